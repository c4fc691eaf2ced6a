// Moments: the sums of a step, as a list of pairs of operands. Kernels fold over the list. Mirrors
// noetherperf/rules/moments.py.
#pragma once

#include <cstddef>
#include <utility>

#include "arithmetic.h"

namespace noetherperf {

enum class Operand : int {
  one,
  p,      // the parameter before the step
  p_new,  // and after it, as stored
  g,      // the gradient of the loss alone
  u,      // the update
  v,      // the first buffer after the step
};

// The moment ⟨a, b⟩.
struct Moment {
  const char* name;
  Operand a, b;

  constexpr bool has(Operand x) const { return a == x || b == x; }
  // The power of the gradient's scale to which it is proportional, for a fixed update.
  constexpr int degree_in_gradient() const { return (a == Operand::g) + (b == Operand::g); }
};

// Whether a moment needs a step's results.
constexpr bool is_of_results(const Moment& moment) {
  const auto given = [](Operand x) { return x == Operand::one || x == Operand::p || x == Operand::g; };
  return !given(moment.a) || !given(moment.b);
}

// One element (or vector of elements) of each operand.
template <class D>
struct Operands {
  D p, p_new, g, u, v;

  template <Operand which>
  NPERF_HD constexpr const D& get() const {
    static_assert(which != Operand::one);
    if constexpr (which == Operand::p) return p;
    if constexpr (which == Operand::p_new) return p_new;
    if constexpr (which == Operand::g) return g;
    if constexpr (which == Operand::u) return u;
    return v;
  }
};

// Selects every moment; the default of `accumulate`.
struct Every {
  static NPERF_HD constexpr bool takes(int) { return true; }
};

// Adds one element (or vector of elements) to moment i of a rule's list, if Selected takes it.
template <class Rule, class Selected, size_t i, class D>
NPERF_HD void add_moment(D* sums, const Operands<D>& x) {
  if constexpr (Selected::takes(i)) {
    constexpr Operand a = Rule::moments[i].a, b = Rule::moments[i].b;
    if constexpr (b == Operand::one) {
      sums[i] += x.template get<a>();
    } else {
      sums[i] += x.template get<a>() * x.template get<b>();
    }
  }
}

template <class Rule, class Selected, class D, size_t... i>
NPERF_HD void add_moments(D* sums, const Operands<D>& x, std::index_sequence<i...>) {
  (add_moment<Rule, Selected, i>(sums, x), ...);
}

// Adds one element (or vector of elements) to the moments that a step sums: the first of its rule's list.
template <class Step, class Selected = Every, class D>
NPERF_HD void accumulate(D* sums, const Operands<D>& x) {
  add_moments<typename Step::Rule, Selected>(sums, x, std::make_index_sequence<Step::n_taken>{});
}

}  // namespace noetherperf
