#include "quick_keys.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "half.h"

namespace rheo {
namespace {

template <class T>
void max_min(const T* keys, int tokens, int dim, float* out) {
  float* high = out;
  float* low = out + dim;
  std::fill(high, high + dim, -std::numeric_limits<float>::infinity());
  std::fill(low, low + dim, std::numeric_limits<float>::infinity());
  for (int t = 0; t < tokens; ++t)
    for (int j = 0; j < dim; ++j) {
      const float x = widen(keys[t * dim + j]);
      // NaN wins and stays, as in torch.
      high[j] = x > high[j] || x != x ? x : high[j];
      low[j] = x < low[j] || x != x ? x : low[j];
    }
}

template <class T>
void mean(const T* keys, int tokens, int dim, float* out) {
  std::fill(out, out + dim, 0.0f);
  for (int t = 0; t < tokens; ++t)
    for (int j = 0; j < dim; ++j) out[j] += widen(keys[t * dim + j]);
  for (int j = 0; j < dim; ++j) out[j] /= static_cast<float>(tokens);
}

template <class T>
void pool(Pooling pooling, const PoolKeysArgs& a) {
  const int64_t block = 2 * static_cast<int64_t>(kBlockTokens) * a.dim;
  const int key_dim = pooling == Pooling::kMaxMin ? 2 * a.dim : a.dim;
  for (int64_t i = 0; i < a.count; ++i)
    for (int h = 0; h < a.kv_heads; ++h) {
      const int64_t at = a.pages[i] * a.kv_heads + h;
      const T* keys = static_cast<const T*>(a.host) + at * block;
      const int tokens = a.filled[i];
      (pooling == Pooling::kMaxMin ? max_min<T> : mean<T>)(keys, tokens, a.dim, a.quick + at * key_dim);
    }
}

}  // namespace

void pool_keys(Pooling pooling, const PoolKeysArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.pages[i] < 0 || a.pages[i] >= a.all_pages)
      throw std::out_of_range("page " + std::to_string(a.pages[i]) + " is not in [0, " + std::to_string(a.all_pages) + ")");
    if (a.filled[i] < 1 || a.filled[i] > kBlockTokens)
      throw std::out_of_range("filled is " + std::to_string(a.filled[i]) + " for page " + std::to_string(a.pages[i]) + ", not in [1, 64]");
  }
  switch (a.dtype) {
    case DType::kFloat32: return pool<float>(pooling, a);
    case DType::kFloat16: return pool<Half>(pooling, a);
    case DType::kBFloat16: return pool<BFloat>(pooling, a);
  }
}

}  // namespace rheo
