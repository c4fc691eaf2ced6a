"""The compiled CPU engine: passes the tables, and the inputs of each step, to csrc/step_cpu.cpp."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherperf import _cpu
from noetherperf.engines import Call, OnDevice
from noetherperf.engines.isa import choose
from noetherperf.engines.reader import Reader
from noetherperf.engines.rows import components
from noetherperf.engines.tables import GRADIENT, TableEngine
from noetherperf.engines.tiling import CPU
from noetherperf.measure.plan import Measurement, Plan


class CpuEngine(TableEngine):
    """Engine of noetherperf._cpu: one call a step, on torch.get_num_threads() threads.

    Computes in float32, in float64 for float64 parameters; moments and laws in float64 (moments of 16-bit
    parameters in float32 over blocks of up to 32 terms, csrc/sums_cpu.h). Results do not depend on the
    number of threads.

    Args:
        isa: The instruction set, one of `module.isas()`; if empty, noetherperf.engines.isa chooses it.
        module: The module of the kernels; in tests, a build that emulates vectors lane by lane instead of
            noetherperf._cpu.
    """

    tiling = CPU
    ages = ()  # the host knows which steps are skipped, and makes no buffers for them

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        names: Sequence[str],
        group_index: Sequence[int],
        measurement: Measurement,
        isa: str = "",
        module: ModuleType | None = None,
    ) -> None:
        self.isa = isa or choose()
        self._module: Any = module or _cpu
        super().__init__(plan, params, names, group_index, measurement)

    def _build(self) -> None:
        super()._build()
        m = self._measurement
        self._clock = m.clock.numpy()
        self._row_of = self._rows.first + np.int32(self._rows.n_ages - 1)  # each tensor's row
        self._any_young = False  # whether one of them is a younger age's
        table, driving = components(self.rule)
        self._engine = self._module.Engine(
            self._tables.tensors,
            self._tables.dims,
            self._tables.views,
            self._tables.tiles,
            self._tables.spans,
            table,
            driving,
            list(self.rule.law_numbers.values()),
            self.rule.n_numbers,
            self._workspace.data_ptr(),
            m.moments.data_ptr(),
            m.moments.stride(0),
            [state.data_ptr() for state in m.states],
            [state.stride(0) for state in m.states],
            m.propagators.data_ptr(),
            self.isa,
            self.rule.name,
        )

    @property
    def addresses(self) -> np.ndarray:
        return self._addresses

    @property
    def readers(self) -> list[Reader]:
        return self._readers

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list[Call]:
        self._admit_to_measure(buffers)
        return [partial(self._engine.measure, self._addresses, torch.get_num_threads())]

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> list[Call]:
        self._admit_buffers(buffers)
        # In float32, as torch unscales. The step multiplies by it, so that small 16-bit gradients do not underflow.
        unscale = 1.0 if on_device.grad_scale is None else float(np.float32(1.0 / on_device.grad_scale.item()))
        self._find_rows(options, ages)
        calls = self._calls(unscale)
        if unscale != 1.0 and (scaled := [g for g in grads if g is not None]):
            calls.append(partial(torch._foreach_mul_, scaled, unscale))
        return calls

    def prepare_again(self, options: Sequence[Any], ages: Sequence[int], *, same_options: bool) -> list[Call]:
        if not same_options:
            self._find_rows(options, ages)
        elif self.rule.step_key is not None:
            self._rows.find_older()
        return self._calls(1.0)

    def _find_rows(self, options: Sequence[Any], ages: Sequence[int]) -> None:
        """Compute the rows of a step, and each tensor's."""
        rows = self._rows
        if self.rule.step_key is None:
            oldest, young = rows.n_ages - 1, 0 in ages
            if young or self._any_young:
                self._row_of = rows.first + np.minimum(np.frombuffer(bytes(ages), np.uint8), oldest)
                self._any_young = young
            rows.find(options, (0, oldest) if young else (oldest,))
        else:
            rows.find_counted(options, ages, self._addresses[:, GRADIENT])
            self._row_of = rows.first

    def _calls(self, unscale: float) -> list[Call]:
        """The calls that make the step of these rows; gradients are the stored values times `unscale`."""
        rows = self._rows
        return [
            partial(
                self._engine.step,
                self._addresses,
                self._row_of,
                rows.numbers,
                rows.groups,
                torch.get_num_threads(),
                unscale,
            ),
            partial(np.add, self._clock, rows.tick, self._clock),
        ]
