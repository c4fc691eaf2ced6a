// The memory of the CUDA kernels: the plan's tables, the measurement, and a step's inputs. All of it is on the device
// and belongs to the caller.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../rows.h"

namespace noetherperf {

// Tables of the plan (noetherperf/engines/tiling.py, cut for a GPU) and of the rule (noetherperf/engines/rows.py), and
// the measurement (noetherperf/measure/plan.py). They outlive the step.
struct DeviceProblem {
  const Tensor* tensors;
  const Dim* dims;
  const View* views;
  const Tile* tiles;
  const Span* spans;
  const Component* components;
  const int32_t* driving;  // the moments that drive components
  int64_t n_tensors, n_spans, n_groups, n_components, n_driving;
  int32_t n_ages, n_numbers;     // rows that a tensor chooses from by its age, numbers of a row
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

// The inputs of one step (noetherperf/engines/device_inputs.py).
struct DeviceInputs {
  const uint64_t* scalars;  // addresses of grad_scale and found_inf, float32; null: 1 and 0
  const double* rows;       // [n_rows, n_numbers]
  const Group* groups;      // [n_groups]
  const uint64_t*
      addresses;         // [n_tensors, 2 + n_buffers]: parameter, gradient (null: takes no part), buffers (null: none)
  const int32_t* first;  // [n_tensors]: the row of age 0
  const uint8_t* ages;   // [n_tensors]: 0 if the tensor's buffers are new
  bool scaled;           // gradients are divided by grad_scale, and stored divided
  bool measuring;        // only take the moments of all tensors, with the buffer in the gradient's place
};

}  // namespace noetherperf
