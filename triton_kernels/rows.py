"""A rule as data: the variants and rows of numbers of parameter groups, and the components of its laws.

Components are compile-time constants, over which kernels unroll. Mirrors csrc/rows.h and the dtypes of
noetherperf/engines/rows.py; the recursions are explained in noetherperf/rules/law.py. float64 throughout.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from noetherperf.triton_kernels.plan import high, low


class Group(NamedTuple):
    variant: tl.tensor
    ages: tl.tensor
    row: tl.tensor


# ---- groups and ages -------------------------------------------------------------------------------------------------


@triton.jit
def load_group(groups, i):
    word = tl.load(groups + 2 * i)
    return Group(low(word), high(word), low(tl.load(groups + 2 * i + 1)))


@triton.jit
def load_ages(groups, i, mask):
    """Whether a step increments the ages of these groups' tensors."""
    return high(tl.load(groups + 2 * i, mask, 0)) != 0


@triton.jit
def variant_of(RULE: tl.constexpr, of_group, has_buffer, has_views):
    """The variant of a tensor's step. Without views, nothing reads an idle buffer."""
    variant = of_group
    for i in tl.static_range(len(RULE.idle)):
        is_idle = (of_group == RULE.idle[i][0]) & has_buffer & has_views
        variant = tl.where(is_idle, RULE.idle[i][1], variant)
    return variant


@triton.jit
def n_taken(RULE: tl.constexpr, variant):
    """How many of the moments a variant sums."""
    n = variant * 0 + RULE.taken[0]
    for i in tl.static_range(1, len(RULE.taken)):
        n = tl.where(variant == i, RULE.taken[i], n)
    return n


@triton.jit
def choose_row(RULE: tl.constexpr, first, given_age, known_age):
    """The index of a tensor's row, from its row of age 0 and its age, which is 0 if its buffers are new."""
    age = tl.where(given_age == 0, 0, known_age).to(tl.int64)
    return first.to(tl.int64) + tl.minimum(age, RULE.n_ages - 1)


@triton.jit
def load_coefficients(RULE: tl.constexpr, COEFFICIENTS: tl.constexpr, numbers, S: tl.constexpr):
    """The update's coefficients, from the first numbers of a row; computed in float64 and rounded once."""
    given = ()
    for i in tl.static_range(len(RULE.coefficients)):
        given = given + (tl.load(numbers + i),)
    exact = COEFFICIENTS(given)
    c = ()
    for i in tl.static_range(len(exact)):
        c = c + (exact[i].to(S),)
    return c


# ---- laws ------------------------------------------------------------------------------------------------------------


@triton.jit
def two_sum(a, b):
    """The rounded sum a + b, and its rounding error, which is exact."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def driven(coefficient, moment):
    """Their product, 0 for a coefficient of 0: a moment without coefficients may be NaN."""
    return tl.where(coefficient != 0.0, coefficient * moment, 0.0)


@triton.constexpr_function
def number(component, row, column):
    """A coefficient's index in a row of numbers: A's and B's rows, then those of the rests; A's columns, then B's."""
    return component.numbers + row * (component.size + len(component.moments)) + column


@triton.jit
def applied(RULE: tl.constexpr, i: tl.constexpr, ROW: tl.constexpr, numbers, x, y, m):
    """A row of component i's coefficients times its numbers x, y and the moments that drive it."""
    COMPONENT: tl.constexpr = RULE.components[i]
    total = tl.load(numbers + number(COMPONENT, ROW, 0)) * x
    if COMPONENT.size > 1:
        total += tl.load(numbers + number(COMPONENT, ROW, 1)) * y
    for k in tl.static_range(len(COMPONENT.moments)):
        total += driven(tl.load(numbers + number(COMPONENT, ROW, COMPONENT.size + k)), m[COMPONENT.moments[k]])
    return total


@triton.jit
def advance(RULE: tl.constexpr, i: tl.constexpr, numbers, state, stride, m, mask):
    """Advances component i of segments by moments m.

    `state` points to the first number of each segment; the others are `stride` apart. If the component is compensated,
    the second number is the rounding error of the first.
    """
    COMPONENT: tl.constexpr = RULE.components[i]
    x = tl.load(state, mask)
    y_ptr = state + (1 + COMPONENT.compensated) * stride
    y = x
    if COMPONENT.size > 1:
        y = tl.load(y_ptr, mask)
    x_new = applied(RULE, i, 0, numbers, x, y, m)
    if COMPONENT.compensated:
        added = x_new + tl.load(state + stride, mask) + applied(RULE, i, COMPONENT.size, numbers, x, y, m)
        x_new, rest = two_sum(x, added)
        tl.store(state + stride, rest, mask)
    tl.store(state, x_new, mask)
    if COMPONENT.size > 1:
        tl.store(y_ptr, applied(RULE, i, 1, numbers, x, y, m), mask)


@triton.jit
def propagate(RULE: tl.constexpr, propagators, numbers):
    """Multiplies one tensor's propagators [law, propagated, 2, 2] from the left by one step's matrices."""
    for i in tl.static_range(len(RULE.propagated)):
        propagate_one(propagators + 4 * i, numbers + RULE.propagated[i])


@triton.jit
def propagate_one(m, by):
    a, b, c, d = tl.load(m), tl.load(m + 1), tl.load(m + 2), tl.load(m + 3)
    xx, xy, yx, yy = tl.load(by), tl.load(by + 1), tl.load(by + 2), tl.load(by + 3)
    tl.store(m, xx * a + xy * c)
    tl.store(m + 1, xx * b + xy * d)
    tl.store(m + 2, yx * a + yy * c)
    tl.store(m + 3, yx * b + yy * d)
