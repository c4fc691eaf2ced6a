"""Rules for kernels: the update as a function, everything else as compile-time constants.

A file <name>.py here mirrors csrc/rules/<name>.h. It has

    rule              of noetherperf.rules: it defines the moments and the rows
    variants          numbered from 0; whatever may be asked of one is in the functions that follow
    n_written, n_read of a variant: how many buffers, from the first on, a step writes and reads
    n_taken           of a variant: how many of the moments, from the first on, a step sums
    divides           whether p' and u of zeros may be other than zero, so that they must be masked
    coefficients      (numbers) -> the update's coefficients, from the first numbers of a row; in float64
    update            (p, g, buffers, c, VARIANT) -> (p', buffers', u) in the dtype of p. It is given the buffers that
                      the variant reads, and returns as many

Constants are frozen dataclasses of plain values. Triton caches kernels by their repr, so that no kernel is used for
other numbers. The two functions are constants too, and Triton caches by their source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from noetherperf.rules.law import PROPAGATED, Law
from noetherperf.rules.moments import COMMON, Moment, Operand, Pair
from noetherperf.rules.rule import Rule

#: Indices of a moment's two operands in moments.Operands; -1: the number one.
Codes = tuple[int, int]


@dataclass(frozen=True)
class Component:
    """One recursion of a law (noetherperf.engines.rows.COMPONENT).

    Fields:
        law: Which.
        row: Its first row in the law's state.
        size: k, how many numbers it has.
        compensated: Whether a second number holds the rounding error of the first.
        moments: Those that drive it, as rows of the moments.
        numbers: Its first coefficient in a row of numbers.
    """

    law: int
    row: int
    size: int
    compensated: bool
    moments: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class Constants:
    """The constants of a rule, for both stages.

    Fields:
        name: The rule's.
        coefficients: Names of the update's coefficients.
        n_buffers: Of a tensor.
        n_ages: Rows that a tensor chooses from by its age.
        n_numbers: Of a row.
        moments: Each moment's operands.
        n_common: How many of them, from the first on, every rule sums.
        n_charges: How many of them, from the first on, are of the parameter alone.
        taken: For each variant, how many of the moments, from the first on, a step sums.
        idle: Pairs of a variant and the one that takes its place for a tensor with views and with an idle buffer.
        propagated: The first number of each propagated matrix in a row, by law.
        components: Of all laws.
    """

    name: str
    coefficients: tuple[str, ...]
    n_buffers: int
    n_ages: int
    n_numbers: int
    moments: tuple[Codes, ...]
    n_common: int
    n_charges: int
    taken: tuple[int, ...]
    idle: tuple[tuple[int, int], ...]
    propagated: tuple[int, ...]
    components: tuple[Component, ...]


@dataclass(frozen=True)
class Step:
    """One variant of a rule's step; or none, a pass that only takes moments, with v in the gradient's place.

    Fields:
        variant: Of the rule.
        updates: Whether it steps.
        scaled: Whether it divides gradients first, and stores them divided.
        n_read, n_written: How many buffers, from the first on, it reads and writes.
        divides: Whether it may make other numbers than zeros of zeros.
        moments: The operands of the moments that it sums.
        n_moments: How many the rule has: rows of a slice of the workspace.
    """

    variant: int
    updates: bool
    scaled: bool
    n_read: int
    n_written: int
    divides: bool
    moments: tuple[Codes, ...]
    n_moments: int


def module_of(rule: Rule[Any]) -> ModuleType:
    """The kernels' file of a rule."""
    return import_module(f"{__name__}.{rule.name}")


def constants(rule: Rule[Any], components: np.ndarray, driving: np.ndarray) -> Constants:
    """The constants of a rule.

    Args:
        rule: The rule.
        components, driving: Of noetherperf.engines.rows.components.
    """
    kernels = module_of(rule)
    recursions = [
        Component(
            int(c["law"]),
            int(c["row"]),
            int(c["size"]),
            bool(c["compensated"]),
            tuple(int(row) for row in driving[c["moments"] : c["moments"] + c["n_moments"]]),
            int(c["numbers"]),
        )
        for c in components
    ]
    return Constants(
        rule.name,
        tuple(rule.coefficients),
        len(rule.buffers),
        max(rule.n_ages, 1),
        rule.n_numbers,
        codes(rule.moments),
        len(COMMON),
        int(Moment.SUM_G),
        tuple(kernels.n_taken(variant) for variant in kernels.variants),
        tuple((int(of), int(idle)) for of, idle in rule.idle.items()),
        tuple(rule.law_numbers[law] + 4 * i for law in Law for i in range(len(PROPAGATED))),
        tuple(recursions),
    )


def step(rule: Rule[Any], variant: int, *, scaled: bool = False) -> Step:
    """One variant of a rule's step."""
    kernels = module_of(rule)
    return Step(
        variant,
        True,
        scaled,
        kernels.n_read(variant),
        kernels.n_written(variant),
        kernels.divides,
        codes(rule.moments[: kernels.n_taken(variant)]),
        len(rule.moments),
    )


def measure(rule: Rule[Any]) -> Step:
    """No step: the common moments of p, with v in the gradient's place."""
    return Step(-1, False, False, 1, 0, False, codes(COMMON), len(rule.moments))


def codes(pairs: Sequence[Pair]) -> tuple[Codes, ...]:
    """Moments' operands as indices."""
    index = {operand: i - 1 for i, operand in enumerate(Operand)}
    return tuple((index[pair.a], index[pair.b]) for pair in pairs)
