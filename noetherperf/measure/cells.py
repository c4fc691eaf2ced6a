"""Cells: which parts of Balances share one law, and the place of each in a measurement.

The parts of one Balance in one parameter group make the same step. Their sum is a *cell*, and keeps one law. Of sharded
tensors, only those that are cut over the same ranks share a cell, so that its sums can be added up over these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherperf.measure.shards import Cut
from noetherperf.rules.law import PROPAGATED, Law
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Balance, Part


class Cell(NamedTuple):
    """The parts of one Balance in one parameter group.

    Attributes:
        balance, group: Their numbers.
        cut: The groups of ranks over which all its tensors are cut; empty if every rank has the whole of them.
        n: Units of a block.
        blocks, entries: Its place among all blocks, and among all entries of upper triangles.
        members: Each part, with its signed weight, and the number of its tensor.
    """

    balance: int
    group: int
    cut: Cut
    n: int
    blocks: slice
    entries: slice
    members: tuple[tuple[int, Part], ...]

    @property
    def n_blocks(self) -> int:
        return int(self.blocks.stop - self.blocks.start)

    def unpacked(self, entries: Tensor) -> Tensor:
        """This cell's entries [..., blocks · n(n + 1)/2] as matrices [..., blocks, n, n]."""
        own: Tensor = entries.unflatten(-1, (self.n_blocks, -1))
        i, j = torch.triu_indices(self.n, self.n, device=own.device)
        whole: Tensor = own.new_empty(*own.shape[:-1], self.n, self.n)
        whole[..., i, j] = own
        whole[..., j, i] = own
        return whole


@dataclass(frozen=True)
class GramPlan:
    """All cells of some tensors."""

    balances: tuple[Balance, ...]
    cells: tuple[Cell, ...]
    rule: Rule[Any]
    tensor_shapes: tuple[tuple[int, ...], ...]  # of whole tensors

    @cached_property
    def measured(self) -> frozenset[int]:
        """The tensors that have a part in a cell."""
        return frozenset(tensor for cell in self.cells for tensor, _ in cell.members)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a measurement, float64, by their names in checkpoints; none without cells.

        gram_state: the law's rows for each entry. gram_defect: sym(W gᵀ) of the last step, with signs. gram_sq_g: |g|²
        of each block, without. gram_propagators: of each cell, the product of all steps' matrices.
        """
        if not self.cells:
            return {}
        n_entries, n_blocks = self.cells[-1].entries.stop, self.cells[-1].blocks.stop
        return {
            "gram_state": (self.rule.laws[Law.NORM].n_rows, n_entries),
            "gram_defect": (n_entries,),
            "gram_sq_g": (n_blocks,),
            "gram_propagators": (len(self.cells), len(PROPAGATED), 2, 2),
        }


def make_gram_plan(
    balances: Sequence[Balance],
    names: Sequence[str | None],
    shapes: Sequence[tuple[int, ...]],
    groups: Sequence[int],
    rule: Rule[Any],
    cuts: Sequence[Cut] | None = None,
) -> GramPlan:
    """Plan the cells of validated balances.

    Args:
        balances: Those that are measured. Parts of other names belong to other plans.
        names, shapes, groups: One per tensor; None if a tensor has no name; its parameter group.
        rule: The update rule.
        cuts: For each tensor the ranks that it is cut over; None: whole tensors.
    """
    index = {name: i for i, name in enumerate(names) if name is not None}
    cells: list[Cell] = []
    n_blocks = n_entries = 0
    for number, balance in enumerate(balances):
        members: dict[tuple[int, Cut], list[tuple[int, Part]]] = {}
        for part in balance.parts:
            if (i := index.get(part.parameter)) is not None:
                members.setdefault((groups[i], () if cuts is None else cuts[i]), []).append((i, part))
        for (group, cut), own in members.items():
            n_units = own[0][1].n_groups(shapes[own[0][0]])
            n = balance.size or n_units
            blocks = slice(n_blocks, n_blocks + n_units // n)
            entries = slice(n_entries, n_entries + n_units * (n + 1) // 2)
            cells.append(Cell(number, group, cut, n, blocks, entries, tuple(own)))
            n_blocks, n_entries = blocks.stop, entries.stop
    return GramPlan(tuple(balances), tuple(cells), rule, tuple(shapes))


class GramsCopy(NamedTuple):
    """The measurement after a step, and what parameters are then.

    Attributes:
        plan: The cells.
        tensors: In the order of `GramPlan.shapes`.
        present: Without cells nothing; else every entry of W Wᵀ, with signs, and |W|² of each block, without.
    """

    plan: GramPlan
    tensors: Sequence[Tensor]
    present: Sequence[Tensor]

    def cpu(self) -> "GramsCopy":
        """A copy on the CPU."""
        return GramsCopy(self.plan, [x.cpu() for x in self.tensors], [x.cpu() for x in self.present])

    def partial(self, whole: GramPlan, cut: Cut) -> list[Tensor]:
        """All sums of the cells of one cut, at their places among whole cells; zero elsewhere.

        In the order of state, defect, |g|², W Wᵀ and |W|². Propagators are no sums.
        """
        state, defect, sq_g, _ = self.tensors
        own = [state, defect, sq_g, *self.present]
        of_all = [x.new_zeros(*x.shape[:-1], n) for x, n in zip(own, _lengths(whole), strict=True)]
        for cell, place in places(self.plan, whole):
            if cell.cut == cut:
                for to, x, at, there in zip(of_all, own, _slices(cell), _slices(place), strict=True):
                    to[..., there] += x[..., at]
        return of_all

    def gathered(self, whole: GramPlan, sums: Sequence[Tensor]) -> "GramsCopy":
        """The copy of the whole cells, with the sums of `partial` over all cuts and ranks."""
        state, defect, sq_g, *present = sums
        propagators = state.new_zeros(whole.shapes["gram_propagators"])
        for cell, place in places(self.plan, whole):
            propagators[whole.cells.index(place)] = self.tensors[-1][self.plan.cells.index(cell)]
        return GramsCopy(whole, [state, defect, sq_g, propagators], present)


def places(plan: GramPlan, whole: GramPlan) -> list[tuple[Cell, Cell]]:
    """Each cell, and the whole cell that it is a part of."""
    of = {(cell.balance, cell.group): cell for cell in whole.cells}
    return [(cell, of[cell.balance, cell.group]) for cell in plan.cells]


def scatter(tensors: Sequence[Tensor], whole: GramPlan, plan: GramPlan, has_first: Sequence[bool]) -> list[Tensor]:
    """The tensors of cells from which a measurement of whole cells continues.

    Summed over cells and ranks, they are the whole ones again: the first cell of each has all of them, on the rank with
    the first element of its first tensor, and the others zeros.

    Args:
        tensors: Of the whole cells.
        whole, plan: The whole cells, and those of this rank.
        has_first: Per tensor, whether this rank has its first element.
    """
    *sums, propagators = tensors
    mine = [x.new_zeros(shape) for x, shape in zip(tensors, plan.shapes.values(), strict=True)]
    seen: set[tuple[int, int]] = set()
    for number, (cell, place) in enumerate(places(plan, whole)):
        mine[-1][number] = propagators[whole.cells.index(place)]
        if cell[:2] not in seen and has_first[cell.members[0][0]]:
            for to, x, at, there in zip(mine, sums, _slices(cell), _slices(place), strict=False):
                to[..., at] = x[..., there]
        seen.add(cell[:2])
    return mine


def _slices(cell: Cell) -> list[slice]:
    """The place of a cell in state, defect, |g|², W Wᵀ and |W|²."""
    return [cell.entries, cell.entries, cell.blocks, cell.entries, cell.blocks]


def _lengths(plan: GramPlan) -> list[int]:
    """The lengths of these."""
    return [at.stop for at in _slices(plan.cells[-1])]
