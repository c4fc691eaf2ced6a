"""Parts "tests-…": all tests of both GPU backends, by the machine's pytest."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.process import Part
from bench.gpu.session import Session

#: Tests that every backend passes, with what they need beside torch, numpy and pytest.
SUITE = {
    "tests/test_dropin.py": [],
    "tests/test_amp.py": [],
    "tests/test_torch_optim.py": ["expecttest"],
    "tests/test_practice.py": ["hypothesis"],
    "tests/test_laws_end_to_end.py": ["hypothesis"],
}
ENGINES = ["tests/test_engines.py", "tests/test_gpu.py"]

#: Per part the backend and its tests. Triton compiles many kernels, so that its tests take two parts.
TESTS = {
    "tests-cuda": ("cuda", [*ENGINES, *SUITE]),
    "tests-triton-engines": ("triton", ENGINES),
    "tests-triton-optimizers": ("triton", list(SUITE)),
}


def tests(session: Session, name: str) -> Iterator[Part]:
    """Run a part's tests on all cores."""
    backend, paths = TESTS[name]
    unfit = _unfit(session)
    n_cores = 1 if session.machine.is_exclusive else os.cpu_count() or 1
    yield _pytest(session, name, backend, [path for path in paths if path not in unfit], n_cores)
    for path in paths:
        if path in unfit:
            yield Part(path, "not run", detail=f"needs {' and '.join(unfit[path])}, which is not here")


def _unfit(session: Session) -> dict[str, list[str]]:
    """Test files that need what this Python lacks."""
    lacking = {
        path: [name for name in needs if name not in session.machine.found["modules"]] for path, needs in SUITE.items()
    }
    return {path: missing for path, missing in lacking.items() if missing}


def _pytest(session: Session, name: str, backend: str, paths: Sequence[str], n_workers: int) -> Part:
    """A backend's tests, by n_workers processes where pytest-xdist is there."""
    results = session.work / f"{name}.xml"
    results.unlink(missing_ok=True)
    # Versions that were never tried may warn: shown, but no error.
    options = ["-v", "--maxfail=20", "--tb=short", "-rfE", "-Wdefault", "-pno:cacheprovider", "-pno:benchmark"]
    options += ["-o", "faulthandler_timeout=60", f"--junitxml={results}"]
    if n_workers > 1 and "xdist" in session.machine.found["modules"]:
        options += ["-n", str(n_workers)]
    chosen = ["-k", f"{backend} and not emulated and not interpreted"]
    part = session.run(name, [session.python, "-m", "pytest", *paths, *chosen, *options], session.left - 5.0)
    return judge_tests(part, results, session.log(name))


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
