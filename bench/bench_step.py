"""Every case: the gate, then interleaved rounds of all its variants.

pytest-benchmark's own figure is the time that noetherperf's steps took together.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.correctness import check, check_in_float64
from bench.inputs import InputSet, TooLarge, input_sets
from bench.settings import LEAST_ROUNDS, SETTINGS
from bench.timing import Rounds, Step, figures
from bench.training import TRAIN
from bench.variants import FLOORS, OURS, VARIANTS, Unavailable, floor, names_for, one_line, ours

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns about itself

_running: list[Rounds] = []
_checked: set[tuple[object, ...]] = set()  # shapes, dtype and rule of steps that do not measure


def ours_seconds() -> float:
    """pytest-benchmark's clock: it goes on only while noetherperf steps."""
    return _running[-1].total("ours")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.getfixturevalue("case").threads or before)
    yield
    torch.set_num_threads(before)


def admit(case: Case, sets: list[InputSet]) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """The variants that can run the case, and why the others cannot; what a first step sets up is set up."""
    admitted, reasons = {}, {}
    for name in names_for(case):
        variant = VARIANTS[name]
        if variant.compiles and not SETTINGS.compiles(case):
            reasons[name] = "compiles for long: BENCH=full or BENCH_CASES runs it"
            continue
        try:
            steps = variant.make(case, sets, **variant.how)
            for step in steps if name in OURS else steps[:1]:
                step()
        except Unavailable as error:
            reasons[name] = str(error)
        except Exception as error:
            if name in OURS:
                raise
            reasons[name] = one_line(error)
        else:
            admitted[name] = steps
    return admitted, reasons


def gate(case: Case, inputs: InputSet) -> None:
    """Check the steps that are timed, each once: all views of a model have one step that does not measure."""
    check(case, inputs, ours(case, inputs))
    plain = (case.shapes, case.dtype, case.rule)
    if case.view != "none" and plain not in _checked:
        check(case, inputs, ours(case, inputs, measuring=False))
    _checked.add(plain)
    check_in_float64(case)


@pytest.mark.benchmark(timer=ours_seconds)
@pytest.mark.parametrize("case", [case for case in SETTINGS.cases if case.suite != TRAIN], ids=lambda case: case.name)
def test_step(case: Case, benchmark: BenchmarkFixture) -> None:
    benchmark.group = case.suite
    _running.clear()
    gc.collect()  # optimizers of the case before, which hold tensors of their own in cycles
    try:
        sets = input_sets(case)
    except TooLarge as error:
        pytest.skip(str(error))
    gate(case, sets[0])
    steps, reasons = admit(case, sets)
    floors = floor(case, sets)
    reasons |= {name: "needs two input sets, and memory holds one" for name in FLOORS if name not in floors}
    rounds = Rounds({**floors, **steps})
    _running[:] = [rounds]
    how = ("ours", SETTINGS.seconds_for(case), LEAST_ROUNDS, SETTINGS.rounds)
    benchmark.pedantic(rounds.compare, args=how)

    info: dict[str, Any] = {
        **case.described(),
        "threads": torch.get_num_threads(),
        "point": case.point,
        "input sets": len(sets),
        "rounds": rounds.n_rounds,
        "steps timed together": rounds.repeats,
        "figures": {
            name: {key: spread.rounded() for key, spread in found.items()}
            for name, found in figures(rounds.times).items()
        },
        "not run": reasons,
    }
    benchmark.extra_info.update(info)
