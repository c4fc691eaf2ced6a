// The CPU kernel: steps a block of a matrix and takes its moments in the same pass, in SIMD.
//
// It is written with the vector extensions that GCC and Clang share and the operations of simd.h. The code depends on
// the width alone, so a machine without an instruction set can run the code of its width.
//
// Arithmetic is in float32 (float64 for float64 parameters), sums in float64 (of blocks in float32 for 16-bit ones, see
// sums_cpu.h). N elements are one vector of the compute type; W float64 are one register.
//
// Each build of the kernel includes this file once; everything in it has internal linkage, so that the linker cannot
// replace one build's code by another's.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernel_cpu.h"
#include "strip.h"
#include "sums_cpu.h"
#include "types_cpu.h"

namespace noetherperf {
namespace {

static_assert(2 * W <= 16, "a vector past the width must fit into the padding of col_sums");

// Adds a group of a half of the moments to the sums by position and, with by_row, to those of n_rows rows, which stay
// in registers.
template <Half half, int n_parts, int n, int group, bool by_row, class Type, class Step, bool whole, int n_rows,
          class Sum>
inline __attribute__((always_inline)) void add_group(const Strip<Type, Step, whole, n_rows>& x,
                                                     const Sums<Step, Sum>& to) {
  constexpr int n_acc = Step::n_taken;
  constexpr bool in_blocks = !std::is_same_v<Sum, F64>;
  constexpr int64_t L = lanes<Sum>;
  using Of = Selected<Step, half, n, group>;
  const auto taken = [](int m) { return Of::takes(m); };
  const auto line = [&](int64_t col, int m) { return place_of<Item<Sum>>(to.block_lines, col, m, n_acc); };
  Sum row_sums[n_rows][n_acc];
  if constexpr (by_row)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 16
      for (int m = 0; m < n_acc; ++m) row_sums[r][m] = taken(m) ? to.block_rows[r][m] : Sum{};
  for (int64_t unit = 0; unit < x.width(); unit += unit_cols<Type>) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      if constexpr (whole && half == Half::before && group == 0) x.prefetch_p(r, unit);
      if constexpr (whole && half == Half::after && group == 0) x.prefetch_buffers(r, unit);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < unit_cols<Type>; i += n_parts * L) {
      Sum sums[n_parts][n_acc];
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part)
#pragma GCC unroll 16
        for (int m = 0; m < n_acc; ++m)
          sums[part][m] = taken(m) ? load_vector<Sum>(line(unit + i + part * L, m)) : Sum{};
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < n_parts; ++part) {
          add<Of, Type, Step>(sums[part], x, r, unit, i + part * L);
          if constexpr (by_row) add<Of, Type, Step>(row_sums[r], x, r, unit, i + part * L);
        }
      U32 worst{};
      if constexpr (in_blocks)
        for (int part = 0; part < n_parts; ++part) look_at<Of, Step>(worst, sums[part]);
      const bool held = !in_blocks || !any_above(worst, limit);
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part) {
        if constexpr (in_blocks)
          if (__builtin_expect(!held, 0) && widen_positions<Of>(x.copied(), n_rows, unit, i + part * L, to.lines))
            continue;
#pragma GCC unroll 16
        for (int m = 0; m < n_acc; ++m)
          if (taken(m)) store_vector(line(unit + i + part * L, m), sums[part][m]);
      }
    }
  }
  if constexpr (by_row) keep_rows<Of>(x, row_sums, to);
}

// Adds a half of the moments of a strip.
template <Half half, bool by_row, class Type, class Step, bool whole, int n_rows, class Sum>
inline __attribute__((always_inline)) void add_by_position(const Strip<Type, Step, whole, n_rows>& x,
                                                           const Sums<Step, Sum>& to) {
  constexpr int n_parts = unit_cols<Type> < 2 * lanes<Sum> ? 1 : 2;  // vectors of sums in registers at a time
  static_assert(unit_cols<Type> % (n_parts * lanes<Sum>) == 0, "a unit is whole vectors");
  constexpr int n = n_groups<Step, half>(by_row, n_rows, n_parts);
  static_assert(n <= 3, "each group is summed below");
  add_group<half, n_parts, n, 0, by_row>(x, to);
  if constexpr (n > 1) add_group<half, n_parts, n, 1, by_row>(x, to);
  if constexpr (n > 2) add_group<half, n_parts, n, 2, by_row>(x, to);
}

// Steps row r; with by_row, adds its moments to the sums of the row, those after the step `lag` vectors behind.
template <bool measured, bool by_row, bool alone, class Type, class Step, bool whole, int n_rows, class Sum>
inline __attribute__((always_inline)) void step_row(Strip<Type, Step, whole, n_rows>& x, int r,
                                                    const Coefficients<Step, typename Type::Scalar>& coefficients,
                                                    const Sums<Step, Sum>& to) {
  const Coefficients<Step, typename Type::Scalar> c = coefficients;  // a local copy, which no store can alias
  constexpr int n_acc = Step::n_taken;
  constexpr int64_t N = n_lanes<Type>, L = lanes<Sum>;
  using Before = Selected<Step, Half::before>;
  using After = Selected<Step, Half::after>;
  Sum sums[n_rows][n_acc];
  if constexpr (by_row)
#pragma GCC unroll 16
    for (int m = 0; m < n_acc; ++m) sums[r][m] = to.block_rows[r][m];
  const auto step = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (alone && (measured || sizeof(typename Type::Element) == 2)) {
      x.prefetch_p(r, col);
      x.prefetch_buffers(r, col);
    }
    if constexpr (measured || sizeof(typename Type::Element) == 2) x.prefetch_g(r, col);
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += L) add<Before, Type, Step>(sums[r], x, r, col, i);
    x.template step<measured>(r, col, c);
  };
  const auto behind = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += L) add<After, Type, Step>(sums[r], x, r, col, i);
  };
  const int64_t width = x.width(), start = !by_row ? width : width < lag * N ? width : lag * N;
  for (int64_t col = 0; col < start; col += N) step(col);
  for (int64_t col = start; col < width; col += N) {
    step(col);
    behind(col - start);
  }
  for (int64_t col = width - start; by_row && col < width; col += N) behind(col);
  if constexpr (by_row) {
    static_assert(n_rows == 1, "row by row");
    keep_rows<Before>(x, sums, to);
    keep_rows<After>(x, sums, to);
  }
}

// Steps n_rows rows of a strip and adds their moments to sums.
template <class Type, class Step, bool by_row, bool by_col, int n_rows, bool whole, class Sum>
inline void step_strip(const Block& b, const Coefficients<Step, typename Type::Scalar>& c, int64_t row, int64_t col,
                       int64_t width, int64_t ahead, Copies<Type>& copies, const Sums<Step, Sum>& to) {
  constexpr bool measured = by_row || by_col;
  Strip<Type, Step, whole, n_rows> strip(b, row, col, width, ahead, copies);
  if constexpr (measured)
    for (int r = 0; r < n_rows; ++r) strip.copy(r);
  if constexpr (by_col) add_by_position<Half::before, by_row>(strip, to);
  for (int r = 0; r < n_rows; ++r) step_row<measured, by_row && !by_col, !by_col>(strip, r, c, to);
  if constexpr (by_col) add_by_position<Half::after, by_row>(strip, to);
}

// The lines of positions from `col` on.
template <class T>
inline Line* lines_from(Line* lines, int64_t col, int n_acc) {
  return lines == nullptr ? nullptr : lines + col * int64_t(sizeof(T)) / int64_t(sizeof(Line)) * n_acc;
}

// Steps the columns of a row that do not fill a unit, with sums in float64. Not inlined, and by_row and by_col are no
// template parameters: one such loop is enough for all kinds of strips.
template <class Type, class Step, bool measured>
__attribute__((noinline)) void step_tail(const Block& b, const Coefficients<Step, typename Type::Scalar>& c,
                                         int64_t row, int64_t col, int64_t ahead, Copies<Type>& copies,
                                         F64 (*row_acc)[Step::n_taken], bool by_row, bool by_col) {
  Line* const lines = lines_from<double>(b.col_sums, col, Step::n_taken);
  const Sums<Step, F64> to{row_acc, row_acc, lines, lines};
  Strip<Type, Step, false, 1> strip(b, row, col, b.width - col, ahead, copies);
  if constexpr (measured) {
    strip.copy(0);
    if (by_col) add_by_position<Half::before, false>(strip, to);
    if (by_row) {
      step_row<true, true, true>(strip, 0, c, to);
    } else {
      step_row<true, false, true>(strip, 0, c, to);
    }
    if (by_col) add_by_position<Half::after, false>(strip, to);
  } else {
    step_row<false, false, true>(strip, 0, c, to);
  }
}

// Steps n_rows rows; their sums are added to row_acc, position sums to the block's. one_run: several rows are
// contiguous, and prefetched as one run.
template <class Type, class Step, bool by_row, bool by_col, int n_rows>
inline void step_rows(const Block& b, const Coefficients<Step, typename Type::Scalar>& c, int64_t row,
                      Copies<Type>& copies, F64 (*row_acc)[Step::n_taken], bool one_run = false) {
  using Rows = Strip<Type, Step, true, n_rows>;
  using Sum = typename Type::Sum;
  constexpr bool in_blocks = !std::is_same_v<Sum, F64>;
  constexpr bool in_strips = by_col || (by_row && Rows::needs_copies);
  const int64_t end = b.width / unit_cols<Type> * unit_cols<Type>;
  const int64_t widest = in_strips ? Rows::cols : end;
  // The prefetch distance. With moments to sum or 16 bits to convert, out-of-order execution keeps too few loads in
  // flight to saturate memory. After one row comes the next. Several rows are as many streams, which the hardware
  // prefetches, but it starts late: at the end of the rows, the beginning of the next ones is prefetched.
  // Contiguous rows within one page are prefetched in whole groups of n_rows.
  constexpr int64_t size = sizeof(typename Type::Element), ahead = (n_rows == 1 ? 2048 : 512) / size;
  const int64_t group = n_rows * b.row_stride;
  const int64_t groups_ahead = one_run ? (2560 / size + group - 1) / group * group : 0;
  const auto from = [&](int64_t col) {
    if (n_rows > 1 && one_run) return groups_ahead;
    return n_rows == 1 || col + ahead < b.width ? ahead : ahead + group - b.width;
  };
  Sum block_rows[in_blocks ? n_rows : 1][Step::n_taken] = {};
  Sums<Step, Sum> to{row_acc, nullptr, b.col_sums, b.col_sums};
  if constexpr (in_blocks) {
    to.block_rows = block_rows;
    to.block_lines = b.block_lines;
  } else {
    to.block_rows = row_acc;
  }
  Line *const lines = to.lines, *const block_lines = to.block_lines;
  for (int64_t col = 0; col < end; col += widest) {
    const int64_t width = end - col < widest ? end - col : widest;
    to.lines = lines_from<double>(lines, col, Step::n_taken);
    to.block_lines = lines_from<Item<Sum>>(block_lines, col, Step::n_taken);
    step_strip<Type, Step, by_row, by_col, n_rows, true>(b, c, row, col, width, from(col), copies, to);
    if constexpr (in_blocks && by_row)
      if (col + width == end || (col + width) % block_cols == 0)
        for (int r = 0; r < n_rows; ++r) close_row<Step>(block_rows[r], row_acc[r]);
  }
  for (int r = 0; r < n_rows && end < b.width; ++r)
    step_tail<Type, Step, by_row || by_col>(b, c, row + r, end, from(end), copies, row_acc + r, by_row, by_col);
}

template <class Type, class Step, bool hot, bool by_row, bool by_col>
void step_block(const Block& block) {
  const Block b = block;  // a local copy, which no store can alias
  using S = typename Type::Scalar;
  double numbers[Step::Rule::n_coefficients];
  for (int i = 0; i < Step::Rule::n_coefficients; ++i)
    numbers[i] = b.row != nullptr && b.row[i] == b.row[i] ? b.row[i] : NAN;  // a NaN that rounding keeps
  const auto c = Coefficients<Step, S>::of(numbers, b.unscale);
  constexpr int n_acc = Step::n_taken;
  const int64_t row_bytes = b.row_stride * sizeof(typename Type::Element);
  const int together = by_col && hot ? rows_together(b.width, n_acc, row_bytes) : 1;
  // Several streams within one page confuse the hardware prefetchers.
  const bool one_run = b.row_stride == b.width && most_rows * row_bytes <= page;
  Copies<Type> copies;
  constexpr bool in_blocks = by_col && !std::is_same_v<typename Type::Sum, F64>;
  if (by_col && b.fresh) std::memset(b.col_sums, 0, n_lines(b.width, n_acc) * sizeof(Line));
  if (in_blocks) std::memset(b.block_lines, 0, n_block_lines(b.width, n_acc) * sizeof(Line));
  for (int64_t bank = 0; bank < b.rows; bank += W) {  // W rows: one vector of row sums
    const int64_t rows = b.rows - bank < W ? b.rows - bank : W;
    F64 acc[W][n_acc];
    for (int r = 0; r < W; ++r)
      for (int m = 0; m < n_acc; ++m) acc[r][m] = F64{};
    int64_t row = 0;
    if constexpr (by_col && hot) {
      for (; together == most_rows && row + most_rows <= rows; row += most_rows)
        step_rows<Type, Step, by_row, by_col, most_rows>(b, c, bank + row, copies, acc + row, one_run);
      for (; together > 1 && row + 2 <= rows; row += 2)
        step_rows<Type, Step, by_row, by_col, 2>(b, c, bank + row, copies, acc + row);
    }
    for (; row < rows; ++row) step_rows<Type, Step, by_row, by_col, 1>(b, c, bank + row, copies, acc + row);
    if constexpr (in_blocks)
      if (bank + rows == b.rows || (bank + rows) % block_terms == 0)
        close_positions<Type, Step>(b.block_lines, b.col_sums, b.width / unit_cols<Type> * unit_cols<Type>);
    if constexpr (by_row) {
      for (int m = 0; m < n_acc; ++m) {
        F64 column[W];
        for (int r = 0; r < W; ++r) column[r] = acc[r][m];
        const F64 sums = sum_each(column);
        double* const to = b.row_sums + m * b.row_sums_stride + bank;
        for (int64_t r = 0; r < rows; ++r) to[r] += sums[r];
      }
    }
  }
}

// The kernels of one dtype; a variant that is not hot has only those that walk row by row.
template <class Type, class Step, bool hot>
constexpr BlockKernels kernels_of() {
  BlockKernels kernels{};
  if constexpr (Step::updates) {
    kernels.of[0][0] = step_block<Type, Step, hot, false, false>;
  } else {
    kernels.of[0][0] = [](const Block&) {};  // neither steps nor sums
  }
  kernels.of[0][1] = step_block<Type, Step, hot, false, true>;
  kernels.of[1][0] = step_block<Type, Step, hot, true, false>;
  kernels.of[1][1] = step_block<Type, Step, hot, true, true>;
  return kernels;
}

}  // namespace
}  // namespace noetherperf
