"""Laws as data: linear recursions of a few numbers per segment, driven by a step's moments.

A law is about one charge x: a translation's sum ⟨p, 1⟩ or a norm |p|². It has *components*, each of k ≤ 2 numbers s:

    s' = A s + B m

m are moments of the step, and A and B follow from the rule's options alone. They are computed in Python, in float64;
the engines multiply and know no law. A component whose name is "free" or "flow_free" has no B: it is driven by nothing,
so the product of its A's, the *propagator*, is kept once per tensor instead of numbers per segment.

A component may be *compensated*: its first number x is kept as a rounded number and its rounding error (the rest), and
so are the coefficients of its increment, A₀ − (1, 0) and B₀:

    (x, rest)' = two_sum(x, (A₀ − (1, 0)) s + B₀ m + rest),   each coefficient with its own rest

so that the recursion is exact to one rounding of x, however many steps are made.

The rows of a law's state [n rows, n segments] are the start x₀, y₀, then each component's numbers.

A norm may count from an offset c: |p + c|² = |p|² + 2c⟨p, 1⟩ + c²n. Its numbers are sums of three: those of |p|²; c
times those of 2⟨p, 1⟩, which the translation's law keeps or, where a norm's matrices move them, a component `offset`;
and c²n times those of 1 (measure/offset.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number, two_sum

#: A row of coefficients, and a matrix of them.
Row = Sequence[Number]
Matrix = Sequence[Row]


class Law(IntEnum):
    """Which quantity a law is about; κ = law + 1."""

    TRANSLATION = 0
    NORM = 1


#: Rows of every law's state for its start: x₀, the charge, and y₀, from a warm buffer.
X0, Y0 = 0, 1
N_START = 2

#: The components with propagators: the undriven parts of the discrete law and of the flow law.
PROPAGATED = ("free", "flow_free")

#: The components that a norm's law has besides, where some norm counts from an offset (Rule.with_offsets).
OFFSET, OFFSET_FLOW = "offset", "offset_flow"


@dataclass(frozen=True)
class Component:
    """One recursion of a law.

    Attributes:
        name: "budget" (all sources together), "forced", "defect" (of which one is kept and the other is the rest), and
            "flow" (the flow law's sources) are what a readout looks for; and "growth" (what the updates' own squares
            added to a norm), which a rule has whose weight decay acts on the parameter alone: p' = r p − η u. Its
            matrices of `free` are upper triangular, with r or r² first. "offset" and "offset_flow" are what a norm with
            an offset has beside |p|² in that one of forced and defect which is kept, and in the flow's sources.
        size: k, how many numbers it has: 1 or 2.
        moments: Names of the moments that drive it, B's columns.
        compensated: Whether its first number is kept together with its rounding error.
        starts: Whether it begins at (x₀, y₀); else at zero.
        jumps: Whether changes made between two steps are added to it: those of the law's charge and of y; to "offset"
            those of 2⟨p, 1⟩ and of the translation's y.
    """

    name: str
    size: int
    moments: tuple[str, ...]
    compensated: bool = False
    starts: bool = False
    jumps: bool = False

    @property
    def n_rows(self) -> int:
        """Rows of the state."""
        return self.size + self.compensated

    @property
    def n_numbers(self) -> int:
        """Coefficients of a step: A and B, and with compensation the rests of their first rows."""
        return (self.size + self.compensated) * (self.size + len(self.moments))

    @property
    def still(self) -> "Recursion":
        """The recursion of a step in which nothing moves."""
        k, n, rests = self.size, len(self.moments), int(self.compensated)
        a = [[float(i == j and i >= rests) for j in range(k)] for i in range(k)]
        return Recursion(a, [[0.0] * n] * k, [0.0] * k * rests, [0.0] * n * rests)


class Recursion(NamedTuple):
    """A component's coefficients in a step. If it is compensated, A₀ lacks the identity, and the rests are of row 0."""

    a: Matrix  # [k, k]
    b: Matrix  # [k, n moments]
    a_rest: Row = ()
    b_rest: Row = ()


def drawn(matrix: Matrix, size: int) -> Recursion:
    """What a flow's matrix M draws to a moment m, of which it knows x = m to be at rest: s' = M s + (1 − M) (m, 0)."""
    to = [1.0 - matrix[0][0], *(-row[0] for row in matrix[1:size])]
    return Recursion([row[:size] for row in matrix[:size]], [[x] for x in to])


@dataclass(frozen=True)
class Shape:
    """A law's components, and the rows of their numbers."""

    components: tuple[Component, ...]

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Each component's first row of the state. Its rows are x, with compensation the rounding error of x, and y."""
        starts, at = {}, N_START
        for component in self.components:
            starts[component.name] = at
            at += component.n_rows
        return starts

    @cached_property
    def n_rows(self) -> int:
        """Rows of the state."""
        return N_START + sum(component.n_rows for component in self.components)

    @property
    def n_propagated(self) -> int:
        """How many coefficients of a step, from the first on, are those of the propagated matrices."""
        return 4 * len(PROPAGATED)

    @cached_property
    def n_numbers(self) -> int:
        """Coefficients of a step."""
        return self.n_propagated + sum(component.n_numbers for component in self.components)

    def place(self, name: str, row: int, column: int) -> int:
        """Where `Step.numbers` has an entry of a component's (A B), or of the matrix of an undriven part."""
        if name in PROPAGATED:
            return 4 * PROPAGATED.index(name) + 2 * row + column
        at = self.n_propagated
        for component in self.components:
            if component.name == name:
                return at + row * (component.size + len(component.moments)) + column
            at += component.n_numbers
        raise KeyError(name)

    @cached_property
    def still(self) -> Sequence[Number]:
        """The coefficients of a step in which nothing moves."""
        return [1.0, 0.0, 0.0, 1.0] * len(PROPAGATED) + [0.0] * (self.n_numbers - self.n_propagated)

    def x(self, name: str, state: Tensor) -> Tensor | None:
        """A component's first number of each segment, [n]; None if the law does not have the component."""
        at = self.rows.get(name)
        if at is None:
            return None
        compensated = next(component.compensated for component in self.components if component.name == name)
        return state[at] + state[at + 1] if compensated else state[at]

    def y_row(self, name: str) -> int | None:
        """The row of a component's second number; None where it has none."""
        for component in self.components:
            if component.name == name and component.size == 2:
                return self.rows[name] + 1 + component.compensated
        return None


@dataclass(frozen=True)
class Step:
    """One step of a law: the 2 × 2 matrices of its undriven parts, and each component's recursion.

    Numbers are floats, or float64 tensors of no dimensions.
    """

    propagated: Mapping[str, Matrix]
    recursions: Mapping[str, Recursion]

    def numbers(self, shape: Shape) -> list[Number]:
        """All coefficients in the order in which engines read them, [shape.n_numbers]."""
        packed = [x for name in PROPAGATED for row in self.propagated[name] for x in row]
        for component in shape.components:
            recursion = self.recursions[component.name]
            for a, b in zip(recursion.a, recursion.b, strict=True):
                packed += [*a, *b]
            packed += [*recursion.a_rest, *recursion.b_rest]
        return packed

    def of_one(self, tensor: int) -> "Step":
        """The step of one tensor, where numbers on a device are those of many, [n]."""

        def row(numbers: Row) -> Row:
            return [x[tensor] if isinstance(x, Tensor) and x.ndim else x for x in numbers]

        def matrix(of: Matrix) -> Matrix:
            return list(map(row, of))

        recursions = {
            name: Recursion(matrix(x.a), matrix(x.b), row(x.a_rest), row(x.b_rest))
            for name, x in self.recursions.items()
        }
        return Step({name: matrix(x) for name, x in self.propagated.items()}, recursions)

    def check(self, shape: Shape) -> None:
        """Check that there is a recursion of each component, and that all matrices have their dimensions.

        Raises:
            ValueError: They are not so; it names the component.
        """
        for name in PROPAGATED:
            if (matrix := self.propagated.get(name)) is None or list(map(len, matrix)) != [2, 2]:
                raise ValueError(f"propagated needs {name!r}, 2 rows of 2 numbers")
        for x in shape.components:
            if (recursion := self.recursions.get(x.name)) is None:
                raise ValueError(f"there is no recursion of its component {x.name!r}")
            k, n, rests = x.size, len(x.moments), x.compensated
            for field, rows, columns in (("a", k, k), ("b", k, n)):
                if list(map(len, getattr(recursion, field))) != [columns] * rows:
                    raise ValueError(f"{field} of {x.name!r} needs {rows} row(s) of {columns} number(s)")
            if (len(recursion.a_rest), len(recursion.b_rest)) != (k * rests, n * rests):
                raise ValueError(
                    f"{x.name!r} is {'' if rests else 'not '}compensated, so a_rest and b_rest need "
                    f"{k * rests} and {n * rests} number(s)"
                )


def in_common(shape: Shape, steps: Sequence[Step | None]) -> Step | None:
    """One step of the sum of several tensors' laws, each of which makes one of these steps; None: it makes none.

    A coefficient in which they differ is NaN, because it would need each tensor's share of the numbers. Of a tensor
    without a step the moments are zero, so any B is its own.

    Returns:
        The step; None if nothing makes one.
    """
    present, stands = list({id(step): step for step in steps if step is not None}.values()), None in steps
    if not present:
        return None
    if len(present) == 1 and not stands:
        return present[0]
    identity = [((1.0, 0.0), (0.0, 1.0))] if stands else []
    propagated = {name: _agreed([*(step.propagated[name] for step in present), *identity]) for name in PROPAGATED}
    recursions = {}
    for component in shape.components:
        own = [step.recursions[component.name] for step in present]
        still = [component.still] if stands else []
        a, (a_rest,) = _agreed([x.a for x in (*own, *still)]), _agreed([[x.a_rest] for x in (*own, *still)])
        b, (b_rest,) = _agreed([x.b for x in own]), _agreed([[x.b_rest] for x in own])
        recursions[component.name] = Recursion(a, b, a_rest, b_rest)
    return Step(propagated, recursions)


def _agreed(matrices: Sequence[Matrix]) -> list[list[Number]]:
    """The entries in which matrices are equal; NaN where they are not."""
    return [[_one(entries) for entries in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _one(entries: Sequence[Number]) -> Number:
    """The number that all of these are; NaN if they are not one."""
    first, *others = sorted(entries, key=lambda x: not isinstance(x, Tensor))  # tensors first
    for x in others:
        if isinstance(first, Tensor):
            first = torch.where(first == x, first, math.nan)
        elif first != x:
            return math.nan
    return first


def begin(shape: Shape, state: Tensor, x0: Tensor, y0: Tensor) -> None:
    """Start a law's state [shape.n_rows, n] in place from x₀ and y₀ [n]; its sources are zero."""
    state.zero_()
    state[X0], state[Y0] = x0, y0
    for component in shape.components:
        if component.starts:
            state[shape.rows[component.name]] = x0
            if (row := shape.y_row(component.name)) is not None:
                state[row] = y0


#: Changes of x and y made between two steps.
Jump = tuple[Tensor, Tensor | float]


def jump(shape: Shape, state: Tensor, of_charge: Jump, of_offset: Jump | None = None) -> None:
    """Add a change made between two steps to all components with `jumps`, in place; "offset" has its own."""
    for component in shape.components:
        if component.jumps:
            row, y_row = shape.rows[component.name], shape.y_row(component.name)
            x_jump, y_jump = of_offset if component.name == OFFSET and of_offset is not None else of_charge
            if component.compensated:
                state[row], rest = two_sum(state[row], x_jump)
                state[row + 1] += rest
            else:
                state[row] += x_jump
            if y_row is not None:
                state[y_row] += y_jump


def is_zero(x: Number) -> bool:
    """Whether a coefficient is known to be zero; of one on a device, nothing is known."""
    return not isinstance(x, Tensor) and x == 0.0


def advance(shape: Shape, step: Step, state: Tensor, moments: Mapping[str, Tensor], out: Tensor | None = None) -> None:
    """Advance a law's state [shape.n_rows, n] by one step with moments [n] by name; all float64.

    Args:
        shape, step: The law, and its step.
        state: Before the step.
        moments: Of the step.
        out: Where the state after the step is written, all but x₀ and y₀, which stay; None: in place.

    Source: docs/theory.md, section 3.
    """
    for component in shape.components:
        recursion, at = step.recursions[component.name], shape.rows[component.name]
        own = state[at : at + component.n_rows] if out is not None else state[at : at + component.n_rows].clone()
        after = (state if out is None else out)[at : at + component.n_rows]
        n_rests = int(component.compensated)
        s = [own[0], *own[1 + n_rests :]]
        # Moments without coefficients are left out, because they may be NaN.
        used = [k for k, column in enumerate(zip(*recursion.b, strict=True)) if not all(map(is_zero, column))]
        m = [moments[component.moments[k]] for k in used]
        new = [_applied(a, [b[k] for k in used], s, m) for a, b in zip(recursion.a, recursion.b, strict=True)]
        if component.compensated:
            new[0] += own[1]
            new[0] += _applied(recursion.a_rest, [recursion.b_rest[k] for k in used], s, m)
            after[0], after[1] = two_sum(s[0], new[0])
        else:
            after[0] = new[0]
        for row, value in enumerate(new[1:], start=1 + n_rests):
            after[row] = value


def _applied(a: Row, b: Row, s: Sequence[Tensor], m: Sequence[Tensor]) -> Tensor:
    """a·s + b·m, added up in place: new memory costs more than the arithmetic."""
    first, *others = zip([*a, *b], [*s, *m], strict=True)
    total: Tensor = first[1] * first[0]
    for coefficient, value in others:
        if isinstance(coefficient, Tensor):
            total += coefficient * value
        else:
            total.add_(value, alpha=coefficient)
    return total


def propagate(propagators: Tensor, step: Step) -> None:
    """Multiply a tensor's propagators of one law [PROPAGATED, 2, 2] in place, from the left, by one step's matrices.

    Source: docs/theory.md, section 3.
    """
    matrices = torch.tensor([step.propagated[name] for name in PROPAGATED], dtype=torch.float64, device="cpu")
    propagators.copy_(matrices @ propagators.cpu())
