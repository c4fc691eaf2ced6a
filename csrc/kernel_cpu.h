// The CPU kernels' interface: a block of a matrix stepped and summed, and laws advanced, in one build per instruction
// set.
#pragma once

#include <cstdint>

#include "plan.h"
#include "recursion.h"
#include "rows.h"
#include "rules/sgd.h"

namespace noetherperf {

constexpr int n_dtypes = 4;

// A cache line of sums. All moments of eight positions lie together: the sums of a row of the matrix are then one
// stream through the nearest caches, as few as the hardware can follow beside the streams of the matrix itself.
struct alignas(64) Line {
  double at[8];
};

// A block of rows × width elements whose rows are row_stride elements apart. Row sums are added to what is there,
// position sums too unless they are fresh: row_sums[m * row_sums_stride + row], m < n_taken, and
// col_sums[column / 8 * n_taken + m].at[column % 8].
struct Block {
  void* p;
  const void* g;
  void* v;
  int64_t row_stride, rows, width;
  const double* row;  // of the step's numbers, the update's coefficients first
  double unscale;     // the gradient is what lies in memory times this
  double* row_sums;
  Line* col_sums;  // padded: whole vectors past the width are read and written
  int64_t row_sums_stride;
  bool fresh;  // col_sums hold nothing yet
};

// How many lines hold the sums of so many positions, what a vector past the width touches included.
constexpr int64_t n_lines(int64_t width, int n_acc) { return (width / 8 + 2) * n_acc; }

using BlockKernel = void (*)(const Block&);

// One variant of a rule's step, or the pass that only measures.
struct StepKernels {
  bool updates, reads_buffer, writes_buffer;
  int n_taken;                     // of the moments, the first of the rule's list
  BlockKernel of[n_dtypes][2][2];  // dtype, sums by row, sums by column
};

struct Kernels {
  const char* isa;
  bool is_native;  // made of that instruction set's code; else its code's width alone
  StepKernels steps[sgd::n_variants], measure;
  AdvanceKernel advance[2][2][most_drives + 2];  // size − 1, compensated, how many moments drive

  AdvanceKernel advance_of(const Recursion& r) const {
    const int n = r.n_drives <= most_drives ? r.n_drives : most_drives + 1;
    return advance[r.component->size - 1][r.component->compensated != 0][n];
  }
};

// One for each that the build has (CMakeLists.txt).
Kernels kernels_baseline();
Kernels kernels_avx2();
Kernels kernels_avx512();

}  // namespace noetherperf
