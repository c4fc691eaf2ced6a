"""Interleaved rounds, and their figures: ratios inside one round, their median and quartiles.

In a round every variant steps once, in shuffled order; each step takes the next input set. A machine that changes its
speed changes it for all variants of a round, so only ratios of two times of one round are compared.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Step = Callable[[], object]

LEAST_SECONDS = 3e-4  # of steps that are timed together


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(*3 * (values[0],))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def rounded(self) -> list[float]:
        """As results keep it: four digits."""
        return [float(f"{x:.4g}") for x in self]


class Rounds:
    """Times variants against each other. A subclass may have another clock (_seconds).

    Args:
        steps: Per variant one callable for each input set.
        seed: Of the orders of the variants.
        clock: Seconds.

    Attributes:
        times: Per variant the seconds of a step in every round so far.
        repeats: How many steps of a variant are timed together.
    """

    max_repeats = 1000

    def __init__(
        self, steps: Mapping[str, Sequence[Step]], seed: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._steps = steps
        self._order = list(steps)
        self._random = random.Random(seed)
        self._clock = clock
        self._turn = 0
        self.repeats = 1
        self.times: dict[str, list[float]] = {name: [] for name in steps}

    def total(self, name: str) -> float:
        """Seconds that a variant's steps took together, one a round."""
        return sum(self.times[name])

    def run(self) -> None:
        """One round."""
        self._random.shuffle(self._order)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in self._order:
                steps = self._steps[name]
                turns = [steps[(self._turn + i) % len(steps)] for i in range(self.repeats)]
                self._turn += self.repeats
                self.times[name].append(self._seconds(name, turns) / self.repeats)
        finally:
            if collecting:
                gc.enable()

    def _seconds(self, name: str, turns: Sequence[Step]) -> float:
        """Make these steps of a variant; how long they took."""
        begin = self._clock()
        for step in turns:
            step()
        return self._clock() - begin

    def calibrate(self, seconds: float, least: int) -> int:
        """Run a round to learn what one takes, and forget it.

        Args:
            seconds: That all rounds may take.
            least: Rounds, however long they take.

        Returns:
            How many rounds to run. `repeats` is set so that the fastest variant's steps take long enough to time.
        """
        self.run()
        once = [times[-1] for times in self.times.values()]
        self.repeats = max(1, min(self.max_repeats, round(LEAST_SECONDS / max(min(once), 1e-9))))
        for times in self.times.values():
            times.clear()
        return max(least, int(seconds / max(1e-9, sum(once) * self.repeats)))


def ratios(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Spread]:
    """Every variant's time as a multiple of the baseline's in the same round."""
    base = times[baseline]
    return {
        name: Spread.of([own / other for own, other in zip(values, base, strict=True)])
        for name, values in times.items()
    }


def figures(
    times: Mapping[str, Sequence[float]], baselines: Sequence[str] = ("floor", "fused", "ours")
) -> dict[str, dict[str, Spread]]:
    """Per variant its seconds, and its multiples of the baselines: the floor, torch's fused step and noetherperf."""
    found = {name: {"seconds": Spread.of(values)} for name, values in times.items()}
    for baseline in baselines:
        if baseline in times:
            for name, spread in ratios(times, baseline).items():
                found[name][f"per {baseline}"] = spread
    return found
