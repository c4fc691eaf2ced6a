// The CUDA engine: two launches step all tensors of a plan, take their moments and advance the laws.
#pragma once

#include <string>
#include <vector>

#include "../rules/all.h"
#include "problem.h"

namespace noetherperf {

// A launch of the first stage over tiles of one dtype. It skips those of another variant.
struct Launch {
  int dtype, variant;
  int64_t begin, end;
};

// The kernels of one rule.
struct Kernels {
  const char* rule;
  int any_variant;  // instead of a variant: the kernel for all variants without their own
  // Queue a stage of a step on a stream: the first one's launches, then the second one. They throw std::runtime_error.
  void (*first_stage)(const DeviceProblem& problem, const DeviceInputs& inputs, const std::vector<Launch>& launches,
                      void* stream);
  void (*second_stage)(const DeviceProblem& problem, const DeviceInputs& inputs, void* stream);
};

// Each rule's, defined in launch_<rule>.cu.
#define NPERF_DECLARE(rule) extern const Kernels rule##_kernels;
NPERF_EACH_RULE(NPERF_DECLARE)
#undef NPERF_DECLARE

// The kernels of a rule, by its name. Throws std::invalid_argument if there are none.
const Kernels& kernels_of(const std::string& rule);

// The number of devices that the driver reports. Throws std::runtime_error with the driver's reason if there are none.
int n_devices();

}  // namespace noetherperf
