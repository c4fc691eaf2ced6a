"""A rule as engines read it: rows of numbers, and a table of the laws' components.

A row (noetherperf/rules/rule.py) holds the coefficients of one parameter group's step for tensors of one age. A
tensor's row is number first + age where ages have a bound. Where they are counted in torch's state, the row is number
`first`: the one of its parameter group and age if the host knows the counts; if these are on a device, a row of its
own, which is computed there. The components say which numbers of a row advance which numbers of a law's state.
Both are data: engines multiply.

The dtypes mirror the structs of csrc/rows.h (a test compares their layouts).
"""

from collections.abc import Callable, Collection, Sequence
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
        ("row", "i4"),  # one of its rows: of all of them, only the time of the step is read
        ("padding", "i4"),
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


# A row's key, if ages are counted: its parameter group, then the age. Tensors that age alike keep their rows.
_AGE_BITS = 40
_AGE_MASK = (1 << _AGE_BITS) - 1


class Rows:
    """The rows of the present options, computed again only when these change.

    Args:
        rule: The update rule.
        group_index: Each tensor's parameter group.
        n_groups: The number of parameter groups.
        laws: The laws that some symmetry needs.

    Attributes:
        n_ages: Rows of a parameter group that a tensor chooses from by its age; 1 if the rule counts ages.
        numbers: [n_rows, n_numbers], float64; every parameter group has one at least.
        first: [n_tensors], int32: the row of each tensor, of age 0 if ages have a bound.
        groups: [n_groups] of GROUP.
        tick: What a step adds to the clock, [1 + n_groups].
    """

    def __init__(self, rule: Rule[Any], group_index: Sequence[int], n_groups: int, laws: Collection[Law]) -> None:
        self._rule, self._laws = rule, laws
        self._group_index = np.array(group_index, np.int64)
        self._group_keys = self._group_index << _AGE_BITS
        self.n_ages = max(rule.n_ages, 1)
        self.numbers = np.zeros((n_groups * self.n_ages, rule.n_numbers))
        self.first = (self._group_index * self.n_ages).astype(np.int32)
        self.groups = np.zeros(n_groups, GROUP)
        self.tick = np.ones(1 + n_groups)
        self._options: Sequence[Any] = ()
        self._known: frozenset[int] = frozenset()  # ages that have rows of the present options
        # If ages are counted:
        self._row_of_age: Sequence[Callable[[int], Sequence[Any]]] = ()  # of each group, with the present options
        self._seen, self._part = b"", np.zeros(0, bool)  # the last `part` as bytes, and as a mask
        self._keys = np.zeros(0, np.int64)  # of the tensors that take part
        self._pairs: Sequence[tuple[int, int]] = ()  # each row's parameter group and age
        self._older = 0  # steps by which the rows are older than that
        self._own: Sequence[Tensor] | None = None  # of each group the numbers of its rows, if every tensor has its own

    def find(self, options: Sequence[Any], ages: Collection[int]) -> None:
        """Compute the rows of some ages; new rows are in new arrays. For a rule whose ages have a bound.

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
                numbers[i * self.n_ages + age] = self._rule.row(x, age, self._laws)
        # In one update: an interrupt between two would leave rows of other options.
        self.__dict__.update(
            self._of_groups(options, [(i + 1) * self.n_ages - 1 for i in range(len(options))]),
            numbers=numbers,
            _known=known.union(ages),
        )

    def find_counted(self, options: Sequence[Any], ages: Sequence[int], part: np.ndarray) -> None:
        """Compute a row for every age that occurs in a parameter group. For a rule that counts ages.

        Args:
            options: One per parameter group.
            ages: One per tensor.
            part: [n_tensors], not 0 where the tensor takes part in the step. The `first` of others means nothing.
        """
        new: dict[str, Any] = {}
        is_same = options == self._options and self._own is None
        if not is_same:
            new["_row_of_age"] = [self._rule.row_of_age(x, self._laws) for x in options]
        seen, mask, shift = part.tobytes(), self._part, -1
        if seen != self._seen:
            if not np.array_equal(part != 0, mask):
                mask = part != 0
            new.update(_seen=seen, _part=mask)
        keys = (self._group_keys + ages)[mask]
        if mask is self._part and len(keys) > 0:  # the same tensors; equal keys may be of others
            shift = keys.item(0) - self._keys.item(0)  # negative: other code made them younger
        if shift >= 0 and (keys - shift).tobytes() == self._keys.tobytes():  # all have aged alike
            pairs = [(g, age + shift) for g, age in self._pairs]
        else:
            is_same = False
            absent = np.flatnonzero(np.bincount(self._group_index[mask], minlength=len(options)) == 0)
            row_keys = np.unique(np.concatenate([keys, absent << _AGE_BITS]))
            new["first"] = first = np.zeros_like(self.first)
            first[mask] = np.searchsorted(row_keys, keys)
            pairs = list(zip((row_keys >> _AGE_BITS).tolist(), (row_keys & _AGE_MASK).tolist(), strict=True))
        if not is_same:
            of_group = dict(reversed([(g, row) for row, (g, _) in enumerate(pairs)]))  # its first row
            new.update(self._of_groups(options, [of_group[g] for g in range(len(options))]))
        row_of_age = new.get("_row_of_age", self._row_of_age)
        numbers = np.array([row_of_age[g](age) for g, age in pairs])
        self.__dict__.update(new, numbers=numbers, _keys=keys, _pairs=pairs, _older=0, _own=None)

    def find_older(self) -> None:
        """Compute the rows of the same tensors in their next step, with the same options, after `find_counted`."""
        older = self._older + 1
        numbers = np.array([self._row_of_age[g](age + older) for g, age in self._pairs])
        self.__dict__.update(numbers=numbers, _older=older)

    def make_own(self, options: Sequence[Any], device: torch.device) -> None:
        """Make room for a row of every tensor, then one of every parameter group, which `fill_own` computes.

        Args:
            options: One per parameter group.
            device: The device of the counts.
        """
        if self._own is not None and options == self._options:
            return
        n, n_groups = len(self._group_index), len(options)
        of_rows = np.concatenate([self._group_index, np.arange(n_groups)])
        self.__dict__.update(
            self._of_groups(options, range(n, n + n_groups)),
            numbers=np.zeros((n + n_groups, self._rule.n_numbers)),
            first=np.arange(n, dtype=np.int32),
            _seen=b"",
            _part=np.zeros(0, bool),
            _own=self._own or [torch.from_numpy(np.flatnonzero(of_rows == i)).to(device) for i in range(n_groups)],
        )

    def fill_own(self, counts: Tensor, lrs: Sequence[Tensor | None], rows: Tensor) -> None:
        """Compute these rows on the device of the counts, without waiting for it.

        Args:
            counts: Of every tensor, [n_tensors].
            lrs: One per parameter group: the learning rate that replaces the one of its options, or None.
            rows: All rows, [n_tensors + n_groups, n_numbers].
        """
        assert self._own is not None, "make_own comes first"
        ages = torch.cat([counts.to(torch.float64), counts.new_zeros(len(self._own), dtype=torch.float64)])
        for options, lr, own in zip(self._options, lrs, self._own, strict=True):
            x = options if lr is None else self._rule.with_lr(options, lr.detach().reshape(()).to(torch.float64))
            rows.index_copy_(0, own, self._rule.rows(x, ages[own], self._laws))

    def _of_groups(self, options: Sequence[Any], rows: Sequence[int]) -> dict[str, Any]:
        """What belongs to the parameter groups, with one row of each."""
        groups, tick = np.zeros_like(self.groups), np.ones_like(self.tick)
        for i, (x, row) in enumerate(zip(options, rows, strict=True)):
            groups[i] = (self._rule.variant(x), self._rule.ages(x), row, 0)
            tick[1 + i] = self._rule.duration(x)
        return {"groups": groups, "tick": tick, "_options": list(options)}

    def find_on_device(self, group: int, lr: Tensor, rows: Tensor) -> None:
        """Compute the rows of a parameter group whose learning rate is on a device, there, without waiting for it.

        Args:
            group: Its number; its options are those of the last `find`.
            lr: The learning rate, one element.
            rows: All rows, [n_rows, n_numbers]; in the group's own, numbers that depend on the learning rate are
                overwritten.
        """
        options = self._rule.with_lr(self._options[group], lr.detach().reshape(()).to(torch.float64))
        if self._rule.step_key is not None:
            for i, (g, age) in enumerate(self._pairs):
                if g == group:
                    self._find_on_device(options, age + self._older, rows[i])
            return
        own = rows[group * self.n_ages : (group + 1) * self.n_ages]
        newest = 0 if self._rule.ages_differ(options) else self.n_ages - 1
        for age in range(newest, self.n_ages):
            self._find_on_device(options, age, own[age])
        own[:newest].copy_(own[newest])

    def _find_on_device(self, options: Any, age: int, to: Tensor) -> None:
        here = to.unbind()
        row = self._rule.row(options, age, self._laws)
        to.copy_(torch.stack([x if isinstance(x, Tensor) else here[k] for k, x in enumerate(row)]))
