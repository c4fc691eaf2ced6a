"""Where figures come from: machine, software and commit."""

import importlib.metadata
import platform
from typing import Any

import torch

import noetherperf as nperf
from bench.checkout import commit, describe_commit, now
from bench.inputs import caches
from noetherperf.engines import isa


def environment(cpu: str) -> dict[str, Any]:
    """What figures depend on, on a processor of this name; no host name and no path."""
    return {
        "date": now(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytest-benchmark": importlib.metadata.version("pytest-benchmark"),
        "noetherperf": nperf.__version__,
        "instructions": isa.choose(),
        **commit(),
    }


def describe(found: dict[str, Any]) -> str:
    """One line for a report."""
    cache = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    return (
        f"{found['cpu']} ({cache}; {found['instructions']}), {found['threads']} threads, {found['system']}, "
        f"Python {found['python']}, torch {found['torch']}, noetherperf {found['noetherperf']} "
        f"at {describe_commit(found, otherwise='no commit')}, {found['date']}"
    )
