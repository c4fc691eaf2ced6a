// Functions in an update's formula, for scalars. For a CPU's vectors they are in simd.h, which is included before the
// rules.
#pragma once

#include <cmath>

#include "moments.h"

namespace noetherperf {

NPERF_HD float square_root(float x) { return sqrtf(x); }
NPERF_HD double square_root(double x) { return sqrt(x); }

// The larger one; NaN if one of them is, as torch.maximum has it.
NPERF_HD float maximum(float x, float y) { return x > y || x != x ? x : y; }
NPERF_HD double maximum(double x, double y) { return x > y || x != x ? x : y; }

}  // namespace noetherperf
