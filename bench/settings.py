"""Settings of a run from environment variables: BENCH, BENCH_CASES, BENCH_ROUNDS, BENCH_SECONDS, BENCH_MINUTES."""

import math
import os
import time
from dataclasses import dataclass

from bench.cases import Case, selected
from bench.training import TRAIN

LEAST_ROUNDS = 12  # of a case, however long they take
QUICK_COMPILED = ("mlp-float32-both-b0.9", "matrix-float32-both-adamw")


@dataclass(frozen=True)
class Settings:
    """A run's size.

    Attributes:
        which: "quick" or "full" (BENCH).
        patterns: Names of cases (BENCH_CASES), "" for the whole set.
        rounds: Of every case (BENCH_ROUNDS); 0: as many as fit into its seconds.
        seconds: For the rounds of a comparison of steps (BENCH_SECONDS); a point of a curve has a third of them, and
            training twice as much.
        end: When no case begins any more, by time.monotonic (BENCH_MINUTES from now); never, where cases are chosen.
    """

    which: str
    patterns: str
    rounds: int
    seconds: float
    end: float = math.inf

    @classmethod
    def read(cls) -> "Settings":
        which = os.environ.get("BENCH") or "quick"
        patterns = os.environ.get("BENCH_CASES") or ""
        seconds, minutes = (3.0, 29.0) if which == "full" else (2.2, 10.0)
        if patterns:
            minutes = math.inf
        return cls(
            which,
            patterns,
            int(os.environ.get("BENCH_ROUNDS") or 0),
            float(os.environ.get("BENCH_SECONDS") or seconds),
            time.monotonic() + 60.0 * float(os.environ.get("BENCH_MINUTES") or minutes),
        )

    @property
    def cases(self) -> list[Case]:
        return selected(self.which, self.patterns)

    def compiles(self, case: Case) -> bool:
        """Whether a case includes the variants that torch.compile first compiles, for a minute where there are many
        tensors."""
        few = len(case.shapes) <= 12 and case.dtype == "float32" and case.view in ("none", "both")
        return bool(self.patterns) or (self.which == "full" and few) or case.name in QUICK_COMPILED

    def seconds_for(self, case: Case) -> float:
        return self.seconds * {"step": 1.0, TRAIN: 2.0}.get(case.suite, 1 / 3)


SETTINGS = Settings.read()
