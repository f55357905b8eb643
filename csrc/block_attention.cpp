#include "block_attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Blocks of a task, which has a state of its own: few, so that one head of one request keeps many threads
// busy; more on long lists, so that there are not too many states.
constexpr int kFewest = 4, kMost = 16, kTasksOfAList = 128;
constexpr int kShortShare = 64;  // blocks a thread

// Where there are more threads than half the KV heads, a list ends in so many tasks of two blocks and as many of one:
// so that a call of one request ends with short ones, and that its few blocks are work for all.
int short_tasks(int threads, int kv_heads) { return std::min(2 * threads / kv_heads, 8) / 2 * 2; }

// Calls task(begin, count) for each task of a list of so many blocks. Nothing that may change from call to call, but the
// list, decides where they begin.
template <class Make>
void cut(int blocks, int short_ones, const Make& task) {
  const int step = std::clamp(blocks / kTasksOfAList, kFewest, kMost);
  const int singles = blocks - std::min(blocks, short_ones), doubles = std::max(singles - 2 * short_ones, 0);
  for (int b = 0; b < doubles; b += step) task(b, std::min(step, doubles - b));
  for (int b = doubles; b < singles; b += 2) task(b, std::min(2, singles - b));
  for (int b = singles; b < blocks; ++b) task(b, 1);
}

[[noreturn]] void refuse(const AttendArgs& a, int pair, const char* name, int64_t value, int64_t low, int64_t high) {
  throw std::out_of_range(std::string(name) + " " + std::to_string(value) + " is not in [" + std::to_string(low) + ", " +
                          std::to_string(high) + "] for request " + std::to_string(pair / a.kv_heads) + ", KV head " +
                          std::to_string(pair % a.kv_heads));
}

void split(const AttendArgs& a, int threads, Workspace& w) {
  const int pairs = a.batch * a.kv_heads, short_ones = short_tasks(threads, a.kv_heads);
  w.tasks.clear();
  w.first.resize(pairs + 1);
  if (w.left_size < static_cast<size_t>(pairs)) {
    w.left = std::make_unique<std::atomic<int>[]>(pairs);
    w.left_size = pairs;
  }
  for (int pair = 0; pair < pairs; ++pair) {
    w.first[pair] = static_cast<int>(w.tasks.size());
    for (int t = 0; t < a.num_tiers; ++t) {
      const Tier& tier = a.tiers[t];
      const int count = tier.counts[pair];
      if (count < 0 || count > tier.max_list) refuse(a, pair, "count", count, 0, tier.max_list);
      if (count > 0 && (tier.last_len[pair] < 1 || tier.last_len[pair] > kBlockTokens))
        refuse(a, pair, "last_len", tier.last_len[pair], 1, kBlockTokens);
      cut(count, short_ones, [&](int begin, int blocks) { w.tasks.push_back({pair, t, begin, blocks}); });
    }
    w.left[pair].store(static_cast<int>(w.tasks.size()) - w.first[pair], std::memory_order_relaxed);
  }
  w.first[pairs] = static_cast<int>(w.tasks.size());
}

// Threads take chunks of neighbouring tasks: large ones first, for which a kernel is set up once, then smaller
// ones, so that all threads end together. A chunk's size is what it reads, in blocks: tasks differ. Where each thread
// has little to read, the short tasks of all lists come last, and setting up counts: a thread's first two chunks, which it
// draws together, are half of its share and a task.
void chunk(int threads, Workspace& w) {
  const int tasks = static_cast<int>(w.tasks.size());
  int64_t left = 0;
  for (const Task& task : w.tasks) left += task.count;
  const int64_t share = left / threads;
  const bool little = share <= kShortShare;
  w.order.clear();
  for (int i = 0; i < tasks; ++i)
    if (!little || w.tasks[i].count > 2) w.order.push_back(i);
  for (int i = 0; i < tasks && little; ++i)
    if (w.tasks[i].count <= 2) w.order.push_back(i);
  const int firsts = little ? 2 * threads : 0;
  w.chunks.clear();
  for (int begin = 0; begin < tasks;) {
    const int number = static_cast<int>(w.chunks.size());
    w.chunks.push_back(begin);
    const int64_t most = number >= firsts ? left / (4 * threads) : number % 2 == 0 ? share / 2 : 0;
    int64_t taken = w.tasks[w.order[begin++]].count;
    while (begin < tasks && taken + w.tasks[w.order[begin]].count <= most) taken += w.tasks[w.order[begin++]].count;
    left -= taken;
  }
  w.chunks.push_back(tasks);
}

State state_of(const AttendArgs& a, const Workspace& w, int task) {
  return State::at(w.states.get() + task * State::floats(a.group, a.dim), a.group);
}

// out += weight * acc
RHEO_CLONES void add_scaled(float* out, float weight, const float* acc, int dim) {
  for (int j = 0; j < dim; ++j) out[j] += weight * acc[j];
}

// Folds the states of one pair, in list order, and writes its output and LSE.
void finish(const AttendArgs& a, const Workspace& w, int pair) {
  const int row = a.group * a.dim;
  const int first = w.first[pair], end = w.first[pair + 1];
  for (int h = 0; h < a.group; ++h) {
    float top = kLowest;
    for (int i = first; i < end; ++i) top = std::max(top, state_of(a, w, i).max[h]);
    float* out = a.out + static_cast<int64_t>(pair) * row + h * a.dim;
    std::fill(out, out + a.dim, 0.0f);
    float total = 0.0f;
    for (int i = first; i < end; ++i) {
      const State state = state_of(a, w, i);
      const float weight = state.max[h] == top ? 1.0f : std::exp(state.max[h] - top);
      total += weight * state.sum[h];
      add_scaled(out, weight, state.acc + h * a.dim, a.dim);
    }
    a.lse[pair * a.group + h] = first == end ? kLowest : top + std::log(total);
    const float inverse = first == end ? 0.0f : 1.0f / total;
    for (int j = 0; j < a.dim; ++j) out[j] *= inverse;
  }
}

int64_t block_bytes(const AttendArgs& a) {
  return 2 * kBlockTokens * static_cast<int64_t>(a.dim) * (a.dtype == DType::kFloat32 ? 4 : 2);
}

const int32_t* ids_of(const AttendArgs& a, const Task& task) {
  const Tier& tier = a.tiers[task.tier];
  return tier.lists + static_cast<int64_t>(task.pair) * tier.max_list + task.begin;
}

void check_ids(const AttendArgs& a, const Task& task) {
  const int32_t* ids = ids_of(a, task);
  const int64_t blocks = a.tiers[task.tier].num_blocks;
  for (int b = 0; b < task.count; ++b)
    if (ids[b] < 0 || ids[b] >= blocks) refuse(a, task.pair, "block", ids[b], 0, blocks - 1);
}

// The first block of a task.
const void* first_block(const AttendArgs& a, const Task& task) {
  return static_cast<const char*>(a.tiers[task.tier].blocks) + *ids_of(a, task) * block_bytes(a);
}

// Attends to the tasks of a chunk, those of one list in one run; `after` is this thread's next chunk, or -1.
void attend_chunk(const AttendArgs& a, Workspace& w, AttendRun kernel, int chunk, int after) {
  const auto task_at = [&](int i) -> const Task& { return w.tasks[w.order[i]]; };
  int begin = w.chunks[chunk];
  const int end = w.chunks[chunk + 1];
  for (int i = begin; i < end; ++i) check_ids(a, task_at(i));
  const void* last_next = nullptr;
  if (after >= 0) {
    check_ids(a, task_at(w.chunks[after]));
    last_next = first_block(a, task_at(w.chunks[after]));
  }
  while (begin < end) {
    const Task& task = task_at(begin);
    const Tier& tier = a.tiers[task.tier];
    int stop = begin, count = 0;
    for (; stop < end && w.order[stop] - w.order[begin] == stop - begin && task_at(stop).pair == task.pair && task_at(stop).tier == task.tier; ++stop)
      count += task_at(stop).count;
    const bool ends_list = task.begin + count == tier.counts[task.pair];
    const void* next = stop < end ? first_block(a, task_at(stop)) : last_next;
    kernel({a.q + static_cast<int64_t>(task.pair) * a.group * a.dim, a.scale, tier.blocks, ids_of(a, task), count,
            ends_list ? tier.last_len[task.pair] : kBlockTokens, &task, next, a.group, a.dim,
            w.states.get() + w.order[begin] * State::floats(a.group, a.dim)});
    // Whoever finishes a pair's last task folds its states.
    if (w.left[task.pair].fetch_sub(stop - begin, std::memory_order_acq_rel) == stop - begin) finish(a, w, task.pair);
    begin = stop;
  }
}

}  // namespace

void attend(const AttendArgs& a, const Variant& variant, ThreadPool& pool, Workspace& w) {
  split(a, pool.size(), w);
  chunk(pool.size(), w);
  const size_t floats = w.tasks.size() * State::floats(a.group, a.dim);
  if (w.states_size < floats) {
    // Not zeroed: every task writes its own.
    w.states.reset(static_cast<float*>(std::aligned_alloc(State::kApart * sizeof(float), floats * sizeof(float))));
    w.states_size = w.states == nullptr ? 0 : floats;
    if (w.states == nullptr) throw std::bad_alloc();
  }
  const int pairs = a.batch * a.kv_heads;
  for (int pair = 0; pair < pairs; ++pair)
    if (w.first[pair] == w.first[pair + 1]) finish(a, w, pair);
  const AttendRun kernel = variant.attend[static_cast<int>(a.dtype)];
  const auto work = [&](int chunk, int after) { attend_chunk(a, w, kernel, chunk, after); };
  pool.run(static_cast<int>(w.chunks.size()) - 1, std::cref(work));  // (a copy of it would be on the heap)
}

}  // namespace rheo
