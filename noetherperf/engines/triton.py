"""The Triton engine: hands the tables, and what is new each step, to the kernels of noetherperf.triton_kernels."""

from collections.abc import Sequence
from functools import partial

import torch

from noetherperf.engines import Call
from noetherperf.engines.gpu import GpuEngine, Inputs, Launch
from noetherperf.engines.tiling import TRITON
from noetherperf.triton_kernels.launch import N_THREADS, kinds, options, stage_1, stage_2


class TritonEngine(GpuEngine):
    """Engine in Triton, which compiles its kernels when they are first needed. Two launches a step, as a rule.

    Computes in float32, in float64 for float64 parameters; moments in the same inside a tile, in float64 across tiles;
    laws in float64. Bitwise reproducible.
    """

    tiling = TRITON

    def _build(self) -> None:
        super()._build()
        self._lanes = torch.cuda.get_device_properties(self.device).warp_size if self._on_gpu else 32
        self._sort()

    def _send_layouts(self) -> None:
        changed = self._layouts_changed
        super()._send_layouts()
        if changed:
            self._sort()

    def _sort(self) -> None:
        """Take note of the kinds of tiles that occur."""
        self._tile_kinds = {dtype: kinds(self._tables, dtype) for dtype, _, _ in self._dtype_ranges}

    def _options(self, launch: Launch) -> dict[str, int]:
        hip = torch.version.hip is not None
        return options(launch.dtype, launch.mode, self._tile_kinds[launch.dtype], self._lanes, hip)

    def _launch(self, launches: Sequence[Launch], inputs: Inputs, *, measuring: bool, scaled: bool) -> list[Call]:
        return [partial(self._queue, launches, inputs, measuring, scaled)]

    def _queue(self, launches: Sequence[Launch], inputs: Inputs, measuring: bool, scaled: bool) -> None:
        n_tensors, n_spans, m = len(self.params), len(self._tables.spans), self.measurement
        for launch in launches:
            stage_1[(launch.end - launch.begin,)](
                self.tensors,
                self.dims,
                self.views,
                self.tiles,
                inputs.scalars,
                inputs.lrs,
                inputs.hypers,
                inputs.addresses,
                inputs.first,
                self.fresh,
                self.pending,
                self._workspace,
                launch.begin,
                n_tensors,
                DTYPE=launch.dtype,
                MODE=launch.mode,
                KINDS=self._tile_kinds[launch.dtype],
                SCALED=scaled,
                **self._options(launch),
            )
        translations, norms = m.states
        stage_2[(max(1, n_spans),)](
            self.tensors,
            self.views,
            self.spans,
            inputs.scalars,
            inputs.lrs,
            inputs.hypers,
            inputs.addresses,
            self.fresh,
            self.pending,
            self._workspace,
            m.moments,
            m.moments.stride(0),
            translations,
            translations.stride(0),
            norms,
            norms.stride(0),
            m.propagators,
            m.clock,
            n_spans,
            n_tensors,
            self.n_groups,
            MEASURING=measuring,
            num_warps=N_THREADS.value // self._lanes,
        )
