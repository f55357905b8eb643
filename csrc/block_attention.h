// Decode attention over listed blocks: one query position, many 64-token KV blocks.
//
// Raw pointers only; bindings.cpp checks shapes, block_attention.cpp splits the work,
// and one file per instruction set under isa/ does the arithmetic.
#pragma once

#include <cstdint>

namespace rheo {

constexpr int kBlockTokens = 64;
constexpr int kMaxGroup = 16;
constexpr int kMaxDim = 256;
// Dims are handled in strips of this many floats, so that every ISA divides them evenly.
constexpr int kDimStep = 16;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// One (request, KV head), or a run of its blocks.
struct Run {
  const float* q;        // [group, dim], already multiplied by the softmax scale
  const void* blocks;    // [num_blocks, 2, 64, dim] in the KV dtype: K then V of each block
  const int32_t* ids;    // [count] block ids
  int count;
  int last_len;          // valid tokens of the last listed block, 1..64
  int group;
  int dim;
};

// Online-softmax state of a run: out = acc / sum, lse = max + log(sum).
// An empty run leaves max = -inf, sum = 0, acc = 0.
struct State {
  float* max;  // [group]
  float* sum;  // [group]
  float* acc;  // [group, dim]
};

using AttendRun = void (*)(const Run&, const State&);

// A build of the kernel for one instruction set, one entry per DType.
struct Variant {
  const char* name;
  AttendRun attend[3];
};

// The listed blocks of one tier.
struct Tier {
  const void* blocks;       // [num_blocks, 2, 64, dim]
  int64_t num_blocks;
  const int32_t* lists;     // [batch, kv_heads, max_list]
  const int32_t* counts;    // [batch, kv_heads]
  const int32_t* last_len;  // [batch, kv_heads]
  int max_list;
};

constexpr int kMaxTiers = 2;

struct AttendArgs {
  const float* q;  // [batch, kv_heads, group, dim]
  Tier tiers[kMaxTiers];
  int num_tiers;
  float* out;  // [batch, kv_heads, group, dim]
  float* lse;  // [batch, kv_heads, group], natural log; -inf where every list is empty
  int batch, kv_heads, group, dim;
  float scale;
  DType dtype;
};

class ThreadPool;

// Attention over the union of the tiers' lists, which must be disjoint.
// Throws std::out_of_range for a block id, count or tail length outside its bounds.
void attend(const AttendArgs& args, const Variant& variant, ThreadPool& pool);

}  // namespace rheo
