// A component of a law as the CPU kernels advance it in one step: its coefficients, and the moments that drive it,
// those that nothing asks for left out. Found once a step for each row of numbers, not for each span of segments.
#pragma once

#include <cstdint>

#include "rows.h"

namespace noetherperf {

constexpr int most_drives = 4;  // that have code of their own; a recursion of more takes the plain way, rows.h

// A moment that drives a component, and its coefficients.
struct Drive {
  int64_t moment;
  double to_x, to_rest, to_y;  // of x, of what rounding of x leaves out, of y
};

struct Recursion {
  const Component* component;
  const int32_t* driving;
  const double* numbers;
  double xx, xy, yx, yy, xx_rest, xy_rest;
  int n_drives;
  Drive drives[most_drives];
};

// Advances the segments [begin, end): a component's first row of a law's state and the stride of its rows; the moments,
// and theirs.
using AdvanceKernel = void (*)(const Recursion&, double* state, int64_t stride, const double* moments,
                               int64_t moment_stride, int64_t begin, int64_t end);

// A component's recursion. driving: the moments that drive it; numbers: its coefficients.
inline Recursion recursion_of(const Component& component, const int32_t* driving, const double* numbers) {
  const bool pair = component.size > 1, compensated = component.compensated != 0;
  const int length = component.size + component.n_moments;  // of a row of coefficients: A's, then B's
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
