#include "block_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "thread_pool.h"

namespace rheo {
namespace {

// A run is the unit of work: this many blocks of one (request, KV head). Its length never
// depends on the batch or the thread count, so neither does the order of additions, and a
// request gets the same bits alone or in company.
constexpr int kRunBlocks = 16;

struct Task {
  int pair;   // request * kv_heads + head
  int tier;
  int begin;  // first listed block
};

void check(const AttendArgs& a, const Tier& tier) {
  for (int pair = 0; pair < a.batch * a.kv_heads; ++pair) {
    const auto refuse = [&](const char* name, int64_t value, int64_t low, int64_t high) {
      throw std::out_of_range(std::string(name) + " " + std::to_string(value) + " is not in [" + std::to_string(low) + ", " +
                              std::to_string(high) + "] for request " + std::to_string(pair / a.kv_heads) + ", KV head " +
                              std::to_string(pair % a.kv_heads));
    };
    const int count = tier.counts[pair];
    if (count < 0 || count > tier.max_list) refuse("count", count, 0, tier.max_list);
    if (count > 0 && (tier.last_len[pair] < 1 || tier.last_len[pair] > kBlockTokens))
      refuse("last_len", tier.last_len[pair], 1, kBlockTokens);
    const int32_t* ids = tier.lists + static_cast<int64_t>(pair) * tier.max_list;
    for (int i = 0; i < count; ++i)
      if (ids[i] < 0 || ids[i] >= tier.num_blocks) refuse("block", ids[i], 0, tier.num_blocks - 1);
  }
}

// Folds the states of one pair, in list order, and writes its output and LSE.
void finish(const AttendArgs& a, int pair, int first, int runs, const float* maxes,
            const float* sums, const float* accs) {
  const int row = a.group * a.dim;
  for (int h = 0; h < a.group; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int r = first; r < first + runs; ++r) top = std::max(top, maxes[r * a.group + h]);
    float* out = a.out + static_cast<int64_t>(pair) * row + h * a.dim;
    std::fill(out, out + a.dim, 0.0f);
    float total = 0.0f;
    for (int r = first; r < first + runs; ++r) {
      const float m = maxes[r * a.group + h];
      const float w = m == top ? 1.0f : std::exp(m - top);
      total += w * sums[r * a.group + h];
      const float* acc = accs + static_cast<int64_t>(r) * row + h * a.dim;
      for (int j = 0; j < a.dim; ++j) out[j] += w * acc[j];
    }
    a.lse[pair * a.group + h] = runs == 0 ? -std::numeric_limits<float>::infinity() : top + std::log(total);
    const float inverse = runs == 0 ? 0.0f : 1.0f / total;
    for (int j = 0; j < a.dim; ++j) out[j] *= inverse;
  }
}

}  // namespace

void attend(const AttendArgs& a, const Variant& variant, ThreadPool& pool) {
  for (int t = 0; t < a.num_tiers; ++t) check(a, a.tiers[t]);
  const int pairs = a.batch * a.kv_heads;
  const int row = a.group * a.dim;
  std::vector<Task> tasks;
  std::vector<int> first(pairs + 1, 0);
  for (int pair = 0; pair < pairs; ++pair) {
    first[pair] = static_cast<int>(tasks.size());
    for (int t = 0; t < a.num_tiers; ++t)
      for (int b = 0; b < a.tiers[t].counts[pair]; b += kRunBlocks) tasks.push_back({pair, t, b});
  }
  const int runs = first[pairs] = static_cast<int>(tasks.size());

  std::vector<float> scaled(static_cast<size_t>(pairs) * row);
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] = a.q[i] * a.scale;
  std::vector<float> maxes(static_cast<size_t>(runs) * a.group, -std::numeric_limits<float>::infinity());
  std::vector<float> sums(static_cast<size_t>(runs) * a.group, 0.0f);
  std::vector<float> accs(static_cast<size_t>(runs) * row, 0.0f);

  const AttendRun kernel = variant.attend[static_cast<int>(a.dtype)];
  pool.run(runs, [&](int i) {
    const Task& task = tasks[i];
    const Tier& tier = a.tiers[task.tier];
    const int left = tier.counts[task.pair] - task.begin;
    Run run;
    run.q = scaled.data() + static_cast<size_t>(task.pair) * row;
    run.blocks = tier.blocks;
    run.ids = tier.lists + static_cast<int64_t>(task.pair) * tier.max_list + task.begin;
    run.count = std::min(left, kRunBlocks);
    run.last_len = left <= kRunBlocks ? tier.last_len[task.pair] : kBlockTokens;
    run.group = a.group;
    run.dim = a.dim;
    kernel(run, {maxes.data() + static_cast<size_t>(i) * a.group, sums.data() + static_cast<size_t>(i) * a.group,
                 accs.data() + static_cast<size_t>(i) * row});
  });
  for (int pair = 0; pair < pairs; ++pair)
    finish(a, pair, first[pair], first[pair + 1] - first[pair], maxes.data(), sums.data(), accs.data());
}

}  // namespace rheo
