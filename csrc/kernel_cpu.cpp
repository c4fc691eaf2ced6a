// The CPU kernel: steps a block of a matrix and takes its moments in the same pass, in SIMD.
//
// Compiled once per instruction set (NPERF_ISA = baseline, avx2, avx512, of NPERF_WIDTH = 2, 4, 8) and update rule
// (NPERF_RULE, of NPERF_RULE_FILE), with the vector extensions that GCC and Clang share and the operations of simd.h.
// The code depends on the width alone, so a machine without an instruction set can run the code of its width.
// Everything except the one exported table has internal linkage, so that the linker cannot replace one build's code by
// another's.
//
// Arithmetic is in float32 (float64 for float64 parameters), sums in float64. N elements are one vector of the compute
// type; W float64 are one register.

#include "kernel_cpu.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "strip.h"
#include "types_cpu.h"

// After the functions of vectors that an update calls.
#include NPERF_RULE_FILE

#define NPERF_JOIN_(a, b) a##b
#define NPERF_JOIN(a, b) NPERF_JOIN_(a, b)

namespace noetherperf {
namespace {

using NPERF_RULE::Rule;

static_assert(2 * W <= 16, "a vector past the width must fit into the padding of col_sums");

// Moments are summed in two halves: those of the gradient and the parameter before the step, and those of the results.
enum class Half { before, after };

// The moments of a half that a step sums, as bits.
template <class Step, Half half>
constexpr uint64_t bits_of() {
  uint64_t bits = 0;
  for (int m = 0; m < Step::n_taken; ++m)
    bits |= uint64_t(is_of_results(Step::Rule::moments[m]) == (half == Half::after)) << m;
  return bits;
}
constexpr int count(uint64_t bits) { return bits == 0 ? 0 : int(bits & 1) + count(bits >> 1); }

// The sums of a half by row and by position stay in registers if these are enough. Otherwise the half is summed in
// groups of moments, one group after the other.
template <class Step, Half half>
constexpr int n_groups(bool by_row, int n_rows, int n_parts) {
  constexpr int n_registers = W == 8 ? 32 : 16, n_operands = 4, n = count(bits_of<Step, half>());
  const int at_once = (n_registers - n_operands) / (by_row * n_rows + n_parts);
  return n == 0 ? 1 : (n + at_once - 1) / at_once;
}

// The moments of one of n groups, which are equally large.
constexpr uint64_t group_of(uint64_t bits, int n, int group) {
  uint64_t found = 0;
  for (int m = 0, place = 0; m < 64; ++m)
    if (bits >> m & 1) found |= uint64_t(place++ * n / count(bits) == group) << m;
  return found;
}

// Selects the moments of a half, or of one group of it if there are several.
template <class Step, Half of_half, int n = 1, int group = 0>
struct Selected {
  static constexpr Half half = of_half;
  static constexpr uint64_t bits = group_of(bits_of<Step, half>(), n, group);
  static constexpr bool takes(int m) { return (bits >> m & 1) != 0; }
  // Whether one of them needs an operand.
  static constexpr bool needs(Operand operand) {
    for (int m = 0; m < Step::n_taken; ++m)
      if (takes(m) && Step::Rule::moments[m].has(operand)) return true;
    return false;
  }
};

// Adds W elements of row r to the selected moments: those of the vector at col, from element i on.
template <class Of, class Type, class Step, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void add(F64* sums, const Strip<Type, Step, whole, n_rows, one_run>& x, int r,
                                               int64_t col, int64_t i) {
  const auto value = [at = col + Type::order(i)](const auto* row) { return as_f64(row + at); };
  Operands<F64> operands{};
  if constexpr (Of::needs(Operand::p)) operands.p = value(Of::half == Half::after ? x.p_kept(r) : x.p(r));
  if constexpr (Of::needs(Operand::p_new)) operands.p_new = value(x.p_new(r));
  if constexpr (Of::needs(Operand::g)) operands.g = value(x.g(r));
  if constexpr (Step::updates && Of::needs(Operand::u)) operands.u = value(x.u(r));
  if constexpr (Of::needs(Operand::v)) operands.v = value(x.v(r));
  accumulate<Step, Of>(sums, operands);
}

// Adds a group of a half of the moments to the sums by position and, with by_row, to those of n_rows rows, which stay
// in registers.
template <Half half, int n_parts, int n, int group, bool by_row, class Type, class Step, bool whole, int n_rows,
          bool one_run>
inline __attribute__((always_inline)) void add_group(const Strip<Type, Step, whole, n_rows, one_run>& x, Line* lines,
                                                     F64 (*row_acc)[Step::n_taken]) {
  constexpr int n_acc = Step::n_taken;
  using Of = Selected<Step, half, n, group>;
  const auto taken = [](int m) { return Of::takes(m); };
  const auto line = [&](int64_t i, int m) { return lines[i / 8 * n_acc + m].at + i % 8; };
  F64 row_sums[n_rows][n_acc];
  if constexpr (by_row)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 16
      for (int m = 0; m < n_acc; ++m) row_sums[r][m] = taken(m) ? row_acc[r][m] : F64{};
  for (int64_t unit = 0; unit < x.width(); unit += unit_cols<Type>, lines += unit_cols<Type> / 8 * n_acc) {
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      if constexpr (half == Half::before && group == 0) x.prefetch_p(r, unit);
      if constexpr (half == Half::after && group == 0) x.prefetch_buffers(r, unit);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < unit_cols<Type>; i += n_parts * W) {
      F64 sums[n_parts][n_acc];
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part)
#pragma GCC unroll 16
        for (int m = 0; m < n_acc; ++m) sums[part][m] = taken(m) ? load_vector<F64>(line(i + part * W, m)) : F64{};
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < n_parts; ++part) {
          add<Of>(sums[part], x, r, unit, i + part * W);
          if constexpr (by_row) add<Of>(row_sums[r], x, r, unit, i + part * W);
        }
#pragma GCC unroll 2
      for (int part = 0; part < n_parts; ++part)
#pragma GCC unroll 16
        for (int m = 0; m < n_acc; ++m)
          if (taken(m)) store_vector(line(i + part * W, m), sums[part][m]);
    }
  }
  if constexpr (by_row)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 16
      for (int m = 0; m < n_acc; ++m)
        if (taken(m)) row_acc[r][m] = row_sums[r][m];
}

// Adds a half of the moments of a strip.
template <Half half, bool by_row, class Type, class Step, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void add_by_position(const Strip<Type, Step, whole, n_rows, one_run>& x,
                                                           Line* lines, F64 (*row_acc)[Step::n_taken]) {
  constexpr int n_parts = unit_cols<Type> < 2 * W ? 1 : 2;  // vectors of sums in registers at a time
  static_assert(unit_cols<Type> % (n_parts * W) == 0, "a unit is whole vectors");
  constexpr int n = n_groups<Step, half>(by_row, n_rows, n_parts);
  static_assert(n <= 3, "each group is summed below");
  add_group<half, n_parts, n, 0, by_row>(x, lines, row_acc);
  if constexpr (n > 1) add_group<half, n_parts, n, 1, by_row>(x, lines, row_acc);
  if constexpr (n > 2) add_group<half, n_parts, n, 2, by_row>(x, lines, row_acc);
}

// Steps row r; with by_row, adds its moments to row_acc, those after the step `lag` vectors behind.
template <bool measured, bool by_row, bool alone, class Type, class Step, bool whole, int n_rows, bool one_run>
inline __attribute__((always_inline)) void step_row(Strip<Type, Step, whole, n_rows, one_run>& x, int r,
                                                    const Coefficients<Step, typename Type::Scalar>& coefficients,
                                                    F64* row_acc) {
  const Coefficients<Step, typename Type::Scalar> c = coefficients;  // a local copy, which no store can alias
  constexpr int n_acc = Step::n_taken;
  constexpr int64_t N = n_lanes<Type>;
  F64 sums[n_acc];
  if constexpr (by_row)
#pragma GCC unroll 16
    for (int m = 0; m < n_acc; ++m) sums[m] = row_acc[m];
  const auto step = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (alone && (measured || sizeof(typename Type::Element) == 2)) {
      x.prefetch_p(r, col);
      x.prefetch_buffers(r, col);
    }
    if constexpr (measured || sizeof(typename Type::Element) == 2) x.prefetch_g(r, col);
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += W) add<Selected<Step, Half::before>>(sums, x, r, col, i);
    x.template step<measured>(r, col, c);
  };
  const auto behind = [&](int64_t col) __attribute__((always_inline)) {
    if constexpr (by_row)
#pragma GCC unroll 4
      for (int64_t i = 0; i < N; i += W) add<Selected<Step, Half::after>>(sums, x, r, col, i);
  };
  const int64_t width = x.width(), start = !by_row ? width : width < lag * N ? width : lag * N;
  for (int64_t col = 0; col < start; col += N) step(col);
  for (int64_t col = start; col < width; col += N) {
    step(col);
    behind(col - start);
  }
  for (int64_t col = width - start; by_row && col < width; col += N) behind(col);
  if constexpr (by_row)
#pragma GCC unroll 16
    for (int m = 0; m < n_acc; ++m) row_acc[m] = sums[m];
}

// Steps n_rows rows of a strip; their row sums are added to row_acc, position sums to the block's col_sums.
template <class Type, class Step, bool by_row, bool by_col, int n_rows, bool whole, bool one_run>
inline void step_strip(const Block& b, const Coefficients<Step, typename Type::Scalar>& c, int64_t row, int64_t col,
                       int64_t width, int64_t ahead, Copies<typename Type::Scalar>& copies,
                       F64 (*row_acc)[Step::n_taken]) {
  constexpr bool measured = by_row || by_col;
  Strip<Type, Step, whole, n_rows, one_run> strip(b, row, col, width, ahead, copies);
  Line* const lines = by_col ? b.col_sums + col / 8 * Step::n_taken : nullptr;
  if constexpr (measured)
    for (int r = 0; r < n_rows; ++r) strip.copy(r);
  if constexpr (by_col) add_by_position<Half::before, by_row>(strip, lines, row_acc);
  for (int r = 0; r < n_rows; ++r) step_row<measured, by_row && !by_col, !by_col>(strip, r, c, row_acc[r]);
  if constexpr (by_col) add_by_position<Half::after, by_row>(strip, lines, row_acc);
}

// Steps the columns of a row that do not fill a unit. Not inlined: one such loop is enough for all kinds of strips.
template <class Type, class Step, bool by_row, bool by_col>
__attribute__((noinline)) void step_tail(const Block& b, const Coefficients<Step, typename Type::Scalar>& c,
                                         int64_t row, int64_t col, int64_t ahead, Copies<typename Type::Scalar>& copies,
                                         F64 (*row_acc)[Step::n_taken]) {
  step_strip<Type, Step, by_row, by_col, 1, false, false>(b, c, row, col, b.width - col, ahead, copies, row_acc);
}

template <class Type, class Step, bool by_row, bool by_col, int n_rows, bool one_run>
inline void step_rows(const Block& b, const Coefficients<Step, typename Type::Scalar>& c, int64_t row,
                      Copies<typename Type::Scalar>& copies, F64 (*row_acc)[Step::n_taken]) {
  constexpr bool in_strips = by_col || (by_row && Strip<Type, Step, true, n_rows, one_run>::needs_copies);
  const int64_t end = b.width / unit_cols<Type> * unit_cols<Type>;
  const int64_t widest = in_strips ? strip_cols(n_rows) : end;
  // The prefetch distance. With moments to sum or 16 bits to convert, out-of-order execution keeps too few loads in
  // flight to saturate memory. After one row comes the next. Several rows are as many streams, which the hardware
  // prefetches, but it starts late: at the end of the rows, the beginning of the next ones is prefetched.
  constexpr int64_t bytes = n_rows == 1 ? 2048 : one_run ? 2560 : 512;
  constexpr int64_t ahead = bytes / sizeof(typename Type::Element);
  const auto from = [&](int64_t col) {
    if (one_run) return ahead + col * (n_rows - 1);
    return n_rows == 1 || col + ahead < b.width ? ahead : ahead + n_rows * b.row_stride - b.width;
  };
  for (int64_t col = 0; col < end; col += widest)
    step_strip<Type, Step, by_row, by_col, n_rows, true, one_run>(
        b, c, row, col, end - col < widest ? end - col : widest, from(col), copies, row_acc);
  for (int r = 0; r < n_rows && end < b.width; ++r)
    step_tail<Type, Step, by_row, by_col>(b, c, row + r, end, from(end), copies, row_acc + r);
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
  Copies<S> copies;
  if (by_col && b.fresh) std::memset(b.col_sums, 0, n_lines(b.width, n_acc) * sizeof(Line));
  for (int64_t bank = 0; bank < b.rows; bank += W) {  // W rows: one vector of row sums
    const int64_t rows = b.rows - bank < W ? b.rows - bank : W;
    F64 acc[W][n_acc];
    for (int r = 0; r < W; ++r)
      for (int m = 0; m < n_acc; ++m) acc[r][m] = F64{};
    int64_t row = 0;
    if constexpr (by_col && hot) {
      for (; together == most_rows && row + most_rows <= rows; row += most_rows)
        if (one_run) {
          step_rows<Type, Step, by_row, by_col, most_rows, true>(b, c, bank + row, copies, acc + row);
        } else {
          step_rows<Type, Step, by_row, by_col, most_rows, false>(b, c, bank + row, copies, acc + row);
        }
      for (; together > 1 && row + 2 <= rows; row += 2)
        step_rows<Type, Step, by_row, by_col, 2, false>(b, c, bank + row, copies, acc + row);
    }
    for (; row < rows; ++row) step_rows<Type, Step, by_row, by_col, 1, false>(b, c, bank + row, copies, acc + row);
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
constexpr void fill(BlockKernel (&kernels)[2][2]) {
  if constexpr (Step::updates) {
    kernels[0][0] = step_block<Type, Step, hot, false, false>;
  } else {
    kernels[0][0] = [](const Block&) {};  // neither steps nor sums
  }
  kernels[0][1] = step_block<Type, Step, hot, false, true>;
  kernels[1][0] = step_block<Type, Step, hot, true, false>;
  kernels[1][1] = step_block<Type, Step, hot, true, true>;
}

template <class Step, bool hot>
constexpr StepKernels kernels_of() {
  StepKernels kernels{Step::updates, Step::n_read, Step::n_written, Step::n_taken, {}};
  fill<Float32, Step, hot>(kernels.of[float32]);
  fill<Float64, Step, hot>(kernels.of[float64]);
  fill<BFloat16, Step, hot>(kernels.of[bfloat16]);
  fill<Float16, Step, hot>(kernels.of[float16]);
  return kernels;
}

template <int... variant>
constexpr void fill_variants(StepKernels* steps, std::integer_sequence<int, variant...>) {
  ((steps[variant] = kernels_of<Rule::Step<variant>, (variant < Rule::n_hot)>()), ...);
}

}  // namespace

#define NPERF_STRING_(x) #x
#define NPERF_STRING(x) NPERF_STRING_(x)
#define NPERF_ADVANCE NPERF_JOIN(advance_, NPERF_ISA)
extern const AdvanceKernels NPERF_ADVANCE;

namespace {

constexpr Kernels every() {
  Kernels kernels{
      NPERF_STRING(NPERF_ISA),
      Rule::name,
      is_native,
      Rule::n_coefficients,
      Rule::n_buffers,
      Rule::n_variants,
      Rule::n_kept,
      Rule::n_moments,
      Rule::moments,
      [](int of_group, bool has_buffer, bool has_views) { return Rule::variant_of(of_group, has_buffer, has_views); },
      {},
      {},
      &NPERF_ADVANCE};
  static_assert(Rule::n_variants <= most_variants && Rule::n_buffers <= most_buffers, "tables have room for these");
  fill_variants(kernels.steps, std::make_integer_sequence<int, Rule::n_variants>{});
  kernels.measure = kernels_of<Rule::Measure, false>();
  return kernels;
}

constexpr Kernels constant = every();

}  // namespace

#define NPERF_NAME NPERF_JOIN(NPERF_JOIN(kernels_, NPERF_ISA), NPERF_JOIN(_, NPERF_RULE))
extern const Kernels NPERF_NAME;
const Kernels NPERF_NAME = constant;

}  // namespace noetherperf
