// The CPU kernels' interface: a block of a matrix stepped and summed, and laws advanced, in one build per instruction
// set.
#pragma once

#include <cstdint>

#include "laws.h"
#include "plan.h"
#include "step.h"

namespace noetherperf {

constexpr int n_dtypes = 4, n_modes = 5;

// A cache line of sums. All moments of eight positions lie together: the sums of a row of the matrix are then one
// stream through the nearest caches, as few as the hardware can follow beside the streams of the matrix itself.
struct alignas(64) Line {
  double at[8];
};

// A block of rows × width elements whose rows are row_stride elements apart. Row sums are added to what is there,
// position sums too unless they are fresh: row_sums[m * row_sums_stride + row], m < n_accumulated(mode), and
// col_sums[column / 8 * n_accumulated(mode) + m].at[column % 8].
struct Block {
  void* p;
  const void* g;
  void* v;
  int64_t row_stride, rows, width;
  Coefficients<double> c;
  double* row_sums;
  Line* col_sums;  // padded: whole vectors past the width are read and written
  int64_t row_sums_stride;
  bool fresh;  // col_sums hold nothing yet
};

// How many lines hold the sums of so many positions, what a vector past the width touches included.
constexpr int64_t n_lines(int64_t width, int n_acc) { return (width / 8 + 2) * n_acc; }

using BlockKernel = void (*)(const Block&);

// state, its stride, moments, their stride, transitions, the segments' begin and end
using AdvanceKernel = void (*)(double*, int64_t, const double*, int64_t, const Transitions&, int64_t, int64_t);

struct Kernels {
  const char* isa;
  bool is_native;                             // made of that instruction set's code; else its code's width alone
  BlockKernel step[n_dtypes][n_modes][2][2];  // dtype, mode, sums by row, sums by column
  AdvanceKernel advance[n_laws];
};

// One for each that the build has (CMakeLists.txt).
Kernels kernels_baseline();
Kernels kernels_avx2();
Kernels kernels_avx512();

}  // namespace noetherperf
