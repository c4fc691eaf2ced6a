// The memory floor of a step. Plain loops: compiled, they are limited by memory bandwidth alone.

#include "floor_cpu.h"

#include <omp.h>

namespace noetherperf {
namespace {

template <int n_read, int n_written>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void stream(float* const* streams, int64_t begin, int64_t end) {
  float* at[n_read];
  for (int k = 0; k < n_read; ++k) at[k] = streams[k];
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    float x = at[n_read - 1][i];
#pragma GCC unroll 8
    for (int k = n_read - 2; k >= 0; --k) {
      x = 0.5f * at[k][i] + x;
      if (k < n_written) at[k][i] = x;
    }
  }
}

using Stream = void (*)(float* const*, int64_t, int64_t);

template <int n_read, int n_written>
Stream find(int read, int written) {
  if (read == n_read && written == n_written) return stream<n_read, n_written>;
  if constexpr (n_written > 1) return find<n_read, n_written - 1>(read, written);
  if constexpr (n_read > 2) return find<n_read - 1, n_read - 2>(read, written);
  return nullptr;
}

}  // namespace

void memory_floor(float* const* streams, int n_read, int n_written, int64_t n, int n_threads) {
  const Stream run = find<most_streams, most_streams - 1>(n_read, n_written);
#pragma omp parallel num_threads(n_threads)
  {
    const int64_t me = omp_get_thread_num(), of = omp_get_num_threads();  // perhaps fewer than asked for
    run(streams, n * me / of, n * (me + 1) / of);
  }
}

}  // namespace noetherperf
