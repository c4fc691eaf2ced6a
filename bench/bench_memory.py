"""Memory that measuring takes, for models of known size: it grows with the groups, not with the parameters."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.checkout import ROOT
from bench.settings import SETTINGS

N = 100_000_000
POINTS = [
    ("b0.9", 1_000_000, 1000),
    ("b0.9", 10_000_000, 1000),
    *(("b0.9", N, n_groups) for n_groups in (1, 1000, 100_000, 1_000_000)),
    *(("adamw", N, n_groups) for n_groups in (1000, 1_000_000)),
]


@pytest.mark.skipif(bool(SETTINGS.patterns), reason="BENCH_CASES chooses other cases")
@pytest.mark.parametrize(
    ("rule", "n_parameters", "n_groups"), POINTS, ids=[f"memory{n}-groups{k}-{rule}" for rule, n, k in POINTS]
)
def test_memory(rule: str, n_parameters: int, n_groups: int, benchmark: BenchmarkFixture) -> None:
    command = [sys.executable, "-m", "bench.memory", rule, str(n_parameters), str(n_groups)]

    def run() -> dict[str, Any]:
        found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        assert isinstance(found, dict)
        return found

    benchmark.group = "memory"
    benchmark.extra_info.update({"suite": "memory", **benchmark.pedantic(run)})
