"""Where the time of a step of 2000 small tensors goes: prints a table, and writes it into docs/performance.md.

python -m bench.phases

Python's profiler tells what each function of the step took. There are some forty calls in a step that sees the tensors
of the step before, so that it changes no figure of the table.
"""

import cProfile
import re
import time
from pathlib import Path
from statistics import median

import cpuinfo
import torch

import noetherperf as nperf
from bench import page
from bench.cases import selected
from bench.environment import describe, environment
from bench.inputs import input_sets
from bench.markdown import table
from bench.timing import Rounds, Step
from bench.variants import floor, ours, peer

COMMAND = "python -m bench.phases"
VIEWS = ("none", "rows", "columns", "both")
ROUNDS = 60
PACKAGE = Path(nperf.__file__).parent
WARM_UP = 3  # rounds that are not counted

#: The phases in the order of the step.
PHASES = {
    "look": "one look at all parameters, gradients and momentum buffers: their addresses, whether they have the same "
    "layouts, and whether anything else has written those that are measured",
    "versions": "autograd's version counters",
    "compiled": "the compiled step, its sums and laws",
}

#: noetherperf's functions that make a phase, none of which calls another one of them.
FUNCTIONS = {
    "look": "look",
    "carry_out": "compiled",  # and the version counters, which are timed apart too
}


def profiled(step: Step) -> dict[str, float]:
    """Make one step like the one before; the seconds of each phase in FUNCTIONS, of the rest, and of the whole.

    Raises:
        RuntimeError: The step does not call one of the functions, and the table would say that it takes no time.
    """
    profiler = cProfile.Profile()
    begin = time.perf_counter()
    profiler.runcall(step)
    whole = time.perf_counter() - begin
    names: set[str] = set()
    seconds = dict.fromkeys(FUNCTIONS.values(), 0.0)
    for entry in profiler.getstats():
        name = _own_function(entry.code)
        if name in FUNCTIONS:
            names.add(name)
            seconds[FUNCTIONS[name]] += entry.totaltime
    if missing := ", ".join(sorted(FUNCTIONS.keys() - names)):
        raise RuntimeError(f"bench.phases: a step calls no function named {missing}; correct FUNCTIONS")
    return {**seconds, "rest": whole - sum(seconds.values()), "whole": whole}


def _own_function(code: object) -> str:
    """The name of a function of noetherperf among the profiler's entries, "" for others."""
    if isinstance(code, str):  # <built-in method noetherperf._cpu.read>
        found = re.fullmatch(rf"<built-in method {nperf.__name__}\.\w+\.(\w+)>", code)
        return found[1] if found else ""
    filename, name = getattr(code, "co_filename", ""), getattr(code, "co_name", "")
    return name if PACKAGE in Path(filename).parents else ""


def milliseconds(view: str) -> dict[str, float]:
    """Medians: the phases, what is left, the whole step, torch's fused step, and the floor."""
    (case,) = selected("quick", f"small2000-float32-{view}-b0.9")
    sets = input_sets(case)
    optimizers = [ours(case, inputs.alone()) for inputs in sets]
    for optimizer in optimizers:
        optimizer.step()
    taken: list[dict[str, float]] = []

    def ours_step(optimizer: nperf.MeasuredOptimizer) -> Step:
        return lambda: taken.append(profiled(optimizer.step))

    def versions_step(params: list[torch.nn.Parameter]) -> Step:
        return lambda: torch.autograd.graph.increment_version(params)

    rounds = Rounds(
        {
            "ours": [ours_step(optimizer) for optimizer in optimizers],
            "versions": [versions_step(inputs.params) for inputs in sets],
            "fused": [peer(case, inputs, fused=True).step for inputs in sets],
            "floor": floor(case, sets)["floor"],
        }
    )
    for _ in range(ROUNDS):
        rounds.run()
    counted = taken[WARM_UP:]
    found = {phase: 1e3 * median(step[phase] for step in counted) for phase in counted[0]}
    found |= {name: 1e3 * median(rounds.times[name][WARM_UP:]) for name in ("versions", "fused", "floor")}
    found["compiled"] -= found["versions"]
    return found


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
