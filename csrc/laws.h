// One segment's law state: the transitions from (η, β, λ, τ), and advance(state, moments, transition).
//
// Mirrors noetherperf/rules/laws.py line for line, where the formulas are derived; float64 throughout.
#pragma once

#include <cmath>
#include <cstdint>

#include "step.h"

namespace noetherperf {

struct Hyper {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov, maximize;
};

enum Law : int { translation, norm, n_laws };
enum State : int { x0, y0, x_sum, x_rest, y_sum, defect_x, defect_y, flow_x, flow_v, n_state };

// Rows of a law's state, of which a step changes those from x_sum on.
NPERF_HD constexpr int n_rows(Law law) { return law == norm ? n_state : defect_x; }

// The mode of a tensor's step; without views nothing reads the buffer that a step without momentum leaves.
NPERF_HD Mode mode_of(const Hyper& h, bool has_buffer, bool has_views) {
  if (h.momentum == 0.0) return has_buffer && has_views ? Mode::stale : Mode::plain;
  return h.nesterov ? Mode::nesterov : Mode::momentum;
}

struct Transition {
  double xx, xy, yx, yy, x_delta, y_delta, x_sq_u, y_sq_u, y_dot_uv, x_pull;
  double x_pull_rest, xy_rest, x_delta_rest, x_sq_u_rest;
};

struct FlowTransition {
  double xx, xv, vx, vv, x_sq_g, v_sq_u, v_dot_gu;
};

NPERF_HD Coefficients<double> coefficients(const Hyper& h, bool first) {
  const double sign = h.maximize ? -1.0 : 1.0;
  if (h.momentum == 0.0) return {h.lr, h.weight_decay, sign, 1.0, 0.0, 1.0, 0.0};
  const double gain = first ? 1.0 : 1.0 - h.dampening;
  if (h.nesterov) return {h.lr, h.weight_decay, sign, h.momentum, gain, 1.0, h.momentum};
  return {h.lr, h.weight_decay, sign, h.momentum, gain, 0.0, 1.0};
}

// A number and what its rounding left out.
struct Exact {
  double value, rest;
};

// a + b and a · b, exactly.
NPERF_HD Exact two_sum(double a, double b) {
  const double total = a + b, of_b = total - a;
  return {total, (a - (total - of_b)) + (b - of_b)};
}
NPERF_HD Exact two_product(double a, double b) {
  const double product = a * b, rest = std::fma(a, b, -product);
  return {product, std::isfinite(rest) ? rest : 0.0};
}
NPERF_HD Exact times(const Exact& a, double b) {
  const Exact product = two_product(a.value, b);
  return {product.value, product.rest + a.rest * b};
}

NPERF_HD Transition discrete_transition(Law law, const Coefficients<double>& c) {
  const double kappa_lr = (law + 1.0) * c.lr;
  const double is_norm = law == norm ? 1.0 : 0.0;
  const bool same = c.mix_d == 0.0;  // u = v', whose ⟨u, v'⟩ is |u|²
  const Exact x_delta = times(two_sum(c.mix_d, c.mix_v * c.buffer_gain), -kappa_lr * c.sign);
  const Exact x_pull = times(x_delta, c.sign * c.decay);
  const Exact xy = times(times({c.mix_v, 0.0}, c.buffer_decay), -kappa_lr);
  const Exact x_sq_u = times({c.lr, 0.0}, is_norm * c.lr);
  return {1.0 + x_pull.value,
          xy.value,
          c.buffer_gain * c.decay,
          c.buffer_decay,
          x_delta.value,
          c.buffer_gain * c.sign,
          x_sq_u.value,
          same ? -is_norm * c.lr : 0.0,
          same ? 0.0 : -is_norm * c.lr,
          x_pull.value,
          x_pull.rest,
          xy.rest,
          x_delta.rest,
          x_sq_u.rest};
}

// T, the time of one step in units of the learning rate.
NPERF_HD double duration(const Hyper& h) { return h.momentum != 0.0 ? h.lr * (1.0 - h.dampening) : h.lr; }

// Sine and cosine. On a GPU through those of multiples of π, whose arguments are reduced without a table in memory.
NPERF_HD void sin_cos(double x, double& sine, double& cosine) {
#if defined(__CUDA_ARCH__)
  sincospi(x * 0.31830988618379067154, &sine, &cosine);
#else
  sine = std::sin(x);
  cosine = std::cos(x);
#endif
}

// e^{−μ}(C + μS) and e^{−μ}S, with C = cosh √Δ, S = sinh √Δ / √Δ, Δ = μ² − w.
NPERF_HD void oscillator(double mu, double w, double& xx, double& s) {
  const double delta = mu * mu - w;
  if (delta > 0.01) {
    const double fast = -(mu + std::copysign(std::sqrt(delta), mu));  // below zero where the oscillator is damped
    const double slow = w / fast;
    s = (std::exp(slow) - std::exp(fast)) / (slow - fast);
    xx = std::exp(slow) - slow * s;
    return;
  }
  const double decay = std::exp(-mu);
  if (delta < -0.01) {
    const double root = std::sqrt(-delta);
    double sine, cosine;
    sin_cos(root, sine, cosine);
    s = decay * sine / root;
    xx = decay * cosine + mu * s;
    return;
  }
  double cosh = 0.0, sinh = 0.0, even = 1.0, odd = 1.0;
  for (int k = 0; k < 8; ++k) {
    cosh += even;
    sinh += odd;
    even *= delta / ((2 * k + 1) * (2 * k + 2));
    odd *= delta / ((2 * k + 2) * (2 * k + 3));
  }
  s = decay * sinh;
  xx = decay * (cosh + mu * sinh);
}

NPERF_HD FlowTransition flow_transition(Law law, const Hyper& h) {
  const double kappa = law + 1.0;
  const double is_norm = law == norm ? 1.0 : 0.0;
  if (h.momentum == 0.0)
    return {std::exp(-kappa * h.weight_decay * h.lr), 0.0, 0.0, 1.0, is_norm * h.lr * h.lr, 0.0, 0.0};
  const double inertia = 1.0 + h.momentum;
  const double extra = h.nesterov ? h.momentum * h.weight_decay * h.lr : 0.0;
  const double mu = (1.0 - h.momentum + extra) / inertia;
  const double stiffness = 2.0 * kappa * h.weight_decay / inertia;  // ω²T
  const double undamped = 1.0 - h.dampening;
  const double duration = h.lr * undamped;
  double xx, s;
  oscillator(mu, stiffness * duration, xx, s);
  const double v_sq_u = undamped != 0.0 ? is_norm * 2.0 * h.lr / undamped : NAN * is_norm;
  const double sign = h.maximize ? -1.0 : 1.0;
  const double v_dot_gu = h.nesterov ? -is_norm * sign * h.lr * 4.0 * h.momentum / inertia : 0.0;
  return {xx, duration * s, -stiffness * s, xx - 2.0 * mu * s, 0.0, v_sq_u, v_dot_gu};
}

// Everything that moves the laws of one tensor in one step.
struct Transitions {
  Transition discrete[n_laws];
  FlowTransition flow[n_laws];
};

NPERF_HD Transitions transitions(const Hyper& h, bool first) {
  const Coefficients<double> c = coefficients(h, first);
  Transitions t;
  for (int law = 0; law < n_laws; ++law) {
    t.discrete[law] = discrete_transition(static_cast<Law>(law), c);
    t.flow[law] = flow_transition(static_cast<Law>(law), h);
  }
  return t;
}

// Advances the budget of segment i by moments [n_moments, moment_stride] of segment i, the source δ among them.
template <Law law>
NPERF_HD void advance_budget(double* state, int64_t stride, const double* moments, int64_t moment_stride,
                             const Transition& step, double delta, int64_t i) {
  const double x = state[x_sum * stride + i], y = state[y_sum * stride + i];
  double x_added = step.x_pull * x + step.xy * y + step.x_delta * delta + state[x_rest * stride + i];
  x_added += step.x_pull_rest * x + step.xy_rest * y + step.x_delta_rest * delta;
  double y_new = step.yx * x + step.yy * y + step.y_delta * delta;
  if constexpr (law == norm) {
    const double sq_update = moments[sq_u * moment_stride + i];
    x_added += step.x_sq_u * sq_update + step.x_sq_u_rest * sq_update;
    y_new += step.y_sq_u * sq_update + step.y_dot_uv * moments[dot_uv * moment_stride + i];
  }
  const Exact x_new = two_sum(x, x_added);
  state[x_sum * stride + i] = x_new.value;
  state[x_rest * stride + i] = x_new.rest;
  state[y_sum * stride + i] = y_new;
}

// Advances segment i of a translation's state [n_rows, stride] by moments [n_moments, moment_stride].
NPERF_HD void advance_translation(double* state, int64_t stride, const double* moments, int64_t moment_stride,
                                  const Transitions& t, int64_t i) {
  const double delta = moments[sum_g * moment_stride + i];
  advance_budget<translation>(state, stride, moments, moment_stride, t.discrete[translation], delta, i);
}

// The same for a norm's state.
NPERF_HD void advance_norm(double* state, int64_t stride, const double* moments, int64_t moment_stride,
                           const Transitions& t, int64_t i) {
  const Transition& step = t.discrete[norm];
  const double delta = moments[dot_pg * moment_stride + i];
  advance_budget<norm>(state, stride, moments, moment_stride, step, delta, i);
  double x = state[defect_x * stride + i], y = state[defect_y * stride + i];
  state[defect_x * stride + i] = step.xx * x + step.xy * y + step.x_delta * delta;
  state[defect_y * stride + i] = step.yx * x + step.yy * y + step.y_delta * delta;
  const FlowTransition& flow = t.flow[norm];
  x = state[flow_x * stride + i] + flow.x_sq_g * moments[sq_g * moment_stride + i];
  const double v = state[flow_v * stride + i] + flow.v_sq_u * moments[sq_u * moment_stride + i] +
                   flow.v_dot_gu * moments[dot_gu * moment_stride + i];
  state[flow_x * stride + i] = flow.xx * x + flow.xv * v;
  state[flow_v * stride + i] = flow.vx * x + flow.vv * v;
}

// Multiplies a propagator [2, 2] from the left by one step's matrix (the first four numbers of a transition).
NPERF_HD void propagate(double* m, double xx, double xy, double yx, double yy) {
  const double a = m[0], b = m[1];
  m[0] = xx * a + xy * m[2];
  m[1] = xx * b + xy * m[3];
  m[2] = yx * a + yy * m[2];
  m[3] = yx * b + yy * m[3];
}

// One tensor's propagators [n_laws, discrete or flow, 2, 2].
NPERF_HD void propagate(double* propagators, const Transitions& t) {
  for (int law = 0; law < n_laws; ++law) {
    const Transition& d = t.discrete[law];
    const FlowTransition& f = t.flow[law];
    propagate(propagators + law * 8, d.xx, d.xy, d.yx, d.yy);
    propagate(propagators + law * 8 + 4, f.xx, f.xv, f.vx, f.vv);
  }
}

}  // namespace noetherperf
