"""Whole training iterations of every variant, in interleaved rounds. pytest-benchmark's own figure means nothing."""

import gc

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.inputs import MEMORY, TooLarge, available_memory
from bench.iterations import timed
from bench.settings import LEAST_ROUNDS, SETTINGS
from bench.training import TRAIN


@pytest.mark.parametrize("case", [case for case in SETTINGS.cases if case.suite == TRAIN], ids=lambda case: case.name)
def test_iterations(case: Case, benchmark: BenchmarkFixture) -> None:
    benchmark.group = case.suite
    gc.collect()  # networks of the case before
    memory = min(MEMORY, available_memory() * 9 // 10)
    how = (case, memory, SETTINGS.seconds_for(case), LEAST_ROUNDS, SETTINGS.rounds)
    try:
        benchmark.extra_info.update(benchmark.pedantic(timed, args=how))
    except TooLarge as error:
        pytest.skip(str(error))
