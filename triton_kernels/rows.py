"""What a step needs of a rule, as data: parameter groups' variants and rows of numbers, and the components of its laws.

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


# ---- what is known when kernels are compiled -------------------------------------------------------------------------


@triton.constexpr_function
def n_ages(rule):
    return rule.n_ages


@triton.constexpr_function
def n_numbers(rule):
    return rule.n_numbers


@triton.constexpr_function
def n_coefficients(rule):
    return len(rule.coefficients)


@triton.constexpr_function
def n_moments(rule):
    return len(rule.moments)


@triton.constexpr_function
def n_common(rule):
    """Moments that every rule takes, the first."""
    return rule.n_common


@triton.constexpr_function
def n_charges(rule):
    """Moments of the parameter alone, the first."""
    return rule.n_charges


@triton.constexpr_function
def n_variants(rule):
    return len(rule.taken)


@triton.constexpr_function
def taken(rule, variant):
    return rule.taken[variant]


@triton.constexpr_function
def least_taken(rule):
    """How many of the moments every variant sums."""
    return min(rule.taken)


@triton.constexpr_function
def n_idle(rule):
    return len(rule.idle)


@triton.constexpr_function
def idle(rule, i, which):
    """A variant, and the one that takes its place."""
    return rule.idle[i][which]


@triton.constexpr_function
def n_matrices(rule):
    return len(rule.propagated)


@triton.constexpr_function
def matrix(rule, i):
    """Where a propagated matrix begins in a row."""
    return rule.propagated[i]


@triton.constexpr_function
def n_components(rule):
    return len(rule.components)


@triton.constexpr_function
def component(rule, i):
    return rule.components[i]


@triton.constexpr_function
def is_norm(component):
    """Whether it is of a norm's law; else of a translation's."""
    return component.law == 1


@triton.constexpr_function
def first_row(component):
    """Where its numbers begin in the law's state."""
    return component.row


@triton.constexpr_function
def has_y(component):
    """Whether it has a second number."""
    return component.size > 1


@triton.constexpr_function
def y_row(component):
    """Where its second number is, from its first."""
    return 1 + component.compensated


@triton.constexpr_function
def compensated(component):
    return component.compensated


@triton.constexpr_function
def n_driving(component):
    return len(component.moments)


@triton.constexpr_function
def driving(component, k):
    """The row of the k-th moment that drives it."""
    return component.moments[k]


@triton.constexpr_function
def number(component, row, column):
    """Where one of its coefficients is in a row: A's and B's rows, then those of the rests; A's columns, then B's."""
    return component.numbers + row * (component.size + len(component.moments)) + column


@triton.constexpr_function
def number_of_moment(component, row, k):
    """The same for the column of the k-th moment."""
    return number(component, row, component.size + k)


@triton.constexpr_function
def row_of_rests(component):
    return component.size


# ---- groups and ages -------------------------------------------------------------------------------------------------


@triton.jit
def load_group(groups, i):
    word = tl.load(groups + i)
    return Group(low(word), high(word))


@triton.jit
def load_ages(groups, i, mask):
    """Whether a step makes tensors of these groups older."""
    return high(tl.load(groups + i, mask, 0)) != 0


@triton.jit
def variant_of(RULE: tl.constexpr, of_group, has_buffer, has_views):
    """The variant of a tensor's step; without views nothing reads a buffer that the step leaves as it is."""
    variant = of_group
    for i in tl.static_range(n_idle(RULE)):
        is_idle = (of_group == idle(RULE, i, 0)) & has_buffer & has_views
        variant = tl.where(is_idle, idle(RULE, i, 1), variant)
    return variant


@triton.jit
def n_taken(RULE: tl.constexpr, variant):
    """How many of the moments a variant sums."""
    n = variant * 0 + taken(RULE, 0)
    for i in tl.static_range(1, n_variants(RULE)):
        n = tl.where(variant == i, taken(RULE, i), n)
    return n


@triton.jit
def choose_row(RULE: tl.constexpr, group, given_age, known_age):
    """The number of a tensor's row: of its group and age, which is 0 where the host has just made its buffers."""
    age = tl.where(given_age == 0, 0, known_age).to(tl.int64)
    return group * n_ages(RULE) + tl.minimum(age, n_ages(RULE) - 1)


@triton.jit
def load_coefficients(RULE: tl.constexpr, row, S: tl.constexpr):
    """The update's, the first numbers of a row."""
    c = ()
    for i in tl.static_range(n_coefficients(RULE)):
        c = c + (tl.load(row + i).to(S),)
    return c


# ---- laws ------------------------------------------------------------------------------------------------------------


@triton.jit
def two_sum(a, b):
    """a + b as the rounded sum and what its rounding left out, exactly."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def driven(coefficient, moment):
    """Their product; what is not asked for may be any number."""
    return tl.where(coefficient != 0.0, coefficient * moment, 0.0)


@triton.jit
def applied(COMPONENT: tl.constexpr, ROW: tl.constexpr, row, x, y, m):
    """One of the component's rows of coefficients times its numbers x, y and the moments that drive it."""
    total = tl.load(row + number(COMPONENT, ROW, 0)) * x
    if has_y(COMPONENT):
        total += tl.load(row + number(COMPONENT, ROW, 1)) * y
    for k in tl.static_range(n_driving(COMPONENT)):
        total += driven(tl.load(row + number_of_moment(COMPONENT, ROW, k)), m[driving(COMPONENT, k)])
    return total


@triton.jit
def advance(COMPONENT: tl.constexpr, row, state, stride, m, mask):
    """Advances a component of segments, whose first numbers `state` points to, others `stride` apart, by moments m."""
    x = tl.load(state, mask)
    y = x
    if has_y(COMPONENT):
        y = tl.load(state + y_row(COMPONENT) * stride, mask)
    x_new = applied(COMPONENT, 0, row, x, y, m)
    if compensated(COMPONENT):
        added = x_new + tl.load(state + stride, mask) + applied(COMPONENT, row_of_rests(COMPONENT), row, x, y, m)
        x_new, rest = two_sum(x, added)
        tl.store(state + stride, rest, mask)
    tl.store(state, x_new, mask)
    if has_y(COMPONENT):
        tl.store(state + y_row(COMPONENT) * stride, applied(COMPONENT, 1, row, x, y, m), mask)


@triton.jit
def propagate(RULE: tl.constexpr, propagators, row):
    """Multiplies one tensor's propagators [law, propagated, 2, 2] from the left by one step's matrices."""
    for i in tl.static_range(n_matrices(RULE)):
        propagate_one(propagators + 4 * i, row + matrix(RULE, i))


@triton.jit
def propagate_one(m, by):
    a, b, c, d = tl.load(m), tl.load(m + 1), tl.load(m + 2), tl.load(m + 3)
    xx, xy, yx, yy = tl.load(by), tl.load(by + 1), tl.load(by + 2), tl.load(by + 3)
    tl.store(m, xx * a + xy * c)
    tl.store(m + 1, xx * b + xy * d)
    tl.store(m + 2, yx * a + yy * c)
    tl.store(m + 3, yx * b + yy * d)
