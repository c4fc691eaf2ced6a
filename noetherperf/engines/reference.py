"""The reference engine: noetherperf.reference, tensor by tensor, on any device and layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from noetherperf import laws, reference
from noetherperf.engines import check_gradient
from noetherperf.hyper import Hyper
from noetherperf.laws import Law
from noetherperf.moments import Moment
from noetherperf.plan import Measurement, Plan


class ReferenceEngine:
    """Engine in plain torch. Computes in float32, in float64 for float64 parameters; allocates as it goes."""

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
        first: Sequence[bool],
    ) -> None:
        for i, (p, g, v) in enumerate(zip(self.params, grads, buffers, strict=True)):
            if g is None:
                for view in self.views[i]:
                    segments = slice(view.segment, view.segment + view.n_segments)
                    self.measurement.moments[Moment.SUM_G :, segments] = 0.0
                continue
            hyper = hypers[self.hyper_index[i]]
            c = hyper.coefficients(first=first[i])
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            before = p.to(dtype, copy=True)
            p_new, v_new, u = reference.step(before, g.to(dtype), None if v is None else v.to(dtype), c)
            p.copy_(p_new)
            if v is not None and v_new is not None and c.mix_v != 0.0:
                v.copy_(v_new)
            for view in self.views[i]:
                segments = slice(view.segment, view.segment + view.n_segments)
                sums = reference.moments(view.grouped, p, before, g, u, v_new, c)
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
