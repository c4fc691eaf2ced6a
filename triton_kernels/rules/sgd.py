"""Stochastic gradient descent with momentum: one element's update. Mirrors csrc/rules/sgd.h: same names, same order.

Variants, coefficients and moments are those of noetherperf/rules/sgd.py.
"""

import triton
import triton.language as tl

from noetherperf.rules.sgd import SGD as rule
from noetherperf.rules.sgd import Coefficients
from noetherperf.rules.sgd import Variant as variants

__all__ = ["n_taken", "reads_buffer", "rule", "update", "variants", "writes_buffer"]

PLAIN, MOMENTUM, NESTEROV, IDLE = (tl.constexpr(int(variant)) for variant in variants)


@triton.constexpr_function
def writes_buffer(variant):
    return variant in (MOMENTUM.value, NESTEROV.value)


@triton.constexpr_function
def reads_buffer(variant):
    return writes_buffer(variant) or variant == IDLE.value


@triton.constexpr_function
def n_taken(variant):
    """How many of the moments a variant sums."""
    return 8 if variant == NESTEROV.value else 7 if variant == IDLE.value else 6


@triton.jit
def update(p, g, v, c, VARIANT: tl.constexpr):
    c = Coefficients(*c)
    # s g, s = ±1: the compiler would pair a product with λ p in vectors, which need more registers than sm_100 has
    d = tl.where(c.sign < 0.0, -g, g) + c.decay * p
    if writes_buffer(VARIANT):
        v = c.buffer_decay * v + c.buffer_gain * d
    if VARIANT == MOMENTUM:
        u = v
    elif VARIANT == NESTEROV:
        u = d + c.mix_v * v
    else:
        u = d
    return p - c.lr * u, v, u
