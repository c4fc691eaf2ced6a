// Lines: the sums of a tile's rows or columns, which the first stage writes to the workspace for the second.
#pragma once

#include "device.cuh"
#include "problem.h"

namespace noetherperf {

// The address of a slice's sums of moment m over a view's lines, in the type they were summed in.
template <class Rule, class Scalar>
NPERF_D Scalar* lines_of(const DeviceProblem& problem, const View& view, int64_t n_lines, int64_t slice, int m) {
  return reinterpret_cast<Scalar*>(problem.workspace + view.workspace) + (slice * Rule::n_moments + m) * n_lines;
}

// The index of a segment's line: one of `inner` neighbours, which repeat `repeats` times in each slice.
struct LineIndex {
  unsigned slice, repeat, inner;

  // The n-th line, slice after slice.
  NPERF_D LineIndex(unsigned n, unsigned inner_size, unsigned repeats)
      : slice(n / inner_size / repeats), repeat(n / inner_size % repeats), inner(n % inner_size) {}

  // Advances by `step` lines, without a division.
  NPERF_D void advance(const LineIndex& step, unsigned inner_size, unsigned repeats) {
    inner += step.inner;
    repeat += step.repeat;
    slice += step.slice;
    if (inner >= inner_size) {
      inner -= inner_size;
      ++repeat;
    }
    if (repeat >= repeats) {
      repeat -= repeats;
      ++slice;
    }
  }
};

// Adds this thread's lines of a segment, every splits-th one, in order; several loads are in flight at once.
template <class Rule, class Scalar>
NPERF_D void add_lines(const DeviceProblem& problem, const View& view, int64_t n_lines, int64_t segment, int split,
                       int splits, int n_taken, double (&sums)[Rule::n_moments]) {
  constexpr int at_once = 2, n_moments = Rule::n_moments;
  const int64_t period = view.inner * view.n_segments;
  const unsigned inner = unsigned(view.inner), repeats = unsigned(n_lines / period);
  const int64_t n_terms = view.n_slices * repeats * inner;
  if (n_terms == 0) return;
  const Scalar* const lines = lines_of<Rule, Scalar>(problem, view, n_lines, 0, 0) + segment * inner;
  const LineIndex step(splits, inner, repeats);
  LineIndex line(split, inner, repeats);
  for (int64_t term = split; term < n_terms; term += at_once * splits) {
    Scalar terms[at_once][n_moments];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const Scalar* const from = lines + line.slice * (n_moments * n_lines) + line.repeat * period + line.inner;
      const int n_there = term + k * splits < n_terms ? n_taken : 0;
#pragma unroll
      for (int m = 0; m < n_moments; ++m) terms[k][m] = m < n_there ? from[m * n_lines] : Scalar(0);
      line.advance(step, inner, repeats);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k)
#pragma unroll
      for (int m = 0; m < n_moments; ++m) sums[m] += double(terms[k][m]);
  }
}

}  // namespace noetherperf
