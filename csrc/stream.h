// A plain streaming read: the limit that the attention kernels are measured against.
#pragma once

#include <cstdint>

namespace rheo {

class ThreadPool;

// Reads `bytes` (a multiple of 1 MiB) on all threads of the pool; returns the sum of the words, so that
// no read can be left out.
uint64_t stream_read(const void* data, int64_t bytes, ThreadPool& pool);

}  // namespace rheo
