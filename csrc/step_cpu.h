// The CPU engine: one call steps all tensors of a plan, takes their moments and advances the laws.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernel_cpu.h"
#include "plan.h"
#include "rows.h"

namespace noetherperf {

// Tables of the plan (noetherperf/engines/tiling.py), the laws' components (noetherperf/engines/rows.py) and the
// measurement (noetherperf/measure/plan.py). All memory belongs to the caller and outlives the engine.
struct Problem {
  const Tensor* tensors;
  const Dim* dims;
  const View* views;
  const Tile* tiles;
  const Span* spans;
  const Component* components;
  const int32_t* driving;  // the moments that drive components
  int64_t n_tensors, n_tiles, n_spans, n_components;
  int32_t law_numbers[n_laws];  // where each law's coefficients begin in a row
  int64_t n_numbers;            // of a row
  double* workspace;
  double* moments;  // [n_moments, moments_stride]
  int64_t moments_stride;
  double* states[n_laws];  // [n rows of the law, states_stride]
  int64_t states_stride[n_laws];
  double* propagators;  // [n_tensors, n_laws, n_propagated, 2, 2]
};

// The inputs of one step. A tensor whose gradient is null takes no part in it.
struct Inputs {
  const uint64_t* addresses;  // [n_tensors, 2 + n_buffers]: parameter, gradient, buffers (null: none)
  const int32_t* row_of;      // [n_tensors]: the number of each one's row
  const double* rows;         // [n_rows, n_numbers]
  int64_t n_rows;
  const Group* groups;  // one per parameter group
  double unscale;       // the gradient is the stored value times this
};

// One thread's scratch memory, allocated before the first tile.
struct Scratch {
  std::vector<double> row_sums, positions;
  std::vector<Line> col_sums, block_lines;
  std::vector<uint64_t> staging;
};

// The tiles that remain of one thread's range; alone on its cache line, against false sharing.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

class Engine {
 public:
  // The kernels outlive the engine.
  Engine(const Problem& problem, const Kernels& kernels);

  // The step: parameters and buffers, moments, laws.
  void step(const Inputs& inputs, int n_threads);

  // Moments of the parameters as they are, with the first buffer in the gradient's place; nothing else changes.
  // Every tensor needs a buffer here.
  void measure(const Inputs& inputs, int n_threads);

  const Kernels& kernels() const { return kernels_; }

 private:
  template <bool measuring>
  void run(const Inputs& inputs, int n_threads);
  void finish(const Inputs& inputs, const Span& span, const StepKernels& step);

  Problem problem_;
  const Kernels& kernels_;
  int64_t max_tile_rows_ = 0, n_elements_ = 0;
  std::vector<int32_t> n_tiles_;  // of each tensor
  std::vector<uint8_t> n_taken_;  // how many moments of each tensor may be nonzero
  std::vector<Scratch> scratch_;
  std::vector<Range> ranges_;
  std::vector<Recursion> recursions_;  // [rows of numbers, components]
};

}  // namespace noetherperf
