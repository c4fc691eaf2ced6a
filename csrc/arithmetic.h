// Functions in an update's formula, for scalars. For a CPU's vectors they are in simd.h, which is included before the
// rules.
#pragma once

#include <cmath>

#include "moments.h"

namespace noetherperf {

// On a GPU floats are within 2 units in the last place, in a few instructions without a branch: for roots of all numbers,
// and for divisors between 2⁻¹²⁶ and 2¹²⁶, zero or infinite. Doubles are rounded to the nearest.
NPERF_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}
NPERF_HD double square_root(double x) { return sqrt(x); }

NPERF_HD float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}
NPERF_HD double quotient(double x, double y) { return x / y; }

// The larger one; NaN if one of them is, as torch.maximum has it.
NPERF_HD float maximum(float x, float y) { return x > y || x != x ? x : y; }
NPERF_HD double maximum(double x, double y) { return x > y || x != x ? x : y; }

}  // namespace noetherperf
