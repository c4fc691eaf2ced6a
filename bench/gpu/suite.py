"""Part "tests": all tests of both GPU backends, by the machine's pytest."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.machine import ask_nvidia_smi, nvidia_smi
from bench.gpu.process import Part
from bench.gpu.session import Session

BENCH_SECONDS = 120.0  # that tests leave to the benchmarks

#: Backends, and which share of the cores takes their tests: Triton compiles many kernels.
BACKENDS = {"cuda": 0.25, "triton": 0.75}

#: Tests that every backend passes, with what they need beside torch, numpy and pytest.
SUITE = {
    "tests/test_dropin.py": [],
    "tests/test_amp.py": [],
    "tests/test_torch_optim.py": ["expecttest"],
    "tests/test_practice.py": ["hypothesis"],
    "tests/test_laws_end_to_end.py": ["hypothesis"],
}


def tests(session: Session) -> Iterator[Part]:
    """Run the tests of both backends side by side; meanwhile Triton compiles what the benchmarks will time."""
    limit = session.left - BENCH_SECONDS if session.left > 2 * BENCH_SECONDS else session.left / 2
    suite = [path for path in SUITE if path not in _unfit(session)]
    paths = ["tests/test_engines.py", "tests/test_gpu.py", *suite]
    alone = nvidia_smi(ask_nvidia_smi())
    n_cores = 1 if "Exclusive" in (alone["compute mode"] or "") else os.cpu_count() or 1
    end = time.monotonic() + limit
    jobs: list[Callable[[], Part]] = [
        partial(_pytest, session, backend, paths, int(share * n_cores), end) for backend, share in BACKENDS.items()
    ]
    n = max(1, n_cores // 4)
    jobs += [partial(_compile, session, f"{i}/{n}", end) for i in range(n) if session.machine.found["triton"]]
    with ThreadPoolExecutor(len(jobs) if n_cores > 1 else 1) as pool:
        yield from pool.map(lambda job: job(), jobs)
    for path, missing in _unfit(session).items():
        yield Part(path, "not run", detail=f"needs {' and '.join(missing)}, which is not here")


def _unfit(session: Session) -> dict[str, list[str]]:
    """Test files that need what this Python lacks."""
    lacking = {
        path: [name for name in needs if name not in session.machine.found["modules"]] for path, needs in SUITE.items()
    }
    return {path: missing for path, missing in lacking.items() if missing}


def _pytest(session: Session, backend: str, paths: Sequence[str], n_workers: int, end: float) -> Part:
    """A backend's tests, by n_workers processes where pytest-xdist is there."""
    name, limit = f"tests {backend}", end - time.monotonic()
    if limit < 1.0:
        return Part(name, "not run", detail="there was no time left for it")
    results = session.work / f"{name.replace(' ', '-')}.xml"
    results.unlink(missing_ok=True)
    # Versions that were never tried may warn: shown, but no error.
    options = ["-v", "--maxfail=20", "--tb=short", "-rfE", "-Wdefault", "-pno:cacheprovider", "-pno:benchmark"]
    options += ["-o", "faulthandler_timeout=60", f"--junitxml={results}"]
    if n_workers > 1 and "xdist" in session.machine.found["modules"]:
        options += ["-n", str(n_workers)]
    chosen = ["-k", f"{backend} and not emulated and not interpreted"]
    part = session.run(name, [session.python, "-m", "pytest", *paths, *chosen, *options], limit)
    return judge_tests(part, results, session.log(name))


def _compile(session: Session, share: str, end: float) -> Part:
    """Compile Triton's kernels of a share of the benchmarks; the benchmarks compile what there was no time for."""
    command: list[str | Path] = [session.python, "-m", "bench.gpu", "--compile", share, *session.chosen_cases]
    part = session.run(f"compile {share}".replace("/", " of "), command, end - time.monotonic())
    if part.status == "timed out":
        part.status, part.output = "passed", ""
    return part


def judge_tests(part: Part, results: Path, log: Path) -> Part:
    """Complete a part by the counts in pytest's XML, or in its output (-v) if it was stopped before it wrote any.

    A part without any test has failed; one whose tests were all skipped was not run.
    """
    try:
        suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        failed = [line.strip() for line in lines if re.search(r"\b(FAILED|ERROR)\b.*::|::.* (FAILED|ERROR)\b", line)]
        n_passed = sum(bool(re.search(r"\bPASSED\b", line)) for line in lines)
        part.detail = ", ".join(filter(None, [f"{n_passed} passed", f"{len(failed)} failed", part.detail]))
        part.output = "\n".join([*failed, part.output]) if failed else part.output
        return part
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    reasons = sorted({skip.get("message", "") for suite in suites for skip in suite.iter("skipped")})
    words = [f"{passed} passed", f"{bad} failed" if bad else "", f"{counts['skipped']} skipped" if reasons else ""]
    part.detail = ", ".join(filter(None, [*words, part.detail]))
    if part.status in ("passed", "failed") and not bad and not passed:
        part.status = "failed" if not reasons else "not run"
        part.detail = "; ".join(reasons) if reasons else "no test was chosen"
    return part
