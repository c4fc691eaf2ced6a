"""What the parts of one run of the report share: the machine, the folders, the time that is left."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkout import ROOT
from bench.gpu.machine import Machine
from bench.gpu.process import Part, run

WORK = ROOT / "build" / "gpu-report"


@dataclass
class Session:
    """One run of the report.

    Args:
        machine: The one that is measured.
        out: Where the results go.
        deadline: When the present part must have ended, by time.monotonic.
        cases: For the benchmarks (--cases).
        work: Where the build goes, and what parts leave for each other.

    Attributes:
        bench: What the benchmarks have measured so far; None before.
    """

    machine: Machine
    out: Path
    deadline: float
    cases: str = ""
    work: Path = WORK
    bench: dict[str, Any] | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def venv(self) -> Path:
        return self.work / "venv"

    @property
    def python(self) -> Path:
        """The one that has the build."""
        return self.venv / "bin" / "python"

    @property
    def ready(self) -> Path:
        """A file that is there when the build is whole."""
        return self.work / "ready"

    def log(self, part: str) -> Path:
        return self.out / f"gpu-{part.replace(' ', '-')}.log"

    def run(self, name: str, command: Sequence[str | Path], limit: float, **environment: str) -> Part:
        """Run a part's command in the machine's environment and these variables."""
        return run(name, command, limit, self.log(name), {**self.machine.environment(self.work), **environment})
