// The plan of a decode step: selection, then two lists by residency (rheoserve_sgl/ops/plan.py).
#pragma once

#include <cstdint>

#include "score.h"

namespace rheo {

enum class Select : int { kAll = 0, kForced = 1, kBudget = 2, kThreshold = 3 };

struct PlanRule {
  Select select;
  int sink_pages, window_pages, budget_pages;
  float log_threshold;
  bool selected_only;
};

struct Visit {
  int32_t* blocks;    // [batch, kv_heads, max_pages]
  int32_t* count;     // [batch, kv_heads]
  int32_t* last_len;  // [batch, kv_heads]
};

struct PlanArgs {
  PageTable table;
  const float* scores;      // [batch, kv_heads, max_pages], or null if the rule needs none
  const int32_t* budgets;   // [batch] pages instead of the rule's, or null
  const int32_t* tail_len;  // [batch]
  const int32_t* frame_of;  // [all_pages, kv_heads]
  int kv_heads;
  Visit device, host;
  uint8_t* chosen = nullptr;  // [batch, kv_heads, max_pages], gets 1 where a page is selected; or null
};

// Throws std::out_of_range for a page or a page count outside its bounds.
void plan(const PlanRule& rule, const PlanArgs& args, ThreadPool& pool);

}  // namespace rheo
