// The CPU kernel's interface: one block of a matrix stepped and summed, in one build per instruction set.
#pragma once

#include <cstdint>

#include "plan.h"
#include "step.h"

namespace noetherperf {

constexpr int n_dtypes = 4, n_modes = 5;

// A block of rows × width elements whose rows are row_stride elements apart. Row sums are added to what is there,
// position sums too unless they are fresh: row_sums[m * row_sums_stride + row] and col_sums[m * col_sums_stride +
// column], m < n_accumulated(mode).
struct Block {
  void* p;
  const void* g;
  void* v;
  int64_t row_stride, rows, width;
  Coefficients<double> c;
  double* row_sums;
  double* col_sums;  // padded: whole vectors past the width are read and written
  int64_t row_sums_stride, col_sums_stride;
  bool fresh;  // col_sums hold nothing yet
};

// How far past the width col_sums may be touched, in values.
constexpr int64_t col_sums_padding = 16;

using BlockKernel = void (*)(const Block&);

struct Kernels {
  const char* isa;
  BlockKernel step[n_dtypes][n_modes][2][2];  // dtype, mode, sums by row, sums by column
};

Kernels kernels_baseline();
#if defined(NPERF_X86_DISPATCH)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace noetherperf
