"""`noetherperf info`: versions, backends and instruction sets, each available or the reason why not."""

import importlib.metadata
import platform

import torch
from rich.console import Console

from noetherperf.common.table import ReportTable
from noetherperf.engines.backends import backends

__all__ = ["info"]


def info() -> None:
    """Print versions, backends and instruction sets; for each that cannot run here, the reason."""
    table = ReportTable(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(folds=True)
    table.add_row("python", platform.python_version())
    for package in ("noetherperf", "torch", "numpy"):
        table.add_row(package, importlib.metadata.version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    if backends()["cpu"] == "available":
        from noetherperf import _cpu
        from noetherperf.engines import isa

        used = isa.choose()
        for name in _cpu.isas():
            wrong = isa.fault(name)
            passed = f"fails its self-check: {wrong}" if wrong else "passes its self-check"
            table.add_row(f"instructions {name}", passed + (f", used ({isa.VARIABLE} chooses)" if name == used else ""))
    Console().print(table, highlight=False)
