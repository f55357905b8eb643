#include "stream.h"

#include <algorithm>
#include <atomic>

#include "clones.h"
#include "thread_pool.h"

namespace rheo {
namespace {

constexpr int64_t kLongPart = 1 << 20, kShortPart = kLongPart / 4;

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
  // A short read in long parts would end with the slowest thread's.
  const int64_t part = bytes >= 16 * kLongPart * pool.size() ? kLongPart : kShortPart;
  pool.run(static_cast<int>(bytes / part), [&](int i, ThreadPool::Next&) {
    const char* begin = static_cast<const char*>(data) + i * part;
    total.fetch_add(sum(reinterpret_cast<const uint64_t*>(begin), part / 8), std::memory_order_relaxed);
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
