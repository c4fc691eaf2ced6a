"""Interleaved rounds, and their figures: ratios inside one round, their median and quartiles.

In a round every variant steps once, in shuffled order; each step takes the next input set. A machine that changes its
speed changes it for all variants of a round, so only ratios of two times of one round are compared. Variants that take
many times as long as the others sit out of most rounds.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Step = Callable[[], object]

LEAST_SECONDS = 3e-4  # of steps that are timed together
FEWEST = 3  # rounds of a variant that sits out of others
PRECISE = 0.005  # standard error of the median of ratios, at which no more rounds are needed


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

    def error(self, n: int) -> float:
        """Standard error of the median of n values, relative: 1.25 σ/√n, and σ of normal ones from the quartiles."""
        return 1.25 * (self.high - self.low) / 1.35 / math.sqrt(n) / self.median

    def rounded(self) -> list[float]:
        """As results keep it: four digits."""
        return [float(f"{x:.4g}") for x in self]


class Rounds:
    """Times variants against each other. A subclass may have another clock (_seconds).

    Args:
        steps: Per variant one callable for each input set.
        seed: Of the orders of the variants.
        clock: Seconds.
        counts: Steps that a variant's callable makes, if not one.

    Attributes:
        times: Per variant the seconds of a step in every round so far, NaN in rounds that it sat out.
        repeats: How many steps of a variant are timed together.
        periods: Of each variant: it takes part in every so-manieth round. They are powers of two, so that of two
            variants one takes part wherever the other does.
    """

    max_repeats = 1000

    def __init__(
        self,
        steps: Mapping[str, Sequence[Step]],
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._steps = steps
        self._counts = dict.fromkeys(steps, 1) | dict(counts or {})
        self._order = list(steps)
        self._random = random.Random(seed)
        self._clock = clock
        self._turn = 0
        self.repeats = 1
        self.periods = dict.fromkeys(steps, 1)
        self.times: dict[str, list[float]] = {name: [] for name in steps}

    def total(self, name: str) -> float:
        """Seconds that a variant's steps took together, one a round."""
        return sum(taken(self.times[name]))

    @property
    def n_rounds(self) -> int:
        return max(map(len, self.times.values()))

    def run(self) -> None:
        """One round."""
        self._random.shuffle(self._order)
        number = self.n_rounds
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in self._order:
                if number % self.periods[name]:
                    self.times[name].append(math.nan)
                    continue
                steps = self._steps[name]
                turns = [steps[(self._turn + i) % len(steps)] for i in range(self.repeats)]
                self._turn += self.repeats
                self.times[name].append(self._seconds(name, turns) / (self.repeats * self._counts[name]))
        finally:
            if collecting:
                gc.enable()

    def _seconds(self, name: str, turns: Sequence[Step]) -> float:
        """Make these steps of a variant; how long they took."""
        begin = self._clock()
        for step in turns:
            step()
        return self._clock() - begin

    def compare(self, baseline: str, seconds: float, least: int, exactly: int = 0) -> None:
        """Run rounds until their time is up, or the ratios of all variants to the baseline have settled.

        Args:
            baseline: A variant.
            seconds: That all rounds may take.
            least: Rounds, however long they take.
            exactly: Rounds to run instead; 0: as said above.
        """
        for _ in range(self.calibrate(seconds, least, exactly)):
            self.run()
            if not exactly and self.n_rounds >= least and self.is_precise(baseline):
                break

    def calibrate(self, seconds: float, least: int, exactly: int = 0) -> int:
        """Run a round to learn what one takes, and forget it.

        Sets `repeats`, so that the fastest variant's steps take long enough to time, and `periods`, so that a variant
        that takes k times as long as most sits out of all but every k-th round.

        Args:
            seconds, least, exactly: As for `compare`.

        Returns:
            How many rounds to run at most.
        """
        self.run()
        once = {name: max(times[-1], 1e-9) * self._counts[name] for name, times in self.times.items()}
        for times in self.times.values():
            times.clear()
        self.repeats = max(1, min(self.max_repeats, round(LEAST_SECONDS / min(once.values()))))
        usual = statistics.median(once.values())
        wanted = {name: _power_of_two(x / usual) for name, x in once.items()}
        n = exactly or max(least, int(seconds / self._wall(once, wanted)))
        self.periods = {name: min(period, _power_of_two(n / FEWEST)) for name, period in wanted.items()}
        return n

    def _wall(self, once: Mapping[str, float], periods: Mapping[str, int]) -> float:
        """Seconds that a round takes on average, from those of each variant's callable."""
        return self.repeats * sum(x / periods[name] for name, x in once.items())

    def is_precise(self, baseline: str) -> bool:
        """Whether the ratios to the baseline have settled, of the variants that take part in every round."""
        return all(
            spread.error(self.n_rounds) <= PRECISE
            for name, spread in ratios(self.times, baseline).items()
            if self.periods[name] == 1
        )


def _power_of_two(x: float) -> int:
    """The largest that is at most x, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(x, 1.0))))


def taken(times: Sequence[float]) -> list[float]:
    """The times of the rounds that a variant took part in."""
    return [x for x in times if not math.isnan(x)]


def ratios(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Spread]:
    """Every variant's time as a multiple of the baseline's in the same round."""
    base = times[baseline]
    return {
        name: Spread.of(taken([own / other for own, other in zip(values, base, strict=True)]))
        for name, values in times.items()
    }


def figures(
    times: Mapping[str, Sequence[float]], baselines: Sequence[str] = ("floor", "fused", "ours")
) -> dict[str, dict[str, Spread]]:
    """Per variant its seconds, and its multiples of the baselines: the floor, torch's fused step and noetherperf."""
    found = {name: {"seconds": Spread.of(taken(values))} for name, values in times.items()}
    for baseline in baselines:
        if baseline in times:
            for name, spread in ratios(times, baseline).items():
                found[name][f"per {baseline}"] = spread
    return found
