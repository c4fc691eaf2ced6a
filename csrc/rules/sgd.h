// Stochastic gradient descent with momentum: one element's update and the list of its moments, written once for CPU and
// CUDA. Mirrors noetherperf/rules/sgd.py: same names, same order.
//
// V is a float or double on a GPU and a SIMD vector of them on a CPU; S is the scalar type of both.
#pragma once

#include "../moments.h"

namespace noetherperf::sgd {

// d = s g + λ p,  v' = b v + a d,  u = c_d d + c_v v',  p' = p − η u.
template <class S>
struct Coefficients {
  S lr;            // η
  S decay;         // λ
  S sign;          // s
  S buffer_decay;  // b
  S buffer_gain;   // a
  S mix_d;         // c_d
  S mix_v;         // c_v

  // From a row's first numbers; the gradient is the stored value times `unscale`.
  static NPERF_HD Coefficients of(const double* row, double unscale = 1.0) {
    return {S(row[0]), S(row[1]), S(row[2] * unscale), S(row[3]), S(row[4]), S(row[5]), S(row[6])};
  }
};

enum Variant : int {
  plain,     // no buffer: u = d
  momentum,  // u = v'
  nesterov,  // u = d + β v'
  idle,      // momentum 0, but a buffer from earlier steps: u = d, v is only read
  n_variants,
};

template <int variant>
struct Step;
struct Measure;

struct Rule {
  static constexpr const char* name = "sgd";
  static constexpr int n_coefficients = 7;
  static constexpr int n_buffers = 1;
  static constexpr int n_variants = sgd::n_variants;
  static constexpr Moment moments[] = {
      {"sum_p", Operand::p_new, Operand::one}, {"sq_p", Operand::p_new, Operand::p_new},
      {"sum_g", Operand::g, Operand::one},     {"sq_g", Operand::g, Operand::g},
      {"dot_pg", Operand::p, Operand::g},      {"sq_u", Operand::u, Operand::u},
      {"dot_uv", Operand::u, Operand::v},      {"dot_gu", Operand::g, Operand::u},
  };
  static constexpr int n_moments = sizeof(moments) / sizeof(Moment);
  static constexpr int n_common = 6;  // the first moments, which every rule sums
  static constexpr int n_kept = 2;    // the first moments, charges: kept if a tensor takes no part in a step

  template <class S>
  using Coefficients = sgd::Coefficients<S>;
  template <int variant>
  using Step = sgd::Step<variant>;
  using Measure = sgd::Measure;

  // The first variants are hot: training mostly uses these.
  static constexpr int n_hot = idle;

  // The variant of a tensor's step. Without views, nothing reads an idle buffer.
  static NPERF_HD int variant_of(int of_group, bool has_buffer, bool has_views) {
    return of_group == plain && has_buffer && has_views ? idle : of_group;
  }

  // Whether the update of zeros may be 0/0.
  static constexpr bool divides = false;
};

// One variant of the step.
template <int variant>
struct Step {
  using Rule = sgd::Rule;
  static constexpr bool updates = true;
  static constexpr int n_written = variant == momentum || variant == nesterov;  // of the buffers, from the first on
  static constexpr int n_read = n_written || variant == idle;
  static constexpr bool u_is_v = variant == momentum;
  static constexpr int n_taken = variant == nesterov ? 8 : variant == idle ? 7 : 6;  // of the moments

  // p becomes p', the buffer v becomes v'; u is the update.
  template <class V, class S>
  static NPERF_HD void update(V& p, const V& g, V* buffers, V& u, const Coefficients<S>& c) {
    V& v = buffers[0];
    const V d = c.sign * g + c.decay * p;
    if constexpr (n_written > 0) v = c.buffer_decay * v + c.buffer_gain * d;
    if constexpr (variant == momentum) {
      u = v;
    } else if constexpr (variant == nesterov) {
      u = d + c.buffer_decay * v;  // c_v and b are both β: one register
    } else {
      u = d;
    }
    p = p - c.lr * u;
  }
};

// No step: the moments of p, with v in the gradient's place.
struct Measure {
  using Rule = sgd::Rule;
  static constexpr bool updates = false, u_is_v = false;
  static constexpr int n_read = 1, n_written = 0;
  static constexpr int n_taken = Rule::n_common;
};

}  // namespace noetherperf::sgd
