"""The benchmarks on a GPU: the same cases and peers as on a CPU, timed by the device's own events.

    python -m bench.gpu --out gpu.json [--seconds 200] [--cases 'resnet50-*'] [--device cuda]

The device's time of a step is what lies between two events of its stream. A pause queued before the first one lets the
host run ahead, so that no launch is waited for in between; what the host takes for a step is timed apart. Input sets
rotate, so that no step finds its data in the L2 cache, and in every round a copy of as many bytes as the step moves is
timed too. The cases come in order of importance; the file is written again after each, and no case begins after
`--seconds`. On a CPU (`--device cpu`) the same is timed by the host's clock: the rehearsal, whose figures mean nothing.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import noetherperf as nperf
from bench.cases import LARGE_MODELS, MODELS, Case
from bench.correctness import Mismatch, check
from bench.inputs import InputSet, TooLarge, available_memory, make_input_set, n_sets
from bench.timing import Rounds, Spread, Step, figures, ratios
from bench.variants import VARIANTS, Unavailable, Variant, ours
from noetherperf.engines.backends import BACKENDS

SUITE = "gpu"
MAX_COMPILED = 20  # tensors: compiling takes seconds for each, and the whole run has minutes
LEAST_ROUNDS = 7
LONGEST_PAUSE = 0.02  # seconds that the host may run ahead

PLAIN = " plain"  # after a backend's name: the same steps without measuring
PEERS = ("fused", "foreach", "compiled")
MEASURING_PEERS = ("fused", "eager", "compiled_measured")


def _cases() -> list[Case]:
    """What matters most comes first."""
    plan: list[tuple[str, str, tuple[str, ...], float]] = [
        ("resnet50", "float32", ("none", "rows", "both"), 0.9),
        ("billion", "float32", ("none", "rows", "both"), 0.9),
        ("gpt2", "float32", ("none", "rows", "both"), 0.9),
        ("matrix", "float32", ("none", "rows", "columns", "both"), 0.9),
        ("small2000", "float32", ("none", "rows", "both"), 0.9),
        ("gpt2", "bfloat16", ("none", "rows", "both"), 0.9),
        ("host161", "float32", ("none", "rows"), 0.9),
        ("gpt2-xl", "float32", ("none", "rows", "both"), 0.9),
        ("resnet50", "bfloat16", ("none", "rows", "both"), 0.9),
        ("vgg16", "float32", ("none", "rows", "both"), 0.9),
        ("embedding", "float32", ("rows",), 0.9),
        ("mlp", "float32", ("none", "both"), 0.9),
        ("matrix", "bfloat16", ("none", "rows", "both"), 0.9),
        ("gpt2-xl", "bfloat16", ("none", "both"), 0.9),
        ("billion", "bfloat16", ("none", "both"), 0.9),
        ("matrix", "float32", ("none", "both"), 0.0),
        ("matrix", "float16", ("none", "both"), 0.9),
        ("matrix", "float64", ("none", "both"), 0.9),
        ("resnet50", "float32", ("columns", "whole"), 0.9),
        ("host2000", "float32", ("none", "rows"), 0.9),
    ]
    shapes = {**MODELS, **LARGE_MODELS, "host161": ((8, 8),) * 161, "host2000": ((1, 1),) * 2000}
    return [
        Case("host" if model.startswith("host") else SUITE, model, shapes[model], dtype, view, momentum)
        for model, dtype, views, momentum in plan
        for view in views
    ]


CASES = tuple(_cases())


# ---- the device -----------------------------------------------------------------------------------------------------


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
        host: Per variant the host's seconds for a step, which say how far ahead it must be.
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
        pause = min(LONGEST_PAUSE, 1.5 * self._host[name] * len(turns) + 5e-5)
        torch.cuda._sleep(int(pause * self._cycles))
        self._begin.record()
        for step in turns:
            step()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3

    def calibrate(self, seconds: float, least: int) -> int:
        begin = time.perf_counter()
        super().calibrate(seconds, least)
        wall = time.perf_counter() - begin  # of one round, which takes longer than its steps
        return max(least, int(seconds / (wall * self.repeats)))


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


# ---- variants -------------------------------------------------------------------------------------------------------


def names_for(case: Case, backends: Sequence[str]) -> list[str]:
    """The variants that a case compares."""
    if case.suite == "host":
        return [*backends, "fused", "foreach"]
    if case.view == "none":
        return [*backends, *PEERS]
    return [*(name for backend in backends for name in (backend, backend + PLAIN)), *MEASURING_PEERS]


def variant_of(name: str) -> Variant:
    """A peer of bench.variants, or a backend of noetherperf."""
    if name in VARIANTS:
        return VARIANTS[name]
    backend = name.removesuffix(PLAIN)
    return Variant(name, VARIANTS["ours"].make, {"measuring": backend == name, "backend": backend})


def copies(case: Case, device: Device) -> list[Step]:
    """Copies on the device that read and write as many bytes together as the case's step, in memory of their own."""
    n = max(1, case.bytes_moved // 2)
    n_pairs = max(1, -(-4 * device.cache // (2 * n))) if n < 4 * device.cache else 1
    pairs = [torch.zeros(2, n, dtype=torch.uint8, device=device.device) for _ in range(min(n_pairs, 64))]

    def copy(source: torch.Tensor, target: torch.Tensor) -> Step:
        return lambda: target.copy_(source)

    return [copy(pair[i], pair[1 - i]) for i in range(2) for pair in pairs]


# ---- a case ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs cases on a device; keeps input sets for the next case if it has the same tensors."""

    device: Device
    case_seconds: float = 1.2  # for a case's rounds
    _key: tuple[object, ...] = ()
    _sets: list[InputSet] = field(default_factory=list)

    def sets(self, case: Case) -> list[InputSet]:
        key = (case.shapes, case.dtype, case.momentum != 0.0)
        if key != self._key:
            self._key, self._sets = (), []
            self.device.forget()
            n = n_sets(case, 2 * self.device.cache, self.device.memory)
            self._sets = [make_input_set(case, i, self.device.device) for i in range(n)]
            self._key = key
        return self._sets

    def run(self, case: Case) -> dict[str, Any]:
        """Check and time one case.

        Raises:
            TooLarge: It does not fit into the device's memory.
        """
        sets = self.sets(case)
        steps, reasons, wrong = self.admit(case, sets)
        steps["copy"] = copies(case, self.device)
        for step in steps["copy"]:
            step()
        host = {name: host_seconds(variant, self.device) for name, variant in steps.items()}
        rounds: Rounds = GpuRounds(steps, host) if self.device.is_gpu else Rounds(steps)
        for _ in range(rounds.calibrate(self.case_seconds, LEAST_ROUNDS)):
            rounds.run()
        counted = [name for name in steps if name in (*self.device.backends, "fused")]
        return {
            "case": case.name,
            "suite": case.suite,
            "model": case.model,
            "dtype": case.dtype,
            "view": case.view,
            "momentum": case.momentum,
            "parameters": case.n_parameters,
            "tensors": len(case.shapes),
            "bytes moved": case.bytes_moved,
            "input sets": len(sets),
            "rounds": len(rounds.times["copy"]),
            "steps timed together": rounds.repeats,
            "figures": self.figures(rounds.times),
            "host seconds": {name: float(f"{x:.4g}") for name, x in host.items()},
            "launches": {name: launches(steps[name][0]) for name in counted} if self.device.is_gpu else {},
            "not run": reasons,
            "wrong": wrong,
        }

    def figures(self, times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, list[float]]]:
        """Per variant its seconds, what fraction of the copy's bandwidth it reaches, and its multiples of others."""
        backends = self.device.backends
        found = figures(times, ["fused", *backends, *(backend + PLAIN for backend in backends)])
        for name, values in times.items():
            found[name]["of copy"] = ratios({"copy": times["copy"], name: values}, name)["copy"]
        return {name: {key: _short(spread) for key, spread in one.items()} for name, one in found.items()}

    def admit(self, case: Case, sets: list[InputSet]) -> tuple[dict[str, list[Step]], dict[str, str], dict[str, str]]:
        """The variants that can run the case, why others cannot, and which of ours compute something wrong.

        What a first step sets up is set up.
        """
        admitted: dict[str, list[Step]] = {}
        reasons: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for name in names_for(case, self.device.backends):
            variant = variant_of(name)
            if variant.compiles and len(case.shapes) > MAX_COMPILED:
                reasons[name] = f"unrolled over {len(case.shapes)} tensors it would compile for too long"
                continue
            try:
                if name not in VARIANTS:
                    check(case, sets[0], ours(case, sets[0], **variant.how))
                steps = variant.make(case, sets, **variant.how)
                for _ in range(2):
                    for step in steps:
                        step()
                self.device.synchronize()
            except Mismatch as error:
                wrong[name] = str(error)
            except Unavailable as error:
                reasons[name] = str(error)
            except Exception as error:
                reasons[name] = one_line(error)
                if name not in VARIANTS:
                    wrong[name] = reasons[name]
                self.device.forget()
            else:
                admitted[name] = steps
        return admitted, reasons, wrong


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _short(spread: Spread) -> list[float]:
    return [float(f"{x:.4g}") for x in spread]


# ---- a run ----------------------------------------------------------------------------------------------------------


def chosen(patterns: str) -> list[Case]:
    """The cases whose names match one of the patterns, separated by commas; "": all.

    Raises:
        ValueError: A pattern matches nothing.
    """
    found = list(CASES)
    if patterns:
        wanted = [pattern.strip() for pattern in patterns.split(",")]
        for pattern in wanted:
            if not any(fnmatchcase(case.name, pattern) for case in CASES):
                raise ValueError(
                    f"--cases: no case is called {pattern!r}; there are {', '.join(c.name for c in CASES)}"
                )
        found = [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in wanted)]
    return found


def run(
    cases: Sequence[Case],
    bench: Bench,
    seconds: float,
    write: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run cases in order while there is time; `write` gets all there is after each."""
    deadline = clock() + seconds
    result: dict[str, Any] = {"backends": list(bench.device.backends), "cases": [], "not timed": []}
    for case in cases:
        begin = clock()
        try:
            if begin >= deadline:
                raise TooLarge("there was no time left for it")
            result["cases"].append(bench.run(case))
            print(f"{case.name}: {clock() - begin:.1f} s", flush=True)
        except TooLarge as error:
            result["not timed"].append({"case": case.name, "reason": str(error)})
        except torch.OutOfMemoryError as error:
            result["not timed"].append({"case": case.name, "reason": one_line(error)})
            bench.device.forget()
        write(result)
    return result


def compile_kernels(cases: Sequence[Case], device: Device) -> None:
    """Make a step of each case by every backend, with and without its measurement.

    Not of the largest models, whose kernels are those of smaller ones.
    """
    for case in cases:
        if case.model in LARGE_MODELS:
            continue
        inputs = make_input_set(case, 0, device.device)
        for backend in device.backends:
            for measuring in (True, False):
                ours(case, inputs, measuring=measuring, backend=backend).step()
        print(case.name, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the JSON to write")
    what.add_argument("--compile", metavar="I/N", help="only compile, for every N-th case from the I-th on")
    parser.add_argument("--seconds", type=float, default=200.0, help="after so many no case begins")
    parser.add_argument("--case-seconds", type=float, default=Bench.case_seconds, help="for the rounds of each case")
    parser.add_argument("--cases", default="", help="names or patterns of names, separated by commas")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = Device.of(options.device)
    if not device.backends:
        status = nperf.backends()
        reasons = "; ".join(f"{name}: {status[name]}" for name in ("cuda", "triton") if name in status)
        print(f"bench.gpu: no backend can run on {options.device} ({reasons})", file=sys.stderr)
        return 1

    if options.compile:
        first, step = map(int, options.compile.split("/"))
        compile_kernels(chosen(options.cases)[first::step], device)
        return 0

    def write(result: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(result))

    result = run(chosen(options.cases), Bench(device, options.case_seconds), options.seconds, write)
    for case in result["cases"]:
        for name, reason in case["wrong"].items():
            print(f"{case['case']}, {name}: {reason}", file=sys.stderr)
    return 1 if any(case["wrong"] for case in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
