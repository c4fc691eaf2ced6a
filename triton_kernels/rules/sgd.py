"""Stochastic gradient descent with momentum: one element's update. Mirrors csrc/rules/sgd.h: same names, same order.

Variants, coefficients and moments are those of noetherperf/rules/sgd.py.
"""

import triton
import triton.language as tl

from noetherperf.rules.sgd import SGD as rule
from noetherperf.rules.sgd import Coefficients
from noetherperf.rules.sgd import Variant as variants

__all__ = ["coefficients", "divides", "n_read", "n_taken", "n_written", "rule", "update", "variants"]

divides = False

PLAIN, MOMENTUM, NESTEROV, IDLE = (tl.constexpr(int(variant)) for variant in variants)


@triton.constexpr_function
def n_written(variant):
    return 1 if variant in (MOMENTUM.value, NESTEROV.value) else 0


@triton.constexpr_function
def n_read(variant):
    return 1 if variant == IDLE.value else n_written(variant)


@triton.constexpr_function
def n_taken(variant):
    """How many of the moments a variant sums."""
    return 8 if variant == NESTEROV.value else 7 if variant == IDLE.value else 6


@triton.jit
def coefficients(numbers):
    return numbers


@triton.jit
def update(p, g, buffers, c, VARIANT: tl.constexpr):
    c = Coefficients(*c)
    # s g, s = ±1: the compiler would pair a product with λ p in vectors, which need more registers than sm_100 has
    d = tl.where(c.sign < 0.0, -g, g) + c.decay * p
    if n_written(VARIANT) > 0:
        buffers = (c.buffer_decay * buffers[0] + c.buffer_gain * d,)
    if VARIANT == MOMENTUM:
        u = buffers[0]
    elif VARIANT == NESTEROV:
        u = d + c.mix_v * buffers[0]
    else:
        u = d
    return p - c.lr * u, buffers, u
