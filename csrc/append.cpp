#include "append.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "block_attention.h"

namespace rheo {

void append(const AppendArgs& a) {
  for (int64_t t = 0; t < a.tokens; ++t)
    if (a.loc[t] < 0 || a.loc[t] >= a.all_pages * kBlockTokens)
      throw std::out_of_range("location " + std::to_string(a.loc[t]) + " of token " + std::to_string(t) + " is not in [0, " + std::to_string(a.all_pages * kBlockTokens) + ")");
  const int64_t half = static_cast<int64_t>(kBlockTokens) * a.row;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t page = a.loc[t] / kBlockTokens;
    const int64_t at = a.loc[t] % kBlockTokens * a.row;
    for (int h = 0; h < a.kv_heads; ++h) {
      const char* k = a.k + t * a.k_stride + static_cast<int64_t>(h) * a.row;
      const char* v = a.v + t * a.v_stride + static_cast<int64_t>(h) * a.row;
      char* block = a.host + (page * a.kv_heads + h) * 2 * half;
      std::memcpy(block + at, k, a.row);
      std::memcpy(block + half + at, v, a.row);
      const int32_t frame = a.frame_of[page * a.kv_heads + h];
      if (frame < 0 || a.frames == nullptr) continue;
      block = a.frames + 2 * half * frame;
      std::memcpy(block + at, k, a.row);
      std::memcpy(block + half + at, v, a.row);
    }
  }
}

}  // namespace rheo
