"""An engine on a GPU for tests whose tensors are on the CPU: everything is copied before and after every call."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from noetherperf.engines import Call, Engine, OnDevice, Stepping
from noetherperf.measure.plan import Measurement, Plan


class Mirror:
    """A tensor's whole storage on a device, a tensor of the same layout in it: writes beside the tensor are seen."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._here = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self._there = self._here.to(device, copy=True)
        self.tensor = self._there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def send(self) -> None:
        self._there.copy_(self._here)

    def fetch(self) -> None:
        self._here.copy_(self._there)


Mirrors = Sequence[Mirror | None]


def tensors(mirrors: Mirrors) -> list[Tensor | None]:
    return [None if mirror is None else mirror.tensor for mirror in mirrors]


class OnGpu(Stepping):
    """Engine over tensors on the CPU: another engine steps copies of them on a device.

    Args:
        make: Makes the other engine.
        device: Where it steps.
    """

    def __init__(
        self,
        make: Callable[..., Engine],
        plan: Plan,
        params: Sequence[Tensor],
        names: Sequence[str],
        group_index: Sequence[int],
        measurement: Measurement,
        device: str = "cuda",
    ) -> None:
        self._device = torch.device(device)
        self._here = measurement
        self._params = [Mirror(p, self._device) for p in params]
        self._grads: Mirrors = []
        there = Measurement.empty(plan, self._device, measurement.clock.numel() - 1)
        self._engine = make(plan, [p.tensor for p in self._params], names, group_index, there)

    @property
    def measurement(self) -> Measurement:
        return self._here

    @property
    def ages(self) -> Sequence[int] | Tensor:
        return self._engine.ages

    def _mirror(self, values: Sequence[Tensor | None]) -> Mirrors:
        return [None if x is None else Mirror(x, self._device) for x in values]

    def _call(self, mirrors: Mirrors, call: Callable[[], Any]) -> None:
        for here, there in zip(self._here.tensors(), self._engine.measurement.tensors(), strict=True):
            there.copy_(here)
        for p in self._params:
            p.send()
        call()
        for here, there in zip(self._here.tensors(), self._engine.measurement.tensors(), strict=True):
            here.copy_(there)
        for mirror in (*self._params, *mirrors):
            if mirror is not None:
                mirror.fetch()

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        self._grads = self._mirror(grads)
        self._engine.admit(tensors(self._grads))
        return grads

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list[Call]:
        return [partial(self._measure, buffers)]

    def _measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> None:
        mirrors = list(map(self._mirror, buffers))
        self._call(list(chain(*mirrors)), lambda: self._engine.measure(list(map(tensors, mirrors))))

    def prepare(self, *args: Any) -> list[Call]:
        return [partial(self._step, *args)]

    def _step(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> None:
        mirrors = list(map(self._mirror, buffers))
        found = (*on_device.lrs, on_device.grad_scale, on_device.found_inf)
        values = [None if x is None else x.to(self._device) for x in found]
        inputs = OnDevice(values[:-2], *values[-2:])
        self._call(
            [*chain(*mirrors), *self._grads],
            lambda: self._engine.step(tensors(self._grads), list(map(tensors, mirrors)), options, ages, inputs),
        )
