"""Adam and AdamW: one element's update. Mirrors csrc/rules/adam.h: same names, same order.

Variants and moments are those of noetherperf/rules/adam.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from noetherperf.rules.adam import ADAM as rule
from noetherperf.rules.adam import Variant as variants

__all__ = ["coefficients", "divides", "n_read", "n_taken", "n_written", "rule", "update", "variants"]

divides = True  # 0/0 where eps is 0


PLAIN, AMSGRAD = (tl.constexpr(int(variant)) for variant in variants)


class Coefficients(NamedTuple):
    """d = s g + λ p,  m' = m + (1 − β₁)(d − m),  n' = β₂ n + (1 − β₂) d²,  D = √n'/√e + ε,  u = m'/(c D).

    p' = r p − η u.
    """

    lr: tl.tensor  # η
    keep: tl.tensor  # r: 1 − ηλ with decoupled decay, else 1
    decay: tl.tensor  # λ with coupled decay, else 0
    sign: tl.tensor  # s
    mean_gain: tl.tensor  # 1 − β₁
    sq_decay: tl.tensor  # β₂
    sq_gain: tl.tensor  # 1 − β₂
    eps: tl.tensor  # ε
    inverse_c: tl.tensor  # 1/c
    inverse_root_e: tl.tensor  # 1/√e


@triton.constexpr_function
def n_written(variant):
    return 3 if variant == AMSGRAD.value else 2


@triton.constexpr_function
def n_read(variant):
    return n_written(variant)


@triton.constexpr_function
def n_taken(variant):
    """How many of the moments a variant sums."""
    return 8


@triton.jit
def coefficients(numbers):
    lr, keep, decay, sign, beta1, beta2, eps, c, root_e, _ = numbers
    return (lr, keep, decay, sign, 1.0 - beta1, beta2, 1.0 - beta2, eps, 1.0 / c, 1.0 / root_e)


@triton.jit
def update(p, g, buffers, c, VARIANT: tl.constexpr):
    c = Coefficients(*c)
    # s g, s = ±1, chosen and not multiplied: as in sgd.py
    d = tl.where(c.sign < 0.0, -g, g) + c.decay * p
    m = buffers[0] + c.mean_gain * (d - buffers[0])
    n = c.sq_decay * buffers[1] + c.sq_gain * (d * d)
    written = (m, n)
    scale = n
    if VARIANT == AMSGRAD:
        scale = tl.maximum(buffers[2], n, tl.PropagateNan.ALL)
        written = (m, n, scale)
    u = c.inverse_c * (m / (c.inverse_root_e * tl.sqrt(scale) + c.eps))
    return c.keep * p - c.lr * u, written, u
