"""`noetherperf info`: versions, backends and instruction sets, each available or the reason why not."""

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console

from noetherperf.common.table import ReportTable

__all__ = ["info"]


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print versions, backends and instruction sets, and say why some of them cannot run here."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = ReportTable(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(folds=True)
    for package, version in found["versions"].items():
        table.add_row(package, version)
    table.add_row("threads", str(found["threads"]))
    for name, reason in found["backends"].items():
        table.add_row(f"backend {name}", "available" if reason is None else reason)
    for name, fault in found["instructions"].items():
        passed = "passes its self-check" if fault is None else f"fails its self-check: {fault}"
        used = f", used ({found['variable']} chooses)" if name == found["used"] else ""
        table.add_row(f"instructions {name}", passed + used)
    Console().print(table, highlight=False)


def facts() -> dict[str, Any]:
    """What `info` prints, as plain data.

    Returns:
        "versions" and "threads"; "backends" and "instructions" (of the CPU engine), by name, each None or the reason
        why it cannot be used; "used", the instruction set that is, None without the engine; and "variable", the
        environment variable that chooses one.
    """
    import torch

    from noetherperf.engines.backends import backends

    states = {name: None if state == "available" else state for name, state in backends().items()}
    versions = {name: importlib.metadata.version(name) for name in ("noetherperf", "torch", "numpy")}
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions},
        "threads": torch.get_num_threads(),
        "backends": states,
        "instructions": {},
        "used": None,
        "variable": None,
    }
    if states["cpu"] is None:
        from noetherperf import _cpu
        from noetherperf.engines import isa

        faults = {name: isa.fault(name) or None for name in _cpu.isas()}
        found |= {"instructions": faults, "used": isa.choose(), "variable": isa.VARIABLE}
    return found
