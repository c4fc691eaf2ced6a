"""Progress of long work on stderr: a bar on a terminal; elsewhere, as in a log file, a line from time to time."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Report", "progress"]

INTERVAL = 10.0  # seconds between two lines, at least
SHARE = 0.01  # of the work between two lines, at least


class Report(Protocol):
    """Say how much is done, in the units of the total, and anything worth a few words."""

    def __call__(self, done: float, note: str = "") -> None: ...


@contextmanager
def progress(task: str, total: float, unit: str = "", *, shown: bool | None = True) -> Iterator[Report]:
    """A context that shows how far a piece of work is.

    Args:
        task: What is done, in a word or two.
        total: Its size, in units; 1 for a share.
        unit: What is counted; "" for a share, which is shown in per cent alone.
        shown: Whether anything is shown; None: only on a terminal.
    """
    is_terminal = sys.stderr.isatty()
    if not (is_terminal if shown is None else shown):
        yield lambda done, note="": None
    elif is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        note = TextColumn("{task.fields[note]}", markup=False)
        with Progress(*columns, note, console=Console(stderr=True), transient=True) as bar:
            number = bar.add_task(task, total=total, note="")
            yield lambda done, note="": bar.update(number, completed=done, note=note)
    else:
        yield _Lines(task, total, unit)


class _Lines:
    """Reports as lines: at most one every ten seconds and for every hundredth of the work, and one at the end."""

    def __init__(self, task: str, total: float, unit: str) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._begin = self._last = time.monotonic()
        self._first: float | None = None  # what was done when it began: a resumed training begins in the middle
        self._told = 0.0

    def __call__(self, done: float, note: str = "") -> None:
        if self._first is None:
            self._first = done
        now = time.monotonic()
        is_due = now - self._last >= INTERVAL and done - self._told >= SHARE * self._total
        if not (is_due or (done >= self._total and done > self._told)):
            return
        self._last, self._told = now, done
        counted = f"{self._unit} {done:,.0f} of {self._total:,.0f}, " if self._unit else ""
        left = (now - self._begin) / (done - self._first) * (self._total - done) if done > self._first else 0.0
        text = f"{self._task}: {counted}{done / self._total:.0%}, {timedelta(seconds=round(left))} left"
        print(f"{text}; {note}" if note else text, file=sys.stderr, flush=True)
