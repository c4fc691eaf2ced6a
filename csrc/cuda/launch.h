// The CUDA engine: two launches step all tensors of a plan, take their moments and advance the laws.
#pragma once

#include <vector>

#include "problem.h"

namespace noetherperf {

// A launch of the first stage: tiles of one dtype, of which it leaves alone those that are another variant's.
struct Launch {
  int dtype, variant;
  int64_t begin, end;
};

// In the place of a variant: the kernel for whatever has none of its own.
int any_variant();

// Puts a step on a stream: the first stage's launches, then the second stage. Throws std::runtime_error.
void launch(const DeviceProblem& problem, const DeviceInputs& inputs, const std::vector<Launch>& launches,
            void* stream);

// The devices that the driver shows; throws std::runtime_error with its reason where there is none.
int n_devices();

}  // namespace noetherperf
