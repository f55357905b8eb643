#include "block_attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int kShortShare = 64;             // blocks a thread
constexpr int kMostOfAll = 64, kMost = 16;  // blocks of a task: more of long lists, so that there are not too many states

// Calls task(begin, count) for each task of a list. Each is what of the rest comes to one of a head's share of the threads,
// or half of it: few tasks, and of two blocks at least but for a list's last, since a state that another thread folds costs
// some microseconds, and short ones at the end of lists that are not long, but where many heads come to a thread. Nothing
// that may change from call to call, but the list, decides where they begin.
template <class Make>
void cut(int blocks, int threads, int kv_heads, const Make& task) {
  const int64_t most = std::clamp(blocks / 128, kMost, kMostOfAll), parts = std::max(threads, 2 * kv_heads);
  const int64_t least = std::min<int64_t>(std::max({kv_heads / threads, blocks / 128, 2}), kMost);
  for (int begin = 0; begin < blocks;) {
    const int64_t left = blocks - begin;
    const int count = static_cast<int>(std::min(left, std::clamp((left * kv_heads + parts - 1) / parts, least, most)));
    task(begin, count);
    begin += count;
  }
}

[[noreturn]] void refuse(const AttendArgs& a, int pair, const char* name, int64_t value, int64_t low, int64_t high) {
  throw std::out_of_range(std::string(name) + " " + std::to_string(value) + " is not in [" + std::to_string(low) + ", " +
                          std::to_string(high) + "] for request " + std::to_string(pair / a.kv_heads) + ", KV head " +
                          std::to_string(pair % a.kv_heads));
}

void split(const AttendArgs& a, int threads, Workspace& w) {
  const int pairs = a.batch * a.kv_heads;
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
      cut(count, threads, a.kv_heads, [&](int begin, int blocks) { w.tasks.push_back({pair, t, begin, blocks}); });
    }
    w.left[pair].store(static_cast<int>(w.tasks.size()) - w.first[pair], std::memory_order_relaxed);
  }
  w.first[pairs] = static_cast<int>(w.tasks.size());
}

// Tasks by size, the largest first.
void sort(Workspace& w) {
  int places[kMostOfAll + 1] = {};  // where those of a number of blocks go, by how many fewer than the most they are
  for (const Task& task : w.tasks) ++places[kMostOfAll - task.count + 1];
  for (int i = 1; i <= kMostOfAll; ++i) places[i] += places[i - 1];
  for (int i = 0; i < static_cast<int>(w.tasks.size()); ++i) w.order[places[kMostOfAll - w.tasks[i].count]++] = i;
}

// Threads take chunks of neighbouring tasks: large ones first, for which a kernel is set up once, then smaller
// ones, so that all threads end together. A chunk's size is what it reads, in blocks: tasks differ. Where each thread
// has little to read, setting up counts: its first two chunks, which it draws together, are half of its share and a task.
// Then the lists' last tasks, of one and two blocks, come last. Where there are hardly more lists than threads each takes a
// task at a time, the largest first. Returns how many chunks a thread draws at first.
int chunk(int threads, int lists, Workspace& w) {
  const int tasks = static_cast<int>(w.tasks.size());
  int64_t left = 0;
  for (const Task& task : w.tasks) left += task.count;
  const int64_t share = left / threads;
  w.order.resize(tasks);
  w.chunks.clear();
  const bool little = share <= kShortShare;
  if (little && lists < 2 * threads) {
    sort(w);
    w.chunks.resize(tasks + 1);
    std::iota(w.chunks.begin(), w.chunks.end(), 0);
    return 1;
  }
  int place = 0;
  for (const bool large : {true, false})
    for (int i = 0; i < tasks; ++i)
      if ((!little || w.tasks[i].count > 2) == large) w.order[place++] = i;
  const int firsts = little ? 2 * threads : 0;
  for (int begin = 0; begin < tasks;) {
    const int number = static_cast<int>(w.chunks.size());
    w.chunks.push_back(begin);
    const int64_t most = number >= firsts ? left / (4 * threads) : number % 2 == 0 ? share / 2 : 0;
    int64_t taken = w.tasks[w.order[begin++]].count;
    while (begin < tasks && taken + w.tasks[w.order[begin]].count <= most) taken += w.tasks[w.order[begin++]].count;
    left -= taken;
  }
  w.chunks.push_back(tasks);
  return 2;
}

constexpr int64_t kFoldAhead = 8192;  // floats of states that are asked for before they are read

// Folds `count` states that lie one behind the other, in their order, into an output `[group, dim]` and its LSE. Most of
// them other threads wrote just now: a line after another would be waited for, so many are asked for at once.
RHEO_CLONES void fold(float* states, int count, int group, int dim, float* out, float* lse) {
  const int64_t apart = State::floats(group, dim);
  const auto ask = [=](int64_t from, int64_t to) {
    for (to = std::min(to, count * apart); from < to; from += 16) __builtin_prefetch(states + from, 0, 3);
  };
  ask(0, kFoldAhead);
  float top[kMaxGroup], total[kMaxGroup] = {};
  std::fill(top, top + kMaxGroup, kLowest);
  for (int i = 0; i < count; ++i)
    for (int h = 0; h < group; ++h) top[h] = std::max(top[h], State::at(states + i * apart, group).max[h]);
  alignas(64) float sums[kMaxGroup * kMaxDim];
  for (int i = 0; i < count; ++i) {
    const State state = State::at(states + i * apart, group);
    ask(kFoldAhead + i * apart, kFoldAhead + (i + 1) * apart);
    for (int h = 0; h < group; ++h) {
      const float weight = state.max[h] == top[h] ? 1.0f : std::exp(state.max[h] - top[h]);
      total[h] += weight * state.sum[h];
      const float* acc = state.acc + h * dim;
      float* sum = sums + h * dim;
      if (i == 0)
        for (int j = 0; j < dim; ++j) sum[j] = weight * acc[j];
      else
        for (int j = 0; j < dim; ++j) sum[j] += weight * acc[j];
    }
  }
  for (int h = 0; h < group; ++h) {
    lse[h] = top[h] + std::log(total[h]);
    const float inverse = 1.0f / total[h];
    for (int j = 0; j < dim; ++j) out[h * dim + j] = sums[h * dim + j] * inverse;
  }
}

float* states_at(const AttendArgs& a, const Workspace& w, int task) { return w.states.get() + task * State::floats(a.group, a.dim); }

// Writes the output and the LSE of one pair, whose states, if any, are all there.
void finish(const AttendArgs& a, const Workspace& w, int pair) {
  const int first = w.first[pair], count = w.first[pair + 1] - first, row = a.group * a.dim;
  float *out = a.out + static_cast<int64_t>(pair) * row, *lse = a.lse + pair * a.group;
  if (count > 0) return fold(states_at(a, w, first), count, a.group, a.dim, out, lse);
  std::fill(out, out + row, 0.0f);
  std::fill(lse, lse + a.group, kLowest);
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

// What a thread reads after a run: more of its chunk, or its next chunk, which it draws then.
struct Following {
  const AttendArgs& a;
  const Workspace& w;
  ThreadPool::Next& chunk;
  int task;  // in `order`, or -1

  // Its first block, or null: ids of another chunk are not checked yet.
  static const void* block(void* of) {
    const Following& self = *static_cast<Following*>(of);
    int task = self.task;
    if (task < 0) {
      const int chunk = self.chunk();
      if (chunk < 0) return nullptr;
      task = self.w.chunks[chunk];
    }
    const Task& first = self.w.tasks[self.w.order[task]];
    const Tier& tier = self.a.tiers[first.tier];
    const int32_t id = *ids_of(self.a, first);
    if (id < 0 || id >= tier.num_blocks) return nullptr;
    return static_cast<const char*>(tier.blocks) + id * block_bytes(self.a);
  }
};

// Attends to the tasks of a chunk, those of one list in one run; `next` is this thread's next chunk.
void attend_chunk(const AttendArgs& a, Workspace& w, AttendRun kernel, int chunk, ThreadPool::Next& next) {
  const auto task_at = [&](int i) -> const Task& { return w.tasks[w.order[i]]; };
  const auto follows = [&](int i) {  // the task before it, of the same list: their states lie one behind the other
    const Task &task = task_at(i), &before = task_at(i - 1);
    return w.order[i] == w.order[i - 1] + 1 && task.pair == before.pair && task.tier == before.tier;
  };
  int begin = w.chunks[chunk];
  const int end = w.chunks[chunk + 1];
  for (int i = begin; i < end; ++i) check_ids(a, task_at(i));
  while (begin < end) {
    const Task& task = task_at(begin);
    const Tier& tier = a.tiers[task.tier];
    int stop = begin + 1, count = task.count;
    for (; stop < end && follows(stop); ++stop) count += task_at(stop).count;
    const bool ends_list = task.begin + count == tier.counts[task.pair];
    Following after{a, w, next, stop < end ? stop : -1};
    kernel({a.q + static_cast<int64_t>(task.pair) * a.group * a.dim, a.scale, tier.blocks, ids_of(a, task), count,
            ends_list ? tier.last_len[task.pair] : kBlockTokens, &task, Following::block, &after, a.group, a.dim,
            states_at(a, w, w.order[begin])});
    // Whoever finishes a pair's last task folds its states.
    if (w.left[task.pair].fetch_sub(stop - begin, std::memory_order_acq_rel) == stop - begin) finish(a, w, task.pair);
    begin = stop;
  }
}

}  // namespace

void attend(const AttendArgs& a, const Variant& variant, ThreadPool& pool, Workspace& w) {
  split(a, pool.size(), w);
  const int pairs = a.batch * a.kv_heads;
  int lists = pairs;
  for (int pair = 0; pair < pairs; ++pair) {
    if (w.first[pair] < w.first[pair + 1]) continue;
    finish(a, w, pair);
    --lists;
  }
  const int first = chunk(pool.size(), lists, w);
  const size_t floats = w.tasks.size() * State::floats(a.group, a.dim);
  if (w.states_size < floats) {
    // Not zeroed: every task writes its own.
    w.states.reset(static_cast<float*>(std::aligned_alloc(State::kApart * sizeof(float), floats * sizeof(float))));
    w.states_size = w.states == nullptr ? 0 : floats;
    if (w.states == nullptr) throw std::bad_alloc();
  }
  const AttendRun kernel = variant.attend[static_cast<int>(a.dtype)];
  const auto work = [&](int chunk, ThreadPool::Next& next) { attend_chunk(a, w, kernel, chunk, next); };
  pool.run(static_cast<int>(w.chunks.size()) - 1, std::cref(work), first);  // (a copy of it would be on the heap)
}

}  // namespace rheo
