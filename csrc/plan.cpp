#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block_attention.h"
#include "thread_pool.h"

namespace rheo {
namespace {

// Marks the selected pages of one (request, KV head) in `chosen`.
void select(const PlanRule& rule, int budget, const float* scores, int pages, std::vector<char>& chosen, std::vector<int>& rest) {
  chosen.assign(pages, rule.select == Select::kAll);
  if (rule.select == Select::kAll) return;
  int forced = 0;
  rest.clear();
  for (int p = 0; p < pages; ++p) {
    chosen[p] = p < rule.sink_pages || p >= pages - 1 - rule.window_pages;
    forced += chosen[p];
    if (!chosen[p]) rest.push_back(p);
  }
  // A NaN score is attended, so that it shows in the output as it would with dense attention.
  const auto value = [&](int p) {
    return std::isnan(scores[p]) ? std::numeric_limits<float>::infinity() : scores[p];
  };
  if (rule.select == Select::kThreshold) {
    for (const int p : rest) chosen[p] = value(p) > rule.log_threshold;
  } else if (rule.select == Select::kBudget) {
    const int want = std::min<int>(std::max(budget - forced, 0), static_cast<int>(rest.size()));
    // Equal scores go to the older page, so that the choice is the same everywhere.
    const auto better = [&](int a, int b) {
      const float x = value(a), y = value(b);
      return x > y || (x == y && a < b);
    };
    std::nth_element(rest.begin(), rest.begin() + want, rest.end(), better);
    for (int i = 0; i < want; ++i) chosen[rest[i]] = 1;
  }
}

void close(const Visit& visit, int pair, int count, bool has_tail, int tail_len) {
  visit.count[pair] = count;
  visit.last_len[pair] = has_tail ? tail_len : kBlockTokens;
}

}  // namespace

void plan(const PlanRule& rule, const PlanArgs& a, ThreadPool& pool) {
  check(a.table);
  for_each(pool, a.table.batch * a.kv_heads, static_cast<int64_t>(a.table.max_pages) * 64, [&](int pair) {
    const int b = pair / a.kv_heads, h = pair % a.kv_heads;
    const int pages = a.table.n_pages[b];
    const int64_t* ids = a.table.pages + static_cast<int64_t>(b) * a.table.max_pages;
    const int64_t row = static_cast<int64_t>(pair) * a.table.max_pages;
    thread_local std::vector<char> chosen;
    thread_local std::vector<int> rest;
    const int budget = a.budgets == nullptr ? rule.budget_pages : a.budgets[b];
    select(rule, budget, a.scores == nullptr ? nullptr : a.scores + row, pages, chosen, rest);
    if (a.chosen != nullptr) {
      std::copy(chosen.begin(), chosen.end(), a.chosen + row);
      std::fill(a.chosen + row + pages, a.chosen + row + a.table.max_pages, 0);
    }
    int on_device = 0, on_host = 0;
    bool tail_device = false, tail_host = false;
    for (int p = 0; p < pages; ++p) {
      const int32_t frame = a.frame_of[ids[p] * a.kv_heads + h];
      const bool last = p + 1 == pages;
      if (frame >= 0) {
        if (!chosen[p] && rule.selected_only) continue;
        a.device.blocks[row + on_device++] = frame;
        tail_device = tail_device || last;
      } else if (chosen[p]) {
        a.host.blocks[row + on_host++] = static_cast<int32_t>(ids[p] * a.kv_heads + h);
        tail_host = tail_host || last;
      }
    }
    close(a.device, pair, on_device, tail_device, a.tail_len[b]);
    close(a.host, pair, on_host, tail_host, a.tail_len[b]);
  });
}

}  // namespace rheo
