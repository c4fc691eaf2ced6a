"""The engine in plain torch: the rule's update, its moments and laws, exactly as defined. Every kernel is tested
against it."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noetherperf.engines import Call, OnDevice, Stepping, check_gradient, gradient_dtypes
from noetherperf.engines.reader import unreadable
from noetherperf.measure.plan import Measurement, Plan, View
from noetherperf.rules import law as laws
from noetherperf.rules.moments import COMMON, Moment, Operand, Pair, take


class ReferenceEngine(Stepping):
    """Engine in plain torch. Computes in float32, in float64 for float64 tensors; allocates, and waits for the device.

    It steps what compiled engines cannot: tensor subclasses, and gradients whose dtype is not their parameter's.
    """

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        names: Sequence[str],
        group_index: Sequence[int],
        measurement: Measurement,
    ) -> None:
        self.plan, self.params, self.names, self.group_index = plan, params, names, group_index
        self.rule, self.measurement = plan.rule, measurement
        self.ages = [1] * len(params)
        self._is_checked = False  # that the rule gives the numbers that it names
        self.views = [[view for view in plan.views if view.tensor == i] for i in range(len(params))]

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        self._need_elements()
        for name, p, g in zip(self.names, self.params, grads, strict=True):
            if g is not None:
                check_gradient(name, p, g, gradient_dtypes(p))
        return grads

    def _need_elements(self) -> None:
        """Raise if a measured parameter has no elements yet."""
        for name, p, views in zip(self.names, self.params, self.views, strict=True):
            if views and p.device.type == "meta":
                raise RuntimeError(
                    f"{name} is on the meta device and has no elements to measure; give the model memory first "
                    "(model.to_empty(device=...) and loading its weights)"
                )

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list[Call]:
        self._need_elements()
        measured = self.measurement.moments.clone()
        for i, (p, views) in enumerate(zip(self.params, self.views, strict=True)):
            v = buffers[0][i] if buffers else None
            zeros = torch.zeros_like(p)
            operands = {Operand.P: p, Operand.P_NEW: p, Operand.G: zeros if v is None else v, Operand.U: zeros}
            for view in views:
                measured[:, _segments(view)] = self._rows(take(view.grouped, COMMON, operands))
        return [partial(self.measurement.moments.copy_, measured)]

    def _rows(self, taken: Tensor) -> Tensor:
        """One row for every moment of the rule: those that were summed, then zeros."""
        return torch.cat([taken, taken.new_zeros(len(self.rule.moments) - len(taken), taken.shape[1])])

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> list[Call]:
        rule = self.rule
        now = list(ages)
        if rule.step_key is None:  # else the host counts, and knows of every skipped step
            now = [min(given, known) for given, known in zip(ages, self.ages, strict=True)]
        if on_device.found_inf is not None and on_device.found_inf.item() != 0.0:
            return [partial(setattr, self, "ages", now)]
        options = [
            x if lr is None else rule.with_lr(x, lr.item()) for x, lr in zip(options, on_device.lrs, strict=True)
        ]
        if not self._is_checked:
            for x in options:
                rule.check_numbers(x, self.plan.laws)
            self._is_checked = True
        new = Measurement.of(x.clone() for x in self.measurement.tensors())
        for i, duration in enumerate([1.0, *map(rule.duration, options)]):
            new.clock[i] += duration
        later = list(now)
        written: list[tuple[Tensor, Tensor]] = []
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                for view in self.views[i]:
                    new.moments[Moment.SUM_G :, _segments(view)] = 0.0
                continue
            own = options[self.group_index[i]]
            dtype = torch.promote_types(torch.promote_types(p.dtype, g.dtype), torch.float32)
            before, grad = p.to(dtype, copy=True), g.to(dtype)
            if on_device.grad_scale is not None:
                grad = grad / on_device.grad_scale.to(dtype)
                if not g._is_zerotensor():  # a zero tensor stays zero and cannot be written
                    written.append((g, grad))
            age = rule.with_row(now[i])
            held = [of_all[i] for of_all in buffers]
            before_it = tuple(None if v is None else v.to(dtype) for v in held)
            p_new, after_it, u = rule.update(before, grad, before_it, rule.coefficients_of(own, age))
            stored = p_new.to(p.dtype)
            written.append((p.data, stored))  # .data, because the caller raises version counters
            if rule.ages(own):
                later[i] = rule.older(now[i])
                pairs = list(zip(held, after_it, strict=True))[: rule.n_written(own)]
                written += [(v.data, x) for v, x in pairs if v is not None and x is not None]
            operands = {Operand.P: before, Operand.P_NEW: stored, Operand.G: grad, Operand.U: u}
            if after_it and (v_new := after_it[0]) is not None:
                operands[Operand.V] = v_new
            self._measure(new, i, rule.moments[: rule.n_taken(own, Operand.V in operands)], operands, own, age)
        written += zip(self.measurement.tensors(), new.tensors(), strict=True)
        return [*_copies(written), partial(setattr, self, "ages", later)]

    def _measure(
        self,
        new: Measurement,
        tensor: int,
        pairs: Sequence[Pair],
        operands: Mapping[Operand, Tensor],
        options: Any,
        age: int,
    ) -> None:
        """Take the moments of one tensor's step and advance its laws."""
        if not self.views[tensor]:
            return
        steps = self.rule.steps(options, age, self.plan.laws)
        for view in self.views[tensor]:
            sums = new.moments[:, _segments(view)] = self._rows(take(view.grouped, pairs, operands))
            by_name = dict(zip(self.rule.moment_rows, sums, strict=True))
            for law, step in steps.items():
                if (at := view.law_segment[law]) >= 0:
                    state = new.states[law][:, at : at + view.n_segments]
                    laws.advance(self.rule.laws[law], step, state, by_name)
        for law, step in steps.items():
            laws.propagate(new.propagators[tensor, law], step)


def _segments(view: View) -> slice:
    return slice(view.segment, view.segment + view.n_segments)


def _copies(written: Sequence[tuple[Tensor, Tensor]]) -> list[Call]:
    """The calls that copy values to tensors: one call for all plain tensors; others may support copy_ alone."""
    odd = [unreadable(to) is not None for to, _ in written]
    calls: list[Call] = [partial(to.copy_, value) for to, value in itertools.compress(written, odd)]
    plain = [pair for pair, is_odd in zip(written, odd, strict=True) if not is_odd]
    if plain:
        calls.append(partial(torch._foreach_copy_, [to for to, _ in plain], [value for _, value in plain]))
    return calls
