"""Cases one after the other while there is time; or only their kernels, compiled."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.cases import LARGE_MODELS, Case
from bench.gpu.comparison import Bench
from bench.gpu.device import Device
from bench.inputs import TooLarge, make_input_set
from bench.training import TRAIN
from bench.variants import one_line, ours


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

    Not of the largest models, whose kernels are those of smaller ones, and not of those that are trained.
    """
    for case in cases:
        if case.model in LARGE_MODELS or case.suite == TRAIN:
            continue
        inputs = make_input_set(case, 0, device.device)
        for backend in device.backends:
            for measuring in (True, False):
                ours(case, inputs, measuring=measuring, backend=backend).step()
        print(case.name, flush=True)
