// Sums of moments: which of them are summed together, and in which precision.
//
// Elements of 32 and 64 bits are summed in float64. Elements of 16 bits carry 8 or 11 digits: their moments are summed
// in float32 over blocks of at most block_terms terms, and the blocks' sums in float64. Each term is rounded once more
// than a product of stored numbers, which is exact: the error of a block is at most block_terms · 2⁻²⁴ of its Σ|terms|.
//
// That holds while no product leaves the range of float32, where the parameters' own range is as wide in bfloat16. Each
// addition to a block's sums ends with a test of the sums, not of the elements: a sum of products that is finite and at
// least 2⁻⁹⁶ has lost no more to underflow than to rounding, even where subnormal numbers are flushed to zero. Sums
// that fail are not stored. Then the elements are looked at, and what float32 does not hold is summed in float64. The
// usual reason to look is zeros.
//
// Each build of the kernel includes this file once; everything in it has internal linkage.
#pragma once

#include <cstdint>
#include <type_traits>

#include "strip.h"

namespace noetherperf {
namespace {

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
  // Whether one of them needs an operand. Without a step there is no update, and its sums are zero.
  static constexpr bool needs(Operand operand) {
    for (int m = 0; m < Step::n_taken && (Step::updates || operand != Operand::u); ++m)
      if (takes(m) && Step::Rule::moments[m].has(operand)) return true;
    return false;
  }
  // Whether a moment tells of a product out of range: all do, except a sum beside the sum of the same squares.
  static constexpr bool tells(int m) {
    const Moment& it = Step::Rule::moments[m];
    for (int k = 0; k < Step::n_taken && it.b == Operand::one; ++k)
      if (const Moment& x = Step::Rule::moments[k]; takes(k) && x.a == it.a && x.b == it.a) return false;
    return takes(m) && needs(it.a);
  }
};

// Where the sums of a strip go: those of its rows, and those of positions from its first column on. `block_rows` and
// `block_lines` have the sums of a block; they are the same as the others if these are float64 too.
template <class Step, class Sum>
struct Sums {
  F64 (*rows)[Step::n_taken];
  Sum (*block_rows)[Step::n_taken];
  Line *lines, *block_lines;
};

// Where moment m of column col is summed, among lines of float64 or float32.
template <class T>
inline T* place_of(Line* lines, int64_t col, int m, int n_acc) {
  constexpr uint64_t n = sizeof(Line) / sizeof(T);
  return reinterpret_cast<T*>(lines) + (uint64_t(col) / n * n_acc + m) * n + uint64_t(col) % n;
}

// Adds a vector of row r to the selected moments: from element i on of the vector at col, in float32 in the order of
// copies. Rows: a Strip, or its CopiedRows.
template <class Of, class Type, class Step, class Sum, class Rows>
inline __attribute__((always_inline)) void add(Sum* sums, const Rows& x, int r, int64_t col, int64_t i) {
  const int64_t at = col + (std::is_same_v<Sum, F64> ? Type::order(i) : i);
  const auto value = [at](const auto* row) { return load_as<Sum>(row + at); };
  Operands<Sum> operands{};
  if constexpr (Of::needs(Operand::p)) operands.p = value(Of::half == Half::after ? x.p_kept(r) : x.p(r));
  if constexpr (Of::needs(Operand::p_new)) operands.p_new = value(x.p_new(r));
  if constexpr (Of::needs(Operand::g)) operands.g = value(x.g(r));
  if constexpr (Of::needs(Operand::u)) operands.u = value(x.u(r));
  if constexpr (Of::needs(Operand::v)) operands.v = value(x.v(r));
  accumulate<Step, Of>(sums, operands);
}

// ---- blocks of float32
// ------------------------------------------------------------------------------------------------

constexpr int64_t block_terms = 32;
constexpr int64_t block_cols = 2 * W * block_terms;

// Bits of float32 without their sign, which are in the order of the numbers.
inline U32 size_bits(const F32& x) { return (U32)x & 0x7fffffffu; }
constexpr uint32_t bits_of_power(int exponent) { return uint32_t(127 + exponent) << 23; }
constexpr int least_power = -96;  // of a sum that tells

// What float32 holds the sums of is at most `limit`.
constexpr uint32_t limit = bits_of_power(128) - 1 - bits_of_power(least_power);
template <class Of, class Step>
inline __attribute__((always_inline)) void look_at(U32& worst, const F32* sums) {
#pragma GCC unroll 16
  for (int m = 0; m < Step::n_taken; ++m)
    if (Of::tells(m)) {
      const U32 excess = size_bits(sums[m]) - bits_of_power(least_power);  // of a smaller sum: it is large
      worst = worst > excess ? worst : excess;
    }
}

// Whether n values are each zero, or as large as factors of a product that float32 holds.
inline bool are_factors(const float* values, int64_t n) {
  constexpr uint32_t least = bits_of_power(least_power / 2), range = bits_of_power(-least_power / 2) - least;
  U32 worst{};
  for (int64_t i = 0; i < n; i += 2 * W) {
    const U32 bits = size_bits(load_vector<F32>(values + i)), excess = (bits - least) & (U32)(bits != 0u);
    worst = worst > excess ? worst : excess;
  }
  return !any_above(worst, range);
}
template <class Of, class Type, class Step>
bool are_factors(const CopiedRows<Type, Step>& x, int r, int64_t col, int64_t n) {
  return (!Of::needs(Operand::p) || are_factors(x.p(r) + col, n)) &&
         (!Of::needs(Operand::p_new) || are_factors(x.p_new(r) + col, n)) &&
         (!Of::needs(Operand::g) || are_factors(x.g(r) + col, n)) &&
         (!Of::needs(Operand::u) || are_factors(x.u(r) + col, n)) &&
         (!Of::needs(Operand::v) || are_factors(x.v(r) + col, n));
}

// Adds `width` columns of row r in float64 if float32 does not hold their moments. Returns whether it has.
template <class Of, class Type, class Step>
__attribute__((noinline, cold)) bool widen_row(const CopiedRows<Type, Step>& x, int r, int64_t width, F64* to) {
  if (are_factors<Of>(x, r, 0, width)) return false;
  for (int64_t unit = 0; unit < width; unit += unit_cols<Type>)
    for (int64_t i = 0; i < unit_cols<Type>; i += W) add<Of, Type, Step>(to, x, r, unit, i);
  return true;
}

// The same of the positions whose copies are a vector, from element i on of the vector at col.
template <class Of, class Type, class Step>
__attribute__((noinline, cold)) bool widen_positions(const CopiedRows<Type, Step>& x, int n_rows, int64_t col,
                                                     int64_t i, Line* lines) {
  bool held = true;
  for (int r = 0; r < n_rows; ++r) held = held && are_factors<Of>(x, r, col + i, 2 * W);
  if (held) return false;
  for (int64_t end = i + 2 * W; i < end; i += W) {
    const int64_t element = Type::order(i);  // and order(element) is i
    F64 sums[Step::n_taken];
    const auto place = [&](int m) { return place_of<double>(lines, col + element, m, Step::n_taken); };
    for (int m = 0; m < Step::n_taken; ++m) sums[m] = Of::takes(m) ? load_vector<F64>(place(m)) : F64{};
    for (int r = 0; r < n_rows; ++r) add<Of, Type, Step>(sums, x, r, col, element);
    for (int m = 0; m < Step::n_taken; ++m)
      if (Of::takes(m)) store_vector(place(m), sums[m]);
  }
  return true;
}

// Stores the selected sums of a strip's rows, those that float32 holds.
template <class Of, class Type, class Step, bool whole, int n_rows, class Sum>
inline __attribute__((always_inline)) void keep_rows(const Strip<Type, Step, whole, n_rows>& x,
                                                     const Sum (&sums)[n_rows][Step::n_taken],
                                                     const Sums<Step, Sum>& to) {
  constexpr bool in_blocks = !std::is_same_v<Sum, F64>;
  U32 worst{};
  if constexpr (in_blocks)
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) look_at<Of, Step>(worst, sums[r]);
  const bool held = !in_blocks || !any_above(worst, limit);
#pragma GCC unroll 4
  for (int r = 0; r < n_rows; ++r) {
    if constexpr (in_blocks)
      if (__builtin_expect(!held, 0) && widen_row<Of>(x.copied(), r, x.width(), to.rows[r])) continue;
#pragma GCC unroll 16
    for (int m = 0; m < Step::n_taken; ++m)
      if (Of::takes(m)) to.block_rows[r][m] = sums[r][m];
  }
}

// Adds a block's sums of a row to those in float64.
template <class Step>
inline void close_row(F32* block, F64* sums) {
  for (int m = 0; m < Step::n_taken; ++m) {
    const float* const from = reinterpret_cast<const float*>(block + m);
    sums[m] += as_f64(from) + as_f64(from + W);
    block[m] = F32{};
  }
}

// Adds a block's sums of the positions before `end` to those in float64.
template <class Type, class Step>
inline void close_positions(Line* block, Line* lines, int64_t end) {
  constexpr int n_acc = Step::n_taken;
  for (int64_t unit = 0; unit < end; unit += unit_cols<Type>)
#pragma GCC unroll 4
    for (int64_t i = 0; i < unit_cols<Type>; i += W)
#pragma GCC unroll 16
      for (int m = 0; m < n_acc; ++m) {
        float* const from = place_of<float>(block, unit + Type::order(i), m, n_acc);
        double* const to = place_of<double>(lines, unit + i, m, n_acc);
        store_vector(to, load_vector<F64>(to) + as_f64(from));
        store_vector(from, F32Half{});
      }
}

}  // namespace
}  // namespace noetherperf
