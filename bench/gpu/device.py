"""The device that is measured: its memory and last cache, its own clock, and what a step has it do."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

import noetherperf as nperf
from bench.inputs import available_memory
from bench.timing import Rounds, Step
from noetherperf.engines.backends import BACKENDS

LONGEST_PAUSE = 0.02  # seconds that the host may run ahead


@dataclass(frozen=True)
class Device:
    """Where to measure: its memory, its last cache, and the backends that it can run."""

    device: torch.device
    backends: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> "Device":
        device = torch.device(name)
        status = nperf.backends()
        wanted = {device.type} if device.type == "cpu" else {"cuda", "triton"}
        return cls(device, tuple(b for b in BACKENDS if b in wanted and status[b] == "available"))

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def cache(self) -> int:
        """Bytes of the last cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.is_gpu else 1 << 22

    @property
    def memory(self) -> int:
        """Bytes that a case may take; what variants take for sums comes on top."""
        return int(0.8 * (torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else available_memory()))

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()


class GpuRounds(Rounds):
    """Rounds timed by the device's events, the host ahead of them.

    Args:
        steps: Per variant one callable for each input set.
        host: Per variant the host's seconds for a step, which decide how far ahead it must be.
    """

    max_repeats = 4  # noetherperf's host may be eight steps ahead

    def __init__(self, steps: Mapping[str, Sequence[Step]], host: Mapping[str, float]) -> None:
        super().__init__(steps)
        self._host = host
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cycles = 0.0  # of a pause, a second
        cycles = 10_000_000
        for _ in range(2):
            self._begin.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            self._end.synchronize()
        self._cycles = cycles / (self._begin.elapsed_time(self._end) / 1e3)

    def _seconds(self, name: str, turns: Sequence[Step]) -> float:
        torch.cuda._sleep(int(self._pause(name, len(turns)) * self._cycles))
        self._begin.record()
        for step in turns:
            step()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3

    def _pause(self, name: str, n_steps: int) -> float:
        """Seconds in which the host gets ahead by so many steps."""
        return min(LONGEST_PAUSE, 1.5 * self._host[name] * n_steps + 5e-5)

    def _wall(self, once: Mapping[str, float], periods: Mapping[str, int]) -> float:
        pauses = sum(self._pause(name, self.repeats) / period for name, period in periods.items())
        return super()._wall(once, periods) + pauses


def host_seconds(steps: Sequence[Step], device: Device, seconds: float = 0.1) -> float:
    """The host's seconds for a step while the device has room for more: the median of at least three tries."""
    found: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < deadline and len(found) < 50):
        device.synchronize()
        begin = time.perf_counter()
        for i in range(3):
            steps[i % len(steps)]()
        found.append((time.perf_counter() - begin) / 3)
    device.synchronize()
    return statistics.median(found)


def launches(step: Step) -> tuple[int, int] | None:
    """Kernels and copies or fills that a step has the GPU do; None where the profiler sees none at all."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return count_launches([event.name for event in profiler.events() if event.device_type.name == "CUDA"])


def count_launches(names: Sequence[str]) -> tuple[int, int] | None:
    """Kernels, and copies or fills, among the profiler's names of what the device did.

    The profiler also tells how long the device was in a range that torch names, which every optimizer's step is.
    """
    names = [name for name in names if not name.startswith("Optimizer.step#")]
    moves = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return (len(names) - moves, moves) if names else None
