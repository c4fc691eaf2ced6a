"""What measuring costs in memory: the bytes that an optimizer keeps for it, and how a process grows by them.

    python -m bench.memory 100000000 1000

measures one model of so many parameters in so many groups, in a process of its own, and prints JSON.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

import noetherperf as nperf
from bench.cases import Case
from bench.inputs import make_inputs
from bench.variants import ours, peer
from noetherperf.engines.cpu import CpuEngine

STEPS = 3


def extra_bytes(optimizer: nperf.SGD) -> dict[str, int]:
    """Bytes that the optimizer keeps beyond parameters, gradients and momentum buffers, by what they hold."""
    found = dict.fromkeys(("moments", "law state", "workspace", "tables"), 0)
    for meter in optimizer._prepare():
        engine, measurement = meter.engine, meter.measurement
        assert isinstance(engine, CpuEngine)
        found["moments"] += measurement.moments.nbytes
        found["law state"] += sum(x.nbytes for x in (*measurement.states, measurement.propagators))
        found["workspace"] += engine._workspace.nbytes
        tables = engine._tables
        arrays = (tables.tensors, tables.dims, tables.views, tables.tiles, tables.spans, engine._addresses)
        found["tables"] += sum(array.nbytes for array in arrays)
    return found


def _resident(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or at most since `_forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _settle() -> None:
    """Give back to the system what nobody holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(n_parameters: int, n_groups: int) -> dict[str, int]:
    """Step a matrix of so many rows, each a group, and see how the process grows beyond torch's fused step."""
    small = Case("memory", "small", ((8, 8),), view="rows")
    case = Case("memory", "matrix", ((n_groups, n_parameters // n_groups),), view="rows")
    warm = make_inputs(small, 0)
    ours(small, warm).step()  # what is loaded once, whatever the model, is there now
    inputs = make_inputs(case, 0)
    fused = peer(case, inputs, fused=True)
    fused.step()
    _settle()
    before = _resident()
    _forget_peak()
    optimizer = ours(case, inputs)
    for _ in range(STEPS):
        optimizer.step()
    growth, peak = _resident() - before, _resident(peak=True) - before
    return {
        "parameters": case.n_parameters,
        "groups": n_groups,
        **extra_bytes(optimizer),
        "counted": sum(extra_bytes(optimizer).values()),
        "grown": growth,
        "grown at peak": peak,
        "buffer of squared gradients": 4 * case.n_parameters,
    }


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(json.dumps(measure(*map(int, sys.argv[1:3]))))
