"""The GPU report where there is no GPU: its one line, and a rehearsal of its parts with a CPU in the GPU's place."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_engines
import test_gpu
import torch
from on_gpu import OnGpu

import noetherperf as nperf
from noetherperf.engines.reference import ReferenceEngine

pytest.importorskip("noetherperf._cpu", reason="the benchmarks measure the compiled CPU engine, which is not built")

from bench import gpu_report, page
from bench.cases import LARGE_MODELS, Case
from bench.gpu import comparison, tables
from bench.gpu.cases import CASES, CASES_OF, chosen, expected_seconds
from bench.gpu.comparison import LEAST_ROUNDS, Bench
from bench.gpu.device import Device, count_launches
from bench.gpu.machine import Machine, find_machine, find_nvcc, nvidia_smi
from bench.gpu.memcheck import find_sanitizer
from bench.gpu.process import Part, run
from bench.gpu.results import BENCHES, PARTS, merge_bench
from bench.gpu.results import main as merge_records
from bench.gpu.run import compile_kernels
from bench.gpu.run import run as run_cases
from bench.gpu.session import Session
from bench.gpu.suite import judge_tests
from bench.gpu.targets import judged
from bench.markdown import Notes
from bench.training import TITLE, TRAIN, training_table

ROOT = Path(__file__).parents[1]

# ---- without a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the report would take its minutes")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "bench/gpu_report.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-report: no GPU, so nothing was measured: ")
    assert f"torch {torch.__version__}, which finds no CUDA device" in line


def fake_python(folder: Path, answers: str) -> Path:
    """A "Python" that prints this, whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{answers}\nEND\n")
    path.chmod(0o755)
    return path


FOUND = {
    "python": "3.12.3",
    "executable": "/usr/bin/python3",
    "path": ["", "/usr/lib/python3.12"],
    "scripts": "/usr/bin",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "triton": "3.6.0",
    "devices": [["NVIDIA H200", [9, 0], 150 << 30]],
    "modules": ["pip", "pytest", "numpy"],
}


def test_the_first_python_with_a_gpu_is_taken(tmp_path: Path) -> None:
    for name in ("none", "gpu"):
        (tmp_path / name).mkdir()
    none = fake_python(tmp_path / "none", json.dumps({**FOUND, "torch": None, "devices": []}))
    with_gpu = fake_python(tmp_path / "gpu", json.dumps(FOUND))
    machine = find_machine([tmp_path / "missing", none, with_gpu])
    assert isinstance(machine, Machine)
    assert (machine.python, machine.capability) == (with_gpu, "90")
    said = find_machine([tmp_path / "missing", none])
    assert isinstance(said, str)
    assert "missing does not answer; " in said
    assert said.endswith("has no torch")


def test_nvidia_smi_is_read_or_done_without() -> None:
    read = nvidia_smi("580.95.05, 1980, 3201, 700.00, Enabled, Default\n580.95.05, 1, 1, 1, [N/A], Default")
    assert (read["driver"], read["ecc"], read["watts at most"]) == ("580.95.05", "Enabled", "700.00")
    assert nvidia_smi("580, 1980, [N/A], 700, [N/A], Default")["ecc"] is None
    assert set(nvidia_smi(None).values()) == {None}
    assert set(nvidia_smi("No devices were found").values()) == {None}


def test_tools_are_found_beside_each_other(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    for tool in (nvcc, nvcc.with_name("compute-sanitizer")):
        tool.write_text("")
        tool.chmod(0o755)
    assert find_nvcc({"CUDACXX": "/opt/nvcc", "PATH": ""}, []) == Path("/opt/nvcc")
    assert find_nvcc({"PATH": "", "CUDA_HOME": str(nvcc.parents[1])}, []) == nvcc
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert find_nvcc({"PATH": ""}, ["", str(tmp_path)]) == nvcc
        assert find_nvcc({"PATH": ""}, []) is None
    if not Path("/usr/local/cuda").exists():
        assert find_sanitizer(nvcc) == nvcc.with_name("compute-sanitizer")


# ---- processes ------------------------------------------------------------------------------------------------------


def test_parts_pass_fail_or_are_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    passed = run("a", [sys.executable, "-c", "print('fine')"], 60, log)
    assert (passed.status, passed.output, log.read_text()) == ("passed", "", "fine\n")
    failed = run("b", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60, log)
    assert (failed.status, failed.detail, failed.output) == ("failed", "exit code 3", "why")
    missing = run("c", [tmp_path / "nothing"], 60, log)
    assert missing.status == "failed"
    assert "cannot be started" in missing.detail
    begin = time.monotonic()
    # neither the process nor what it started listens to a request to stop
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code = f"import subprocess, sys, time; {deaf}p = subprocess.Popen([sys.executable, '-c', '{deaf}import time;"
    code += " time.sleep(600)']); print(p.pid, flush=True); time.sleep(600)"
    stopped = run("d", [sys.executable, "-c", code], 2.0, log, grace=0.2)
    assert (stopped.status, stopped.detail) == ("timed out", "stopped after 2 s")
    assert time.monotonic() - begin < 30
    child = int(stopped.output)
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the process had started is still there")


XML = """<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}">
{skips}</testsuite></testsuites>"""


def part_judged(tmp_path: Path, status: str, tests: int, failures: int, skipped: int) -> Part:
    path = tmp_path / "results.xml"
    skips = '<testcase><skipped message="cuda: not built"/></testcase>' * skipped
    path.write_text(XML.format(tests=tests, failures=failures, skipped=skipped, skips=skips))
    return judge_tests(Part("t", status), path, tmp_path / "log")


def test_tests_are_counted(tmp_path: Path) -> None:
    fine = part_judged(tmp_path, "passed", 12, 0, 2)
    assert (fine.status, fine.detail) == ("passed", "10 passed, 2 skipped")
    bad = part_judged(tmp_path, "failed", 12, 3, 0)
    assert (bad.status, bad.detail) == ("failed", "9 passed, 3 failed")
    assert part_judged(tmp_path, "failed", 0, 0, 0).status == "failed"
    skipped = part_judged(tmp_path, "passed", 4, 0, 4)
    assert (skipped.status, skipped.detail) == ("not run", "cuda: not built")


LOG = """tests/test_a.py::test_one[cuda-a b] PASSED [ 25%]
[gw1] [ 50%] PASSED tests/test_a.py::test_one[triton]
[gw0] [ 75%] FAILED tests/test_a.py::test_two[c d]
[gw0] [100%] SKIPPED tests/test_a.py::test_three
"""


def test_tests_that_were_stopped_are_counted_by_what_they_printed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    part = Part("t", "timed out", detail="stopped", output="its end")
    stopped = judge_tests(part, tmp_path / "none.xml", log)
    assert (stopped.status, stopped.detail) == ("timed out", "2 passed, 1 failed, stopped")
    assert stopped.output == "[gw0] [ 75%] FAILED tests/test_a.py::test_two[c d]\nits end"
    untold = judge_tests(Part("t", "timed out", detail="stopped"), tmp_path / "none.xml", tmp_path / "none")
    assert (untold.status, untold.detail) == ("timed out", "0 passed, 0 failed, stopped")


# ---- the whole report, by parts that only pretend -------------------------------------------------------------------


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A Python with a GPU, as far as it says, and in the folder "build" beside it a build that is ready."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "ready").touch()
    return fake_python(tmp_path, json.dumps(FOUND))


def bench_result(**changes: Any) -> dict[str, Any]:
    info = {
        "case": "gpt2-float32-both-b0.9",
        "suite": "gpu",
        "model": "gpt2",
        "view": "both",
        "parameters": 124_439_808,
        "tensors": 148,
        "bytes moved": 20 * 124_439_808,
        "figures": {
            "cuda": {
                "seconds": [6e-4, 6e-4, 6e-4],
                "of copy": [0.95, 0.94, 0.96],
                "per fused": [1.04, 1.03, 1.05],
                "per cuda plain": [1.02, 1.01, 1.03],
            },
            "fused": {"seconds": [5.8e-4, 5.8e-4, 5.8e-4], "of copy": [0.99, 0.98, 1.0]},
            "eager": {"seconds": [6e-3, 6e-3, 6e-3], "per cuda": [10.0, 9.0, 11.0]},
            "copy": {"seconds": [5.7e-4, 5.7e-4, 5.7e-4]},
        },
        "host seconds": {"cuda": 9e-5, "fused": 1e-4},
        "launches": {"cuda": [2, 1], "fused": [3, 0]},
        "not run": {"compiled_measured": "it would compile for too long"},
        "wrong": {},
        **changes,
    }
    return {"backends": ["cuda", "triton"], "cases": [info], "not timed": [{"case": "billion", "reason": "no time"}]}


def step_part(session: Session, name: str, case: str, **changes: Any) -> Part:
    """A part that measured one case."""
    found = bench_result(case=case, **changes)
    session.bench = merge_bench(session.bench, found)
    return Part(name, "passed", 4.0, "1 cases timed")


def test_every_part_alone_adds_to_one_record(
    pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tests(session: Session, name: str) -> Any:
        yield Part("engine cuda", "failed", 3.0, "9 passed, 1 failed", "AssertionError: parameters")

    def benchmarks(session: Session, name: str) -> Any:
        yield step_part(session, name, f"case of {name}", view="none")

    def alone(part: str) -> int:
        return gpu_report.main(["--only", part, "--out", str(tmp_path)], [pretended], tmp_path / "build")

    monkeypatch.setitem(gpu_report.RUN, "tests-cuda", tests)
    for part in BENCHES:
        monkeypatch.setitem(gpu_report.RUN, part, benchmarks)
    assert alone("tests-cuda") == 1
    assert [alone(part) for part in ("bench-small", "bench-adamw")] == [0, 0]
    result = json.loads((tmp_path / "gpu.json").read_text())
    states = [(part["phase"], part["status"]) for part in result["parts"]]
    assert states == [("tests-cuda", "failed"), ("bench-adamw", "passed"), ("bench-small", "passed")]
    assert {case["case"] for case in result["bench"]["cases"]} == {"case of bench-small", "case of bench-adamw"}
    assert result["environment"]["device"] == "NVIDIA H200"
    text = (tmp_path / "gpu.md").read_text()
    assert "NVIDIA H200 (compute capability 90, 150 GiB)" in text
    assert "| engine cuda | failed | 3 s | 9 passed, 1 failed |" in text
    assert "AssertionError: parameters" in text
    assert capsys.readouterr().out.count("### Targets, as measured") == 2
    assert alone("bench") == 0
    assert len(json.loads((tmp_path / "gpu.json").read_text())["bench"]["cases"]) == len(BENCHES)


def test_a_part_has_less_than_four_minutes(pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, float] = {}

    def noted(session: Session, name: str) -> Any:
        left[name] = session.left
        yield Part(name, "passed")

    for part in PARTS:
        monkeypatch.setitem(gpu_report.RUN, part, noted)
    assert gpu_report.main(["--out", str(tmp_path)], [pretended], tmp_path / "build") == 0
    assert list(left) == list(PARTS)
    assert all(225 < seconds <= 230 for seconds in left.values())
    short = ["--out", str(tmp_path), "--only", "memcheck", "--minutes", "2"]
    gpu_report.main(short, [pretended], tmp_path / "build")
    assert 100 < left["memcheck"] <= 110


def test_what_the_build_lacks_is_not_run(pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build" / "ready").unlink()
    monkeypatch.setitem(
        gpu_report.RUN, "build", lambda session, name: iter([Part(name, "failed", 1.0, "exit code 1", "no nvcc")])
    )
    assert gpu_report.main(["--only", "bench-sgd", "--out", str(tmp_path)], [pretended], tmp_path / "build") == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in parts] == [("build", "failed"), ("bench-sgd", "not run")]


def test_parts_are_chosen_by_name() -> None:
    assert gpu_report.read_arguments(["--only", "bench, tests-cuda"]).only == ["tests-cuda", *BENCHES]
    assert gpu_report.read_arguments(["--only", "bench-small"]).minutes == 4.0
    everything = gpu_report.read_arguments([])
    assert everything.only == list(PARTS)
    assert everything.minutes == 4.0 * (len(PARTS) - 1)


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "bench,dance"], [])
    assert f"there is no part dance; choose of {', '.join(PARTS)}" in capsys.readouterr().err


def test_a_case_is_kept_as_it_was_measured_last() -> None:
    first, second = bench_result(case="a"), bench_result(case="b")
    first["not timed"] = [{"case": "b", "reason": "no time"}, {"case": "c", "reason": "no time"}]
    second["not timed"] = [{"case": "a", "reason": "no time"}]
    merged = merge_bench(first, second)
    assert merged is not None
    assert [case["case"] for case in merged["cases"]] == ["a", "b"]
    assert merged["not timed"] == [{"case": "c", "reason": "no time"}]
    again = bench_result(case="a", tensors=1)
    merged = merge_bench(merged, again)
    assert merged is not None
    assert [(case["case"], case["tensors"]) for case in merged["cases"]] == [("a", 1), ("b", 148)]
    assert merge_bench(None, first) is first
    assert merge_bench(first, None) is first


def test_records_of_other_machines_are_merged_or_refused(pretended: Path, tmp_path: Path) -> None:
    environment = {**Machine(pretended, FOUND).describe(), "date": "today"}
    paths = []
    for part in ("bench-small", "bench-adamw"):
        path = tmp_path / f"{part}.json"
        parts = [{"phase": part, **asdict(Part(part, "passed"))}]
        path.write_text(json.dumps({"environment": environment, "parts": parts, "bench": bench_result(case=part)}))
        paths.append(str(path))
    merge_records([str(tmp_path / "all"), *paths])
    merged = json.loads((tmp_path / "all" / "gpu.json").read_text())
    assert [part["phase"] for part in merged["parts"]] == ["bench-adamw", "bench-small"]
    assert {case["case"] for case in merged["bench"]["cases"]} == {"bench-adamw", "bench-small"}
    other = json.loads(Path(paths[1]).read_text())
    other["environment"]["commit"] = "another"
    Path(paths[1]).write_text(json.dumps(other))
    with pytest.raises(SystemExit, match=r"bench-adamw.json differs from .*bench-small.json in commit"):
        merge_records([str(tmp_path / "all"), *paths])


def test_targets_are_judged_as_measured() -> None:
    verdicts = {one["target"]: one["backends"] for one in judged(bench_result())}
    copy = verdicts["rows + columns: fraction of the copy's bandwidth, 1e8 parameters and more"]
    assert copy == {"cuda": {"value": "0.950", "case": "gpt2-float32-both-b0.9", "met": True}, "triton": None}
    fused = verdicts["rows + columns: × torch fused without measuring, every case"]["cuda"]
    assert (fused["value"], fused["met"]) == ("1.040", False)
    assert verdicts["kernels launched a step, every case"]["cuda"]["met"]
    assert verdicts["rows + columns: eager measurement after torch's fused step, × ours"]["cuda"]["met"]
    assert verdicts["rows + columns: ResNet-50, overhead of measuring"]["cuda"] is None
    resnet = {one["target"]: one["backends"] for one in judged(bench_result(model="resnet50"))}
    overhead = resnet["rows + columns: ResNet-50, overhead of measuring"]["cuda"]
    assert (overhead["value"], overhead["met"]) == ("2.0 %", True)


def test_tables_say_what_is_missing_and_why() -> None:
    sections = dict(tables.bench_sections(bench_result(wrong={"triton": "parameter w0: 1 beyond its bound"})))
    assert "**not met**: 1.040 (gpt2-float32-both-b0.9)" in sections["Targets, as measured"]
    assert "not measured" in sections["Targets, as measured"]
    assert "0.95 (0.94–0.96)" in sections["The step with its measurement"]
    assert "parameter w0: 1 beyond its bound" in sections["Notes"]
    assert "it would compile for too long" in sections["Notes"]
    assert "90 µs, 2 + 1" in sections["Host time of a step, and kernels + copies launched"]
    assert "| billion | no time |" in sections["Without a time"]
    assert "triton: parameter w0: 1 beyond its bound" in sections["Without a time"]


def test_training_has_a_table_of_its_own() -> None:
    variants = ("fused", "unmeasured", "rows", "both", "recorded")
    trained = {
        "case": "train-gpt2-float32-both-adamw",
        "suite": TRAIN,
        "model": "train-gpt2",
        "rule": "adamw",
        "batch": "64 × 128 tokens",
        "figures": {name: {"seconds": [0.03] * 3, "per fused": [1.01, 1.0, 1.02]} for name in variants},
        "host seconds": {},
        "launches": {},
    }
    bench = bench_result()
    bench["cases"].append({**bench["cases"][0], **trained})
    sections = dict(tables.bench_sections(bench))
    assert "| GPT-2, 124 million | 64 × 128 tokens | AdamW | 30 ms | 1.01 (1.00–1.02) |" in sections[TITLE]
    titles = [title for title, text in sections.items() if "train-gpt2" in text or "GPT-2, 124" in text]
    assert titles == [TITLE]
    environment = {**dict.fromkeys(["driver", "nvcc", "triton", "commit", "dirty"]), "memory": 0}
    environment |= dict.fromkeys(["device", "capability", "torch", "cuda", "python", "date"], "?")
    assert sections[TITLE] in tables.section({"environment": environment, "bench": bench})
    bench["cases"].pop()
    assert TITLE not in dict(tables.bench_sections(bench))


def test_the_documentation_shows_the_run_that_is_kept() -> None:
    text = tables.section(json.loads(tables.RESULT.read_text()))
    document = page.DOCUMENT.read_text()
    assert page.insert(document, "gpu", tables.COMMAND, text) == document


# ---- the benchmarks, on a CPU ---------------------------------------------------------------------------------------

SMALL = Case("gpu", "small", ((64, 33), (17,)), view="both")
BENCH = Bench(Device(torch.device("cpu"), ("cpu",)), case_seconds=0.01)


def test_parts_fit_into_their_time_the_most_wanted_first() -> None:
    assert tuple(CASES_OF) == BENCHES
    assert set(PARTS) == set(gpu_report.RUN)
    for cases in CASES_OF.values():
        assert sum(map(expected_seconds, cases)) <= 100.0  # of 230; the build and the compilers take the rest
    assert {case.rule for case in CASES_OF["bench-adamw"] if case.dtype == "float32"} == {"adamw"}
    names = {case.name for case in CASES}
    for model in ("gpt2", "matrix", "resnet50", "billion", "small2000", "gpt2-xl"):
        for rule in ("b0.9", "adamw"):
            assert {f"{model}-float32-{view}-{rule}" for view in ("none", "rows", "both")} <= names
    assert {case.suite for case in CASES_OF["bench-train"]} == {TRAIN}


def test_large_models_have_their_known_size() -> None:
    assert Case("gpu", "gpt2-xl", LARGE_MODELS["gpt2-xl"]).n_parameters == 1_557_611_200
    assert Case("gpu", "billion", LARGE_MODELS["billion"]).n_parameters == 1_000_000_000
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_case_is_checked_timed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MAX_COMPILED", 0)
    info = BENCH.run(SMALL)
    assert set(info["figures"]) == {"cpu", "cpu plain", "fused", "probed", "eager", "copy"}
    assert set(info["figures"]["cpu"]) == {"seconds", "of copy", "per fused", "per cpu", "per cpu plain"}
    assert info["figures"]["fused"]["per fused"] == [1.0, 1.0, 1.0]
    assert "compile for too long" in info["not run"]["compiled_measured"]
    assert info["wrong"] == {}
    assert info["rounds"] >= LEAST_ROUNDS
    text = tables.report(
        {
            "environment": {**dict.fromkeys(["driver", "nvcc", "triton", "commit", "dirty"]), "memory": 0}
            | dict.fromkeys(["device", "capability", "torch", "cuda", "python", "date"], "?"),
            "parts": [],
            "bench": {"backends": ["cpu"], "cases": [info], "not timed": []},
        }
    )
    assert SMALL.name in text


def test_training_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TRAIN_SECONDS", 0.0)
    (case,) = chosen("train-mlp-*-adamw")
    info = BENCH.run(case)
    assert info["batch"] == "32 inputs of 64 numbers"
    assert set(info["figures"]) == {"fused", "unmeasured", "rows", "both", "recorded"}
    assert info["wrong"] == {}
    monkeypatch.setattr(nperf.AdamW, "step", lambda self: None)
    wrong = BENCH.run(case)
    assert "after one step" in wrong["wrong"]["cpu"]
    text = training_table([wrong], Notes())
    assert "—" in text


def test_a_wrong_step_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: nperf.SGD, closure: object = None) -> None:
        step(self)
        self.param_groups[0]["params"][0].data[0, 0] += 1.0

    step = nperf.SGD.step
    monkeypatch.setattr(comparison, "MAX_COMPILED", 0)
    monkeypatch.setattr(nperf.SGD, "step", forgetful)
    info = BENCH.run(SMALL)
    assert "parameter w0" in info["wrong"]["cpu"]
    assert "cpu" not in info["figures"]


def test_no_case_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 11.0])
    monkeypatch.setattr(Bench, "run", lambda self, case: {"case": case.name, "wrong": {}})
    written: list[int] = []
    result = run_cases(CASES[:2], BENCH, 10.0, lambda r: written.append(len(r["cases"])), clock=lambda: next(times))
    assert [case["case"] for case in result["cases"]] == [CASES[0].name]
    assert result["not timed"] == [{"case": CASES[1].name, "reason": "there was no time left for it"}]
    assert written == [1, 1]


def test_cases_are_chosen_by_name() -> None:
    assert {case.model for case in chosen("gpt2-xl-*, billion*")} == {"gpt2-xl", "billion"}
    with pytest.raises(ValueError, match="no case is called 'gpt3'"):
        chosen("gpt3")
    assert {case.rule for case in chosen("small2000-*,matrix-*", "bench-small")} == {"b0.9", "adamw"}
    assert chosen("small2000-*", "bench-sgd") == []
    with pytest.raises(ValueError, match="there is no part 'bench'; choose one of bench-adamw"):
        chosen("", "bench")


def test_kernels_are_compiled_by_one_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int]] = []
    step = nperf.SGD.step

    def noted(self: nperf.SGD) -> None:
        steps.append((self.backend, len(self.symmetries)))
        step(self)

    monkeypatch.setattr(nperf.SGD, "step", noted)
    cases = chosen("host161-*,billion-float32-rows-*")
    compile_kernels(cases, BENCH.device)
    assert capsys.readouterr().out.split() == [case.name for case in cases if case.model != "billion"]
    assert steps == [("cpu", 0), ("cpu", 0), ("cpu", 161), ("cpu", 0)]


def test_launches_are_counted_by_name() -> None:
    assert count_launches(["stage_1", "Memcpy HtoD (Pinned -> Device)", "stage_2", "Memset (Device)"]) == (2, 2)
    assert count_launches(["Optimizer.step#SGD.step", "stage_1", "stage_2"]) == (2, 0)
    assert count_launches([]) is None


# ---- the tests of the device, on a CPU ------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", ["vector plus", "padded", "empty"])
def test_an_engine_elsewhere_is_tested_by_copies(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    monkeypatch.setitem(test_engines.ENGINES, "elsewhere", partial(OnGpu, ReferenceEngine, device="cpu"))
    test_engines.test_step_moments_and_laws("sgd", "elsewhere", torch.float32, tensor)
    test_engines.test_a_tensor_without_gradient_waits("adam", "elsewhere")
    test_engines.test_a_step_that_overflows_writes_nothing("elsewhere", 2.0)
    test_engines.test_scaled_gradients_are_divided_and_left_divided("sgd", "elsewhere", torch.float32)


def test_what_an_engine_elsewhere_does_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(ReferenceEngine):
        def step(self, *args: Any) -> None:
            super().step(*args)
            whole = self.params[0].as_strided((1,), (1,), 0)  # beside the tensor
            whole += 1.0

    monkeypatch.setitem(test_engines.ENGINES, "elsewhere", partial(OnGpu, Careless, device="cpu"))
    with pytest.raises(AssertionError, match="wrote out of bounds"):
        test_engines.test_step_moments_and_laws("sgd", "elsewhere", torch.float32, "vector plus")


def test_rehearsal_of_the_devices_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        test_gpu.test_runs_agree_bit_for_bit("cpu", dtype, "momentum")
        test_gpu.test_laws_hold_to_rounding_over_many_steps("cpu", dtype, "momentum")
        test_gpu.test_memory_checker_set_of_odd_shapes_and_layouts("cpu", dtype, "nesterov")
    test_gpu.test_laws_hold_to_rounding_over_many_steps("cpu", torch.float64, "dampening")
    test_gpu.test_agrees_with_the_reference_backend("cpu", "plain")


def test_make_asks_the_machines_own_python() -> None:
    """Nothing is fetched or set up first: the target depends on no other."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "gpu-report", "PYTHON=some-python", "ARGS=--only bench"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert done.stdout.strip() == "some-python bench/gpu_report.py --only bench"
