// Decode attention over listed blocks: one query position, many 64-token KV blocks.
//
// Raw pointers only; bindings.cpp checks shapes, block_attention.cpp splits the work,
// and one file per instruction set under isa/ does the arithmetic.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace rheo {

constexpr int kBlockTokens = 64;
constexpr int kMaxGroup = 16;
constexpr int kMaxDim = 256;
// Dims are handled in strips of this many floats, so that every ISA divides them evenly.
constexpr int kDimStep = 16;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Online-softmax state of some blocks: out = acc / sum, lse = max + log(sum).
struct State {
  float* max;  // [group]
  float* sum;  // [group]
  float* acc;  // [group, dim]

  // States lie one behind the other, none on a cache line of another's, nor on the one that is fetched with it.
  static constexpr int64_t kApart = 32;
  static constexpr int64_t floats(int group, int dim) {
    return (static_cast<int64_t>(group) * (dim + 2) + kApart - 1) / kApart * kApart;
  }
  static State at(float* base, int group) { return {base, base + group, base + 2 * group}; }
};

// Blocks of one state.
struct Task {
  int pair;  // request * kv_heads + head
  int tier;
  int begin, count;  // of the pair's list
};

// A run of listed blocks of one (request, KV head): one or more tasks, each with a state of its own.
struct Run {
  const float* q;        // [group, dim]
  float scale;           // of the softmax
  const void* blocks;    // [num_blocks, 2, 64, dim] in the KV dtype: K then V of each block
  const int32_t* ids;    // [count] block ids
  int count;
  int last_len;          // valid tokens of the last listed block, 1..64
  const Task* tasks;
  const void* (*next)(void* of);  // a block that will be read after this run, or null; asked for at its last block
  void* of;                       // its argument
  int group;
  int dim;
  float* states;         // as many as tasks, uninitialised
};

using AttendRun = void (*)(const Run&);

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

// What `attend` needs between its arguments and its results; kept from call to call, because its pages are
// expensive to touch anew.
struct Workspace {
  std::vector<Task> tasks;                    // of all lists, in their order
  std::vector<int> first;                     // first task of each pair, and the end
  std::vector<int> order;                     // of the tasks, as threads take them
  std::vector<int> chunks;                    // where in `order` each chunk that a thread takes begins, and the end
  std::unique_ptr<std::atomic<int>[]> left;   // unfinished tasks of each pair
  size_t left_size = 0;
  std::unique_ptr<float[], void (*)(void*)> states{nullptr, std::free};  // max, sum and acc of each task
  size_t states_size = 0;
};

// Attention over the union of the tiers' lists, which must be disjoint. The order of additions depends
// on a list and on the pool's size only, so a request gets the same bits alone or in a batch.
// Throws std::out_of_range for a block id, count or tail length outside its bounds.
void attend(const AttendArgs& args, const Variant& variant, ThreadPool& pool, Workspace& workspace);

}  // namespace rheo
