"""A step that another optimizer has made: one element's update. Mirrors csrc/rules/given.h: same names, same order.

Coefficients and moments are those of noetherperf/rules/given.py.
"""

import triton
import triton.language as tl

from noetherperf.rules.given import GIVEN as rule
from noetherperf.rules.given import Coefficients

__all__ = ["coefficients", "divides", "n_read", "n_taken", "n_written", "rule", "update", "variants"]

variants = (0,)
divides = False


@triton.constexpr_function
def n_written(variant):
    return 0


@triton.constexpr_function
def n_read(variant):
    return 1


@triton.constexpr_function
def n_taken(variant):
    """How many of the moments a variant sums."""
    return 8


@triton.jit
def coefficients(numbers):
    return numbers


@triton.jit
def update(p, g, buffers, c, VARIANT: tl.constexpr):
    c = Coefficients(*c)
    # the difference comes first: it is exact where p and v are close
    u = c.per_lr * (p - buffers[0]) - c.decay * p
    return buffers[0], buffers, u
