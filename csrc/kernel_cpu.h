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

// A cache line of sums. All moments of eight positions are adjacent, so the sums of a matrix row are one stream through
// the caches. The hardware prefetchers follow few streams, and the matrix itself needs most of them.
struct alignas(64) Line {
  double at[8];
};

// A block of rows × width elements; rows are row_stride elements apart. Row sums are added to
// row_sums[m * row_sums_stride + row], m < n_taken. Position sums are added to
// col_sums[column / 8 * n_taken + m].at[column % 8], or written there if `fresh`.
struct Block {
  void* p;
  const void* g;
  void* v;
  int64_t row_stride, rows, width;
  const double* row;  // the step's row of numbers, which begins with the update's coefficients
  double unscale;     // the gradient is the stored value times this
  double* row_sums;
  Line* col_sums;  // padded: whole vectors past the width are loaded and stored
  int64_t row_sums_stride;
  bool fresh;  // col_sums is not initialized
};

// The lines that hold the sums of `width` positions, with padding for a vector past the width.
constexpr int64_t n_lines(int64_t width, int n_acc) { return (width / 8 + 2) * n_acc; }

using BlockKernel = void (*)(const Block&);

// One variant of a rule's step, or the pass that only measures.
struct StepKernels {
  bool updates;
  int n_read, n_written;           // buffers, the first of the rule's
  int n_taken;                     // moments that it sums: the first of the rule's list
  BlockKernel of[n_dtypes][2][2];  // dtype, sums by row, sums by column
};

struct Kernels {
  const char* isa;
  bool is_native;  // compiled for that instruction set; else it only has the same vector width
  StepKernels steps[sgd::n_variants], measure;
  AdvanceKernel advance[2][2][most_drives + 2];  // by size − 1, compensated, number of driving moments

  AdvanceKernel advance_of(const Recursion& r) const {
    const int n = r.n_drives <= most_drives ? r.n_drives : most_drives + 1;
    return advance[r.component->size - 1][r.component->compensated != 0][n];
  }
};

// One function for each instruction set of the build (CMakeLists.txt).
Kernels kernels_baseline();
Kernels kernels_avx2();
Kernels kernels_avx512();

}  // namespace noetherperf
