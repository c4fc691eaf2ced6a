"""Settings of a run from environment variables: BENCH, BENCH_CASES, BENCH_ROUNDS, BENCH_SECONDS."""

import os
from dataclasses import dataclass

from bench.cases import Case, selected


@dataclass(frozen=True)
class Settings:
    """A run's size.

    Attributes:
        which: "quick" or "full" (BENCH).
        patterns: Names of cases (BENCH_CASES), "" for the whole set.
        rounds: Of every case (BENCH_ROUNDS); 0: as many as fit into its seconds.
        seconds: For the rounds of a comparison of steps (BENCH_SECONDS); a point of a curve has a third of them.
    """

    which: str
    patterns: str
    rounds: int
    seconds: float

    @classmethod
    def read(cls) -> "Settings":
        which = os.environ.get("BENCH") or "quick"
        seconds = 20.0 if which == "full" else 2.2
        return cls(
            which,
            os.environ.get("BENCH_CASES") or "",
            int(os.environ.get("BENCH_ROUNDS") or 0),
            float(os.environ.get("BENCH_SECONDS") or seconds),
        )

    @property
    def cases(self) -> list[Case]:
        return selected(self.which, self.patterns)

    def compiles(self, case: Case) -> bool:
        """Whether a case includes the variants that torch.compile first compiles, some of them for minutes."""
        return self.which == "full" or bool(self.patterns) or case.name == "mlp-float32-both-b0.9"

    def seconds_for(self, case: Case) -> float:
        return self.seconds if case.suite == "step" else self.seconds / 3

    @property
    def least_rounds(self) -> int:
        return 15 if self.which == "full" else 5


SETTINGS = Settings.read()
