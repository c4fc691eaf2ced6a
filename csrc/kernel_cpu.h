// The CPU kernels' interface: a block of a matrix stepped and summed, and laws advanced, in one build per instruction
// set; blocks in one per update rule too.
#pragma once

#include <cstdint>
#include <vector>

#include "moments.h"
#include "plan.h"
#include "recursion.h"
#include "rows.h"

namespace noetherperf {

constexpr int n_dtypes = 4;
constexpr int most_variants = 4;  // of a rule's step

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
  void* buffers[most_buffers];  // the rule's; those that the step does not read may be null
  int64_t row_stride, rows, width;
  const double* row;  // the step's row of numbers, which begins with the update's coefficients
  double unscale;     // the gradient is the stored value times this
  double* row_sums;
  Line* col_sums;     // padded: whole vectors past the width are loaded and stored
  Line* block_lines;  // n_block_lines that the kernel uses
  int64_t row_sums_stride;
  bool fresh;  // col_sums is not initialized
};

// The lines that hold the sums of `width` positions, with padding for a vector past the width.
constexpr int64_t n_lines(int64_t width, int n_acc) { return (width / 8 + 2) * n_acc; }
// The same of float32 sums.
constexpr int64_t n_block_lines(int64_t width, int n_acc) { return (width / 16 + 2) * n_acc; }

using BlockKernel = void (*)(const Block&);

// One variant's kernels for one dtype: sums by row, sums by column.
struct BlockKernels {
  BlockKernel of[2][2] = {};
};

// The kernels of a rule's variants for one dtype.
struct VariantKernels {
  BlockKernels of[most_variants] = {};
};

// One variant of a rule's step, or the pass that only measures.
struct StepKernels {
  bool updates = false;
  int n_read = 0, n_written = 0;  // buffers, the first of the rule's
  int n_taken = 0;                // moments that it sums: the first of the rule's list
  const BlockKernels* kernels[n_dtypes] = {};

  BlockKernel of(int dtype, bool by_row, bool by_col) const { return kernels[dtype]->of[by_row][by_col]; }
};

// The kernels of one instruction set that advance laws.
struct AdvanceKernels {
  AdvanceKernel of[2][2][most_drives + 2] = {};  // by size − 1, compensated, number of driving moments

  AdvanceKernel operator()(const Recursion& r) const {
    const int n = r.n_drives <= most_drives ? r.n_drives : most_drives + 1;
    return of[r.component->size - 1][r.component->compensated != 0][n];
  }
};

// The kernels of one instruction set for one rule, and what the engine needs to know of the rule (csrc/rules).
struct Kernels {
  const char* isa;
  const char* rule;
  bool is_native;  // compiled for that instruction set; else it only has the same vector width
  int n_coefficients, n_buffers, n_variants, n_kept, n_moments;
  const Moment* moments;
  int (*variant_of)(int of_group, bool has_buffer, bool has_views);
  StepKernels steps[most_variants], measure;
  const AdvanceKernels* advance;
};

// Names of exported tables: one per instruction set, or one per instruction set, rule and dtype.
#define NPERF_TABLE_(what, isa) what##_##isa
#define NPERF_TABLE(what, isa) NPERF_TABLE_(what, isa)
#define NPERF_KERNELS_(isa, rule, Type) kernels_##isa##_##rule##_##Type
#define NPERF_KERNELS(isa, rule, Type) NPERF_KERNELS_(isa, rule, Type)

// The kernels that this build has and this machine can run: of each rule those of the best instruction set first.
const std::vector<const Kernels*>& available_kernels();

}  // namespace noetherperf
