"""Where figures come from: machine, software and commit."""

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import noetherperf as nperf
from bench.inputs import caches
from noetherperf.engines import isa

ROOT = Path(__file__).parents[1]


def _git(*arguments: str) -> str | None:
    """What git says; None where it is not there or this is no checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(cpu: str) -> dict[str, Any]:
    """What figures depend on, on a processor of this name; no host name and no path."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytest-benchmark": importlib.metadata.version("pytest-benchmark"),
        "noetherperf": nperf.__version__,
        "instructions": isa.choose(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def describe(found: dict[str, Any]) -> str:
    """One line for a report."""
    cache = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    state = {True: " with uncommitted changes", False: "", None: ""}[found["dirty"]]
    return (
        f"{found['cpu']} ({cache}; {found['instructions']}), {found['threads']} threads, {found['system']}, "
        f"Python {found['python']}, torch {found['torch']}, noetherperf {found['noetherperf']} "
        f"at {found['commit'] or 'no commit'}{state}, {found['date']}"
    )
