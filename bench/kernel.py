"""Time of arithmetic alone: the CPU kernel on data that stays in the second-level cache, beside the memory's time.

Prints a table, and writes it into docs/performance.md. Where the kernel takes longer in the cache than the memory takes
to bring the same elements, no arrangement of memory accesses can reach the floor.

python -m bench.kernel
"""

from collections.abc import Callable
from typing import Any

import cpuinfo
import torch

import noetherperf as nperf
from bench import page
from bench.environment import describe, environment
from bench.inputs import cache_size
from bench.timing import Rounds, Spread
from noetherperf import Norm, Part
from noetherperf.engines.floor import memory_floor

COMMAND = "python -m bench.kernel"
REPEATS = 256  # steps that are timed together; all but the first find their data in the cache
LARGE = 1 << 25  # elements of the floor: 400 MB, far outside of every cache
VIEWS = {"none": (), "rows": (0,), "columns": (1,), "both": (0, 1)}
ROUNDS = 60
#: Per rule: an optimizer, its options, and how many tensors of a parameter's shape a step reads. It writes all of them
#: but the gradient.
RULES: dict[str, tuple[Callable[..., nperf.MeasuredOptimizer], dict[str, Any], int]] = {
    "SGD, β = 0.9": (nperf.SGD, {"momentum": 0.9}, 3),
    "SGD, β = 0": (nperf.SGD, {"momentum": 0.0}, 2),
    "AdamW": (nperf.AdamW, {}, 4),
}


def shape_in_cache() -> tuple[int, int]:
    """Of a matrix whose float32 parameters, gradients and buffers fill half of the second-level cache."""
    elements = cache_size("L2", 512 << 10) // 2 // (4 * max(n for *_, n in RULES.values()))
    return 96, elements // 96 // 16 * 16


def optimizer(shape: tuple[int, int], dtype: torch.dtype, axes: tuple[int, ...], rule: str) -> nperf.MeasuredOptimizer:
    param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    symmetries = [Norm(f"p[{axis}]", [Part("p", axis)]) for axis in axes]
    made, options, _ = RULES[rule]
    return made([("p", param)], lr=1e-6, symmetries=symmetries, backend="cpu", **options)


def spreads(dtype: torch.dtype, rule: str, n_threads: int) -> dict[str, Spread]:
    """Nanoseconds an element takes one thread: the floor, with the bandwidth shared by all, and the kernel by view.

    The kernel's time is that of a step, less that of a step of a tensor with one element.
    """
    shape = shape_in_cache()
    optimizers = {view: optimizer(shape, dtype, axes, rule) for view, axes in VIEWS.items()}
    calls = {view: optimizer((1, 1), dtype, axes, rule) for view, axes in VIEWS.items()}
    streams = [torch.ones(LARGE) for _ in range(RULES[rule][2])]
    floor = memory_floor(streams, len(streams) - 1, n_threads)
    torch.set_num_threads(1)  # the kernel's; the floor is told its own number
    kernel = Rounds(
        {view: [o.step] for view, o in optimizers.items()} | {f"{v} call": [o.step] for v, o in calls.items()}
    )
    memory = Rounds({"floor": [floor]})
    kernel.run()
    memory.run()
    for times in (*kernel.times.values(), *memory.times.values()):
        times.clear()
    kernel.repeats = REPEATS
    for _ in range(ROUNDS):
        kernel.run()
        memory.run()
    torch.set_num_threads(n_threads)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    per_element = 1e9 * n_threads / LARGE * itemsize / streams[0].element_size()
    found = {"floor": Spread.of([t * per_element for t in memory.times["floor"]])}
    for view in VIEWS:
        pairs = zip(kernel.times[view], kernel.times[f"{view} call"], strict=True)
        found[view] = Spread.of([(step - call) * 1e9 / (shape[0] * shape[1]) for step, call in pairs])
    return found


def table() -> str:
    """One line a dtype and rule."""
    lines = ["| dtype | rule | memory | none | rows | columns | both |", "|---|---|" + "---:|" * 5]
    for dtype in (torch.float32, torch.bfloat16):
        for rule in RULES:
            found = spreads(dtype, rule, torch.get_num_threads())
            cells = [f"{s.median:.2f} ({s.low:.2f}–{s.high:.2f})" for s in found.values()]
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and put it where the page keeps it."""
    rows = table()
    where = describe(environment(cpuinfo.get_cpu_info()["brand_raw"]))
    what = "Nanoseconds an element takes one thread, median (quartiles)."
    page.write("kernel", COMMAND, f"{what}\n\n{rows}\n\nPrinted by `{COMMAND}` on {where}.\n")
    print(rows)


if __name__ == "__main__":
    main()
