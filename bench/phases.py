"""Where the time of a step of 2000 small tensors goes: prints a table, and writes it into docs/performance.md.

python -m bench.phases
"""

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import cpuinfo
import torch

import noetherperf as nperf
from bench import page
from bench.cases import selected
from bench.environment import describe, environment
from bench.inputs import input_sets
from bench.markdown import table
from bench.timing import Rounds
from bench.variants import floor, ours, peer

COMMAND = "python -m bench.phases"
VIEWS = ("none", "rows", "columns", "both")
ROUNDS = 60
PHASES = {
    "gradients": "`p.grad` of every parameter",
    "buffers": "every momentum buffer in the optimizer's state",
    "addresses": "where parameters, gradients and buffers are, and that they lie as they did",
    "versions": "autograd's version counters",
    "compiled": "the compiled step, its sums and laws",
}


class Stopwatch:
    """Seconds of every phase of one optimizer's steps: its parts, timed as they call each other."""

    def __init__(self, optimizer: nperf.SGD) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        gatherer, engine = optimizer._measuring.parameters.gatherer, optimizer._prepare()[0].engine
        compiled: Any = engine
        optimizer._measuring.parameters.gatherer = SimpleNamespace(
            attributes=self._timed("gradients", gatherer.attributes), items=self._timed("buffers", gatherer.items)
        )
        compiled.admit = self._timed("addresses", compiled.admit)
        compiled._admit_buffers = self._timed("addresses", compiled._admit_buffers)
        compiled._engine = SimpleNamespace(
            step=self._timed("compiled", compiled._engine.step), measure=compiled._engine.measure
        )

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[phase] += time.perf_counter() - begin

        return timed

    def step(self, optimizer: nperf.SGD) -> dict[str, float]:
        """Make one step; what each phase took, and the whole."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        increment = torch.autograd.graph.increment_version
        torch.autograd.graph.increment_version = self._timed("versions", increment)
        begin = time.perf_counter()
        try:
            optimizer.step()
        finally:
            torch.autograd.graph.increment_version = increment
        return {**self.seconds, "whole": time.perf_counter() - begin}


def milliseconds(view: str) -> dict[str, float]:
    """Medians: the phases, what is left, the whole step, torch's fused step, and the floor."""
    (case,) = selected("quick", f"small2000-float32-{view}-b0.9")
    sets = input_sets(case)
    optimizers = [ours(case, x) for x in sets]
    for optimizer in optimizers:
        optimizer.step()
    watches = list(map(Stopwatch, optimizers))
    taken: dict[str, list[float]] = {}

    def step(i: int) -> None:
        for phase, seconds in watches[i].step(optimizers[i]).items():
            taken.setdefault(phase, []).append(seconds)

    fused = [peer(case, x, fused=True).step for x in sets]
    rounds = Rounds(
        {
            "ours": [lambda i=i: step(i) for i in range(len(sets))],  # type: ignore[misc]
            "fused": fused,
            "floor": floor(case, sets)["floor"],
        }
    )
    for _ in range(ROUNDS):
        rounds.run()
    found = {phase: 1e3 * median(values[3:]) for phase, values in taken.items()}
    found["rest"] = found["whole"] - sum(found[phase] for phase in PHASES)
    return found | {name: 1e3 * median(rounds.times[name][3:]) for name in ("fused", "floor")}


def main() -> None:
    """Print the table and put it where the page keeps it."""
    found = {view: milliseconds(view) for view in VIEWS}
    rows = [
        [name, *(f"{found[view][key]:.2f}" for view in VIEWS)]
        for key, name in {
            **PHASES,
            "rest": "all else in Python",
            "whole": "**the whole step**",
            "fused": "torch's fused step",
            "floor": "the floor",
        }.items()
    ]
    text = table(["milliseconds, medians", *VIEWS], rows)
    print(text)
    where = describe(environment(cpuinfo.get_cpu_info()["brand_raw"]))
    page.write("phases", COMMAND, f"{text}\n\nPrinted by `{COMMAND}` on {where}.\n")


if __name__ == "__main__":
    main()
