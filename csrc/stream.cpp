#include "stream.h"

#include <algorithm>
#include <atomic>

#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr int64_t kChunk = 1 << 20;

RHEO_CLONES uint64_t sum(const uint64_t* words, int64_t count) {
  uint64_t sums[32] = {};
  for (int64_t i = 0; i < count; i += 32)
    for (int j = 0; j < 32; ++j) sums[j] += words[i + j];
  uint64_t total = 0;
  for (int j = 0; j < 32; ++j) total += sums[j];
  return total;
}

}  // namespace

uint64_t stream_read(const void* data, int64_t bytes, ThreadPool& pool) {
  std::atomic<uint64_t> total{0};
  pool.run(static_cast<int>(bytes / kChunk), [&](int i, ThreadPool::Next&) {
    const char* chunk = static_cast<const char*>(data) + i * kChunk;
    total.fetch_add(sum(reinterpret_cast<const uint64_t*>(chunk), kChunk / 8), std::memory_order_relaxed);
  });
  return total.load();
}

void first_touch(void* data, int64_t bytes, ThreadPool& pool) {
  constexpr int64_t kPage = 4096, kStretch = 16 << 20;
  volatile char* memory = static_cast<volatile char*>(data);
  pool.run(static_cast<int>((bytes + kStretch - 1) / kStretch), [&](int i, ThreadPool::Next&) {
    const int64_t begin = i * kStretch, end = std::min(begin + kStretch, bytes);
    for (int64_t at = begin; at < end; at += kPage) memory[at] = 0;
  });
}

}  // namespace rheo
