// Functions of numbers in a rule's update. simd.h has the same ones of vectors.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define NPERF_HD __host__ __device__ __forceinline__
#else
#define NPERF_HD inline __attribute__((always_inline))
#endif

namespace noetherperf {

// On a GPU, roots and quotients of float32 take a few instructions without a branch, and are within two units in the
// last place: roots of any number, quotients by any divisor that is in [2⁻¹²⁶, 2¹²⁶], zero or infinite.
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

// x / y, of numbers or vectors.
template <class V>
NPERF_HD V quotient(const V& x, const V& y) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) return __fdividef(x, y);
#endif
  return x / y;
}

// The larger one; NaN if one of them is NaN.
NPERF_HD float maximum(float a, float b) { return a > b || a != a ? a : b; }
NPERF_HD double maximum(double a, double b) { return a > b || a != a ? a : b; }

}  // namespace noetherperf
