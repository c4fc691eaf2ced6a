// A rule as data: the variants and rows of numbers of parameter groups, and the components of its laws, linear
// recursions s' = A s + B m of a few numbers per segment. Mirrors the dtypes of noetherperf/engines/rows.py; the
// recursions are explained in noetherperf/rules/law.py. float64 throughout.
#pragma once

#include <cstdint>

#include "moments.h"

namespace noetherperf {

enum Law : int { translation, norm, n_laws };

// Rows of a law's state for its start, x₀ and y₀; and propagated matrices per law.
constexpr int n_start = 2, n_propagated = 2;

struct Group {
  int32_t variant;  // of the rule's step
  int32_t ages;     // whether a step increments its tensors' ages
  int32_t row;      // one of its rows
  int32_t padding;
};

struct Component {
  int32_t law;
  int32_t row;  // its first row in the law's state
  int32_t size;
  int32_t compensated;
  int32_t n_moments;
  int32_t moments;  // its first driving moment in the table `driving`
  int32_t numbers;  // its first coefficient in a row of numbers
  int32_t padding;
};

// The rounded sum a + b, and its rounding error, which is exact.
NPERF_HD double two_sum(double a, double b, double& rest) {
  const double total = a + b, of_b = total - a;
  rest = (a - (total - of_b)) + (b - of_b);
  return total;
}

// Advances a component of one segment. Its numbers begin at `state` and are `stride` apart; moment(k), k < n_moments,
// returns a moment that drives it. If it is compensated, its second number is the rounding error of the first.
template <class MomentOf>
NPERF_HD void advance(const Component& component, const double* numbers, double* state, int64_t stride,
                      const MomentOf& moment) {
  const int size = component.size, rest = component.compensated != 0, n = component.n_moments;
  const int length = size + n;  // of a row of coefficients: A's columns, then B's
  const double x = state[0], y = size > 1 ? state[(1 + rest) * stride] : 0.0;
  double x_new = numbers[0] * x + (size > 1 ? numbers[1] * y : 0.0);
  double y_new = size > 1 ? numbers[length] * x + numbers[length + 1] * y : 0.0;
  const double* const rests = numbers + size * length;
  double x_rest = rest ? rests[0] * x + (size > 1 ? rests[1] * y : 0.0) : 0.0;
  for (int k = 0; k < n; ++k) {
    const double to_x = numbers[size + k], to_y = size > 1 ? numbers[length + size + k] : 0.0;
    if (to_x == 0.0 && to_y == 0.0) continue;  // a moment without coefficients may be NaN
    const double m = moment(k);
    x_new += to_x * m;
    if (rest) x_rest += rests[size + k] * m;
    y_new += to_y * m;
  }
  if (rest) {
    state[0] = two_sum(x, x_new + state[stride] + x_rest, state[stride]);
  } else {
    state[0] = x_new;
  }
  if (size > 1) state[(1 + rest) * stride] = y_new;
}

// Multiplies a tensor's propagators [n_laws, n_propagated, 2, 2] from the left by one step's matrices. Each law's
// numbers in a row begin with its matrices.
NPERF_HD void propagate(double* propagators, const double* row, const int32_t* law_numbers) {
  for (int i = 0; i < n_laws * n_propagated; ++i) {
    const double* const by = row + law_numbers[i / n_propagated] + i % n_propagated * 4;
    double* const m = propagators + i * 4;
    const double a = m[0], b = m[1], c = m[2], d = m[3];
    m[0] = by[0] * a + by[1] * c;
    m[1] = by[0] * b + by[1] * d;
    m[2] = by[2] * a + by[3] * c;
    m[3] = by[2] * b + by[3] * d;
  }
}

}  // namespace noetherperf
