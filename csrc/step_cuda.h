// The CUDA engine: two launches step all tensors of a plan, take their moments and advance the laws.
#pragma once

#include <cstdint>
#include <vector>

#include "laws.h"
#include "plan.h"

namespace noetherperf {

// Tables of the plan (noetherperf/engines/tiling.py, cut for a GPU) and what the laws live in (Measurement,
// noetherperf/measure/plan.py). All of it lies on the device, belongs to the caller and outlives the step.
struct Problem {
  const Tensor* tensors;
  const Dim* dims;
  const View* views;
  const Tile* tiles;
  const Span* spans;
  int64_t n_tensors, n_spans, n_hypers;
  double* workspace;
  double* moments;  // [n_moments, moments_stride]
  int64_t moments_stride;
  double* states[n_laws];  // [4 for a translation, n_state for a norm; states_stride]
  int64_t states_stride[n_laws];
  double* propagators;  // [n_tensors, n_laws, discrete or flow, 2, 2]
  double* clock;        // [1 + n_hypers]
  uint8_t* fresh;       // [n_tensors]: the momentum buffer has not been written yet; the second stage clears it
  uint8_t* pending;  // [n_tensors]: whether this step writes it for the first time; from the first stage to the second
};

// A learning rate that lies on the device.
struct DeviceLr {
  uint64_t address;  // null: Hyper.lr holds
  int64_t dtype;     // float32 or float64
};

// What is new each step, on the device (noetherperf/engines/gpu.py).
struct Inputs {
  const uint64_t* scalars;    // addresses of grad_scale and found_inf, float32; null: 1 and 0
  const DeviceLr* lrs;        // one per parameter group
  const Hyper* hypers;        // one per parameter group
  const uint64_t* addresses;  // [n_tensors, 3]: parameter, gradient (null: takes no part), momentum buffer (null: none)
  const uint8_t* first;       // [n_tensors]: the host has just made the momentum buffer
  Transitions* transitions;   // [n_hypers, without or with a first step]: of these hyperparameters
  bool scaled;                // there is a grad_scale: gradients are divided by it, and left divided
  bool measuring;             // only take the moments of all tensors, with the buffer in the gradient's place
};

// Kernels of the first stage: one for each of the first three modes and dense tensors, one for whatever else there is.
constexpr int any = 3, n_variants = 4;
static_assert(int(Mode::plain) == 0 && int(Mode::momentum) == 1 && int(Mode::nesterov) == 2);

// A launch of the first stage: tiles of one dtype, of which it leaves alone those that are another variant's.
struct Launch {
  int dtype, variant;
  int64_t begin, end;
};

// Puts on a stream what finds the transitions of the inputs' hyperparameters. Throws std::runtime_error.
void find_transitions(int64_t n_hypers, const Inputs& inputs, void* stream);

// Puts a step on a stream: the first stage's launches, then the second stage. Throws std::runtime_error.
void launch(const Problem& problem, const Inputs& inputs, const std::vector<Launch>& launches, void* stream);

// The devices that the driver shows; throws std::runtime_error with its reason where there is none.
int n_devices();

}  // namespace noetherperf
