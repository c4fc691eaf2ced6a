"""The CUDA engine: passes the tables on the device to the kernels of csrc/cuda."""

import re
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from noetherperf.engines import Call
from noetherperf.engines.device_inputs import DeviceInputs
from noetherperf.engines.gpu import GpuEngine, Launch
from noetherperf.engines.rows import COMPONENT
from noetherperf.engines.side_stream import SideStream
from noetherperf.engines.tiling import CUDA


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a module built for these architectures runs on a device of this compute capability.

    Args:
        architectures: As CMake writes them, "80-real,100-virtual": machine code runs on later devices of the same major
            version, virtual code on every later device; without a suffix it is both. "90a" runs on 9.0 alone, "100f" on
            10.0 and later 10.x. What is not a number ("native", "all") is taken to cover any device.
        capability: Major and minor.
    """
    for architecture in architectures.split(","):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", architecture)
        if match is None:
            return True
        code, suffix, kind = (int(match[1]), int(match[2])), match[3], match[4]
        if capability == code:
            return True
        if suffix != "a" and kind != "virtual" and capability[0] == code[0] and capability > code:
            return True
        if suffix == "" and kind != "real" and capability > code:
            return True
    return False


def unsupported() -> str | None:
    """Why the installed noetherperf._cuda cannot run with this driver, torch and devices; None if it can."""
    from noetherperf import _cuda

    try:
        _cuda.n_devices()
    except RuntimeError as error:
        return f"no CUDA device ({error}); it needs an NVIDIA GPU, and a driver as new as the CUDA it was built with"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; install a torch built with CUDA"
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not covers(_cuda.architectures, capability):
            code = "".join(map(str, capability))
            return (
                f"{torch.cuda.get_device_name(i)} (cuda:{i}) has compute capability {code}, and noetherperf._cuda was "
                f"built for {_cuda.architectures}; build it for that device too "
                f'(CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES={code}" pip install -e .) or hide the device '
                "(CUDA_VISIBLE_DEVICES)"
            )
    return None


class CudaEngine(GpuEngine):
    """Engine of noetherperf._cuda: stage 1 in one launch for all tensors of a dtype and variant, then stage 2, on
    torch's current stream.

    Computes and sums in float32 inside a tile, in float64 for float64 parameters; across tiles, and the laws, in
    float64. Runs agree bit for bit. Loads and stores are 16 bytes wide if parameter, gradient, buffer and all their
    rows have an alignment of 16 bytes.

    Args:
        module: The module of the kernels; in tests, one that executes them on a CPU instead of noetherperf._cuda.
    """

    tiling = CUDA

    def __init__(self, *args: Any, module: ModuleType | None = None) -> None:
        if module is None:
            from noetherperf import _cuda

            module = _cuda
        self._module: Any = module
        super().__init__(*args)

    def _build(self) -> None:
        super()._build()
        m, t = self._measurement, self._tables
        held = {
            "tensors": self.tensors,
            "dims": self.dims,
            "views": self.views,
            "tiles": self.tiles,
            "spans": self.spans,
            "components": self.components,
            "driving": self.driving,
            "workspace": self._workspace,
            "moments": m.moments,
            "translation": m.states[0],
            "norm": m.states[1],
            "propagators": m.propagators,
            "clock": m.clock,
            "ages": self._known_ages,
            "chosen": self.chosen,
        }
        self._engine = self._module.Engine(
            self.rule.name,
            {name: tensor.data_ptr() for name, tensor in held.items()},
            n_tensors=len(self.params),
            n_spans=len(t.spans),
            n_groups=self.n_groups,
            n_components=len(self.components) // (COMPONENT.itemsize // 8),
            n_driving=len(self.driving),
            n_ages=self._rows.n_ages,
            n_numbers=self.rule.n_numbers,
            law_numbers=list(self.rule.law_numbers.values()),
            n_state_rows=[len(state) for state in m.states],
            moments_stride=m.moments.stride(0),
            states_stride=[state.stride(0) for state in m.states],
        )
        self._strided = self._strided_dtypes()
        self._wanted_for: tuple[Sequence[Launch], list[tuple[int, int, int, int]]] = ([], [])

    def _strided_dtypes(self) -> frozenset[int]:
        """Dtypes with a tensor whose parameter, gradient and buffer are not all dense in one layout."""
        t = self._tables.tensors
        return frozenset(t["dtype"][t["dense"] == 0].tolist())

    def _send_layouts(self) -> None:
        if self._layouts_changed:
            self._strided = self._strided_dtypes()
            self._wanted_for = [], []
        super()._send_layouts()

    def _launch(
        self,
        launches: Sequence[Launch],
        inputs: DeviceInputs,
        *,
        measuring: bool,
        scaled: bool,
        aside: SideStream | None,
    ) -> list[Call]:
        if launches is not self._wanted_for[0]:
            last = self._engine.any_variant
            wanted = {(x.dtype, x.variant if 0 <= x.variant < last else last, x.begin, x.end) for x in launches}
            wanted |= {(x.dtype, last, x.begin, x.end) for x in launches if x.dtype in self._strided}
            self._wanted_for = launches, sorted(wanted)
        how = {"scaled": scaled, "measuring": measuring}
        launch = partial(self._engine.launch, self._wanted_for[1], inputs.pointers, **how)
        if aside is None:
            return [partial(launch, stream=self._queue())]
        first = partial(launch, stream=self._queue(), second=False)
        return [first, *aside.fork([partial(launch, stream=aside.address, first=False)])]

    def _queue(self) -> int:
        """The current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream if self._on_gpu else 0
