"""Steps beside busy processes, one a core: prints a table of noetherperf's beside torch's default and fused ones, and
writes it into docs/performance.md.

A team of threads is as slow as the last of them, and beside busy processes one of them may wait for a slice of the
scheduler. The times are wall-clock times.

python -m bench.busy
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import cpuinfo
import torch
from torch.optim import Optimizer

import noetherperf as nperf
from bench import page
from bench.cases import MODELS, norms
from bench.environment import describe, environment
from bench.markdown import ratio, table
from bench.timing import Rounds, Spread, ratios

COMMAND = "python -m bench.busy"
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "10,000 parameters": [(84, 64), (84,), (50, 84), (50,), (10, 50), (10,)],
    "670,000 parameters": [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)],
    "2,000 tensors of 64×64": [(64, 64)] * 2000,
    "ResNet-50": list(MODELS["resnet50"]),
    "a matrix of 4096×4096": [(4096, 4096)],
}
VIEWS = ("none", "rows", "both")
ROUNDS = 20
SECONDS = 0.02  # of the slowest variant in a round
#: Per rule: torch's optimizer, noetherperf's, and their options.
RULES = {
    "SGD": (torch.optim.SGD, nperf.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (torch.optim.AdamW, nperf.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}),
}


@contextmanager
def busy(n: int) -> Iterator[None]:
    """As many processes that do nothing but compute, until the end of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5)  # until they have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def optimizers(rule: str, shapes: list[tuple[int, ...]]) -> dict[str, Optimizer]:
    """Every variant, on parameters of its own."""
    torchs, mine, options = RULES[rule]

    def named() -> list[tuple[str, torch.nn.Parameter]]:
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return [(f"p{i}", p) for i, p in enumerate(params)]

    found: dict[str, Optimizer] = {
        "default": torchs(named(), **options),
        "fused": torchs(named(), fused=True, **options),
    }
    for view in VIEWS:
        params = named()
        found[view] = mine(params, symmetries=norms({name: tuple(p.shape) for name, p in params}, view), **options)
    return found


def measured(rule: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """Cells: microseconds of torch's default step, and the other variants as its multiples."""
    made = optimizers(rule, shapes)
    rounds = Rounds({name: [optimizer.step] for name, optimizer in made.items()})
    for _ in range(3):
        rounds.run()
    rounds.repeats = max(1, round(SECONDS / max(times[-1] for times in rounds.times.values())))
    for times in rounds.times.values():
        times.clear()
    for _ in range(ROUNDS):
        rounds.run()
    found = ratios(rounds.times, "default")
    cells = [ratio(spread) for name, spread in found.items() if name != "default"]
    return [f"{1e6 * Spread.of(rounds.times['default']).median:.0f}", *cells]


def main() -> None:
    """Print the table and put it where the page keeps it."""
    n_cores = len(os.sched_getaffinity(0))
    rows = []
    for n in (0, n_cores):
        with busy(n):
            for rule in RULES:
                rows += [[rule, what, str(n), *measured(rule, shapes)] for what, shapes in SHAPES.items()]
    text = table(["rule", "model", "busy processes", "default, µs", "fused", *VIEWS], rows)
    print(text)
    where = describe(environment(cpuinfo.get_cpu_info()["brand_raw"]))
    page.write("busy", COMMAND, f"{text}\n\nPrinted by `{COMMAND}` with {n_cores} cores on {where}.\n")


if __name__ == "__main__":
    main()
