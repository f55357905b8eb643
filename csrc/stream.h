// Whole stretches of memory on all threads: a plain streaming read, the limit that the attention kernels are
// measured against, and a first touch.
#pragma once

#include <cstdint>

namespace rheo {

class ThreadPool;

// Reads `bytes` (a multiple of 1 MiB) on all threads of the pool; returns the sum of the words, so that
// no read can be left out.
uint64_t stream_read(const void* data, int64_t bytes, ThreadPool& pool);

// Writes a zero to each page of [data, data + bytes), so that the threads map them together.
void first_touch(void* data, int64_t bytes, ThreadPool& pool);

}  // namespace rheo
