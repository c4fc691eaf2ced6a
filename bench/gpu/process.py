"""A part of the report: a process of its own with a time limit, and how it went."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.checkout import ROOT, now

OUTPUT = 4000  # characters of a failed part's output that the report shows


@dataclass
class Part:
    """The result of a part.

    Attributes:
        part: Its name.
        status: "passed", "failed", "timed out" or "not run".
        seconds: Its duration.
        detail: A few words: the number of tests passed and failed, or why it was not run.
        output: The end of what it printed, if it failed.
        date: When.
    """

    part: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    output: str = ""
    date: str = field(default_factory=now)


def run(
    name: str,
    command: Sequence[str | Path],
    limit: float,
    log: Path,
    environment: Mapping[str, str] = os.environ,
    grace: float = 10.0,
) -> Part:
    """Run a command in ROOT, its output into a file.

    After `limit` seconds it is interrupted (pytest then still reports its results), and `grace` seconds later killed.
    """
    begin = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            return Part(name, "failed", detail=f"{command[0]} cannot be started: {error}")
        status = ""
        try:
            process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            _kill_group(process)
    status = status or ("passed" if process.returncode == 0 else "failed")
    detail = f"stopped after {limit:.0f} s" if status == "timed out" else f"exit code {process.returncode}"
    text = "" if status == "passed" else tail(log)
    return Part(name, status, time.monotonic() - begin, "" if status == "passed" else detail, text)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    text = log.read_text(errors="replace").replace("```", "'''")
    return text[-OUTPUT:].strip()
