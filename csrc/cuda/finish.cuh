// The second stage. Blocks add the lines of all slices to segments, in float64 and in an order that depends on shapes
// alone, and advance the laws. One more block counts the step.
#pragma once

#include "inputs.cuh"
#include "lines.cuh"

namespace noetherperf {

// Counts the step and each group's time, unless the step is skipped. Increments the age of tensors whose buffers it
// wrote.
template <class Rule>
NPERF_D void finish_step(const DeviceProblem& problem, const DeviceInputs& inputs, bool skipped) {
  if (threadIdx.x == 0 && !skipped) problem.clock[0] += 1.0;
  for (int64_t i = threadIdx.x; i < problem.n_groups && !skipped; i += n_finishers)
    problem.clock[1 + i] += row_in(problem, inputs, inputs.groups[i].row)[Rule::n_coefficients];
  for (int64_t i = threadIdx.x; i < problem.n_tensors; i += n_finishers) {
    const bool written = !skipped && takes_part<Rule>(inputs, i) && inputs.groups[problem.tensors[i].group].ages;
    const int age = age_in(problem, inputs, i) + written;
    problem.ages[i] = uint8_t(age < problem.n_ages ? age : problem.n_ages - 1);
  }
}

// The first segment of a law's state for a view; −1 if no symmetry needs that law.
NPERF_D int64_t segment_of(const View& view, int law) { return law == norm ? view.norm : view.translation; }

// A block's shared memory: the numbers and components of its tensor's laws; and for the segment of each thread, the
// moments and the laws' states. Registers cannot hold these, because components index them at run time.
struct SpanShared {
  double* row;            // [n_numbers]
  Component* components;  // [n_components]
  int32_t* driving;       // [n_driving]
  double* sums;           // [n_moments, n_finishers]
  double* states;         // [the rows of all laws' states that a step changes, n_finishers]

  static NPERF_HD constexpr int64_t n_words(int64_t n_bytes) { return (n_bytes + 7) / 8; }

  static NPERF_HD int64_t n_state_rows(const DeviceProblem& problem) {
    int64_t n = 0;
    for (int law = 0; law < n_laws; ++law) n += problem.n_state_rows[law] - n_start;
    return n;
  }

  // The size of all of it.
  static int64_t n_bytes(const DeviceProblem& problem, int n_moments) {
    return 8 * (problem.n_numbers + n_words(problem.n_components * sizeof(Component)) + n_words(4 * problem.n_driving) +
                (n_moments + n_state_rows(problem)) * n_finishers);
  }

  NPERF_D SpanShared(const DeviceProblem& problem, double* memory, int n_moments) {
    row = memory;
    sums = row + problem.n_numbers;
    states = sums + n_moments * n_finishers;
    double* const tables = states + n_state_rows(problem) * n_finishers;
    components = reinterpret_cast<Component*>(tables);
    driving = reinterpret_cast<int32_t*>(tables + n_words(problem.n_components * sizeof(Component)));
  }

  // Loads the numbers and components, by all threads.
  NPERF_D void load(const DeviceProblem& problem, const double* from) const {
    for (int i = threadIdx.x; i < problem.n_numbers; i += n_finishers) row[i] = from[i];
    for (int i = threadIdx.x; i < problem.n_components; i += n_finishers) components[i] = problem.components[i];
    for (int i = threadIdx.x; i < problem.n_driving; i += n_finishers) driving[i] = problem.driving[i];
  }

  // The address of row its_row of a law's state, for this thread's segment. The start, which no step changes, is left
  // out.
  NPERF_D double* state(const DeviceProblem& problem, int law, int its_row) const {
    const int before = law == translation ? 0 : problem.n_state_rows[translation] - n_start;
    return states + (before + its_row - n_start) * n_finishers + threadIdx.x;
  }

  // Prefetches the states of a view's segment i: they are in flight while its lines are added.
  NPERF_D void fetch_states(const DeviceProblem& problem, const View& view, int64_t i) const {
    for (int law = 0; law < n_laws; ++law) {
      const int64_t first = segment_of(view, law), stride = problem.states_stride[law];
      if (first < 0) continue;
      for (int k = n_start; k < problem.n_state_rows[law]; ++k)
        __pipeline_memcpy_async(state(problem, law, k), problem.states[law] + k * stride + first + i, 8);
    }
    __pipeline_commit();
  }

  // Advances the laws of a view's segment i by its sums.
  NPERF_D void advance_laws(const DeviceProblem& problem, const View& view, int64_t i) const {
    __pipeline_wait_prior(0);
    for (int c = 0; c < problem.n_components; ++c) {
      const Component& component = components[c];
      if (segment_of(view, component.law) < 0) continue;
      const int32_t* const moments = driving + component.moments;
      advance(component, row + component.numbers, state(problem, component.law, component.row), n_finishers,
              [&](int k) { return sums[moments[k] * n_finishers + threadIdx.x]; });
    }
    for (int law = 0; law < n_laws; ++law) {
      const int64_t first = segment_of(view, law), stride = problem.states_stride[law];
      if (first < 0) continue;
      for (int k = n_start; k < problem.n_state_rows[law]; ++k)
        problem.states[law][k * stride + first + i] = *state(problem, law, k);
    }
  }
};

// The row of a tensor's step, which the first stage has chosen. An empty tensor has no tile and so no choice: it takes
// the row of age 0 if its buffers are new, else that of the highest age. Its sums are zero.
NPERF_D int chosen_row(const DeviceProblem& problem, const DeviceInputs& inputs, const Tensor& tensor, int64_t i) {
  if (tensor.n_rows * tensor.n_cols > 0) return problem.chosen[i];
  return row_number(problem, inputs, i, inputs.ages[i] == 0 ? 0 : problem.n_ages);
}

// One block for each span of segments, and one for the step as a whole. Registers allow eight blocks per
// multiprocessor.
template <class Rule>
__global__ void __launch_bounds__(n_finishers, 8)
    finish_spans(const __grid_constant__ DeviceProblem problem, const __grid_constant__ DeviceInputs inputs) {
  constexpr int n_moments = Rule::n_moments;
  if (blockIdx.x == problem.n_spans) {
    if (!inputs.measuring) finish_step<Rule>(problem, inputs, skips(inputs));
    return;
  }
  const Span span = problem.spans[blockIdx.x];
  const View& view = problem.views[span.view];
  const Tensor& tensor = problem.tensors[span.tensor];
  double* const moments = problem.moments + view.segment;
  const bool skipped = skips(inputs), part = takes_part<Rule>(inputs, span.tensor);
  int n_taken = 0;
  with_step<Rule>(variant_in<Rule>(inputs, tensor, span.tensor), [&](auto its) { n_taken = decltype(its)::n_taken; });
  if (skipped) return;
  if (!part) {  // charges stay; the other moments are of its step, so zero
    for (int m = Rule::n_kept; m < n_moments; ++m)
      for (int64_t i = span.begin + threadIdx.x; i < span.end; i += n_finishers)
        moments[m * problem.moments_stride + i] = 0.0;
    return;
  }
  DYNAMIC_SHARED(memory, double);
  const SpanShared shared(problem, memory, n_moments);
  if (!inputs.measuring)
    shared.load(problem, row_in(problem, inputs, chosen_row(problem, inputs, tensor, span.tensor)));
  const int64_t n_lines = view.by_row ? tensor.n_rows : tensor.n_cols;
  const int64_t n_segments = span.end - span.begin;
  int width = 1;
  while (width < n_segments && width < n_finishers) width *= 2;
  const int splits = n_finishers / width;  // threads that share a segment
  // Coalesced: neighbouring threads read neighbouring lines.
  const bool one_line = view.inner == 1;
  const int mine = one_line ? threadIdx.x % width : threadIdx.x / splits;
  const int split = one_line ? threadIdx.x / width : threadIdx.x % splits;
  for (int64_t i = span.begin + mine; i - mine < span.end; i += width) {
    const bool finishes = split == 0 && i < span.end;
    const bool advances = finishes && !inputs.measuring;
    if (advances) shared.fetch_states(problem, view, i);
    double sums[n_moments] = {};
    if (i < span.end) {
      if (tensor.dtype == float64) {
        add_lines<Rule, double>(problem, view, n_lines, i, split, splits, n_taken, sums);
      } else {
        add_lines<Rule, float>(problem, view, n_lines, i, split, splits, n_taken, sums);
      }
    }
    for (int half = splits / 2; half > 0; half /= 2) {
      __syncthreads();
      double* const place = shared.sums + mine * half;
      if (split >= half && split < 2 * half)
#pragma unroll
        for (int m = 0; m < n_moments; ++m) place[m * n_finishers / 2 + split - half] = sums[m];
      __syncthreads();
      if (split < half)
#pragma unroll
        for (int m = 0; m < n_moments; ++m) sums[m] += place[m * n_finishers / 2 + split];
    }
    __syncthreads();  // also for the loads of the numbers and components
    if (!finishes) continue;
#pragma unroll
    for (int m = 0; m < n_moments; ++m)
      moments[m * problem.moments_stride + i] = shared.sums[m * n_finishers + threadIdx.x] = sums[m];
    if (advances) shared.advance_laws(problem, view, i);
  }
  if (threadIdx.x == 0 && !inputs.measuring && span.begin == 0 && span.view == tensor.view)
    propagate(problem.propagators + span.tensor * n_laws * n_propagated * 4, shared.row, problem.law_numbers);
}

}  // namespace noetherperf
