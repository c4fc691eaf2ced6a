"""The Triton engine: passes the tables, and the inputs of each step, to the kernels of noetherperf.triton_kernels."""

from collections.abc import Sequence
from functools import partial

import torch

from noetherperf.engines import Call
from noetherperf.engines.device_inputs import DeviceInputs
from noetherperf.engines.gpu import MEASURE, GpuEngine, Launch
from noetherperf.engines.rows import components
from noetherperf.engines.side_stream import SideStream
from noetherperf.engines.tiling import TRITON
from noetherperf.triton_kernels import rules
from noetherperf.triton_kernels.options import kinds, n_stages, options
from noetherperf.triton_kernels.spans import N_THREADS
from noetherperf.triton_kernels.stage_1 import stage_1
from noetherperf.triton_kernels.stage_2 import stage_2


class TritonEngine(GpuEngine):
    """Engine in Triton, which compiles a kernel when it is first used. Usually two launches per step.

    Computes in float32, in float64 for float64 parameters; moments in the same inside a tile, in float64 across tiles;
    laws in float64. Bitwise reproducible.
    """

    tiling = TRITON

    def _build(self) -> None:
        super()._build()
        self._hip = torch.version.hip is not None
        self._lanes = torch.cuda.get_device_properties(self.device).warp_size if self._on_gpu else 32
        self._constants = rules.constants(self.rule, *components(self.rule))
        self._kernels = rules.module_of(self.rule)
        self._steps: dict[tuple[int, bool], rules.Step] = {(MEASURE, False): rules.measure(self.rule)}
        self._sort()

    def _send_layouts(self) -> None:
        changed = self._layouts_changed
        super()._send_layouts()
        if changed:
            self._sort()

    def _sort(self) -> None:
        """List the kinds of tiles of each dtype."""
        self._tile_kinds = {dtype: kinds(self._tables, dtype) for dtype, _, _ in self._dtype_ranges}

    def _step(self, variant: int, scaled: bool) -> rules.Step:
        """The constants for which a variant's kernels are compiled."""
        if (variant, scaled) not in self._steps:
            self._steps[variant, scaled] = rules.step(self.rule, variant, scaled=scaled)
        return self._steps[variant, scaled]

    def _options(self, launch: Launch, step: rules.Step) -> dict[str, int]:
        return options(launch.dtype, step, self._tile_kinds[launch.dtype], self._lanes, self._hip)

    def _launch(
        self,
        launches: Sequence[Launch],
        inputs: DeviceInputs,
        *,
        measuring: bool,
        scaled: bool,
        aside: SideStream | None,
    ) -> list[Call]:
        first, second = partial(self._stage_1, launches, inputs, scaled), partial(self._stage_2, inputs, measuring)
        if aside is None:
            return [first, second]
        return [first, *aside.fork([partial(self._stage_2_there, aside, inputs)])]

    def _stage_1(self, launches: Sequence[Launch], inputs: DeviceInputs, scaled: bool) -> None:
        for launch in launches:
            step = self._step(launch.variant, scaled)
            stage_1[(launch.end - launch.begin,)](
                self.tensors,
                self.dims,
                self.views,
                self.tiles,
                inputs.scalars,
                inputs.rows,
                inputs.groups,
                inputs.addresses,
                inputs.first,
                inputs.ages,
                self._known_ages,
                self.chosen,
                self._workspace,
                launch.begin,
                len(self.params),
                DTYPE=launch.dtype,
                RULE=self._constants,
                STEP=step,
                COEFFICIENTS=self._kernels.coefficients,
                UPDATE=self._kernels.update,
                KINDS=self._tile_kinds[launch.dtype],
                STAGES=n_stages(self._hip),
                **self._options(launch, step),
            )

    def _stage_2_there(self, aside: SideStream, inputs: DeviceInputs) -> None:
        with aside.here():
            self._stage_2(inputs, measuring=False)

    def _stage_2(self, inputs: DeviceInputs, measuring: bool) -> None:
        n_spans, m = len(self._tables.spans), self._measurement
        translations, norms = m.states
        stage_2[(max(1, n_spans),)](
            self.tensors,
            self.views,
            self.spans,
            inputs.scalars,
            inputs.rows,
            inputs.groups,
            inputs.addresses,
            inputs.first,
            self._known_ages,
            self.chosen,
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
            len(self.params),
            self.n_groups,
            RULE=self._constants,
            MEASURING=measuring,
            num_warps=N_THREADS.value // self._lanes,
        )
