// Adam and AdamW: one element's update and the list of its moments, written once for CPU and CUDA. Mirrors
// noetherperf/rules/adam.py: same names, same order.
//
// V is a float or double on a GPU and a SIMD vector of them on a CPU; S is the scalar type of both.
#pragma once

#include "../moments.h"

namespace noetherperf::adam {

// d = s g + λ p,  m' = m + (1 − β₁)(d − m),  n' = β₂ n + (1 − β₂) d²,  cD = (c/√e) √n' + cε,  u = m'/(cD),  p' = r p −
// η u.
template <class S>
struct Coefficients {
  S lr;         // η
  S keep;       // r: 1 − ηλ with decoupled decay, else 1
  S decay;      // λ with coupled decay, else 0
  S sign;       // s
  S mean_gain;  // 1 − β₁
  S sq_decay;   // β₂
  S sq_gain;    // 1 − β₂
  S root_gain;  // c/√e
  S eps;        // cε

  // From a row's first numbers, rounded once: 1 − β₂ of a β₂ in float32 would have lost four digits. The gradient is
  // the stored value times `unscale`.
  static NPERF_HD Coefficients of(const double* row, double unscale = 1.0) {
    const double c = row[7];
    return {S(row[0]), S(row[1]),       S(row[2]),     S(row[3] * unscale), S(1.0 - row[4]),
            S(row[5]), S(1.0 - row[5]), S(c / row[8]), S(c * row[6])};
  }
};

enum Variant : int {
  plain,
  amsgrad,  // the largest n' so far in the place of n'
  n_variants,
};

template <int variant>
struct Step;
struct Measure;

struct Rule {
  static constexpr const char* name = "adam";
  static constexpr int n_coefficients = 10;
  static constexpr int n_buffers = 3;  // m, n, and the largest n
  static constexpr int n_variants = adam::n_variants;
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
  using Coefficients = adam::Coefficients<S>;
  template <int variant>
  using Step = adam::Step<variant>;
  using Measure = adam::Measure;

  // The first variants are hot: training mostly uses these.
  static constexpr int n_hot = amsgrad;

  // The variant of a tensor's step.
  static NPERF_HD int variant_of(int of_group, bool, bool) { return of_group; }

  // Whether the update of zeros may be 0/0.
  static constexpr bool divides = true;
};

// One variant of the step.
template <int variant>
struct Step {
  using Rule = adam::Rule;
  static constexpr bool updates = true;
  static constexpr int n_written = variant == amsgrad ? 3 : 2;  // of the buffers, from the first on
  static constexpr int n_read = n_written;
  static constexpr bool u_is_v = false;
  static constexpr int n_taken = Rule::n_moments;

  // p becomes p', the buffers become m', n' and the largest n'; u is the update.
  template <class V, class S>
  static NPERF_HD void update(V& p, const V& g, V* buffers, V& u, const Coefficients<S>& c) {
    V& m = buffers[0];
    V& n = buffers[1];
    const V d = c.sign * g + c.decay * p;
    m = m + c.mean_gain * (d - m);
    n = c.sq_decay * n + c.sq_gain * (d * d);
    V scale = n;
    if constexpr (variant == amsgrad) scale = buffers[2] = maximum(buffers[2], n);
    u = quotient(m, c.root_gain * square_root(scale) + c.eps);
    p = c.keep * p - c.lr * u;
  }
};

// No step: the moments of p, with the first buffer in the gradient's place.
struct Measure {
  using Rule = adam::Rule;
  static constexpr bool updates = false, u_is_v = false;
  static constexpr int n_read = 1, n_written = 0;
  static constexpr int n_taken = Rule::n_common;
};

}  // namespace noetherperf::adam
