// The memory floor of a momentum step. Plain loops: compiled, they are limited by memory bandwidth alone.

#include "floor_cpu.h"

#include <omp.h>

namespace noetherperf {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void stream(float* __restrict p, const float* __restrict g, float* __restrict v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    v[i] = 0.5f * v[i] + g[i];
    p[i] = 0.5f * p[i] + v[i];
  }
}

void memory_floor(float* p, const float* g, float* v, int64_t n, int n_threads) {
#pragma omp parallel num_threads(n_threads)
  {
    const int64_t me = omp_get_thread_num(), begin = n * me / n_threads, end = n * (me + 1) / n_threads;
    stream(p + begin, g + begin, v + begin, end - begin);
  }
}

}  // namespace noetherperf
