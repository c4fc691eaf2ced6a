// What a step decides first: whether it is skipped, whether a tensor takes part, the variant of its step, and its row.
#pragma once

#include <utility>

#include "device.cuh"
#include "problem.h"

namespace noetherperf {

NPERF_D bool skips(const DeviceInputs& inputs) {
  const uint64_t found_inf = inputs.scalars[1];
  return found_inf != 0 && *reinterpret_cast<const float*>(found_inf) != 0.0f;
}

// A tensor's addresses: parameter, gradient, the rule's buffers.
template <class Rule>
NPERF_D const uint64_t* addresses_of(const DeviceInputs& inputs, int64_t tensor) {
  return inputs.addresses + (2 + Rule::n_buffers) * tensor;
}

template <class Rule>
NPERF_D bool takes_part(const DeviceInputs& inputs, int64_t tensor) {
  return inputs.measuring || addresses_of<Rule>(inputs, tensor)[1] != 0;
}

// Instead of a rule's variant: no step, only the moments.
constexpr int measure = -1;

template <class Rule>
NPERF_D int variant_in(const DeviceInputs& inputs, const Tensor& tensor, int64_t i) {
  if (inputs.measuring) return measure;
  const bool has_buffer = Rule::n_buffers > 0 && addresses_of<Rule>(inputs, i)[2] != 0;
  return Rule::variant_of(inputs.groups[tensor.group].variant, has_buffer, tensor.n_views > 0);
}

// Calls f with an object of the type of a variant's step.
template <class Rule, class F, int... variants>
NPERF_D void with_step(int variant, const F& f, std::integer_sequence<int, variants...>) {
  const bool is_step = ((variant == variants && (f(typename Rule::template Step<variants>{}), true)) || ...);
  if (!is_step) f(typename Rule::Measure{});
}

template <class Rule, class F>
NPERF_D void with_step(int variant, const F& f) {
  with_step<Rule>(variant, f, std::make_integer_sequence<int, Rule::n_variants>{});
}

// A tensor's age in this step.
NPERF_D int age_in(const DeviceProblem& problem, const DeviceInputs& inputs, int64_t i) {
  const int given = inputs.ages[i], known = problem.ages[i];  // both loads are in flight at once
  return given == 0 ? 0 : known;
}

// The number of a tensor's row at an age.
NPERF_D int row_number(const DeviceProblem& problem, const DeviceInputs& inputs, int64_t i, int age) {
  return inputs.first[i] + (age < problem.n_ages ? age : problem.n_ages - 1);
}

NPERF_D const double* row_in(const DeviceProblem& problem, const DeviceInputs& inputs, int number) {
  return inputs.rows + int64_t(number) * problem.n_numbers;
}

}  // namespace noetherperf
