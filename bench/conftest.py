"""Turns a run of pytest-benchmark into one JSON file with its environment, and a report of it.

An interrupted run keeps the cases that it has finished.
"""

import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.checkout import ROOT, RUNS
from bench.environment import environment
from bench.settings import SETTINGS

PART = "part"  # the results of a run that chose some cases, or was interrupted
NOT_TIMED = pytest.StashKey[list[dict[str, str]]]()
IS_WHOLE = pytest.StashKey[bool]()  # whether the run is of a whole set
WRITTEN = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_TIMED] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended is interrupted
    option = config.option
    option.benchmark_quiet = True  # the report has its own tables
    config.stash[IS_WHOLE] = False
    if option.benchmark_json is None and not option.collectonly:
        chosen = SETTINGS.patterns or SETTINGS.rounds or option.keyword or option.markexpr or option.deselect
        chosen = chosen or option.maxfail
        places = [Path(argument).resolve() for argument in config.args]
        config.stash[IS_WHOLE] = not chosen and places == [ROOT / "bench"]
        RUNS.mkdir(parents=True, exist_ok=True)
        option.benchmark_json = RUNS / f"{PART}.json"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    if time.monotonic() >= SETTINGS.end:
        pytest.skip("there was no time left for it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the reason why a case has no time."""
    outcome = yield
    if call.when == "call" and call.excinfo is not None:
        reason = (str(call.excinfo.value).strip() or call.excinfo.typename).splitlines()[0]
        item.config.stash[NOT_TIMED].append({"case": item.name.partition("[")[2].removesuffix("]"), "reason": reason})
    return outcome


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """Drop the case that was interrupted in its first round: it has no figures, and pytest-benchmark would fail."""
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Replace pytest-benchmark's description of the machine, which has the host's name, by what figures depend on."""
    cpu = output_json["machine_info"]["cpu"].get("brand_raw") or output_json["machine_info"]["machine"]
    for key in ("machine_info", "commit_info", "datetime"):
        del output_json[key]
    # A case that failed has no figures.
    output_json["benchmarks"] = [benchmark for benchmark in output_json["benchmarks"] if benchmark["extra_info"]]
    for benchmark in output_json["benchmarks"]:
        for key in ("params", "options"):
            del benchmark[key]
        benchmark["stats"].pop("data", None)
    output_json["environment"] = environment(cpu)
    output_json["set"] = SETTINGS.which
    output_json["not timed"] = config.stash[NOT_TIMED]
    config.stash[WRITTEN] = config.option.benchmark_json


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    if WRITTEN in config.stash:
        path = config.stash[WRITTEN]
        if config.stash[IS_WHOLE] and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            path = path.rename(path.with_name(f"{SETTINGS.which}.json"))
        path.write_text(report.compact(path.read_text()))
        terminalreporter.write_line(report.write(path))
        terminalreporter.write_line(f"Written to {path}. `make bench-page` puts a whole set into the docs.")
