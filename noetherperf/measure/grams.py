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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noetherperf.measure.cells import Cell, GramPlan, GramsCopy
from noetherperf.measure.sharded_units import ShardedUnits
from noetherperf.measure.shards import Indices
from noetherperf.rules.law import PROPAGATED, Law, Shape, Step, advance, begin, is_zero, jump
from noetherperf.rules.moments import Moment, Operand
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Part

#: The product that is a Balance's constraint.
DEFECT = Moment.DOT_PG.name.lower()

#: Elements of a piece, and least of each unit.
PIECE, LEAST = 1 << 16, 32


class Grams:
    """Measures the cells of one device's tensors.

    Args:
        plan: The cells.
        params: The tensors.
        device: Where they are.
        indices: For each tensor the indices of its shard in this rank's memory; None: the tensors are whole.

    Raises:
        ValueError: Units of one block are on several ranks.
    """

    def __init__(
        self,
        plan: GramPlan,
        params: Sequence[Tensor],
        device: torch.device | str,
        indices: Sequence[Indices] | None = None,
    ) -> None:
        self.plan, self._params = plan, params
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in plan.shapes.values()]
        if zeros:
            self._state, self._defect, self._sq_g, self._propagators = zeros
            self._propagators.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self._tensors = zeros
        self._law = plan.rule.laws[Law.NORM]
        self._parts: dict[int, list[tuple[Cell, Part]]] = defaultdict(list)  # of each tensor
        self._shards: dict[tuple[int, Part], ShardedUnits] = {}
        for cell in plan.cells:
            for tensor, part in cell.members:
                self._parts[tensor].append((cell, part))
                if cell.cut and indices is not None:
                    balance, shape = plan.balances[cell.balance], plan.tensor_shapes[tensor]
                    found = ShardedUnits.of(balance, part, shape, indices[tensor], device)
                    self._shards[cell.balance, part] = found
        self._upper = {cell.n: _upper(cell.n, device) for cell in plan.cells}

    def tensors(self) -> list[Tensor]:
        """All that is measured, in the order of `GramPlan.shapes`."""
        return self._tensors

    # ---- products ---------------------------------------------------------------------------------------------------

    def _shard(self, cell: Cell, part: Part) -> ShardedUnits | None:
        return self._shards.get((cell.balance, part)) if cell.cut else None

    def _units(self, cell: Cell, part: Part, x: Tensor) -> Tensor:
        """[blocks, n, rest], float64; of a shard with zeros for what other ranks have."""
        shard = self._shard(cell, part)
        return (self.plan.balances[cell.balance].units(part, x) if shard is None else shard.units(x)).double()

    def _entries(self, cell: Cell, part: Part, a: Tensor, b: Tensor) -> Tensor:
        """The upper triangles of sym(a bᵀ), times the part's sign, for a, b [blocks, n, rest]."""
        product = a @ b.mT
        if a is not b:
            product = (product + product.mT).mul_(0.5)
        upper: Tensor = product.flatten(1).index_select(1, self._upper[cell.n]).flatten()
        return upper.mul_(part.weight)

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
            jump(self._law, state[:, at], (x[at] - budget[at], y_jump))
        return [partial(self._state.copy_, state)]

    def copy(self) -> GramsCopy:
        """A copy on the device, with the present charges."""
        if not self._tensors:
            return GramsCopy(self.plan, [], [])
        return GramsCopy(self.plan, [x.clone() for x in self._tensors], self._present())

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
        rule, shape = self.plan.rule, self._law
        options = [
            x if lr is None else rule.with_lr(x, lr.detach().reshape(()).to(torch.float64))
            for x, lr in zip(options, lrs, strict=True)
        ]
        rows = [_row_of(cell, rule, options, grads, ages) for cell in self.plan.cells]
        steps = {key: rule.steps(options[key[0]], key[1], (Law.NORM,))[Law.NORM] for key in rows if key is not None}
        names = {DEFECT}.union(*(driving(shape, step) for step in steps.values()))
        state, propagators = self._state.clone(), self._propagators.clone()
        defect, sq_g = torch.zeros_like(self._defect), torch.zeros_like(self._sq_g)
        for number, (cell, key) in enumerate(zip(self.plan.cells, rows, strict=True)):
            if key is None:
                continue
            x, sums = options[cell.group], {name: torch.zeros_like(defect[cell.entries]) for name in names}
            for tensor, part in cell.members:
                if (g := grads[tensor]) is None:
                    continue
                c, before = rule.coefficients_of(x, rule.with_row(ages[tensor])), [of_all[tensor] for of_all in buffers]
                for pieces in self._pieces(cell, part, [self._params[tensor].detach(), g, *before]):
                    operands = self._operands(cell, part, c, pieces, grad_scale)
                    for name, a, b in rule.moments[: rule.n_taken(x, Operand.V in operands)]:
                        if name in names:
                            sums[name] += self._entries(cell, part, operands[a], operands[b])
                    sq_g[cell.blocks] += torch.linalg.vector_norm(operands[Operand.G], dim=(1, 2)).square_()
            advance(shape, steps[key], state[:, cell.entries], sums)
            propagators[number] = _matrices(steps[key], propagators.device) @ propagators[number]
            defect[cell.entries] = sums[DEFECT]
            if _is_torn(cell, rule, options, grads, ages):
                state[shape.rows["budget"], cell.entries] = torch.nan
        new = [state, defect, sq_g, propagators]
        if found_inf is not None:
            new = [torch.where(found_inf != 0.0, old, x) for old, x in zip(self._tensors, new, strict=True)]
        return [partial(torch._foreach_copy_, self._tensors, new)]

    def _pieces(self, cell: Cell, part: Part, tensors: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
        """Pieces of tensors, whose products add up: few elements of every unit, which stay in a processor's cache.

        A shard is one piece, and not in units yet, because what it lacks must not be divided.
        """
        if self._shard(cell, part) is not None:
            yield list(tensors)
            return
        balance = self.plan.balances[cell.balance]
        units = [None if x is None else balance.units(part, x) for x in tensors]
        first = next(x for x in units if x is not None)
        blocks, n, rest = first.shape
        step = max(PIECE // (blocks * n), LEAST) if first.device.type == "cpu" else max(rest, 1)
        for start in range(0, rest, step):
            yield [None if x is None else x[..., start : start + step] for x in units]

    def _operands(
        self, cell: Cell, part: Part, c: Sequence[Any], pieces: Sequence[Tensor | None], grad_scale: Tensor | None
    ) -> dict[Operand, Tensor]:
        """The factors of a step's products of pieces, [blocks, n, some], float64; of 16-bit numbers in float32.

        Args:
            cell, part: Whose.
            c: Coefficients of the step.
            pieces: Of parameter, gradient and buffers.
            grad_scale: As for `prepare`.
        """
        shard, (p, g, *buffers) = self._shard(cell, part), pieces
        assert p is not None
        assert g is not None
        dtype = torch.promote_types(torch.promote_types(p.dtype, g.dtype), torch.float32)
        p, g = p.to(dtype), g.to(dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(dtype)
        before = tuple(None if v is None else v.to(dtype) for v in buffers)
        after, u = self.plan.rule.direction(p, g, before, c)
        operands = {Operand.P: p, Operand.G: g, Operand.U: u}
        if after and (v := after[0]) is not None:
            operands[Operand.V] = v
        made = {id(x): (x if shard is None else shard.units(x)).double() for x in operands.values()}
        return {which: made[id(x)] for which, x in operands.items()}


def _upper(n: int, device: torch.device | str) -> Tensor:
    """Where the upper triangle of an n × n matrix is among its entries, row by row."""
    i, j = torch.triu_indices(n, n, device="cpu")
    places: Tensor = n * i + j
    return places.to(device)


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


def driving(shape: Shape, step: Step) -> set[str]:
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
