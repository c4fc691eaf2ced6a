"""One element's update and its moments; mirrors csrc/step.h: same names, same order."""

from typing import NamedTuple

import triton
import triton.language as tl

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (tl.constexpr(i) for i in range(4))
PLAIN, MOMENTUM, NESTEROV, STALE, MEASURE = (tl.constexpr(i) for i in range(5))

# The interpreter cuts where a GPU rounds.
CUTS_BFLOAT16 = tl.constexpr(triton.knobs.runtime.interpret)


class Coefficients(NamedTuple):
    """d = s g + λ p,  v' = b v + a d,  u = c_d d + c_v v',  p' = p − η u."""

    lr: tl.tensor
    decay: tl.tensor
    sign: tl.tensor
    buffer_decay: tl.tensor
    buffer_gain: tl.tensor
    mix_d: tl.tensor
    mix_v: tl.tensor


class Moments(NamedTuple):
    sum_p: tl.tensor
    sq_p: tl.tensor
    sum_g: tl.tensor
    sq_g: tl.tensor
    dot_pg: tl.tensor
    sq_u: tl.tensor
    dot_uv: tl.tensor
    dot_gu: tl.tensor


N_MOMENTS = tl.constexpr(len(Moments._fields))


@triton.constexpr_function
def element(dtype):
    """What lies in memory."""
    return (tl.float32, tl.float64, tl.bfloat16, tl.float16)[dtype]


@triton.constexpr_function
def scalar(dtype):
    """What is computed in, and what sums inside a tile are."""
    return tl.float64 if dtype == 1 else tl.float32


@triton.constexpr_function
def writes_buffer(mode):
    return mode in (MOMENTUM.value, NESTEROV.value)


@triton.constexpr_function
def reads_buffer(mode):
    return mode in (MOMENTUM.value, NESTEROV.value, STALE.value)


@triton.constexpr_function
def n_accumulated(mode):
    """How many moments a mode accumulates; the others are zero."""
    return 8 if mode == NESTEROV.value else 7 if mode == STALE.value else 6


@triton.jit
def update(p, g, v, c, MODE: tl.constexpr):
    """(p', v', u) in the dtype of p; v' is v where the mode writes no buffer."""
    d = c.sign * g + c.decay * p
    if writes_buffer(MODE):
        v = c.buffer_decay * v + c.buffer_gain * d
    if MODE == MOMENTUM:
        u = v
    elif MODE == NESTEROV:
        u = d + c.mix_v * v
    else:
        u = d
    return p - c.lr * u, v, u


@triton.jit
def products(stored, p, g, u, v, MODE: tl.constexpr):
    """What one element adds to each moment. stored is p' as stored, after rounding to the dtype."""
    dot_uv = u * v if n_accumulated(MODE) > 6 else u
    dot_gu = g * u if n_accumulated(MODE) > 7 else u
    return Moments(stored, stored * stored, g, g * g, p * g, u * u, dot_uv, dot_gu)


@triton.jit
def accumulate(m, x, MODE: tl.constexpr):
    """Adds products to moments."""
    dot_uv = m.dot_uv + x.dot_uv if n_accumulated(MODE) > 6 else m.dot_uv
    dot_gu = m.dot_gu + x.dot_gu if n_accumulated(MODE) > 7 else m.dot_gu
    return Moments(
        m.sum_p + x.sum_p,
        m.sq_p + x.sq_p,
        m.sum_g + x.sum_g,
        m.sq_g + x.sq_g,
        m.dot_pg + x.dot_pg,
        m.sq_u + x.sq_u,
        dot_uv,
        dot_gu,
    )


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x as it is stored: rounded to the nearest, ties to even."""
    if DTYPE == BFLOAT16 and CUTS_BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(element(DTYPE))
