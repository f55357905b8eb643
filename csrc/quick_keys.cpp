#include "quick_keys.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "clones.h"
#include "half.h"
#include "thread_pool.h"

namespace rheo {
namespace {

// NaN wins and stays, as in torch.
RHEO_CLONES void widen_range(const float* key, int dim, float* high, float* low) {
  for (int j = 0; j < dim; ++j) {
    const float x = key[j];
    high[j] = x > high[j] || x != x ? x : high[j];
    low[j] = x < low[j] || x != x ? x : low[j];
  }
}

RHEO_CLONES void add(const float* key, int dim, float* sum) {
  for (int j = 0; j < dim; ++j) sum[j] += key[j];
}

// Keys `[tokens, dim]` one by one, as floats.
template <class Visit>
void each_key(const float* keys, int tokens, int dim, const Visit& visit) {
  for (int t = 0; t < tokens; ++t) visit(keys + t * dim);
}
template <class T, class Visit>
void each_key(const T* keys, int tokens, int dim, const Visit& visit) {
  float key[kMaxDim];
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < dim; ++j) key[j] = widen(keys[t * dim + j]);
    visit(key);
  }
}

template <class T>
void pool_one(Pooling pooling, const T* keys, int tokens, int dim, float* out) {
  if (pooling == Pooling::kMaxMin) {
    std::fill(out, out + dim, -std::numeric_limits<float>::infinity());
    std::fill(out + dim, out + 2 * dim, std::numeric_limits<float>::infinity());
    each_key(keys, tokens, dim, [&](const float* key) { widen_range(key, dim, out, out + dim); });
  } else {
    std::fill(out, out + dim, 0.0f);
    each_key(keys, tokens, dim, [&](const float* key) { add(key, dim, out); });
    for (int j = 0; j < dim; ++j) out[j] /= static_cast<float>(tokens);
  }
}

template <class T>
void pool_all(Pooling pooling, const PoolKeysArgs& a, ThreadPool& pool) {
  const int64_t block = 2 * static_cast<int64_t>(kBlockTokens) * a.dim;
  const int key_dim = pooling == Pooling::kMaxMin ? 2 * a.dim : a.dim;
  for_each(pool, static_cast<int>(a.count) * a.kv_heads, 2 * kBlockTokens * a.dim, [&](int i) {
    const int64_t at = a.pages[i / a.kv_heads] * a.kv_heads + i % a.kv_heads;
    pool_one(pooling, static_cast<const T*>(a.host) + at * block, a.filled[i / a.kv_heads], a.dim, a.quick + at * key_dim);
  });
}

}  // namespace

void pool_keys(Pooling pooling, const PoolKeysArgs& a, ThreadPool& pool) {
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.pages[i] < 0 || a.pages[i] >= a.all_pages)
      throw std::out_of_range("page " + std::to_string(a.pages[i]) + " is not in [0, " + std::to_string(a.all_pages) + ")");
    if (a.filled[i] < 1 || a.filled[i] > kBlockTokens)
      throw std::out_of_range("filled is " + std::to_string(a.filled[i]) + " for page " + std::to_string(a.pages[i]) + ", not in [1, 64]");
  }
  switch (a.dtype) {
    case DType::kFloat32: return pool_all<float>(pooling, a, pool);
    case DType::kFloat16: return pool_all<Half>(pooling, a, pool);
    case DType::kBFloat16: return pool_all<BFloat>(pooling, a, pool);
  }
}

}  // namespace rheo
