"""Moments: the sums that a step takes, a tuple with one tensor a moment, in the order of the rule's list.

The list comes as pairs of operands (a compile-time constant); all here folds over it. Mirrors csrc/moments.h.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Operands(NamedTuple):
    """A block of each operand, in the order of noetherperf.rules.moments.Operand without the number one."""

    p: tl.tensor
    p_new: tl.tensor
    g: tl.tensor
    u: tl.tensor
    v: tl.tensor


@triton.constexpr_function
def n_summed(step):
    """How many moments a step sums."""
    return len(step.moments)


@triton.constexpr_function
def operand(step, i, which):
    """The first or second operand of moment i."""
    return step.moments[i][which]


@triton.constexpr_function
def is_plain(step, i):
    """Whether moment i sums its first operand alone."""
    return step.moments[i][1] < 0


@triton.jit
def product(x, STEP: tl.constexpr, i: tl.constexpr):
    """What each element adds to moment i."""
    if is_plain(STEP, i):
        return x[operand(STEP, i, 0)]
    else:
        return x[operand(STEP, i, 0)] * x[operand(STEP, i, 1)]


@triton.jit
def products(x, STEP: tl.constexpr):
    """What each element adds to the moments that a step sums."""
    m = ()
    for i in tl.static_range(n_summed(STEP)):
        m = m + (product(x, STEP, i),)
    return m


@triton.jit
def zeros(N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """N moments [R, C] of nothing."""
    zero = tl.zeros([R, C], S)
    m = ()
    for _ in tl.static_range(N):
        m = m + (zero,)
    return m


@triton.jit
def add(m, x, N: tl.constexpr):
    """Sums of two sets of N moments."""
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (m[i] + x[i],)
    return sums


@triton.jit
def sums_along(m, AXIS: tl.constexpr, N: tl.constexpr):
    """N moments summed along an axis."""
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (tl.sum(m[i], AXIS),)
    return sums


@triton.jit
def sums_of_vectors(m, V: tl.constexpr, N: tl.constexpr):
    """Moments [R, C] summed over each V columns, [R, C / V]: what a thread holds, so no thread waits for another."""
    SHAPE: tl.constexpr = [m[0].shape[0], m[0].shape[1] // V, V]
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (tl.sum(tl.reshape(m[i], SHAPE), 2),)
    return sums
