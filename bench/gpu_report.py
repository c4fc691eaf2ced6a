"""`make gpu-report`: builds for the GPU at hand, tests both GPU backends on it, measures. One command, no network.

    python bench/gpu_report.py [--only build,tests,memcheck,bench] [--out DIR] [--minutes 8] [--cases PATTERNS]

It runs with the Python that starts it or else with .venv's, whichever has a torch that finds a GPU, and installs into
neither: the build goes to build/gpu-report/venv, which borrows that Python's packages. Each part is a process of its
own with a time limit; what fails or takes too long is reported and the rest goes on. Parts that were run before, on
the same machine and commit, stay in the report. Writes DIR/gpu.json, DIR/gpu.md and the parts' output, DIR/gpu-*.log.

Exit code: 0 if every part passed (a target that is not met is no failure), 1 else; without a GPU 1 and one line.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is started by its path

from bench import gpu_tables  # noqa: E402

BUILD = ROOT / "build" / "gpu-report"
VENV = BUILD / "venv"
READY = BUILD / "ready"  # written when the build is whole; holds what it was built of

PARTS = ("build", "tests", "memcheck", "bench")
BENCH_SECONDS = 120.0  # that tests leave to the benchmarks
OUTPUT = 4000  # characters of a failed part's output that the report shows

#: What a Python must say of itself; run by that Python.
PROBE = """
import importlib.util, json, platform, sys, sysconfig
found = {
    "python": platform.python_version(), "executable": sys.executable, "path": sys.path,
    "scripts": sysconfig.get_path("scripts"), "torch": None, "cuda": None, "triton": None, "devices": [],
}
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found["devices"].append([properties.name, [properties.major, properties.minor], properties.total_memory])
except ImportError:
    pass
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    pass
names = ["hypothesis", "expecttest", "pip", "pytest", "xdist", "numpy"]
found["modules"] = [name for name in names if importlib.util.find_spec(name)]
print(json.dumps(found))
"""

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


# ---- processes ------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """How a part went.

    Fields:
        part: Its name.
        status: "passed", "failed", "timed out" or "not run".
        seconds: That it took.
        detail: In a few words: tests passed and failed, or why it was not run.
        output: The end of what it printed, if it failed.
        date: When.
    """

    part: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    output: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))


def run(
    name: str,
    command: Sequence[str | Path],
    limit: float,
    log: Path,
    environment: Mapping[str, str] = os.environ,
    grace: float = 10.0,
) -> Part:
    """Run a command in ROOT, its output into a file.

    After `limit` seconds it is asked to stop (pytest then still says what it found), `grace` seconds later it must.
    """
    begin = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            return Part(name, "failed", detail=f"{command[0]} cannot be started: {error}")
        status = ""
        try:
            process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            _kill_group(process)
    status = status or ("passed" if process.returncode == 0 else "failed")
    detail = f"stopped after {limit:.0f} s" if status == "timed out" else f"exit code {process.returncode}"
    text = "" if status == "passed" else tail(log)
    return Part(name, status, time.monotonic() - begin, "" if status == "passed" else detail, text)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """End a process and whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    text = log.read_text(errors="replace").replace("```", "'''")
    return text[-OUTPUT:].strip()


def answer(command: Sequence[str | Path], limit: float = 20.0) -> str | None:
    """What a program prints; None where it is not there, fails or takes too long."""
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=limit, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---- the machine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A Python whose torch finds a GPU, and what it says of itself (PROBE)."""

    python: Path
    found: Mapping[str, Any]

    @property
    def capability(self) -> str:
        """ "90" for 9.0."""
        major, minor = self.found["devices"][0][1]
        return f"{major}{minor}"

    @property
    def nvcc(self) -> Path | None:
        return find_nvcc(os.environ, self.found["path"])

    def environment(self) -> dict[str, str]:
        """For the parts' processes."""
        path = os.pathsep.join([self.found["scripts"], os.environ.get("PATH", os.defpath)])
        found = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TRITON_CACHE_DIR": str(BUILD / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        if self.nvcc is not None:
            found["CUDACXX"] = str(self.nvcc)
        found.pop("TRITON_INTERPRET", None)  # kernels run on the device
        return found

    def describe(self) -> dict[str, Any]:
        """What figures depend on; no host name and no path."""
        name, _, memory = self.found["devices"][0]
        status = answer(["git", "status", "--porcelain", "--untracked-files=no"])
        nvcc = None if self.nvcc is None else answer([self.nvcc, "--version"])
        release = re.search(r"release ([\d.]+)", nvcc or "")
        return {
            "device": name,
            "capability": self.capability,
            "memory": memory,
            **nvidia_smi(answer(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"])),
            "python": self.found["python"],
            "torch": self.found["torch"],
            "cuda": self.found["cuda"],
            "triton": self.found["triton"],
            "nvcc": release[1] if release else None,
            "commit": answer(["git", "rev-parse", "--short=12", "HEAD"]),
            "dirty": None if status is None else bool(status),
        }


SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "MHz of multiprocessors at most",
    "clocks.max.mem": "MHz of memory at most",
    "power.limit": "watts at most",
    "ecc.mode.current": "ecc",
    "compute_mode": "compute mode",
}


def nvidia_smi(printed: str | None) -> dict[str, str | None]:
    """The first device's fields, of nvidia-smi's CSV; None for what it does not tell."""
    lines = (printed or "").splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(SMI):
        return dict.fromkeys(SMI.values())
    return {name: None if "N/A" in value else value for name, value in zip(SMI.values(), values, strict=True)}


def find_nvcc(environment: Mapping[str, str], path: Sequence[str]) -> Path | None:
    """Where the CUDA compiler is: as CUDACXX, on PATH, under CUDA_HOME, /usr/local/cuda or among Python's packages."""
    named = environment.get("CUDACXX") or shutil.which("nvcc", path=environment.get("PATH"))
    if named:
        return Path(named)
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    places += [found for folder in path if folder for found in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def find_machine(pythons: Sequence[Path]) -> Machine | str:
    """The first Python whose torch finds a GPU, or one line that says why there is none."""
    reasons = []
    for python in pythons:
        printed = answer([python, "-c", PROBE], limit=120.0)
        if printed is None:
            reasons.append(f"{python} does not answer")
            continue
        found = json.loads(printed.splitlines()[-1])
        if found["devices"]:
            return Machine(python, found)
        what = "has no torch" if found["torch"] is None else f"has torch {found['torch']}, which finds no CUDA device"
        reasons.append(f"{python} {what}")
    return f"gpu-report: no GPU, so nothing was measured: {'; '.join(reasons)}"


def candidates() -> list[Path]:
    own = Path(sys.executable)
    return list(dict.fromkeys([own, *(path for path in [ROOT / ".venv" / "bin" / "python"] if path.exists())]))


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """One run of the report: where to write, how much time is left, what has been found.

    Args:
        machine: Whom to measure.
        out: Where the results go.
        deadline: When all must be done, by time.monotonic.
        cases: For the benchmarks (--cases).
    """

    machine: Machine
    out: Path
    deadline: float
    cases: str = ""
    bench: dict[str, Any] | None = None

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def python(self) -> Path:
        return VENV / "bin" / "python"

    def log(self, part: str) -> Path:
        return self.out / f"gpu-{part.replace(' ', '-')}.log"

    def run(self, name: str, command: Sequence[str | Path], limit: float) -> Part:
        return run(name, command, limit, self.log(name), self.machine.environment())

    # ---- build

    def build(self) -> Iterator[Part]:
        """The package with noetherperf._cuda for this device alone; without it where that fails."""
        READY.unlink(missing_ok=True)
        made = self.run("build venv", [self.machine.python, "-m", "venv", "--clear", "--without-pip", VENV], 60.0)
        if made.status != "passed":
            yield made
            return
        site = next((VENV / "lib").glob("python3.*/site-packages"))
        (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed(self.machine.found["path"])))
        part = self.run("build", self._install("ON"), min(180.0, self.left))
        if part.status == "passed":
            part.detail = f"noetherperf._cuda for compute capability {self.machine.capability}"
            READY.touch()
        yield part
        if part.status != "passed":
            part = self.run("build without CUDA", self._install("OFF"), min(90.0, self.left))
            if part.status == "passed":
                part.detail = "for Triton alone"
                READY.touch()
            yield part

    def _install(self, cuda: str) -> list[str | Path]:
        settings = {
            "build-dir": f"build/gpu-report/{cuda}-{{wheel_tag}}",
            "cmake.define.NPERF_CUDA": cuda,
            "cmake.define.CMAKE_CUDA_ARCHITECTURES": f"{self.machine.capability}-real",
        }
        how = ["--no-build-isolation", "--no-deps", "--ignore-installed", "--no-index", "--disable-pip-version-check"]
        chosen = [f"--config-settings={key}={value}" for key, value in settings.items()]
        return [self.python, "-m", "pip", "install", "-v", *how, *chosen, "-e", "."]

    # ---- tests

    def tests(self) -> Iterator[Part]:
        """All tests of both backends, side by side; with them Triton compiles what the benchmarks will time."""
        limit = self.left - BENCH_SECONDS if self.left > 2 * BENCH_SECONDS else self.left / 2
        suite = [path for path in SUITE if path not in self._unfit()]
        paths = ["tests/test_engines.py", "tests/test_gpu.py", *suite]
        alone = nvidia_smi(answer(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]))
        n_cores = 1 if "Exclusive" in (alone["compute mode"] or "") else os.cpu_count() or 1
        end = time.monotonic() + limit
        jobs: list[Callable[[], Part]] = [
            partial(self._pytest, backend, paths, int(share * n_cores), end) for backend, share in BACKENDS.items()
        ]
        n = max(1, n_cores // 4)
        jobs += [partial(self._compile, f"{i}/{n}", end) for i in range(n) if self.machine.found["triton"]]
        with ThreadPoolExecutor(len(jobs) if n_cores > 1 else 1) as pool:
            yield from pool.map(lambda job: job(), jobs)
        for path, missing in self._unfit().items():
            yield Part(path, "not run", detail=f"needs {' and '.join(missing)}, which is not here")

    def _unfit(self) -> dict[str, list[str]]:
        """Test files that need what this Python lacks."""
        lacking = {
            path: [name for name in needs if name not in self.machine.found["modules"]] for path, needs in SUITE.items()
        }
        return {path: missing for path, missing in lacking.items() if missing}

    def _pytest(self, backend: str, paths: Sequence[str], n_workers: int, end: float) -> Part:
        """A backend's tests, by n_workers processes where pytest-xdist is there."""
        name, limit = f"tests {backend}", end - time.monotonic()
        if limit < 1.0:
            return Part(name, "not run", detail="there was no time left for it")
        results = BUILD / f"{name.replace(' ', '-')}.xml"
        results.unlink(missing_ok=True)
        # Warnings of versions that nobody has tried yet are shown, and stop nothing.
        options = [
            "-v",
            "--maxfail=20",
            "--tb=short",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
            "-W",
            "default",
        ]
        options += ["-o", "faulthandler_timeout=60", f"--junitxml={results}"]
        if n_workers > 1 and "xdist" in self.machine.found["modules"]:
            options += ["-n", str(n_workers)]
        chosen = ["-k", f"{backend} and not emulated and not interpreted"]
        part = self.run(name, [self.python, "-m", "pytest", *paths, *chosen, *options], limit)
        return judge_tests(part, results, self.log(name))

    def _compile(self, share: str, end: float) -> Part:
        """Triton's kernels of a share of the benchmarks; those that there is no time for are compiled there."""
        chosen = ["--cases", self.cases] if self.cases else []
        command: list[str | Path] = [self.python, "-m", "bench.gpu", "--compile", share, *chosen]
        part = self.run(f"compile {share}".replace("/", " of "), command, end - time.monotonic())
        if part.status == "timed out":
            part.status, part.output = "passed", ""
        return part

    # ---- memory checker

    def memcheck(self) -> Iterator[Part]:
        """A small set under compute-sanitizer: accesses out of bounds or misaligned, memory that was never written."""
        checker = find_sanitizer(self.machine.nvcc)
        if checker is None:
            yield Part("memcheck", "not run", detail="compute-sanitizer is not here")
            return
        tests = ["tests/test_gpu.py", "-k", "memory_checker and cuda", "-q", "--tb=short", "-p", "no:cacheprovider"]
        environment = {**self.machine.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command: list[str | Path] = [
            checker,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "86",
            self.python,
            "-m",
            "pytest",
            *tests,
        ]
        part = run("memcheck", command, min(75.0, self.left), self.log("memcheck"), environment)
        summary = re.findall(r"ERROR SUMMARY: .*", self.log("memcheck").read_text(errors="replace"))
        part.detail = "; ".join(filter(None, [part.detail, summary[-1] if summary else "no summary"]))
        if part.status == "passed" and not summary:
            part.status = "failed"
        yield part

    # ---- benchmarks

    def benchmarks(self) -> Iterator[Part]:
        out = BUILD / "bench.json"
        out.unlink(missing_ok=True)
        limit = self.left - 5.0
        chosen = ["--cases", self.cases] if self.cases else []
        command: list[str | Path] = [
            self.python,
            "-m",
            "bench.gpu",
            "--out",
            out,
            "--seconds",
            str(max(5.0, limit - 25.0)),
            *chosen,
        ]
        part = self.run("bench", command, limit)
        self.bench = json.loads(out.read_text()) if out.exists() else None
        n_timed = len(self.bench["cases"]) if self.bench else 0
        part.detail = "; ".join(filter(None, [f"{n_timed} cases timed", part.detail]))
        yield part


def borrowed(path: Sequence[str]) -> list[str]:
    """The folders of a Python's sys.path that another one can read packages from."""
    return [folder for folder in path if Path(folder).is_absolute() and Path(folder).is_dir() and Path(folder) != ROOT]


def find_sanitizer(nvcc: Path | None) -> Path | None:
    """compute-sanitizer, on PATH or beside nvcc."""
    on_path = shutil.which("compute-sanitizer")
    homes = [] if nvcc is None else [nvcc.resolve().parent, nvcc.resolve().parents[1] / "compute-sanitizer"]
    places = [*([Path(on_path)] if on_path else []), *(home / "compute-sanitizer" for home in homes)]
    places.append(Path("/usr/local/cuda/bin/compute-sanitizer"))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def judge_tests(part: Part, results: Path, log: Path) -> Part:
    """A part with what pytest's XML says, or its output (-v) where it was stopped before it could write any.

    No test at all, or none that was not skipped, is a failure.
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


# ---- the report -----------------------------------------------------------------------------------------------------


def merge(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the parts of an older one that were not run again, if that is of the same machine and commit."""

    def place(result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in result["environment"].items() if key != "date"}

    if place(old) != place(new):
        return new
    again = {part["phase"] for part in new["parts"]}
    parts = [part for part in old["parts"] if part["phase"] not in again] + new["parts"]
    parts.sort(key=lambda part: PARTS.index(part["phase"]))
    return {**new, "parts": parts, "bench": new["bench"] if "bench" in again else old["bench"]}


def write(result: dict[str, Any], out: Path) -> str:
    """Write gpu.json and gpu.md; returns the Markdown."""
    path = out / "gpu.json"
    if path.exists():
        try:
            result = merge(json.loads(path.read_text()), result)
        except (ValueError, KeyError, TypeError):
            print(f"gpu-report: {path} is no result of this version; it is replaced", file=sys.stderr)
    if result["bench"]:
        result["targets"] = gpu_tables.judged(result["bench"])
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = gpu_tables.report(result)
    path.with_suffix(".md").write_text(text)
    return text


def parts_of(session: Session, wanted: Sequence[str]) -> Iterator[tuple[str, Part]]:
    """Run the wanted parts, the build first where it is needed; (phase, part) of each."""
    phases: dict[str, Callable[[], Iterator[Part]]] = {
        "build": session.build,
        "tests": session.tests,
        "memcheck": session.memcheck,
        "bench": session.benchmarks,
    }
    for phase in PARTS:
        if phase == "build" and not ("build" in wanted or not READY.exists()):
            continue
        if phase not in ("build", *wanted):
            continue
        if phase != "build" and not READY.exists():
            yield phase, Part(phase, "not run", detail="the build failed")
            continue
        if session.left < 10.0:
            yield phase, Part(phase, "not run", detail="there was no time left for it")
            continue
        for part in phases[phase]():
            print(f"{part.part}: {part.status} in {part.seconds:.0f} s. {part.detail}", flush=True)
            yield phase, part


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-report", description="Build, test and measure on the GPU at hand.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where the results go")
    parser.add_argument("--minutes", type=float, default=8.0, help="that everything may take together")
    parser.add_argument("--cases", default="", help="names or patterns of the benchmarks' cases")
    options = parser.parse_args(arguments)
    options.only = [part.strip() for part in options.only.split(",")]
    unknown = set(options.only) - set(PARTS)
    if unknown:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    return options


def main(arguments: Sequence[str] | None = None, pythons: Sequence[Path] | None = None) -> int:
    options = read_arguments(arguments)
    begin = time.monotonic()
    machine = find_machine(candidates() if pythons is None else pythons)
    if isinstance(machine, str):
        print(machine, file=sys.stderr)
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**machine.describe(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    print(f"gpu-report: {gpu_tables.describe(environment)}", flush=True)
    session = Session(machine, options.out.resolve(), begin + 60.0 * options.minutes - 10.0, options.cases)
    parts = []
    for phase, part in parts_of(session, options.only):
        parts.append({"phase": phase, **asdict(part)})
        write({"environment": environment, "parts": parts, "bench": session.bench}, options.out)
    text = (options.out / "gpu.md").read_text()
    print(text)
    return 0 if parts and all(part["status"] in ("passed", "not run") for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
