// Write-through of new tokens: rows of K and V into the host store and into resident frames.
#pragma once

#include <cstdint>

namespace rheo {

struct AppendArgs {
  char* host;               // [all_pages, kv_heads, 2, 64, row] bytes
  char* frames;             // [frames + 1, 2, 64, row] bytes, or null when frames are elsewhere
  const int32_t* frame_of;  // [all_pages, kv_heads], -1 where not resident
  const int64_t* loc;       // [tokens] page * 64 + offset
  const char* k;            // [tokens, kv_heads, row] bytes, token stride below
  const char* v;
  int64_t k_stride, v_stride;  // bytes from token to token
  int64_t tokens, all_pages;
  int kv_heads, row;  // row: bytes of one token of one head
};

// Throws std::out_of_range for a location outside the store; nothing is written then.
void append(const AppendArgs& args);

}  // namespace rheo
