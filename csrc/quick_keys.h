// Gate keys of pages, pooled from their stored K (rheoserve_sgl/gate).
#pragma once

#include <cstdint>

#include "block_attention.h"

namespace rheo {

enum class Pooling : int { kMaxMin = 0, kMean = 1 };

struct PoolKeysArgs {
  const void* host;       // [all_pages, kv_heads, 2, 64, dim]
  const int64_t* pages;   // [count]
  const int32_t* filled;  // [count] valid tokens of each page, 1..64
  float* quick;           // [all_pages, kv_heads, 2 * dim] (max, then min) or [.., dim] (mean)
  int64_t count, all_pages;
  int kv_heads, dim;
  DType dtype;
};

// Throws std::out_of_range for a page or a fill outside its bounds; nothing is written then.
void pool_keys(Pooling pooling, const PoolKeysArgs& args, ThreadPool& pool);

}  // namespace rheo
