"""Moments: the sums of a step, a tuple with one tensor per moment, in the order of the rule's list.

The list is a compile-time constant, pairs of operands; the functions here fold over it. Mirrors csrc/moments.h.
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


@triton.jit
def product(x, STEP: tl.constexpr, i: tl.constexpr):
    """Each element's term of moment i."""
    OPERANDS: tl.constexpr = STEP.moments[i]
    if OPERANDS[1] < 0:  # the number one
        return x[OPERANDS[0]]
    else:
        return x[OPERANDS[0]] * x[OPERANDS[1]]


@triton.jit
def products(x, STEP: tl.constexpr):
    """Each element's terms of the moments that a step sums."""
    m = ()
    for i in tl.static_range(len(STEP.moments)):
        m = m + (product(x, STEP, i),)
    return m


@triton.jit
def zeros(N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """N moments [R, C] of zeros."""
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
    """Moments [R, C] summed over each V columns, [R, C / V]: the elements of one thread, so threads do not wait."""
    SHAPE: tl.constexpr = [m[0].shape[0], m[0].shape[1] // V, V]
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (tl.sum(tl.reshape(m[i], SHAPE), 2),)
    return sums
