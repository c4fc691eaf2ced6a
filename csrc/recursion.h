// One step of a law's component for the CPU kernels: its coefficients, and the moments that drive it with a nonzero
// coefficient. Computed once a step for each row of numbers, not for each span of segments.
#pragma once

#include <cstdint>

#include "rows.h"

namespace noetherperf {

constexpr int most_drives = 4;  // with unrolled code; a recursion with more uses the generic loop of rows.h

// A moment that drives a component, and its coefficients.
struct Drive {
  int64_t moment;
  double to_x, to_rest, to_y;  // for x, for the rounding error of x, for y
};

struct Recursion {
  const Component* component;
  const int32_t* driving;
  const double* numbers;
  double xx, xy, yx, yy, xx_rest, xy_rest;
  int n_drives;
  Drive drives[most_drives];
};

// Advances the segments [begin, end). `state` is the component's first row of the law's state, `moments` the first row
// of the moments; each has the stride of its rows.
using AdvanceKernel = void (*)(const Recursion&, double* state, int64_t stride, const double* moments,
                               int64_t moment_stride, int64_t begin, int64_t end);

// A component's recursion. driving: the moments that drive it; numbers: its coefficients.
inline Recursion recursion_of(const Component& component, const int32_t* driving, const double* numbers) {
  const bool pair = component.size > 1, compensated = component.compensated != 0;
  const int length = component.size + component.n_moments;  // of a row of coefficients: A's columns, then B's
  const double* const second = numbers + length;
  const double* const rests = numbers + component.size * length;
  Recursion r{&component, driving, numbers, numbers[0], 0.0, 0.0, 0.0, 0.0, 0.0, 0, {}};
  if (pair) {
    r.xy = numbers[1];
    r.yx = second[0];
    r.yy = second[1];
  }
  if (compensated) {
    r.xx_rest = rests[0];
    r.xy_rest = pair ? rests[1] : 0.0;
  }
  for (int k = component.size; k < length; ++k) {
    const double to_x = numbers[k], to_y = pair ? second[k] : 0.0;
    if (to_x == 0.0 && to_y == 0.0) continue;
    if (r.n_drives < most_drives)
      r.drives[r.n_drives] = {driving[k - component.size], to_x, compensated ? rests[k] : 0.0, to_y};
    ++r.n_drives;
  }
  return r;
}

}  // namespace noetherperf
