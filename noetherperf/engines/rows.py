"""A rule as engines read it: rows of numbers, and a table of the laws' components.

A row (noetherperf/rules/rule.py) holds the coefficients of one parameter group's step for tensors of one age. The
components say which numbers of a row advance which numbers of a law's state. Both are data: engines multiply.

The dtypes mirror the structs of csrc/rows.h (a test compares their layouts).
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherperf.rules.law import Law
from noetherperf.rules.rule import Rule

GROUP = np.dtype(
    [
        ("variant", "i4"),  # of the rule's kernels
        ("ages", "i4"),  # whether a step increments its tensors' ages
    ]
)
COMPONENT = np.dtype(
    [
        ("law", "i4"),
        ("row", "i4"),  # its first row in the law's state
        ("size", "i4"),
        ("compensated", "i4"),
        ("n_moments", "i4"),
        ("moments", "i4"),  # its first driving moment, in the table of these
        ("numbers", "i4"),  # its first coefficient in a row of numbers
        ("padding", "i4"),
    ]
)


def components(rule: Rule[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The table of a rule's components, in the order of its laws, and the moments that drive them, int32."""
    table: list[tuple[int, ...]] = []
    driving: list[int] = []
    for law in Law:
        shape = rule.laws[law]
        at = rule.law_numbers[law] + shape.n_propagated
        for component in shape.components:
            row = shape.rows[component.name]
            n_moments = len(component.moments)
            compensated = component.compensated
            table.append((law, row, component.size, compensated, n_moments, len(driving), at, 0))
            driving += [rule.moment_rows[name] for name in component.moments]
            at += component.n_numbers
    return np.array(table, COMPONENT), np.array(driving, np.int32)


class Rows:
    """The rows of the present options, computed again only when these change.

    Args:
        rule: The update rule.
        n_groups: The number of parameter groups.
        laws: The laws that some symmetry needs.

    Attributes:
        numbers: [n_groups, n_ages, n_numbers], float64.
        groups: [n_groups] of GROUP.
        tick: What a step adds to the clock, [1 + n_groups].
    """

    def __init__(self, rule: Rule[Any], n_groups: int, laws: Collection[Law]) -> None:
        self._rule, self._laws = rule, laws
        self.numbers = np.zeros((n_groups, rule.n_ages, rule.n_numbers))
        self.groups = np.zeros(n_groups, GROUP)
        self.tick = np.ones(1 + n_groups)
        self._options: Sequence[Any] = ()
        self._known: frozenset[int] = frozenset()

    def find(self, options: Sequence[Any], ages: Collection[int]) -> None:
        """Compute the rows of some ages; new rows are in new arrays.

        Args:
            options: One per parameter group.
            ages: Those that a step may need.
        """
        is_same = options == self._options
        if is_same and self._known.issuperset(ages):
            return
        known = self._known if is_same else frozenset()
        numbers = self.numbers.copy()
        for age in {*ages} - known:
            for i, x in enumerate(options):
                numbers[i, age] = self._rule.row(x, age, self._laws)
        groups, tick = np.zeros_like(self.groups), np.ones_like(self.tick)
        for i, x in enumerate(options):
            groups[i] = (self._rule.variant(x), self._rule.ages(x))
            tick[1 + i] = self._rule.duration(x)
        # In one update: an interrupt between two would leave rows of other options.
        self.__dict__.update(
            numbers=numbers, groups=groups, tick=tick, _options=list(options), _known=known.union(ages)
        )

    def find_on_device(self, group: int, lr: Tensor, to: Tensor) -> None:
        """Compute the rows of a parameter group whose learning rate is on a device, there, without waiting for it.

        Args:
            group: Its number; its options are those of the last `find`.
            lr: The learning rate, one element.
            to: Its rows from `find`, [n_ages, n_numbers]; numbers that depend on the learning rate are overwritten.
        """
        options = self._rule.with_lr(self._options[group], lr.detach().reshape(()).to(torch.float64))
        newest = 0 if self._rule.ages_differ(options) else self._rule.n_ages - 1
        for age in range(newest, self._rule.n_ages):
            row = self._rule.row(options, age, self._laws)
            here = to[age].unbind()
            to[age].copy_(torch.stack([x if isinstance(x, Tensor) else here[k] for k, x in enumerate(row)]))
        to[:newest].copy_(to[newest])
