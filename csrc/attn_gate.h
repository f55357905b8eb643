// The learned gate on a CPU: its keys from pre-RoPE K as tokens come, its queries (rheoserve_sgl/gate/attn_gate.py).
#pragma once

#include <cstdint>

namespace rheo {

class ThreadPool;

constexpr int kMaxGateDim = 256;

// x [inputs] times weights [inputs, gate_dim], RMSNorm, rotation at a position; what is null is left out.
struct Projection {
  const float* weights;  // [kv_heads, inputs, gate_dim]
  const float* norm;     // [gate_dim]
  const float* rope;     // [positions, gate_dim], cosines then sines
  int inputs, gate_dim;
  int64_t positions;
};

enum PoolPart { kPoolMax = 1, kPoolMin = 2, kPoolAvg = 4 };

struct GateKeysArgs {
  const float* plain;       // [tokens, kv_heads, dim] pre-RoPE keys of the new tokens
  const int64_t* pages;     // [count] pages that tokens were written to
  const int64_t* token;     // [count] index of a page's first new token
  const int64_t* requests;  // [count] the request's slot
  const int64_t* at;        // [count] position at which the page's key is rotated
  const int32_t* before;    // [count] tokens that the page had, 0..63
  const int32_t* filled;    // [count] tokens that it has now, before < filled <= 64
  float* running;           // [slots, kv_heads, 3, dim] max, min and sum of a request's incomplete page
  float* quick;             // [all_pages, kv_heads, gate_dim]; zeros for an incomplete page
  int64_t tokens, count, slots, all_pages;
  int kv_heads, dim, parts;  // PoolPart, ored
};

// Throws std::out_of_range for an index outside its bounds; nothing is written then.
void gate_keys(const Projection& projection, const GateKeysArgs& args, ThreadPool& pool);

// out [batch, kv_heads, gate_dim] of plain [batch, kv_heads, group, dim]; averaged over the group first if
// the projection has `dim` inputs or no weights. Throws std::out_of_range for a position without a rotation.
void gate_queries(const Projection& projection, const float* plain, const int64_t* positions, float* out, int batch,
                  int kv_heads, int group, int dim, ThreadPool& pool);

}  // namespace rheo
