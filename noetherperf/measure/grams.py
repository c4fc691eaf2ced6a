"""Grams: the products of units with each other, which a Balance measures, and their laws.

A part of a Balance is a matrix W [n, rest] for each block: a row for each unit. Where a norm's law has sums over
elements, this one has products of rows, entry by entry:

    |θ|²  →  W Wᵀ         ⟨θ, v⟩  →  sym(W vᵀ)        |u|²  →  u uᵀ        ⟨θ, g⟩  →  sym(W gᵀ)         and so on

with sym(A) = (A + Aᵀ)/2. The recursions of the norm law, s' = A s + B m, are linear and have the same A and B for every
entry, so every rule has this law without a line of its own. Only the upper triangle is kept.

A rule gives u and its new buffers from what a step reads (`Rule.direction`), so that all products of a step are taken
before it, by torch's own matrix product, on every device and for every engine alike. Those of a step are in float32
where parameters and gradients are, or have 16 bits. Sums over steps are in float64, so that an error is 1e-7 of what a
step adds, not of the charge. Factors are never rounded to TF32 or bfloat16 (measure/precision.py). Charges are taken
in float64, when they are read or a law starts from them.

The parts of one Balance in one parameter group, a *cell*, keep one law, since they make the same step. Where they once
do not (one has no gradient, or another age), nobody knows their shares of the law's numbers: what depends on them is
NaN from then on (`in_common`), and the law is open with the reason.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherperf.measure.cells import Cell, GramPlan, GramsCopy
from noetherperf.measure.precision import full_precision
from noetherperf.measure.products import Sums, Units, lengths
from noetherperf.measure.shards import Indices
from noetherperf.rules.law import N_START, PROPAGATED, Law, Shape, Step, advance, begin, in_common, is_zero, jump
from noetherperf.rules.moments import Moment, Operand
from noetherperf.symmetry import Part

#: The product that is a Balance's constraint; the readout shows that of the last step, whatever the law needs.
DEFECT = Moment.DOT_PG.name.lower()


class Measured(NamedTuple):
    """What is measured, in the order of `GramPlan.shapes`."""

    state: Tensor
    defect: Tensor
    sq_g: Tensor
    propagators: Tensor

    @classmethod
    def zeros(cls, plan: GramPlan, device: torch.device | str) -> "Measured":
        shapes = plan.shapes.values() if plan.cells else [(0,)] * len(cls._fields)
        return cls(*(torch.zeros(x, dtype=torch.float64, device=device) for x in shapes))


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
        self.plan, self._params, self._device = plan, params, torch.device(device)
        # After the last step, and where the next one writes: new memory in each step would cost more than arithmetic.
        self._now, self._next = (Measured.zeros(plan, device) for _ in range(2))
        self._law = plan.rule.laws[Law.NORM]
        self._units, self._sums = Units(plan, device, indices), Sums(plan, device)
        self._is_fixed = False  # whether a CUDA graph knows where `_now` is

    def tensors(self) -> list[Tensor]:
        """All that is measured after the last step, in the order of `GramPlan.shapes`; a step may replace them."""
        return list(self._now) if self.plan.cells else []

    # ---- between steps ----------------------------------------------------------------------------------------------

    def _present(self, carried: Sequence[Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """What parameters are now: every entry of W Wᵀ; and |W|² of each block or, with what tensors carry into their
        next step, every entry of sym(W vᵀ)."""
        x = torch.zeros_like(self._now.defect)
        other = torch.zeros_like(self._now.sq_g if carried is None else x)
        for cell in self.plan.cells:
            self._sums.begin(cell, torch.float64)
            carry = carried is not None and any(carried[tensor] is not None for tensor, _ in cell.members)
            for tensor, part in cell.members:
                v = None if carried is None else carried[tensor]
                for blocks, pieces in self._units.pieces(cell, part, [self._params[tensor].detach(), v]):
                    w, of_v = (None if y is None else self._units.complete(cell, part, y).double() for y in pieces)
                    assert w is not None, "a parameter is there"
                    pairs = {"x": (w, w)}
                    if carry:
                        pairs["y"] = (w, torch.zeros_like(w) if of_v is None else of_v)
                    elif carried is None:
                        other[cell.blocks][blocks] += w.square().sum((1, 2))
                    self._sums.add(blocks, part.weight, pairs)
            for name, entries in self._sums.entries().items():
                (x if name == "x" else other)[cell.entries] = entries
        return x, other

    def start(self, carried: Sequence[Tensor | None]) -> None:
        """Start the laws from the present parameters.

        Args:
            carried: Per tensor what it carries into its next step (`Rule.carried`), None if nothing.
        """
        if self.plan.cells:
            with full_precision(self._device):
                begin(self._law, self._now.state, *self._present(carried))
            self._now.defect.zero_()
            self._now.sq_g.zero_()
            self._now.propagators.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)

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
        with full_precision(self._device):
            x, y = self._present(carried)
        state = self._now.state.clone()
        budget, y_row = self._law.x("budget", state), self._law.y_row("budget")
        assert budget is not None, "every law keeps its budget"
        for cell in which:
            at = cell.entries
            y_jump = 0.0 if y_row is None else y[at] - state[y_row, at]
            jump(self._law, state[:, at], (x[at] - budget[at], y_jump))
        return [partial(self._now.state.copy_, state)]

    def copy(self) -> GramsCopy:
        """A copy on the device, with the present charges."""
        if not self.plan.cells:
            return GramsCopy(self.plan, [], [])
        with full_precision(self._device):
            return GramsCopy(self.plan, [x.clone() for x in self._now], self._present())

    # ---- a step -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int] | Tensor,
        lrs: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        fixed: bool = False,
    ) -> list[Callable[[], object]]:
        """Take the products of a step that is about to be made; the calls make them those of the last step.

        Nothing waits for the device.

        Args:
            grads: One per tensor; None: it takes no part.
            buffers: For each of the rule's buffers one per tensor.
            options: Of the rule, one per parameter group.
            ages: One per tensor; on the device float64, where the host does not know them.
            lrs: One per parameter group: a learning rate on the device that replaces the one of its options, or None.
            grad_scale: On the device: gradients are divided by it.
            found_inf: On the device: if not zero, nothing is written.
            fixed: Whether what is measured must stay where it is from now on, since a CUDA graph may replay the step.
        """
        if not self.plan.cells:
            return []
        rule, now, new = self.plan.rule, self._now, self._next
        options = [
            x if lr is None else rule.with_lr(x, lr.detach().reshape(()).to(torch.float64))
            for x, lr in zip(options, lrs, strict=True)
        ]
        new.state[:N_START].copy_(now.state[:N_START])
        new.defect.zero_()
        new.sq_g.zero_()
        steps = self._steps(grads, options, ages)
        matrices = {id(step): _matrices(step, self._device) for step in steps}
        with full_precision(self._device):
            for cell, step in zip(self.plan.cells, steps, strict=True):
                at = cell.entries
                if step is None:
                    new.state[:, at] = now.state[:, at]
                    continue
                names = {DEFECT} | driving(self._law, step)
                sums = self._take(cell, names, grads, buffers, options[cell.group], ages, grad_scale)
                advance(self._law, step, now.state[:, at], sums, out=new.state[:, at])
                new.defect[at] = sums[DEFECT]
        new.propagators.copy_(_product(torch.stack([matrices[id(step)] for step in steps]), now.propagators))
        if found_inf is not None:
            for old, x in zip(now, new, strict=True):
                torch.where(found_inf != 0.0, old, x, out=x)
        self._is_fixed |= fixed
        if self._is_fixed:
            return [partial(torch._foreach_copy_, list(now), list(new))]
        return [partial(self.__dict__.update, _now=new, _next=now)]

    def _steps(
        self, grads: Sequence[Tensor | None], options: Sequence[Any], ages: Sequence[int] | Tensor
    ) -> list[Step | None]:
        """Each cell's step; None if none of its tensors makes one."""
        rule = self.plan.rule

        @cache
        def of_age(group: int, age: int) -> Step:
            return rule.steps(options[group], age, (Law.NORM,))[Law.NORM]

        @cache
        def of_group(group: int) -> Step:
            return rule.steps(options[group], ages, (Law.NORM,))[Law.NORM]  # type: ignore[arg-type]

        def of_tensor(group: int, tensor: int) -> Step | None:
            if grads[tensor] is None:
                return None
            if isinstance(ages, Tensor):
                return of_group(group).of_one(tensor)
            return of_age(group, rule.with_row(ages[tensor]))

        return [
            in_common(self._law, [of_tensor(cell.group, tensor) for tensor, _ in cell.members])
            for cell in self.plan.cells
        ]

    def _take(
        self,
        cell: Cell,
        names: Collection[str],
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Any,
        ages: Sequence[int] | Tensor,
        grad_scale: Tensor | None,
    ) -> dict[str, Tensor]:
        """The products of a cell's step by the names of moments: sums over its parts, [entries of the cell], float64;
        zero if there is no such moment in this step."""
        rule, members = self.plan.rule, [member for member in cell.members if grads[member[0]] is not None]
        given = [x for tensor, _ in members for x in (self._params[tensor], grads[tensor]) if x is not None]
        dtype = reduce(torch.promote_types, (x.dtype for x in given), torch.float32)
        warm = any(of_all[tensor] is not None for of_all in buffers[:1] for tensor, _ in members)
        self._sums.begin(cell, dtype)
        for tensor, part in members:
            age: Any = ages[tensor] if isinstance(ages, Tensor) else rule.with_row(ages[tensor])
            c = rule.coefficients_of(options, age)
            tensors = [self._params[tensor].detach(), grads[tensor], *(of_all[tensor] for of_all in buffers)]
            for blocks, pieces in self._units.pieces(cell, part, tensors):
                converted = [None if x is None else x.to(dtype) for x in pieces]
                operands = self._operands(cell, part, c, converted, grad_scale, warm=warm)
                taken = rule.moments[: rule.n_taken(options, Operand.V in operands)]
                pairs = {name: (operands[a], operands[b]) for name, a, b in taken if name in names}
                self._sums.add(blocks, part.weight, pairs)
                self._next.sq_g[cell.blocks][blocks] += lengths(operands[Operand.G]).double().square_()
        return dict.fromkeys(names, torch.zeros_like(self._next.defect[cell.entries])) | self._sums.entries()

    def _operands(
        self,
        cell: Cell,
        part: Part,
        c: Sequence[Any],
        pieces: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        *,
        warm: bool,
    ) -> dict[Operand, Tensor]:
        """The factors of a step's products of pieces, [some blocks, n, some elements].

        Args:
            cell, part: Whose.
            c: Coefficients of the step.
            pieces: Of parameter, gradient and buffers, in one dtype.
            grad_scale: As for `prepare`.
            warm: Whether some tensor of the cell has the first buffer.
        """
        p, g, *buffers = pieces
        assert p is not None
        assert g is not None
        if grad_scale is not None:
            g = g / grad_scale.to(g.dtype)
        after, u = self.plan.rule.direction(p, g, tuple(buffers), c)
        operands = {Operand.P: p, Operand.G: g, Operand.U: u}
        if warm:
            operands[Operand.V] = torch.zeros_like(u) if after[0] is None else after[0]
        # Of what is one tensor, one again: it is multiplied once.
        complete = {id(x): self._units.complete(cell, part, x) for x in operands.values()}
        return {which: complete[id(x)] for which, x in operands.items()}


def driving(shape: Shape, step: Step) -> set[str]:
    """The names of the moments that have a coefficient in a step."""
    return {
        name
        for component in shape.components
        for name, column in zip(component.moments, zip(*step.recursions[component.name].b, strict=True), strict=True)
        if not all(map(is_zero, column))
    }


def _matrices(step: Step | None, device: torch.device) -> Tensor:
    """The matrices of a step's undriven parts, [PROPAGATED, 2, 2], on the device without waiting for it.

    None: those of no step.
    """
    if step is None:
        return torch.eye(2, dtype=torch.float64, device=device).expand(len(PROPAGATED), 2, 2)
    numbers = [x for name in PROPAGATED for row in step.propagated[name] for x in row]
    filled = [x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device) for x in numbers]
    return torch.stack(filled).view(len(PROPAGATED), 2, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices [..., 2, 2], in which an unknown (NaN) entry of a does not reach what b multiplies by zero."""
    terms = a.unsqueeze(-1) * b.unsqueeze(-3)
    return terms.masked_fill_(b.unsqueeze(-3) == 0.0, 0.0).sum(-2)
