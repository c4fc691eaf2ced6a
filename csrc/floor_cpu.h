// The memory floor of a step, to measure steps against.
#pragma once

#include <cstdint>

namespace noetherperf {

constexpr int most_streams = 5;

// Reads n_read streams of n numbers and writes the first n_written of them in place, with hardly any arithmetic:
// x = (last stream); then for each stream s before it, from the last one on, x = s/2 + x, and s = x if it is written.
// 2 <= n_read <= most_streams, 1 <= n_written < n_read.
void memory_floor(float* const* streams, int n_read, int n_written, int64_t n, int n_threads);

}  // namespace noetherperf
