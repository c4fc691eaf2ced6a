// Functions of numbers in a rule's update. simd.h has the same ones of vectors.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define NPERF_HD __host__ __device__ __forceinline__
#else
#define NPERF_HD inline __attribute__((always_inline))
#endif

namespace noetherperf {

NPERF_HD float square_root(float x) { return sqrtf(x); }
NPERF_HD double square_root(double x) { return sqrt(x); }

// The larger one; NaN if one of them is NaN.
NPERF_HD float maximum(float a, float b) { return a > b || a != a ? a : b; }
NPERF_HD double maximum(double a, double b) { return a > b || a != a ? a : b; }

}  // namespace noetherperf
