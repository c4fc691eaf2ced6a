// The CUDA engine: two launches step all tensors of a plan, take their moments and advance the laws.
#pragma once

#include <vector>

#include "problem.h"

namespace noetherperf {

// A launch of the first stage over tiles of one dtype. It skips those of another variant.
struct Launch {
  int dtype, variant;
  int64_t begin, end;
};

// Instead of a variant: the kernel for all variants without their own.
int any_variant();

// Queues a step on a stream: the first stage's launches, then the second stage. Throws std::runtime_error.
void launch(const DeviceProblem& problem, const DeviceInputs& inputs, const std::vector<Launch>& launches,
            void* stream);

// The number of devices that the driver reports. Throws std::runtime_error with the driver's reason if there are none.
int n_devices();

}  // namespace noetherperf
