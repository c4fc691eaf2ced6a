"""`noetherperf info`: versions, backends and instruction sets, each available or why not; and sizes of records."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.files import local
from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable

__all__ = ["info"]


def info(
    record: Annotated[
        Path | None, typer.Argument(callback=local, help="A record, to print its size instead.", show_default=False)
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=0, help="Print how big a record of so many groups will be, instead.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of that training; 10,000 or the record's if left out.")
    ] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between rows; 1 or the record's if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print versions, backends and instruction sets, and say why some of them cannot run here.

    With a record or --groups: its size, and how big it will be.
    """
    if record is not None or groups is not None:
        with clean_errors():
            _print_sizes(_sizes(record, groups, steps, every), as_json=as_json)
        return
    if steps is not None or every is not None:
        fail("--steps and --every: are of a record; name one, or give --groups")
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = _table()
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


def _sizes(record: Path | None, groups: int | None, steps: int | None, every: int | None) -> dict[str, Any]:
    """What is known of a record's size, as plain data: what is there, and an estimate.

    Returns:
        "groups" and "estimate"; and of a record "rows", "every", "bytes", and "balances": [blocks, units] by name.

    Raises:
        ValueError: Both a record and groups are given, or the path is no record.
    """
    from noetherperf.record.reader import open_record
    from noetherperf.record.size import bytes_of, estimated_bytes, projected_bytes

    if record is None:
        n_steps, n_every = 10_000 if steps is None else steps, every or 1
        estimate = estimated_bytes(groups or 0, n_steps, n_every)
        return {"groups": groups, "estimate": {"steps": n_steps, "every": n_every, "bytes": estimate}}
    if groups is not None:
        raise ValueError("--groups: a record has groups of its own; leave it out, or the record")
    opened = open_record(record)
    n_rows, n_groups, own_every = len(opened.steps), int(opened.dataset.sizes["group"]), opened.attrs.get("every", 1)
    n_steps = (int(opened.steps[-1]) if n_rows else 0) if steps is None else steps
    n_every = every or own_every
    estimate = projected_bytes(opened.path, n_steps // n_every + 1)
    return {
        "groups": n_groups,
        "balances": dict(zip(opened.balances, opened.attrs.get("balance_shapes", []), strict=True)),
        "rows": n_rows,
        "every": own_every,
        "bytes": bytes_of(opened.path),
        "estimate": {"steps": n_steps, "every": n_every, "bytes": estimate},
    }


def _print_sizes(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = _table()
    balances = found.get("balances", {})
    if found["groups"] or not balances:
        table.add_row("groups", f"{found['groups']:,}")
    for name, (blocks, units) in balances.items():
        table.add_row(f"Balance {printable(name)}", f"{blocks:,} × [{units:,}, {units:,}]")
    if "rows" in found:
        table.add_row("rows", f"{found['rows']:,}, every {found['every']:,} steps")
        table.add_row("on disk", _megabytes(found["bytes"]))
    estimate = found["estimate"]
    rows = estimate["steps"] // estimate["every"] + 1
    how = f"{estimate['steps']:,} steps, every {estimate['every']:,}: {rows:,} rows"
    table.add_row("estimate", f"{_megabytes(estimate['bytes'])} for {how}")
    if "rows" not in found:
        table.add_row("", "without Balances: a row has 2n + 3 float64 for each block of n units, and 2n² with matrices")
    Console().print(table, highlight=False)


def _table() -> ReportTable:
    """Of names and facts, without headings."""
    table = ReportTable(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(folds=True)
    return table


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.2g} MB"


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
