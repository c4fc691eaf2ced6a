"""The reference engine: noetherperf.rules.reference, tensor by tensor, on any device and layout."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from noetherperf.engines import Call, OnDevice, Stepping, check_gradient, gradient_dtypes
from noetherperf.engines.reader import unreadable
from noetherperf.measure.plan import Measurement, Plan
from noetherperf.rules import laws, reference
from noetherperf.rules.hyper import Hyper
from noetherperf.rules.laws import Law
from noetherperf.rules.moments import Moment


class ReferenceEngine(Stepping):
    """Engine in plain torch. Computes in float32, in float64 for float64 tensors; allocates and waits as it goes.

    It steps what no compiled engine can: tensor subclasses, gradients of another dtype than their parameter's.
    """

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        names: Sequence[str],
        hyper_index: Sequence[int],
        measurement: Measurement,
    ) -> None:
        self.plan, self.params, self.names, self.hyper_index = plan, params, names, hyper_index
        self.measurement = measurement
        self.fresh = [False] * len(params)  # buffers that no step has written yet
        self.views = [[view for view in plan.views if view.tensor == i] for i in range(len(params))]

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        self._need_elements()
        for name, p, g in zip(self.names, self.params, grads, strict=True):
            if g is not None:
                check_gradient(name, p, g, gradient_dtypes(p))
        return grads

    def _need_elements(self) -> None:
        """Raise where there is nothing to measure yet."""
        for name, p, views in zip(self.names, self.params, self.views, strict=True):
            if views and p.device.type == "meta":
                raise RuntimeError(
                    f"{name} is on the meta device and has no elements to measure; give the model memory first "
                    "(model.to_empty(device=...) and loading its weights)"
                )

    def prepare_to_measure(self, buffers: Sequence[Tensor | None]) -> list[Call]:
        self._need_elements()
        measured = self.measurement.moments.clone()
        still = Hyper(lr=0.0).coefficients(first=False)
        for p, v, views in zip(self.params, buffers, self.views, strict=True):
            for view in views:
                zeros = torch.zeros_like(p)
                segments = slice(view.segment, view.segment + view.n_segments)
                sums = reference.moments(view.grouped, p, p, zeros if v is None else v, zeros, None, still)
                measured[:, segments] = sums
        return [partial(self.measurement.moments.copy_, measured)]

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        first: Sequence[int],
        on_device: OnDevice,
    ) -> list[Call]:
        fresh = [old or new == 1 for old, new in zip(self.fresh, first, strict=True)]
        if on_device.found_inf is not None and on_device.found_inf.item() != 0.0:
            return [partial(setattr, self, "fresh", fresh)]
        hypers = [
            hyper if lr is None else replace(hyper, lr=lr.item())
            for hyper, lr in zip(hypers, on_device.lrs, strict=True)
        ]
        new = Measurement.of(x.clone() for x in self.measurement.tensors())
        for i, duration in enumerate([1.0, *(hyper.duration for hyper in hypers)]):
            new.clock[i] += duration
        written: list[tuple[Tensor, Tensor]] = []
        for i, (p, g, v) in enumerate(zip(self.params, grads, buffers, strict=True)):
            if g is None:
                for view in self.views[i]:
                    segments = slice(view.segment, view.segment + view.n_segments)
                    new.moments[Moment.SUM_G :, segments] = 0.0
                continue
            hyper = hypers[self.hyper_index[i]]
            c = hyper.coefficients(first=fresh[i])
            fresh[i] &= hyper.momentum == 0.0
            dtype = torch.promote_types(torch.promote_types(p.dtype, g.dtype), torch.float32)
            before, grad = p.to(dtype, copy=True), g.to(dtype)
            if on_device.grad_scale is not None:
                grad = grad / on_device.grad_scale.to(dtype)
                if not g._is_zerotensor():  # which are zeros still, and cannot be written
                    written.append((g, grad))
            p_new, v_new, u = reference.step(before, grad, None if v is None else v.to(dtype), c)
            stored = p_new.to(p.dtype)
            written.append((p.data, stored))  # not to raise a version counter, which is the caller's business
            if v is not None and v_new is not None and c.mix_v != 0.0:
                written.append((v.data, v_new))
            for view in self.views[i]:
                segments = slice(view.segment, view.segment + view.n_segments)
                sums = reference.moments(view.grouped, stored, before, grad, u, v_new, c)
                new.moments[:, segments] = sums
                for law in Law:
                    at = view.law_segment[law]
                    if at >= 0:
                        state = new.states[law][:, at : at + view.n_segments]
                        laws.advance(
                            law, state, sums, laws.discrete_transition(law, c), laws.flow_transition(law, hyper)
                        )
            if self.views[i]:
                for law in Law:
                    laws.propagate(new.propagators[i, law, 0], laws.discrete_transition(law, c))
                    laws.propagate(new.propagators[i, law, 1], laws.flow_transition(law, hyper))
        written += zip(self.measurement.tensors(), new.tensors(), strict=True)
        return [*_copies(written), partial(setattr, self, "fresh", fresh)]


def _copies(written: Sequence[tuple[Tensor, Tensor]]) -> list[Call]:
    """The calls that copy values to tensors: one for all in memory; others may know no other than copy_."""
    odd = [unreadable(to) is not None for to, _ in written]
    calls: list[Call] = [partial(to.copy_, value) for to, value in itertools.compress(written, odd)]
    plain = [pair for pair, is_odd in zip(written, odd, strict=True) if not is_odd]
    if plain:
        calls.append(partial(torch._foreach_copy_, [to for to, _ in plain], [value for _, value in plain]))
    return calls
