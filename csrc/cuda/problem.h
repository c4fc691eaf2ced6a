// What the CUDA engine's kernels read and write: the plan's tables and the measurement, and what is new in a step. All
// of it lies on the device and belongs to the caller.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../rows.h"

namespace noetherperf {

// Tables of the plan (noetherperf/engines/tiling.py, cut for a GPU), of the rule (noetherperf/engines/rows.py), and
// what the laws live in (Measurement, noetherperf/measure/plan.py). They outlive the step.
struct DeviceProblem {
  const Tensor* tensors;
  const Dim* dims;
  const View* views;
  const Tile* tiles;
  const Span* spans;
  const Component* components;
  const int32_t* driving;  // the moments that drive components
  int64_t n_tensors, n_spans, n_groups, n_components, n_driving;
  int32_t n_ages, n_numbers;     // of a parameter group's rows, and of a row
  int32_t law_numbers[n_laws];   // where in a row each law's coefficients begin
  int32_t n_state_rows[n_laws];  // of each law's state
  double* workspace;
  double* moments;  // [n_moments, moments_stride]
  int64_t moments_stride;
  double* states[n_laws];  // [n_state_rows, states_stride]
  int64_t states_stride[n_laws];
  double* propagators;  // [n_tensors, n_laws, n_propagated, 2, 2]
  double* clock;        // [1 + n_groups]
  uint8_t* ages;        // [n_tensors]: written by the second stage alone
  int32_t* chosen;      // [n_tensors]: the row of each tensor's step, from the first stage to the second
};

// What is new each step (noetherperf/engines/gpu.py).
struct DeviceInputs {
  const uint64_t* scalars;    // addresses of grad_scale and found_inf, float32; null: 1 and 0
  const double* rows;         // [n_groups, n_ages, n_numbers]
  const Group* groups;        // [n_groups]
  const uint64_t* addresses;  // [n_tensors, 3]: parameter, gradient (null: takes no part), momentum buffer (null: none)
  const uint8_t* ages;        // [n_tensors]: 0 where the host has just made the tensor's buffers
  bool scaled;                // there is a grad_scale: gradients are divided by it, and left divided
  bool measuring;             // only take the moments of all tensors, with the buffer in the gradient's place
};

}  // namespace noetherperf
