"""How far a search is: a bar on stderr, with an estimate of the time that is left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from rich.console import Console
from rich.progress import Progress

__all__ = ["Report", "Stage", "bar"]


class Stage(Enum):
    """The stages of a search, in order, and their usual shares of the time."""

    GRADIENTS = "gradients", 0.35
    RELATIONS = "relations between parts", 0.25
    WHOLE_TENSORS = "whole tensors", 0.3
    VERIFICATION = "verification", 0.1


Report = Callable[[Stage, float], None]  # of a stage, and the fraction of it that is done


@contextmanager
def bar(progress: bool | None) -> Iterator[Report]:
    """A bar that is shown if asked for; None: if stderr is a terminal. It never goes back."""
    console = Console(stderr=True)
    shown = sys.stderr.isatty() if progress is None else progress
    before = {}
    done = 0.0
    for stage in Stage:
        before[stage] = done
        done += stage.value[1]
    with Progress(console=console, transient=console.is_terminal, disable=not shown) as shown_bar:
        task = shown_bar.add_task("finding symmetries", total=done)

        def report(stage: Stage, fraction: float) -> None:
            name, share = stage.value
            reached = max(shown_bar.tasks[task].completed, before[stage] + share * fraction)
            shown_bar.update(task, completed=reached, description=f"finding symmetries: {name}")

        yield report
