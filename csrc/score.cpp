#include "score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr int kLanes = 16;  // independent sums, so that the compiler may use whatever vectors it has

RHEO_CLONES float dot(const float* a, const float* b, int n) {
  float sums[kLanes] = {};
  for (int i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  float total = 0.0f;
  for (int j = 0; j < kLanes; ++j) total += sums[j];
  return total;
}

}  // namespace

void check(const PageTable& t) {
  for (int b = 0; b < t.batch; ++b) {
    if (t.n_pages[b] < 1 || t.n_pages[b] > t.max_pages)
      throw std::out_of_range("n_pages[" + std::to_string(b) + "] is " + std::to_string(t.n_pages[b]) + ", not in [1, " + std::to_string(t.max_pages) + "]");
    const int64_t* ids = t.pages + static_cast<int64_t>(b) * t.max_pages;
    for (int p = 0; p < t.n_pages[b]; ++p)
      if (ids[p] < 0 || ids[p] >= t.all_pages)
        throw std::out_of_range("page " + std::to_string(ids[p]) + " of request " + std::to_string(b) + " is not in [0, " + std::to_string(t.all_pages) + ")");
  }
}

void score(const PageTable& t, const float* gate_q, const float* quick, float* scores, int kv_heads, int group,
           int key_dim, float scale, ThreadPool& pool) {
  check(t);
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for_each(pool, t.batch * kv_heads, static_cast<int64_t>(t.max_pages) * group * key_dim, [&](int pair) {
    const int b = pair / kv_heads, h = pair % kv_heads;
    const int64_t* ids = t.pages + static_cast<int64_t>(b) * t.max_pages;
    const int pages = t.n_pages[b];
    const float* q = gate_q + static_cast<int64_t>(pair) * group * key_dim;
    std::vector<float> logits(static_cast<size_t>(group) * pages);
    for (int p = 0; p < pages; ++p) {
      const float* key = quick + (ids[p] * kv_heads + h) * key_dim;
      for (int g = 0; g < group; ++g) logits[g * pages + p] = scale * dot(q + g * key_dim, key, key_dim);
    }
    float* out = scores + static_cast<int64_t>(pair) * t.max_pages;
    std::fill(out, out + t.max_pages, kLowest);
    for (int g = 0; g < group; ++g) {
      const float* row = logits.data() + g * pages;
      const float top = *std::max_element(row, row + pages);
      float sum = 0.0f;
      for (int p = 0; p < pages; ++p) sum += std::exp(row[p] - top);
      const float lse = top + std::log(sum);
      // A NaN wins and stays, as in torch's amax.
      for (int p = 0; p < pages; ++p) {
        const float s = row[p] - lse;
        out[p] = out[p] > s || std::isnan(out[p]) ? out[p] : s;
      }
    }
  });
}

void record(const PageTable& t, const float* scores, const uint8_t* chosen, float* importance, int kv_heads, float weight,
            ThreadPool& pool) {
  check(t);
  // Heads share nothing; the rows of a head may share pages.
  for_each(pool, kv_heads, static_cast<int64_t>(t.batch) * t.max_pages * 32, [&](int h) {
    for (int b = 0; b < t.batch; ++b) {
      const int64_t first = (static_cast<int64_t>(b) * kv_heads + h) * t.max_pages;
      const int64_t* ids = t.pages + static_cast<int64_t>(b) * t.max_pages;
      for (int p = 0; p < t.n_pages[b]; ++p) {
        const float score = scores[first + p];
        const float selected = chosen != nullptr && chosen[first + p] ? 1.0f : 0.0f;
        importance[ids[p] * kv_heads + h] += weight * (selected + (std::isnan(score) ? 0.0f : std::exp(score)));
      }
    }
  });
}

}  // namespace rheo
