"""One segment's law state: transitions from (η, β, λ, τ), and their steps; mirrors csrc/laws.h, float64 throughout."""

from typing import NamedTuple

import triton
import triton.language as tl

from noetherperf.triton_kernels.step import MOMENTUM, NESTEROV, PLAIN, STALE, Coefficients

TRANSLATION, NORM = tl.constexpr(0), tl.constexpr(1)
NAN, INFINITY = tl.constexpr(float("nan")), tl.constexpr(float("inf"))
TURN, TURN_REST = tl.constexpr(6.2831853069365025), tl.constexpr(2.430840202602477e-10)  # 2π; the first has 33 bits
X0, Y0, X, X_REST, Y, DEFECT_X, DEFECT_Y, FLOW_X, FLOW_V = (tl.constexpr(i) for i in range(9))


@triton.jit
def mode_of(h, has_buffer, has_views):
    """The mode of a tensor's step; without views nothing reads the buffer that a step without momentum leaves."""
    without = tl.where(has_buffer & has_views, STALE, PLAIN)
    return tl.where(h.momentum == 0.0, without, tl.where(h.nesterov != 0, NESTEROV, MOMENTUM))


class Transition(NamedTuple):
    xx: tl.tensor
    xy: tl.tensor
    yx: tl.tensor
    yy: tl.tensor
    x_delta: tl.tensor
    y_delta: tl.tensor
    x_sq_u: tl.tensor
    y_sq_u: tl.tensor
    y_dot_uv: tl.tensor
    x_pull: tl.tensor
    x_pull_rest: tl.tensor
    xy_rest: tl.tensor
    x_delta_rest: tl.tensor
    x_sq_u_rest: tl.tensor


class FlowTransition(NamedTuple):
    xx: tl.tensor
    xv: tl.tensor
    vx: tl.tensor
    vv: tl.tensor
    x_sq_g: tl.tensor
    v_sq_u: tl.tensor
    v_dot_gu: tl.tensor


@triton.jit
def coefficients(h, first):
    one, zero = tl.cast(1.0, tl.float64), tl.cast(0.0, tl.float64)
    sign = tl.where(h.maximize != 0, -one, one)
    gain = tl.where(first != 0, one, 1.0 - h.dampening)
    has_momentum, nesterov = h.momentum != 0.0, h.nesterov != 0
    return Coefficients(
        h.lr,
        h.weight_decay,
        sign,
        tl.where(has_momentum, h.momentum, one),
        tl.where(has_momentum, gain, zero),
        tl.where(has_momentum & (h.nesterov == 0), zero, one),
        tl.where(has_momentum, tl.where(nesterov, h.momentum, one), zero),
    )


class Exact(NamedTuple):
    """A number and what its rounding left out."""

    value: tl.tensor
    rest: tl.tensor


@triton.jit
def two_sum(a, b):
    """a + b, exactly."""
    total = a + b
    of_b = total - a
    return Exact(total, (a - (total - of_b)) + (b - of_b))


@triton.jit
def times(a, b):
    """A number and its rest times a number, in as many digits."""
    product = a.value * b
    rest = tl.fma(a.value, b, -product)
    return Exact(product, tl.where(tl.abs(rest) < INFINITY, rest, 0.0) + a.rest * b)


@triton.jit
def discrete_transition(LAW: tl.constexpr, c):
    kappa_lr = (LAW + 1.0) * c.lr
    is_norm = LAW * 1.0
    same = c.mix_d == 0.0  # u = v', whose ⟨u, v'⟩ is |u|²
    zero = tl.cast(0.0, tl.float64)
    x_delta = times(two_sum(c.mix_d, c.mix_v * c.buffer_gain), -kappa_lr * c.sign)
    x_pull = times(x_delta, c.sign * c.decay)
    xy = times(times(Exact(c.mix_v, zero), c.buffer_decay), -kappa_lr)
    x_sq_u = times(Exact(c.lr, zero), is_norm * c.lr)
    return Transition(
        1.0 + x_pull.value,
        xy.value,
        c.buffer_gain * c.decay,
        c.buffer_decay,
        x_delta.value,
        c.buffer_gain * c.sign,
        x_sq_u.value,
        tl.where(same, -is_norm * c.lr, 0.0),
        tl.where(same, 0.0, -is_norm * c.lr),
        x_pull.value,
        x_pull.rest,
        xy.rest,
        x_delta.rest,
        x_sq_u.rest,
    )


@triton.jit
def duration(h):
    """T, the time of one step in units of the learning rate."""
    return tl.where(h.momentum != 0.0, h.lr * (1.0 - h.dampening), h.lr)


@triton.jit
def even_odd(delta, TERMS: tl.constexpr):
    """cosh √Δ and sinh √Δ / √Δ (below zero cos √−Δ and sin √−Δ / √−Δ), by their series."""
    cosh, sinh = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    even, odd = tl.cast(1.0, tl.float64), tl.cast(1.0, tl.float64)
    for k in tl.static_range(TERMS):
        cosh += even
        sinh += odd
        even *= delta / ((2 * k + 1) * (2 * k + 2))
        odd *= delta / ((2 * k + 2) * (2 * k + 3))
    return cosh, sinh


@triton.jit
def sin_cos(x):
    """Sine and cosine, without the table in memory by which the library's reduce arguments of any size."""
    turns = tl.floor(x / TURN + 0.5)
    rest = (x - turns * TURN) - turns * TURN_REST  # within ±π, where 16 terms leave 1e-17; the first product is exact
    cosine, sine = even_odd(-rest * rest, 16)
    return rest * sine, cosine


@triton.jit
def oscillator(mu, w):
    """e^{−μ}(C + μS) and e^{−μ}S, with C = cosh √Δ, S = sinh √Δ / √Δ, Δ = μ² − w."""
    delta = mu * mu - w
    decay = tl.exp(-mu)
    if delta > 0.01:
        root = tl.sqrt(delta)
        fast = -(mu + tl.where(mu < 0.0, -root, root))  # below zero where the oscillator is damped
        slow = w / fast
        s = (tl.exp(slow) - tl.exp(fast)) / (slow - fast)
        xx = tl.exp(slow) - slow * s
    elif delta < -0.01:
        root = tl.sqrt(-delta)
        sine, cosine = sin_cos(root)
        s = decay * sine / root
        xx = decay * cosine + mu * s
    else:
        cosh, sinh = even_odd(delta, 8)
        s = decay * sinh
        xx = decay * (cosh + mu * sinh)
    return xx, s


@triton.jit
def flow_transition(LAW: tl.constexpr, h):
    kappa = LAW + 1.0
    is_norm = LAW * 1.0
    one = tl.cast(1.0, tl.float64)
    has_momentum = h.momentum != 0.0
    inertia = 1.0 + h.momentum
    extra = tl.where(h.nesterov != 0, h.momentum * h.weight_decay * h.lr, 0.0)
    mu = (1.0 - h.momentum + extra) / inertia
    stiffness = 2.0 * kappa * h.weight_decay / inertia  # ω²T
    undamped = 1.0 - h.dampening
    time = h.lr * undamped
    xx, s = oscillator(mu, stiffness * time)
    exists = undamped != 0.0
    v_sq_u = tl.where(exists, is_norm * 2.0 * h.lr / tl.where(exists, undamped, one), NAN * is_norm)
    sign = tl.where(h.maximize != 0, -one, one)
    v_dot_gu = tl.where(h.nesterov != 0, -is_norm * sign * h.lr * 4.0 * h.momentum / inertia, 0.0)
    return FlowTransition(
        tl.where(has_momentum, xx, tl.exp(-kappa * h.weight_decay * h.lr)),
        tl.where(has_momentum, time * s, 0.0),
        tl.where(has_momentum, -stiffness * s, 0.0),
        tl.where(has_momentum, xx - 2.0 * mu * s, 1.0),
        tl.where(has_momentum, 0.0, is_norm * h.lr * h.lr),
        tl.where(has_momentum, v_sq_u, 0.0),
        tl.where(has_momentum, v_dot_gu, 0.0),
    )


class Transitions(NamedTuple):
    """Everything that moves the laws of one tensor in one step; 0 translation, 1 norm."""

    discrete_0: Transition
    discrete_1: Transition
    flow_0: FlowTransition
    flow_1: FlowTransition


@triton.jit
def transitions(h, first):
    c = coefficients(h, first)
    return Transitions(
        discrete_transition(TRANSLATION, c),
        discrete_transition(NORM, c),
        flow_transition(TRANSLATION, h),
        flow_transition(NORM, h),
    )


@triton.jit
def advance_budget(LAW: tl.constexpr, state, stride, m, step, delta, mask):
    """Advances the budget of segments by moments m, the source δ among them."""
    x = tl.load(state + X * stride, mask)
    y = tl.load(state + Y * stride, mask)
    rest = tl.load(state + X_REST * stride, mask)
    x_added = step.x_pull * x + step.xy * y + step.x_delta * delta + rest
    x_added += step.x_pull_rest * x + step.xy_rest * y + step.x_delta_rest * delta
    y_new = step.yx * x + step.yy * y + step.y_delta * delta
    if LAW == NORM:
        x_added += step.x_sq_u * m.sq_u + step.x_sq_u_rest * m.sq_u
        y_new += step.y_sq_u * m.sq_u + step.y_dot_uv * m.dot_uv
    x_new = two_sum(x, x_added)
    tl.store(state + X * stride, x_new.value, mask)
    tl.store(state + X_REST * stride, x_new.rest, mask)
    tl.store(state + Y * stride, y_new, mask)


@triton.jit
def advance_translation(state, stride, m, step, mask):
    """Advances segments of a translation's state [5, stride], whose first row `state` points to, by moments m."""
    advance_budget(TRANSLATION, state, stride, m, step, m.sum_g, mask)


@triton.jit
def advance_norm(state, stride, m, step, flow, mask):
    """The same for a norm's state [9, stride]."""
    advance_budget(NORM, state, stride, m, step, m.dot_pg, mask)
    x = tl.load(state + DEFECT_X * stride, mask)
    y = tl.load(state + DEFECT_Y * stride, mask)
    tl.store(state + DEFECT_X * stride, step.xx * x + step.xy * y + step.x_delta * m.dot_pg, mask)
    tl.store(state + DEFECT_Y * stride, step.yx * x + step.yy * y + step.y_delta * m.dot_pg, mask)
    x = tl.load(state + FLOW_X * stride, mask) + flow.x_sq_g * m.sq_g
    v = tl.load(state + FLOW_V * stride, mask) + flow.v_sq_u * m.sq_u + flow.v_dot_gu * m.dot_gu
    tl.store(state + FLOW_X * stride, flow.xx * x + flow.xv * v, mask)
    tl.store(state + FLOW_V * stride, flow.vx * x + flow.vv * v, mask)


@triton.jit
def propagate(m, xx, xy, yx, yy):
    """Multiplies a propagator [2, 2] from the left by one step's matrix."""
    a, b, c, d = tl.load(m), tl.load(m + 1), tl.load(m + 2), tl.load(m + 3)
    tl.store(m, xx * a + xy * c)
    tl.store(m + 1, xx * b + xy * d)
    tl.store(m + 2, yx * a + yy * c)
    tl.store(m + 3, yx * b + yy * d)


@triton.jit
def propagate_all(propagators, t):
    """One tensor's propagators [law, discrete or flow, 2, 2]."""
    propagate(propagators, t.discrete_0.xx, t.discrete_0.xy, t.discrete_0.yx, t.discrete_0.yy)
    propagate(propagators + 4, t.flow_0.xx, t.flow_0.xv, t.flow_0.vx, t.flow_0.vv)
    propagate(propagators + 8, t.discrete_1.xx, t.discrete_1.xy, t.discrete_1.yx, t.discrete_1.yy)
    propagate(propagators + 12, t.flow_1.xx, t.flow_1.xv, t.flow_1.vx, t.flow_1.vv)
