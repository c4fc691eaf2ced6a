"""How far a search is, in stages, with an estimate of the time that is left."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from noetherperf.common.progress import progress

__all__ = ["Report", "Stage", "bar"]


class Stage(Enum):
    """The stages of a search, in order, and their usual shares of the time."""

    GRADIENTS = "gradients", 0.35
    RELATIONS = "relations between parts", 0.25
    WHOLE_TENSORS = "whole tensors", 0.3
    VERIFICATION = "verification", 0.1


Report = Callable[[Stage, float], None]  # of a stage, and the fraction of it that is done


@contextmanager
def bar(shown: bool | None) -> Iterator[Report]:
    """Progress that is shown if asked for; None: if stderr is a terminal. It never goes back."""
    *starts, total = itertools.accumulate((stage.value[1] for stage in Stage), initial=0.0)
    before = dict(zip(Stage, starts, strict=True))
    done = 0.0
    with progress("finding symmetries", total, shown=shown) as show:

        def report(stage: Stage, fraction: float) -> None:
            nonlocal done
            name, share = stage.value
            done = max(done, before[stage] + share * fraction)
            show(done, name)

        yield report
