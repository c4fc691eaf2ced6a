// A step that another optimizer has made: its update, taken from outside, and the list of its moments, written once for
// CPU and CUDA. Mirrors noetherperf/rules/given.py: same names, same order.
//
// V is a float or double on a GPU and a SIMD vector of them on a CPU; S is the scalar type of both.
#pragma once

#include "../moments.h"

namespace noetherperf::given {

// p' = v,  u = (p − v)/η − λ p.
template <class S>
struct Coefficients {
  S per_lr;  // 1/η
  S decay;   // λ

  // From a row's first numbers. The gradient is in no coefficient: what its stored value is to be multiplied by is
  // left to its moments.
  static NPERF_HD Coefficients of(const double* row, double = 1.0) { return {S(row[0]), S(row[1])}; }
};

enum Variant : int {
  plain,
  n_variants,
};

template <int variant>
struct Step;
struct Measure;

struct Rule {
  static constexpr const char* name = "given";
  static constexpr int n_coefficients = 2;
  static constexpr int n_buffers = 1;  // the parameter that the other optimizer has stepped
  static constexpr int n_variants = given::n_variants;
  static constexpr Moment moments[] = {
      {"sum_p", Operand::p_new, Operand::one}, {"sq_p", Operand::p_new, Operand::p_new},
      {"sum_g", Operand::g, Operand::one},     {"sq_g", Operand::g, Operand::g},
      {"dot_pg", Operand::p, Operand::g},      {"sq_u", Operand::u, Operand::u},
      {"dot_pu", Operand::p, Operand::u},      {"sum_u", Operand::u, Operand::one},
  };
  static constexpr int n_moments = sizeof(moments) / sizeof(Moment);
  static constexpr int n_common = 6;  // the first moments, which every rule sums
  static constexpr int n_kept = 2;    // the first moments, charges: kept if a tensor takes no part in a step

  template <class S>
  using Coefficients = given::Coefficients<S>;
  template <int variant>
  using Step = given::Step<variant>;
  using Measure = given::Measure;

  // The first variants are hot: training mostly uses these.
  static constexpr int n_hot = n_variants;

  // The variant of a tensor's step.
  static NPERF_HD int variant_of(int of_group, bool, bool) { return of_group; }

  // Whether the update of zeros may be 0/0.
  static constexpr bool divides = false;
};

// The step.
template <int variant>
struct Step {
  using Rule = given::Rule;
  static constexpr bool updates = true;
  static constexpr int n_read = 1, n_written = 0;  // of the buffers, from the first on
  static constexpr bool u_is_v = false;
  static constexpr int n_taken = Rule::n_moments;

  // p becomes p', the buffer; u is the update. The difference comes first: it is exact where p and v are close.
  template <class V, class S>
  static NPERF_HD void update(V& p, const V&, V* buffers, V& u, const Coefficients<S>& c) {
    const V& v = buffers[0];
    u = c.per_lr * (p - v) - c.decay * p;
    p = v;
  }
};

// No step: the moments of p, with the first buffer in the gradient's place.
struct Measure {
  using Rule = given::Rule;
  static constexpr bool updates = false, u_is_v = false;
  static constexpr int n_read = 1, n_written = 0;
  static constexpr int n_taken = Rule::n_common;
};

}  // namespace noetherperf::given
