"""The benchmarks' own arithmetic: ratios of one round, the gate, what is chosen, and what a report says."""

import ast
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherperf as nperf

pytest.importorskip("noetherperf._cpu", reason="the benchmarks measure the compiled CPU engine, which is not built")

from bench import kernel, oracle, page, paper, phases, report
from bench.cases import EVERYTHING, MODELS, QUICK_STEPS, TRAINED, Case, selected
from bench.cells import LABELS
from bench.checkout import ROOT
from bench.correctness import Mismatch, check, check_in_float64
from bench.inputs import TooLarge, input_sets, make_input_set, n_sets
from bench.iterations import iterations, timed
from bench.markdown import ratio, seconds, size
from bench.memory import extra_bytes
from bench.networks import TASKS
from bench.recipes import RECIPES, STEPS
from bench.settings import Settings
from bench.timing import LEAST_SECONDS, Rounds, Spread, figures, ratios
from bench.training import TRAIN
from bench.variants import VARIANTS, Unavailable, measured, names_for, ours, plain_sums, views_of
from noetherperf.engines.floor import memory_floor
from noetherperf.measure.plan import View
from noetherperf.record.pending import Entry
from noetherperf.record.writer import Writer
from noetherperf.rules.moments import Moment, Operand
from noetherperf.rules.rule import Rule
from noetherperf.rules.sgd import Hyper

GIB = 1 << 30

# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "n_parameters", "n_tensors"),
    [("resnet50", 25_557_032, 161), ("gpt2", 124_439_808, 148), ("vgg16", 40_708_104, 32)],
)
def test_models_have_their_known_size(model: str, n_parameters: int, n_tensors: int) -> None:
    case = Case("step", model, MODELS[model])
    assert (case.n_parameters, len(case.shapes)) == (n_parameters, n_tensors)
    assert case.bytes_moved == 20 * n_parameters
    assert case.bytes_held == 12 * n_parameters


def test_names_tell_cases_apart() -> None:
    assert len({case.name for case in EVERYTHING}) == len(EVERYTHING)


def test_every_number_of_parameters_is_about_what_it_says() -> None:
    for case in EVERYTHING:
        if case.suite == "parameters":
            assert case.n_parameters == pytest.approx(case.point, rel=0.02)


def test_the_quick_set_is_part_of_the_full_one() -> None:
    quick = selected("quick")
    assert set(quick) <= set(selected("full"))
    assert {case.name for case in quick if case.suite == "step"} <= set(QUICK_STEPS)


def test_cases_are_chosen_by_name() -> None:
    chosen = selected("quick", "gpt2-float16-whole-b0, mlp-*-rows-b0.9")
    assert chosen[0].name == "gpt2-float16-whole-b0"
    assert len(chosen) == 5
    with pytest.raises(ValueError, match="no case is called 'gpt3'"):
        selected("quick", "gpt3")
    with pytest.raises(ValueError, match="BENCH='fast' is unknown; choose one of quick, full"):
        selected("fast")


def test_a_set_has_an_end_and_chosen_cases_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BENCH", "BENCH_CASES", "BENCH_MINUTES"):
        monkeypatch.delenv(name, raising=False)
    assert Settings.read().end <= time.monotonic() + 10 * 60
    monkeypatch.setenv("BENCH", "full")
    assert 10 * 60 < Settings.read().end - time.monotonic() <= 29 * 60
    monkeypatch.setenv("BENCH_CASES", "host1-*")
    assert Settings.read().end == math.inf
    monkeypatch.setenv("BENCH_MINUTES", "2")
    assert Settings.read().end <= time.monotonic() + 2 * 60


def test_the_sets_show_adamw_and_training() -> None:
    names = {case.name for case in selected("quick")}
    for model in ("matrix", "resnet50", "small2000"):
        assert {f"{model}-float32-{view}-adamw" for view in ("none", "rows", "columns", "both")} <= names
    assert {f"gpt2-float32-{view}-adamw" for view in ("rows", "both")} <= names  # with a Probe, at 1e8 parameters
    trained = {(case.model, case.rule) for case in selected("full") if case.suite == TRAIN}
    assert trained == {(model, rule) for model in TRAINED for rule in ("b0.9", "adamw")}


# ---- inputs ---------------------------------------------------------------------------------------------------------

SMALL = Case("step", "small", ((7, 5, 3), (4,), (33, 17)), view="both")


def test_inputs_are_apart_and_different() -> None:
    one, two = make_input_set(SMALL, 0), make_input_set(SMALL, 1)
    tensors = [x for inputs in (one, two) for x in inputs.tensors]
    regions = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(regions))
    assert not torch.equal(one.grads[0], two.grads[0])
    assert [p.shape for p in one.params] == [torch.Size(s) for s in SMALL.shapes]


def test_input_sets_exceed_the_cache_and_fit_into_memory() -> None:
    case = Case("step", "matrix", ((1 << 14, 1 << 14),))  # 3 GiB of p, g, v
    assert n_sets(case, cache=8 * GIB, memory=100 * GIB) == 6
    assert n_sets(case, cache=0, memory=100 * GIB) == 2
    assert n_sets(case, cache=8 * GIB, memory=18 * GIB) == 3
    with pytest.raises(TooLarge, match=r"needs 6\.0 GiB of memory, and may take 5\.0"):
        n_sets(case, cache=0, memory=5 * GIB)


# ---- timing ---------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that goes on only by what steps say they take, and a machine that may turn slower."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.log: list[str] = []

    def step(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += self.slowness * seconds
            self.log.append(name)

        return run

    def clock(self) -> float:
        return self.now


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that turns three times slower changes no ratio; a ratio of medians would."""
    machine = Machine()
    rounds = Rounds({"floor": [machine.step("floor", 1.0)], "ours": [machine.step("ours", 1.25)]}, clock=machine.clock)
    for slowness in (1.0, 3.0, 3.0, 1.0, 7.0):
        machine.slowness = slowness
        rounds.run()
    assert rounds.times["floor"] == [1.0, 3.0, 3.0, 1.0, 7.0]
    assert ratios(rounds.times, "floor")["ours"] == (1.25, 1.25, 1.25)
    assert rounds.total("ours") == 1.25 * 15.0
    found = figures(rounds.times)
    assert found["ours"]["seconds"] == (3.75, 1.25, 3.75)
    assert found["floor"]["per ours"] == (0.8, 0.8, 0.8)
    assert "per fused" not in found["ours"]


def test_the_order_changes_and_each_step_takes_the_next_set() -> None:
    machine = Machine()
    names = ("a", "b", "c")
    steps = {name: [machine.step(f"{name}{i}", 1.0) for i in range(4)] for name in names}

    def run(seed: int) -> list[str]:
        machine.log.clear()
        rounds = Rounds(steps, seed=seed, clock=machine.clock)
        for _ in range(20):
            rounds.run()
        return machine.log.copy()

    log = run(0)
    assert [int(entry[1]) for entry in log] == [i % 4 for i in range(60)]
    orders = {"".join(entry[0] for entry in log[i : i + 3]) for i in range(0, 60, 3)}
    assert len(orders) == 6
    assert run(0) == log
    assert run(1) != log


def test_short_steps_are_timed_together() -> None:
    machine = Machine()
    rounds = Rounds(
        {"a": [machine.step("a", LEAST_SECONDS / 10)], "b": [machine.step("b", LEAST_SECONDS)]}, clock=machine.clock
    )
    assert rounds.calibrate(seconds=115 * LEAST_SECONDS, least=3) == 10
    assert rounds.repeats == 10
    assert rounds.times == {"a": [], "b": []}
    rounds.run()
    assert rounds.times["a"][0] == pytest.approx(LEAST_SECONDS / 10)
    assert rounds.calibrate(seconds=0.0, least=3) == 3


def test_slow_variants_sit_out_and_are_compared_where_they_were() -> None:
    machine = Machine()
    seconds_of = {"floor": 1.0, "ours": 1.0, "fused": 1.5, "eager": 9.0, "norms": 4.5}
    rounds = Rounds({name: [machine.step(name, x)] for name, x in seconds_of.items()}, clock=machine.clock)
    n = rounds.calibrate(seconds=100.0, least=3)
    assert rounds.periods == {"floor": 1, "ours": 1, "fused": 1, "eager": 4, "norms": 2}
    assert n == int(100.0 / (1.0 + 1.0 + 1.5 + 9.0 / 4 + 4.5 / 2))
    for slowness in (1.0, 3.0, 5.0, 2.0, 7.0):
        machine.slowness = slowness
        rounds.run()
    assert [math.isnan(x) for x in rounds.times["eager"]] == [False, True, True, True, False]
    assert [math.isnan(x) for x in rounds.times["norms"]] == [False, True, False, True, False]
    found = figures(rounds.times)
    assert found["eager"]["per ours"] == (9.0, 9.0, 9.0)
    assert found["norms"]["seconds"] == (4.5 * 5.0, 4.5 * 3.0, 4.5 * 6.0)
    assert rounds.total("norms") == 4.5 * 13.0
    few = Rounds({name: [machine.step(name, x)] for name, x in seconds_of.items()}, clock=machine.clock)
    assert few.calibrate(seconds=0.0, least=12) == 12
    assert few.periods["eager"] == 4  # three rounds of twelve
    few.calibrate(seconds=0.0, least=12, exactly=2)
    assert set(few.periods.values()) == {1}


def test_rounds_end_when_ratios_have_settled_or_time_is_up() -> None:
    machine = Machine()

    def compared(varying: float, **how: int) -> int:
        """Rounds of two variants, one of whose times varies."""
        turns = iter(range(10_000))

        def vary() -> None:
            machine.now += 1.0 + varying * (next(turns) % 5)

        rounds = Rounds({"a": [machine.step("a", 1.0)], "b": [vary]}, clock=machine.clock)
        rounds.compare("a", seconds=400.0, least=12, **how)
        return rounds.n_rounds

    assert compared(0.0) == 12
    assert 12 < compared(0.01) < 100
    assert compared(0.1) > 150
    assert compared(0.0, exactly=30) == 30


def test_a_callable_may_make_several_steps() -> None:
    machine = Machine()
    steps = {"one": [machine.step("one", 2.0)], "ten": [machine.step("ten", 20.0)]}
    rounds = Rounds(steps, clock=machine.clock, counts={"ten": 10})
    assert rounds.calibrate(seconds=220.0, least=1) == 10  # rounds of 22 seconds
    rounds.run()
    assert rounds.times == {"one": [2.0], "ten": [2.0]}


# ---- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(RECIPES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("view", ["none", "rows", "columns", "both", "whole"])
def test_the_gate_admits_a_right_step(view: str, dtype: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.correctness.CHUNK", 100)  # several chunks a tensor
    case = Case("step", "small", SMALL.shapes, dtype, view, rule)
    inputs = make_input_set(case, 0)
    check(case, inputs, ours(case, inputs))


def test_every_case_of_the_quick_set_is_checked_in_float64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sum that is wrong in float64 alone is refused."""
    monkeypatch.setattr("bench.correctness.IN_FLOAT64", 1 << 15)
    quick = [case for case in selected("quick") if case.suite != TRAIN]
    for case in quick:
        check_in_float64(case)
    moments = oracle.moments

    def spoiled(rule: Rule[Any], hyper: Hyper, view: View, factors: dict[Operand, Tensor]) -> Tensor:
        in_float64 = factors[Operand.P_NEW].dtype == torch.float64
        return moments(rule, hyper, view, factors) * (2.0 if in_float64 else 1.0)

    monkeypatch.setattr(oracle, "moments", spoiled)
    with pytest.raises(Mismatch, match="moments"):
        check_in_float64(next(case for case in quick if case.view != "none"))


@pytest.mark.parametrize("what", ["parameter", "buffer", "moments"])
def test_the_gate_refuses_a_wrong_step(what: str) -> None:
    inputs = make_input_set(SMALL, 0)
    optimizer = ours(SMALL, inputs)

    @torch.no_grad()
    def spoil(*_: Any) -> None:
        match what:
            case "parameter":
                inputs.params[2][32, 16] *= 1 + 1e-5
            case "buffer":
                inputs.buffers[0][0][0, 0, 0] += 1e-4
            case "moments":
                optimizer._prepare()[0].measurement.moments[Moment.DOT_PG, 3] += 1e-9

    optimizer.register_step_post_hook(spoil)
    with pytest.raises(Mismatch, match=f"{what} .*beyond its bound"):
        check(SMALL, inputs, optimizer)


# ---- variants -------------------------------------------------------------------------------------------------------


def test_variants_fit_their_cases() -> None:
    for case in EVERYTHING:
        assert set(names_for(case)) <= set(VARIANTS)
        assert "ours" in names_for(case)
        assert "fused" in names_for(case)


COMPILED = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])
    for name in ("compiled", "compiled_measured")
]


@pytest.mark.parametrize("name", ["fused", "foreach", "forloop", "eager", "norms", "paper", *COMPILED])
@pytest.mark.parametrize("rule", list(RECIPES))
def test_peers_make_the_same_step(name: str, rule: str) -> None:
    case = Case("step", "small", SMALL.shapes, view="rows", rule=rule)
    mine, theirs = make_input_set(case, 0), make_input_set(case, 0)
    if name == "paper" and rule == "adamw":
        with pytest.raises(Unavailable, match="SGD alone"):
            VARIANTS[name].make(case, [theirs])
        return
    ours(case, mine).step()
    (step,) = VARIANTS[name].make(case, [theirs], **VARIANTS[name].how)
    step()
    for one, two in zip(mine.tensors, theirs.tensors, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rule", list(RECIPES))
def test_users_sums_are_the_moments(rule: str) -> None:
    """The peers measure what noetherperf measures; else their times would mean nothing."""
    case = Case("step", "small", SMALL.shapes, "float64", "both", rule)
    inputs, again = make_input_set(case, 0), make_input_set(case, 0)
    optimizer, params = ours(case, inputs, measuring=False), [p.detach() for p in inputs.params]
    of_rule, options = optimizer.rule, optimizer.rule.options(optimizer.param_groups[0])
    views = views_of(case)
    found = measured(case.recipe, optimizer.step, params, inputs.grads, inputs.buffers, views, plain_sums)
    assert len(found) == len(views) == 5
    for view, sums in zip(views, found, strict=True):
        i = view.tensor
        held = [of_all[i] for of_all in again.buffers]
        buffers = (*held, *[None] * (len(of_rule.buffers) - len(held)))
        p, g = again.params[i].detach(), inputs.grads[i]
        stepped = oracle.step(of_rule, p, g, buffers, of_rule.coefficients_of(options, STEPS))
        factors = oracle.operands(params[i], p, g, stepped)
        expected = oracle.moments(of_rule, options, view, factors)[:6]
        if case.recipe.sums_of_update:
            extra = (view.grouped(x).sum((0, 2)) for x in (params[i] * stepped.u, stepped.u))
            expected = torch.cat([expected, torch.stack(list(extra))])
        torch.testing.assert_close(torch.stack(sums), expected)


def test_extra_bytes_grow_with_groups_and_not_with_parameters() -> None:
    def total(shape: tuple[int, int]) -> int:
        case = Case("memory", "matrix", (shape,), view="rows")
        return sum(extra_bytes(case, make_input_set(case, 0)).values())

    assert total((10, 1000)) == total((10, 10))
    per_group = (total((1010, 10)) - total((10, 10))) / 1000
    assert 64 <= per_group <= 1024


@pytest.mark.parametrize("view", ["none", "both"])
def test_a_step_comes_apart_into_phases(view: str) -> None:
    case = replace(SMALL, view=view)
    optimizer = ours(case, make_input_set(case, 0))
    optimizer.step()
    found = phases.profiled(optimizer.step)
    whole = found.pop("whole")
    assert {phase for phase, seconds in found.items() if seconds > 0} == {*phases.FUNCTIONS.values(), "rest"}
    assert sum(found.values()) == pytest.approx(whole)


def test_a_phase_without_its_function_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a step calls no function named carry_out, look"):
        phases.profiled(lambda: None)


# ---- whole iterations -----------------------------------------------------------------------------------------------

(TRAINING,) = selected("full", "train-mlp-float32-both-adamw")


@pytest.mark.parametrize("model", TASKS)
def test_trained_networks_have_the_shapes_of_their_cases(model: str) -> None:
    with torch.device("meta"):
        network = TASKS[model].network()
    assert sorted(tuple(p.shape) for p in network.parameters()) == sorted(TRAINED[model])


def test_a_batch_of_text_asks_for_the_next_token() -> None:
    inputs, classes = TASKS["train-gpt2"].data(torch.device("cpu"))
    assert inputs.shape == classes.shape == (1, 128)
    assert torch.equal(classes[:, :-1], inputs[:, 1:])
    assert TASKS["train-gpt2"].described(torch.device("cpu")) == "1 × 128 tokens"


def test_iterations_are_timed_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    with iterations(TRAINING, GIB) as rounds:
        append = Writer.append

        def noted(self: Writer, entry: Entry) -> None:
            rows.append(1)
            append(self, entry)

        monkeypatch.setattr(Writer, "append", noted)
        for _ in range(3):
            rounds.run()
    assert len(rows) == 3  # thirty iterations
    info = timed(TRAINING, GIB, seconds=0.0, least=2)
    assert info["batch"] == "32 inputs of 64 numbers"
    assert set(info["figures"]) == {"fused", "unmeasured", "rows", "both", "recorded"}
    assert info["figures"]["fused"]["per fused"] == [1.0, 1.0, 1.0]
    with pytest.raises(TooLarge, match="needs"):
        timed(TRAINING, 1000, seconds=0.0, least=2)


def test_a_wrong_iteration_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nperf.AdamW, "step", lambda self: None)
    with pytest.raises(Mismatch, match=r"unmeasured: after one step 1 of its length away"):
        timed(TRAINING, GIB, seconds=0.0, least=2)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_numbers_are_readable() -> None:
    assert ratio(Spread(1.0449, 1.02, 1.0701)) == "1.04 (1.02–1.07)"
    assert ratio(Spread(12.34, 9.0, 15.0)) == "12.3 (9.0–15.0)"
    assert [seconds(x) for x in (1.5, 0.0123, 4.2e-6)] == ["1.5 s", "12.3 ms", "4.2 µs"]
    assert [size(x) for x in (12, 3 << 10, 5 << 20, -(6 << 30))] == ["12 B", "3 KiB", "5 MiB", "-6 GiB"]


def result() -> dict[str, Any]:
    """A run of one case, as a machine would time it on which noetherperf takes 1.25 floors and fused 2."""
    times = {"floor": [1.0, 2.0, 4.0], "copy": [1.5, 3.0, 6.0], "ours": [1.25, 2.5, 5.0], "fused": [2.0, 4.0, 8.0]}
    info = {
        "case": "mlp-float32-rows-b0.9",
        "suite": "step",
        "model": "mlp",
        "dtype": "float32",
        "view": "rows",
        "rule": "b0.9",
        "bytes moved": 10e9,
        "figures": {name: {k: list(s) for k, s in found.items()} for name, found in figures(times).items()},
        "not run": {"norms": "the norms are away"},
    }
    environment = {
        "date": "today",
        "cpu": "a processor",
        "threads": 2,
        "caches": {"L1 data": "48K"},
        "system": "Linux",
        "python": "3",
        "torch": "2",
        "noetherperf": "0",
        "instructions": "avx",
        "commit": "abc",
        "dirty": True,
    }
    failed = [{"case": "gpt2-float32-rows-b0.9", "reason": "parameter w0: 1 beyond its bound"}]
    return {
        "benchmarks": [{"extra_info": info}],
        "environment": environment,
        "set": "quick",
        "not timed": failed,
    }


def test_a_report_shows_ratios_reasons_and_failures(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text(json.dumps(result()))
    text = report.write(path)
    (row,) = (line for line in text.splitlines() if line.startswith("| mlp, rows | 2 s (5 GB/s) |"))
    cells = [cell.strip() for cell in row.split("|")]
    assert "1.25 (1.25–1.25)" in cells
    assert "0.62 (0.62–0.62)" in cells
    assert "the norms are away." in text
    assert "| gpt2-float32-rows-b0.9 | parameter w0: 1 beyond its bound |" in text
    assert "at abc with uncommitted changes" in text
    assert (tmp_path / "part.md").read_text() == text
    picture = (tmp_path / "part.svg").read_text()
    assert "mlp, rows" in picture
    assert LABELS["fused"] in picture
    assert LABELS["foreach"] not in picture


@pytest.mark.parametrize(("aim", "verdict"), [(0.63, "met"), (0.62, "met"), (0.5, "missed by 25%")])
def test_a_report_says_which_aims_were_met(monkeypatch: pytest.MonkeyPatch, aim: float, verdict: str) -> None:
    assert "Aims" not in report.report(result())
    monkeypatch.setitem(report.AIMS, ("mlp", "b0.9"), ("per fused", {"rows": aim}))
    assert f"| mlp, rows | × fused ≤ {aim:.2f} | 0.62 | {verdict} |" in report.report(result())


def train_result() -> dict[str, Any]:
    """A run that trained one network too."""
    times = {
        "fused": [2.0, 4.0],
        "unmeasured": [1.9, 3.8],
        "rows": [2.0, 4.0],
        "both": [2.1, 4.2],
        "recorded": [3.0, 6.0],
    }
    info = {
        **selected("full", "train-gpt2-float32-both-adamw")[0].described(),
        "batch": "1 × 128 tokens",
        "figures": {name: {k: list(s) for k, s in found.items()} for name, found in figures(times).items()},
        "not run": {},
    }
    found = result()
    return {**found, "benchmarks": [*found["benchmarks"], {"extra_info": info}]}


TRAIN_ROW = (
    "| GPT-2, 124 million | 1 × 128 tokens | AdamW | 3 s | 0.95 (0.95–0.95) | 1.00 (1.00–1.00) | 1.05 (1.05–1.05) |"
)


def test_a_kept_run_goes_into_the_page_and_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[tuple[str, Path], str] = {}

    def write(section: str, command: str, text: str, document: Path = page.DOCUMENT) -> None:
        written[section, document] = page.insert(document.read_text(), section, command, text)

    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PICTURE", tmp_path / "picture.svg")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(train_result()))
    report.publish(path)
    assert set(written) == {("results", page.DOCUMENT), ("training", page.README)}
    assert all(f"{TRAIN_ROW} 1.50 (1.50–1.50) |" in document for document in written.values())
    kept = {file.name for file in tmp_path.iterdir()} - {"run.json", "picture.svg"}
    assert kept == {"quick-a-avx.json", "quick-a-avx.md"}
    written.clear()
    path.write_text(json.dumps(result()))
    report.publish(path)
    assert set(written) == {("results", page.DOCUMENT)}  # README keeps what it has


INTERRUPT = """
import os, signal
from bench.timing import Rounds

cases, calibrate, run = [], Rounds.calibrate, Rounds.run

def counted(self, *args, **kwargs):
    n = calibrate(self, *args, **kwargs)
    cases.append(self)
    return n

def interrupted(self):
    if len(cases) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    run(self)

Rounds.calibrate, Rounds.run = counted, interrupted
"""


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path: Path) -> None:
    (tmp_path / "interrupt.py").write_text(INTERRUPT)
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_step.py",
        "-q",
        "-p",
        "interrupt",
        f"--benchmark-json={out}",
    ]
    chosen = {"BENCH_CASES": "host1-float32-none-b0.9,host1-float32-rows-b0.9", "BENCH_ROUNDS": "2"}
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    environment = {**own, **chosen, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    assert benchmark["extra_info"]["case"] == "host1-float32-none-b0.9"
    assert "| 1 | SGD | none |" in out.with_suffix(".md").read_text()


def test_a_section_goes_between_its_marks_again_and_again() -> None:
    begin, end = page.marks("tables", "a command")
    document = f"before\n{begin}\nold\n{end}\nafter\n"
    once = page.insert(document, "tables", "a command", "new\n")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert page.insert(once, "tables", "a command", "new\n") == once
    with pytest.raises(ValueError, match="must have one line"):
        page.insert("no marks", "tables", "a command", "new")


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ("results", report.COMMAND),
        ("kernel", kernel.COMMAND),
        ("phases", phases.COMMAND),
        ("cost", paper.COMMAND),
        ("training", report.COMMAND),
    ],
)
def test_the_documents_have_every_section(section: str, command: str) -> None:
    document = page.README if section == "training" else page.DOCUMENT
    page.insert(document.read_text(), section, command, "")


def test_the_floor_takes_only_what_it_can_read() -> None:
    x = torch.ones(8)
    for wrong in (torch.ones(7), torch.ones(16)[::2], torch.ones(8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="stream 1 must be contiguous float32"):
            memory_floor([x, wrong], 1, 1)
    for n_read, n_written in ((1, 0), (2, 2), (3, 0), (6, 1)):
        with pytest.raises(ValueError, match=f"asked for {n_read}, {n_written} of them written"):
            memory_floor(torch.ones(n_read, 8), n_written, 1)


@pytest.mark.parametrize(("n_read", "n_written"), [(r, w) for r in range(2, 6) for w in range(1, r)])
def test_the_floor_reads_every_stream_and_writes_the_first(n_read: int, n_written: int) -> None:
    streams = torch.arange(n_read * 1003, dtype=torch.float32).reshape(n_read, 1003) % 64
    x, expected = streams[-1], streams.clone()
    for k in reversed(range(n_read - 1)):
        x = streams[k] / 2 + x
        if k < n_written:
            expected[k] = x
    memory_floor(streams, n_written, 2)()
    assert torch.equal(streams, expected)


def test_kept_input_sets_begin_with_the_same_values() -> None:
    (case,) = selected("full", "host1-float32-none-b0.9")

    def tensors() -> list[torch.Tensor]:
        return [x for inputs in input_sets(case) for x in inputs.tensors]

    first = tensors()
    values = [x.clone() for x in first]
    assert len({x.double().sum().item() for x in values}) == len(values)
    for x in first:
        x.fill_(torch.nan)
    for x, again, expected in zip(first, tensors(), values, strict=True):
        assert again.data_ptr() == x.data_ptr()
        assert torch.equal(again, expected)


def test_compact_json_is_the_same_json() -> None:
    data = {"a": [1.5, -2e-7, 3], "b": {"c": [], "d": ["x, 1", [1, 2]]}, "e": math.pi}
    text = report.compact(json.dumps(data, indent=4))
    assert json.loads(text) == data
    assert '"a": [ 1.5, -2e-07, 3 ]' in text


# ---- the code of the benchmarks -------------------------------------------------------------------------------------


def private_names(source: str) -> list[str]:
    """Names with a leading underscore that code takes from others; of torch, which has no public ones for all, none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=module, names=names) if module != "__future__":
                found += [alias.name for alias in names if alias.name.startswith("_")]
            case ast.Attribute(value=value, attr=name) if name.startswith("_") and not name.startswith("__"):
                while isinstance(value, ast.Attribute):
                    value = value.value
                if isinstance(value, ast.Call):  # super()
                    value = value.func
                if not (isinstance(value, ast.Name) and value.id in ("self", "super", "torch")):
                    found.append(name)
    return found


def test_private_names_are_seen() -> None:
    assert private_names("from noetherperf import _cpu\noptimizer._prepare()[0].engine._tables.views") == [
        "_cpu",
        "_tables",
        "_prepare",
    ]
    assert private_names("self._x.y = torch.cuda._sleep(1).__class__ + super()._z()") == []
    assert private_names("optimizer.engine()._tables") == ["_tables"]


def test_benchmarks_measure_through_what_is_public() -> None:
    """Else a change of noetherperf's inside would change, or silently drop, what they time."""
    paths = sorted((ROOT / "bench").rglob("*.py"))
    assert len(paths) > 20
    assert {path.name: found for path in paths if (found := private_names(path.read_text()))} == {}
