// Gate scores over a page table, and the recorder that accumulates them.
#pragma once

#include <cstdint>

namespace rheo {

class ThreadPool;

struct PageTable {
  const int64_t* pages;    // [batch, max_pages]
  const int32_t* n_pages;  // [batch]
  int batch, max_pages;
  int64_t all_pages;
};

// Throws std::out_of_range for a page or a page count outside its bounds.
void check(const PageTable& table);

// scores[b, h, p] = max over the group of log_softmax_p(scale * gate_q[b, h, g] . quick[page, h]),
// -inf beyond n_pages (rheoserve_sgl/ops/score.py).
//   gate_q [batch, kv_heads, group, key_dim], quick [all_pages, kv_heads, key_dim],
//   scores [batch, kv_heads, max_pages]
void score(const PageTable& table, const float* gate_q, const float* quick, float* scores, int kv_heads, int group,
           int key_dim, float scale, ThreadPool& pool);

// importance += weight * (exp(score) + chosen) for the table's pages, scores of NaN left out (rheoserve_sgl/ops/score.py).
// chosen [batch, kv_heads, max_pages] or null, importance [all_pages, kv_heads].
void record(const PageTable& table, const float* scores, const uint8_t* chosen, float* importance, int kv_heads, float weight,
            ThreadPool& pool);

}  // namespace rheo
