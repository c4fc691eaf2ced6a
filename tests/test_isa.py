"""Instruction sets of the CPU engine: checked before they are used, chosen by the user or by what computes rightly."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cpu_stand_in
import pytest
import torch
from torch import nn

import noetherperf as nperf
from noetherperf.engines.backends import backends

if backends()["cpu"] != "available":
    pytest.skip("the compiled engine is not here", allow_module_level=True)

from noetherperf import _cpu
from noetherperf.engines import isa

ROOT = Path(__file__).parents[1]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes instruction sets fail their self-check."""
    faults: dict[str, str] = {}
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    monkeypatch.setattr(_cpu, "self_check", lambda name: faults.get(name, ""))

    def forget() -> None:
        isa.fault.cache_clear()
        isa._warn.cache_clear()

    def breaks(name: str) -> None:
        faults[name] = "float64, plain: wrong sums by row"
        forget()

    forget()
    yield breaks
    forget()


def used() -> str:
    model = nn.Linear(3, 2)
    optimizer = nperf.SGD(model.named_parameters(), symmetries=nperf.neurons(model))
    optimizer.readout()
    (meter,) = optimizer._prepare()
    return str(getattr(meter.engine, "isa", optimizer.backend))


def test_every_set_passes_its_check_here() -> None:
    assert {name: _cpu.self_check(name) for name in _cpu.isas()} == dict.fromkeys(_cpu.isas(), "")


@pytest.mark.parametrize("name", _cpu.isas())
def test_the_check_sees_kernels_that_do_something_else(name: str) -> None:
    for rule in ("sgd", "adam"):
        assert _cpu.self_check(name, mix_up=rule) == f"{rule}, float32, plain, a block of 5 x 7: wrong parameters"


def test_the_best_set_is_used_unless_the_variable_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert used() == _cpu.isas()[0]
    for name in _cpu.isas():
        monkeypatch.setenv(isa.VARIABLE, name)
        assert used() == name


@pytest.mark.parametrize("name", ["avx9", "AVX2", " ", "avx2,baseline"])
def test_a_set_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(isa.VARIABLE, name)
    with pytest.raises(ValueError, match=f"NOETHERPERF_ISA={re.escape(repr(name))} is not available here; choose one"):
        used()


def test_a_set_that_fails_is_left_out_with_one_warning(broken: Callable[[str], None]) -> None:
    *better, last = _cpu.isas()
    for name in better:
        broken(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert used() == used() == last
    told = [str(w.message) for w in caught]
    assert len(told) == len(better)
    assert all(
        f"{name} is not used" in text and "wrong sums by row" in text for name, text in zip(better, told, strict=True)
    )


def test_a_set_that_fails_is_an_error_where_the_user_names_it(
    broken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("baseline")
    monkeypatch.setenv(isa.VARIABLE, "baseline")
    with pytest.raises(RuntimeError, match=r"NOETHERPERF_ISA='baseline' computes wrong numbers .*wrong sums by row"):
        used()


def test_where_all_fail_the_backend_is_missing_and_says_why(broken: Callable[[str], None]) -> None:
    for name in _cpu.isas():
        broken(name)
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert "wrong sums by row" in backends()["cpu"]
    assert used() == "reference"
    with pytest.raises(RuntimeError, match='backend="cpu" cannot run here: the compiled kernels compute wrong numbers'):
        nperf.SGD([torch.zeros(2, requires_grad=True)], backend="cpu")


@pytest.mark.slow
@pytest.mark.skipif(cpu_stand_in.missing() is not None, reason=f"{cpu_stand_in.missing()}")
def test_stand_ins_of_all_sets_pass_the_engines_tests() -> None:
    """Where the processor has the sets, `make test` runs those; their stand-ins must not rot."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "tests/test_engines.py", "-k", "stand-in"],
        cwd=ROOT,
        env=environment | {"STAND_INS": "all"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 200
