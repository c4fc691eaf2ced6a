// The kernels of one rule, and their launches. Each rule has a translation unit of its own (launch_<rule>.cu), so that
// they compile in parallel.
#pragma once

#include <stdexcept>

#include "finish.cuh"
#include "launch.h"
#include "tile.cuh"

namespace noetherperf {

// Throws what went wrong with the launches so far.
inline void check_launches() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
#endif
}

template <class Type, class Step>
void launch_step(const DeviceProblem& problem, const DeviceInputs& inputs, const Launch& launch, void* stream) {
  LAUNCH((step_tiles<Type, Step>), unsigned(launch.end - launch.begin), n_threads<Step>, 0, stream, problem, inputs,
         launch.begin, launch.dtype, launch.variant);
}

// Launches the kernel of a variant: each hot variant has its own.
template <class Rule, class Type, int... hot>
void launch_tiles(const DeviceProblem& problem, const DeviceInputs& inputs, const Launch& launch, void* stream,
                  std::integer_sequence<int, hot...>) {
  const bool is_hot =
      ((launch.variant == hot &&
        (launch_step<Type, typename Rule::template Step<hot>>(problem, inputs, launch, stream), true)) ||
       ...);
  if (!is_hot) launch_step<Type, Any<Rule>>(problem, inputs, launch, stream);
}

template <class Rule>
void first_stage(const DeviceProblem& problem, const DeviceInputs& inputs, const std::vector<Launch>& launches,
                 void* stream) {
  constexpr std::make_integer_sequence<int, Rule::n_hot> hot{};
  for (const Launch& launch : launches) {
    switch (launch.dtype) {
      case float32:
        launch_tiles<Rule, Float32>(problem, inputs, launch, stream, hot);
        break;
      case float64:
        launch_tiles<Rule, Float64>(problem, inputs, launch, stream, hot);
        break;
      case bfloat16:
        launch_tiles<Rule, BFloat16>(problem, inputs, launch, stream, hot);
        break;
      case float16:
        launch_tiles<Rule, Float16>(problem, inputs, launch, stream, hot);
        break;
    }
  }
  check_launches();
}

template <class Rule>
void second_stage(const DeviceProblem& problem, const DeviceInputs& inputs, void* stream) {
  const size_t shared = SpanShared::n_bytes(problem, Rule::n_moments);
  LAUNCH(finish_spans<Rule>, unsigned(problem.n_spans + 1), n_finishers, shared, stream, problem, inputs);
  check_launches();
}

template <class Rule>
constexpr Kernels kernels_of() {
  return {Rule::name, Rule::n_hot, first_stage<Rule>, second_stage<Rule>};
}

}  // namespace noetherperf
