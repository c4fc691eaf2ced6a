"""Whole training iterations of every variant, in interleaved rounds."""

import gc

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import TRAIN, Case
from bench.inputs import CPU, MEMORY, TooLarge, available_memory
from bench.iterations import BASELINE, iterations
from bench.networks import TASKS
from bench.settings import LEAST_ROUNDS, SETTINGS
from bench.timing import figures


@pytest.mark.parametrize("case", [case for case in SETTINGS.cases if case.suite == TRAIN], ids=lambda case: case.name)
def test_iterations(case: Case, benchmark: BenchmarkFixture) -> None:
    benchmark.group = case.suite
    gc.collect()  # networks of the case before
    try:
        with iterations(case, min(MEMORY, available_memory() * 9 // 10)) as rounds:
            how = (BASELINE, SETTINGS.seconds_for(case), LEAST_ROUNDS, SETTINGS.rounds)
            benchmark.pedantic(rounds.compare, args=how)
    except TooLarge as error:
        pytest.skip(str(error))
    benchmark.extra_info.update(
        {
            **case.described(),
            "threads": torch.get_num_threads(),
            "batch": TASKS[case.model].described(CPU),
            "rounds": rounds.n_rounds,
            "iterations timed together": rounds.repeats,
            "figures": {
                name: {key: spread.rounded() for key, spread in found.items()}
                for name, found in figures(rounds.times, (BASELINE, "unmeasured", "both")).items()
            },
            "not run": {},
        }
    )
