// The memory floor of a momentum step, to measure steps against.
#pragma once

#include <cstdint>

namespace noetherperf {

// Three reads and two writes in place, and hardly any arithmetic: v = v/2 + g, p = p/2 + v.
void memory_floor(float* p, const float* g, float* v, int64_t n, int n_threads);

}  // namespace noetherperf
