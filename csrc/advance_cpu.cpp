// Advances laws by one step of a component, over spans of segments. Compiled once per instruction set, as
// kernel_cpu.cpp.

#include <utility>

#include "kernel_cpu.h"

namespace noetherperf {
namespace {

// Advances a component of `size` numbers, which n_drives moments drive.
template <int size, bool compensated, int n_drives>
void advance_segments(const Recursion& recursion, double* state, int64_t stride, const double* moments,
                      int64_t moment_stride, int64_t begin, int64_t end) {
  const Recursion r = recursion;  // a local copy, which no store can alias
  double* const xs = state;
  double* const lost = state + stride;  // the rounding error of x
  double* const ys = state + (1 + compensated) * stride;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const double x = xs[i];
    double x_new = r.xx * x, x_rest = r.xx_rest * x, y_new = 0.0;
    if constexpr (size > 1) {
      const double y = ys[i];
      x_new += r.xy * y;
      x_rest += r.xy_rest * y;
      y_new = r.yx * x + r.yy * y;
    }
#pragma GCC unroll 8
    for (int k = 0; k < n_drives; ++k) {
      const double m = moments[r.drives[k].moment * moment_stride + i];
      x_new += r.drives[k].to_x * m;
      x_rest += r.drives[k].to_rest * m;
      if constexpr (size > 1) y_new += r.drives[k].to_y * m;
    }
    if constexpr (compensated) {
      double rest;
      xs[i] = two_sum(x, x_new + lost[i] + x_rest, rest);
      lost[i] = rest;
    } else {
      xs[i] = x_new;
    }
    if constexpr (size > 1) ys[i] = y_new;
  }
}

// The generic loop, for any number of moments.
void advance_plainly(const Recursion& r, double* state, int64_t stride, const double* moments, int64_t moment_stride,
                     int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    advance(*r.component, r.numbers, state + i, stride,
            [&](int k) { return moments[r.driving[k] * moment_stride + i]; });
}

template <int size, bool compensated, int... n_drives>
constexpr void fill(AdvanceKernel* kernels, std::integer_sequence<int, n_drives...>) {
  ((kernels[n_drives] = advance_segments<size, compensated, n_drives>), ...);
  kernels[most_drives + 1] = advance_plainly;
}

constexpr AdvanceKernels every() {
  AdvanceKernels kernels;
  const auto numbers = std::make_integer_sequence<int, most_drives + 1>{};
  fill<1, false>(kernels.of[0][false], numbers);
  fill<1, true>(kernels.of[0][true], numbers);
  fill<2, false>(kernels.of[1][false], numbers);
  fill<2, true>(kernels.of[1][true], numbers);
  return kernels;
}

}  // namespace

extern const AdvanceKernels NPERF_TABLE(advance, NPERF_ISA);
constexpr AdvanceKernels NPERF_TABLE(advance, NPERF_ISA) = every();

}  // namespace noetherperf
