"""Grams: the products of units with each other, which a Balance measures, and their laws.

A part of a Balance is a matrix W [n, rest] for each block: a row for each unit. Where a norm's law has sums over
elements, this one has products of rows, entry by entry:

    |θ|²  →  W Wᵀ         ⟨θ, v⟩  →  sym(W vᵀ)        |u|²  →  u uᵀ        ⟨θ, g⟩  →  sym(W gᵀ)         and so on

with sym(A) = (A + Aᵀ)/2. The recursions of the norm law, s' = A s + B m, are linear and have the same A and B for every
entry, so every rule has this law without a line of its own. Only the upper triangle is kept.

A rule gives u and its new buffers from what a step reads (`Rule.direction`), so that all products of a step are taken
before it, by torch's own matrix product, on every device and for every engine alike. Products are taken in float64,
which no setting of torch rounds to TF32 or bfloat16. The charge itself is taken when it is read.

The parts of one Balance in one parameter group make the same step. Their sum is a *cell*, and keeps one law. If they
once do not (one has no gradient, or another age), the law's state is that of no step: it becomes NaN, and the law is
open with the reason.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherperf.rules.law import PROPAGATED, Law, Shape, Step, advance, begin, is_zero, jump
from noetherperf.rules.moments import Moment, Operand
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Balance, Part

#: The product that is a Balance's constraint.
DEFECT = Moment.DOT_PG.name.lower()


class Cell(NamedTuple):
    """The parts of one Balance in one parameter group.

    Attributes:
        balance, group: Their numbers.
        n: Units of a block.
        blocks, entries: Its place among all blocks, and among all entries of upper triangles.
        members: Each part, with its signed weight, and the number of its tensor.
    """

    balance: int
    group: int
    n: int
    blocks: slice
    entries: slice
    members: tuple[tuple[int, Part], ...]

    @property
    def n_blocks(self) -> int:
        return self.blocks.stop - self.blocks.start

    def unpacked(self, entries: Tensor) -> Tensor:
        """This cell's entries [..., blocks · n(n + 1)/2] as matrices [..., blocks, n, n]."""
        own = entries.unflatten(-1, (self.n_blocks, -1))
        i, j = torch.triu_indices(self.n, self.n, device=own.device)
        whole = own.new_empty(*own.shape[:-1], self.n, self.n)
        whole[..., i, j] = own
        whole[..., j, i] = own
        return whole


@dataclass(frozen=True)
class GramPlan:
    """All cells of some tensors."""

    balances: tuple[Balance, ...]
    cells: tuple[Cell, ...]
    rule: Rule[Any]

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
) -> GramPlan:
    """Plan the cells of validated balances.

    Args:
        balances: Those that are measured. Parts of other names belong to other plans.
        names, shapes, groups: One per tensor; None if a tensor has no name; its parameter group.
        rule: The update rule.
    """
    index = {name: i for i, name in enumerate(names) if name is not None}
    cells: list[Cell] = []
    n_blocks = n_entries = 0
    for number, balance in enumerate(balances):
        members: dict[int, list[tuple[int, Part]]] = {}
        for part in balance.parts:
            if (i := index.get(part.parameter)) is not None:
                members.setdefault(groups[i], []).append((i, part))
        for group, own in members.items():
            n_units = own[0][1].n_groups(shapes[own[0][0]])
            n = balance.size or n_units
            blocks = slice(n_blocks, n_blocks + n_units // n)
            entries = slice(n_entries, n_entries + n_units * (n + 1) // 2)
            cells.append(Cell(number, group, n, blocks, entries, tuple(own)))
            n_blocks, n_entries = blocks.stop, entries.stop
    return GramPlan(tuple(balances), tuple(cells), rule)


class GramsCopy(NamedTuple):
    """The measurement after a step, in the order of `Grams.tensors()`, and what parameters are then."""

    plan: GramPlan
    tensors: list[Tensor]
    charge: Tensor | None  # [n_entries]; None without cells
    sq_p: Tensor | None  # |W|² of each block, without signs

    def cpu(self) -> "GramsCopy":
        """A copy on the CPU."""
        charge, sq_p = (None if x is None else x.cpu() for x in (self.charge, self.sq_p))
        return self._replace(tensors=[x.cpu() for x in self.tensors], charge=charge, sq_p=sq_p)


class Grams:
    """Measures the cells of one device's tensors.

    Args:
        plan: The cells.
        params: The tensors.
        device: Where they are.
    """

    def __init__(self, plan: GramPlan, params: Sequence[Tensor], device: torch.device | str) -> None:
        self.plan, self._params = plan, params
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in plan.shapes.values()]
        if zeros:
            self._state, self._defect, self._sq_g, self._propagators = zeros
            self._propagators.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self._tensors = zeros
        self._law = plan.rule.laws[Law.NORM]
        self._parts: dict[int, list[tuple[Cell, Part]]] = defaultdict(list)  # of each tensor
        for cell in plan.cells:
            for tensor, part in cell.members:
                self._parts[tensor].append((cell, part))
        self._upper = {cell.n: _upper(cell.n, device) for cell in plan.cells}

    def tensors(self) -> list[Tensor]:
        """All that is measured, in the order of `GramPlan.shapes`."""
        return self._tensors

    # ---- products ---------------------------------------------------------------------------------------------------

    def _units(self, cell: Cell, part: Part, x: Tensor) -> Tensor:
        """[blocks, n, rest], float64."""
        return self.plan.balances[cell.balance].units(part, x).double()

    def _units_of(self, cell: Cell, part: Part, operands: Mapping[Operand, Tensor]) -> dict[Operand, Tensor]:
        """The units of all operands; those of one tensor are one tensor."""
        made: dict[int, Tensor] = {}
        for x in operands.values():
            if id(x) not in made:
                made[id(x)] = self._units(cell, part, x)
        return {which: made[id(x)] for which, x in operands.items()}

    def _entries(self, cell: Cell, part: Part, a: Tensor, b: Tensor) -> Tensor:
        """The upper triangles of sym(a bᵀ), times the part's sign, for a, b [blocks, n, rest]."""
        product = a @ b.mT
        if a is not b:
            product = (product + product.mT).mul_(0.5)
        return product.flatten(1).index_select(1, self._upper[cell.n]).flatten().mul_(part.weight)

    def _present(self, carried: Sequence[Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """What parameters are now: every entry of W Wᵀ; and |W|² of each block or, with what tensors carry into their
        next step, every entry of sym(W vᵀ)."""
        x = torch.zeros_like(self._defect)
        other = torch.zeros_like(self._sq_g if carried is None else x)
        for tensor, parts in self._parts.items():
            v = None if carried is None else carried[tensor]
            for cell, part in parts:
                units = self._units(cell, part, self._params[tensor].detach())
                x[cell.entries] += self._entries(cell, part, units, units)
                if carried is None:
                    other[cell.blocks] += units.square().sum((1, 2))
                elif v is not None:
                    other[cell.entries] += self._entries(cell, part, units, self._units(cell, part, v))
        return x, other

    # ---- between steps ----------------------------------------------------------------------------------------------

    def start(self, carried: Sequence[Tensor | None]) -> None:
        """Start the laws from the present parameters.

        Args:
            carried: Per tensor what it carries into its next step (`Rule.carried`), None if nothing.
        """
        if self._tensors:
            begin(self._law, self._state, *self._present(carried))
            self._defect.zero_()
            self._sq_g.zero_()
            self._propagators.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)

    def followed(self, carried: Sequence[Tensor | None], changed: Sequence[bool]) -> list[Callable[[], object]]:
        """The calls that continue the laws after tensors were changed outside steps.

        The jump counts as defect: from the budgets to what tensors are now, with what rounding had lost until then.

        Args:
            carried: As for `start`.
            changed: Per tensor, whether it or its buffer was changed.
        """
        which = [cell for cell in self.plan.cells if any(changed[tensor] for tensor, _ in cell.members)]
        if not which:
            return []
        state, (x, y) = self._state.clone(), self._present(carried)
        budget, y_row = self._law.x("budget", state), self._law.y_row("budget")
        assert budget is not None, "every law keeps its budget"
        for cell in which:
            at = cell.entries
            y_jump = 0.0 if y_row is None else y[at] - state[y_row, at]
            jump(self._law, state[:, at], x[at] - budget[at], y_jump)
        return [partial(self._state.copy_, state)]

    def copy(self) -> GramsCopy:
        """A copy on the device, with the present charges."""
        if not self._tensors:
            return GramsCopy(self.plan, [], None, None)
        return GramsCopy(self.plan, [x.clone() for x in self._tensors], *self._present())

    # ---- a step -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        lrs: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Callable[[], object]]:
        """Take the products of a step that is about to be made; the calls write them.

        Args:
            grads: One per tensor; None: it takes no part.
            buffers: For each of the rule's buffers one per tensor.
            options: Of the rule, one per parameter group.
            ages: One per tensor.
            lrs: One per parameter group: a learning rate on the device that replaces the one of its options, or None.
            grad_scale: On the device: gradients are divided by it.
            found_inf: On the device: if not zero, nothing is written.
        """
        if not self._tensors:
            return []
        rule = self.plan.rule
        options = [
            x if lr is None else rule.with_lr(x, lr.detach().reshape(()).to(torch.float64))
            for x, lr in zip(options, lrs, strict=True)
        ]
        rows = [_row_of(cell, rule, options, grads, ages) for cell in self.plan.cells]
        steps = {key: rule.steps(options[key[0]], key[1], (Law.NORM,))[Law.NORM] for key in rows if key is not None}
        names = {DEFECT}.union(*(_driving(self._law, step) for step in steps.values()))
        sums = {name: torch.zeros_like(self._defect) for name in names}
        sq_g = torch.zeros_like(self._sq_g)
        for tensor, parts in self._parts.items():
            if (g := grads[tensor]) is None:
                continue
            x, age = options[parts[0][0].group], rule.with_row(ages[tensor])
            before = tuple(of_all[tensor] for of_all in buffers)
            operands = _operands(rule, x, age, self._params[tensor].detach(), g, before, grad_scale)
            taken = [pair for pair in rule.moments[: rule.n_taken(x, Operand.V in operands)] if pair.name in names]
            for cell, part in parts:
                units = self._units_of(cell, part, {which: operands[which] for pair in taken for which in pair[1:]})
                for name, a, b in taken:
                    sums[name][cell.entries] += self._entries(cell, part, units[a], units[b])
                sq_g[cell.blocks] += units[Operand.G].square().sum((1, 2))
        state, propagators = self._state.clone(), self._propagators.clone()
        for number, (cell, key) in enumerate(zip(self.plan.cells, rows, strict=True)):
            if key is None:
                continue
            moments = {name: of_all[cell.entries] for name, of_all in sums.items()}
            advance(self._law, steps[key], state[:, cell.entries], moments)
            propagators[number] = _matrices(steps[key], propagators.device) @ propagators[number]
            if _is_torn(cell, rule, options, grads, ages):
                state[self._law.rows["budget"], cell.entries] = torch.nan
        new = [state, sums[DEFECT], sq_g, propagators]
        if found_inf is not None:
            new = [torch.where(found_inf != 0.0, old, x) for old, x in zip(self._tensors, new, strict=True)]
        return [partial(torch._foreach_copy_, self._tensors, new)]


def _upper(n: int, device: torch.device | str) -> Tensor:
    """Where the upper triangle of an n × n matrix is among its entries, row by row."""
    i, j = torch.triu_indices(n, n, device="cpu")
    return (n * i + j).to(device)


def _row_of(
    cell: Cell, rule: Rule[Any], options: Sequence[Any], grads: Sequence[Tensor | None], ages: Sequence[int]
) -> tuple[int, int] | None:
    """The parameter group, and the age, of the tensors of a cell that take part in a step; None if none does."""
    age = next((rule.with_row(ages[tensor]) for tensor, _ in cell.members if grads[tensor] is not None), None)
    return None if age is None else (cell.group, age)


def _is_torn(
    cell: Cell, rule: Rule[Any], options: Sequence[Any], grads: Sequence[Tensor | None], ages: Sequence[int]
) -> bool:
    """Whether the tensors of a cell do not make the same step."""
    differ = rule.ages_differ(options[cell.group])
    kinds = {
        None if grads[tensor] is None else rule.with_row(ages[tensor]) if differ else 0 for tensor, _ in cell.members
    }
    return len(kinds) > 1


def _operands(
    rule: Rule[Any],
    options: Any,
    age: int,
    p: Tensor,
    g: Tensor,
    buffers: tuple[Tensor | None, ...],
    grad_scale: Tensor | None,
) -> dict[Operand, Tensor]:
    """The factors of a step's products of one tensor; 16-bit numbers in float32."""
    dtype = torch.promote_types(torch.promote_types(p.dtype, g.dtype), torch.float32)
    p, g = p.to(dtype), g.to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(dtype)
    before = tuple(None if v is None else v.to(dtype) for v in buffers)
    after, u = rule.direction(p, g, before, rule.coefficients_of(options, age))
    operands = {Operand.P: p, Operand.G: g, Operand.U: u}
    if after and (v := after[0]) is not None:
        operands[Operand.V] = v
    return operands


def _driving(shape: Shape, step: Step) -> set[str]:
    """The names of the moments that have a coefficient in a step."""
    return {
        name
        for component in shape.components
        for name, column in zip(component.moments, zip(*step.recursions[component.name].b, strict=True), strict=True)
        if not all(map(is_zero, column))
    }


def _matrices(step: Step, device: torch.device) -> Tensor:
    """The matrices of a step's undriven parts, [PROPAGATED, 2, 2], on the device without waiting for it."""
    numbers = [x for name in PROPAGATED for row in step.propagated[name] for x in row]
    if any(isinstance(x, Tensor) for x in numbers):
        matrices = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device, non_blocking=True) for x in numbers])
    else:
        matrices = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
    return matrices.view(len(PROPAGATED), 2, 2)
