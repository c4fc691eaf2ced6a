"""The reference engine: noetherperf.reference, tensor by tensor, on any device and layout."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from noetherperf import laws, reference
from noetherperf.engines import OnDevice, check_gradient
from noetherperf.hyper import Hyper
from noetherperf.laws import Law
from noetherperf.moments import Moment
from noetherperf.plan import Measurement, Plan


class ReferenceEngine:
    """Engine in plain torch. Computes in float32, in float64 for float64 parameters; allocates and waits as it goes."""

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

    def admit(self, grads: Sequence[Tensor | None]) -> None:
        for name, p, g in zip(self.names, self.params, grads, strict=True):
            if g is not None:
                check_gradient(name, p, g)

    def measure(self, buffers: Sequence[Tensor | None]) -> None:
        still = Hyper(lr=0.0).coefficients(first=False)
        for p, v, views in zip(self.params, buffers, self.views, strict=True):
            v = torch.zeros_like(p) if v is None else v
            for view in views:
                segments = slice(view.segment, view.segment + view.n_segments)
                sums = reference.moments(view.grouped, p, p, v, torch.zeros_like(p), None, still)
                self.measurement.moments[:, segments] = sums

    def step(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        first: Sequence[int],
        on_device: OnDevice,
    ) -> None:
        self.fresh = [old or new == 1 for old, new in zip(self.fresh, first, strict=True)]
        if on_device.found_inf is not None and on_device.found_inf.item() != 0.0:
            return
        hypers = [
            hyper if lr is None else replace(hyper, lr=lr.item())
            for hyper, lr in zip(hypers, on_device.lrs, strict=True)
        ]
        clock = self.measurement.clock
        clock += torch.tensor([1.0, *(hyper.duration for hyper in hypers)], dtype=clock.dtype, device=clock.device)
        for i, (p, g, v) in enumerate(zip(self.params, grads, buffers, strict=True)):
            if g is None:
                for view in self.views[i]:
                    segments = slice(view.segment, view.segment + view.n_segments)
                    self.measurement.moments[Moment.SUM_G :, segments] = 0.0
                continue
            hyper = hypers[self.hyper_index[i]]
            c = hyper.coefficients(first=self.fresh[i])
            self.fresh[i] &= hyper.momentum == 0.0
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            before, grad = p.to(dtype, copy=True), g.to(dtype)
            if on_device.grad_scale is not None:
                grad = grad / on_device.grad_scale.to(dtype)
                g.copy_(grad)
            p_new, v_new, u = reference.step(before, grad, None if v is None else v.to(dtype), c)
            p.data.copy_(p_new)  # not to raise a version counter, which is the caller's business
            if v is not None and v_new is not None and c.mix_v != 0.0:
                v.data.copy_(v_new)
            for view in self.views[i]:
                segments = slice(view.segment, view.segment + view.n_segments)
                sums = reference.moments(view.grouped, p, before, grad, u, v_new, c)
                self.measurement.moments[:, segments] = sums
                for law in Law:
                    at = view.law_segment[law]
                    if at >= 0:
                        state = self.measurement.states[law][:, at : at + view.n_segments]
                        laws.advance(
                            law, state, sums, laws.discrete_transition(law, c), laws.flow_transition(law, hyper)
                        )
            if self.views[i]:
                for law in Law:
                    laws.propagate(self.measurement.propagators[i, law, 0], laws.discrete_transition(law, c))
                    laws.propagate(self.measurement.propagators[i, law, 1], laws.flow_transition(law, hyper))
