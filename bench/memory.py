"""What measuring costs in memory: the bytes that an optimizer keeps for it, and how a process grows by them.

    python -m bench.memory adamw 100000000 1000

measures one model of so many parameters in so many groups, in a process of its own, and prints JSON.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from bench.cases import Case
from bench.inputs import InputSet, make_input_set
from bench.variants import ours, peer
from noetherperf.engines.cpu import CpuEngine
from noetherperf.measure.plan import Measurement, make_plan

STEPS = 3


def extra_bytes(case: Case, inputs: InputSet) -> dict[str, int]:
    """Bytes that noetherperf keeps beyond parameters, gradients and momentum buffers, by what they hold.

    Counted on an engine and a measurement that are made as the optimizer makes its own.
    """
    plan = make_plan(case.symmetries(), case.names, case.shapes, case.recipe.ours.rule)
    measurement = Measurement.empty(plan)
    engine = CpuEngine(plan, inputs.params, case.names, [0] * len(case.names), measurement)
    return {
        "moments": measurement.moments.nbytes,
        "law state": sum(x.nbytes for x in (*measurement.states, measurement.propagators)),
        **engine.n_bytes(),
    }


def _resident(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or at most since `_forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _settle() -> None:
    """Return unused memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(rule: str, n_parameters: int, n_groups: int) -> dict[str, str | int]:
    """Step a matrix of so many rows, each a group, and see how the process grows beyond torch's fused step."""
    small = Case("memory", "small", ((8, 8),), view="rows", rule=rule)
    case = Case("memory", "matrix", ((n_groups, n_parameters // n_groups),), view="rows", rule=rule)
    warm = make_input_set(small, 0)
    ours(small, warm).step()  # loads what every model needs once
    inputs = make_input_set(case, 0)
    fused = peer(case, inputs, fused=True)
    fused.step()
    _settle()
    before = _resident()
    _forget_peak()
    optimizer = ours(case, inputs)
    for _ in range(STEPS):
        optimizer.step()
    growth, peak = _resident() - before, _resident(peak=True) - before
    extra = extra_bytes(case, inputs)
    return {
        "rule": rule,
        "parameters": case.n_parameters,
        "groups": n_groups,
        **extra,
        "counted": sum(extra.values()),
        "grown": growth,
        "grown at peak": peak,
        "buffer of squared gradients": 4 * case.n_parameters,
    }


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:4]))))
