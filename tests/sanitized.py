"""The CPU engine under AddressSanitizer and UndefinedBehaviorSanitizer; `make sanitize` does the same.

    python tests/sanitized.py [pytest's arguments]

Builds the engine a second time, into build/sanitize. Then it starts pytest with the sanitizers' libraries loaded before
Python, and with this file as a plugin that replaces the engine. Memory of torch and numpy is watched too: an access out
of range of a tensor or table ends the process, and so does every other error that a sanitizer reports.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import cpu_stand_in

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
TESTS = ("tests/test_engines.py", "tests/test_properties.py", "tests/test_reader.py")


def missing() -> str | None:
    """Why this cannot be done here, None where it can."""
    try:
        libraries = _libraries()
    except OSError:
        return "needs g++"
    absent = [library for library in libraries if not Path(library).is_absolute()]
    return f"g++ comes without {absent[0]}" if absent else None


def _libraries() -> list[str]:
    # libstdc++ as early: the sanitizer else finds no exceptions of what is loaded later.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    return [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]


def build() -> None:
    """Every width's kernels, lane by lane where the processor lacks the instruction set."""
    cpu_stand_in.build(cpu_stand_in.wanted(), BUILD, NPERF_SANITIZE="ON", CMAKE_CXX_COMPILER="g++")


def environment() -> dict[str, str]:
    """Environment variables of a process that imports this file."""
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def run(*arguments: str) -> int:
    """Run pytest under the sanitizers; its exit status."""
    command = [sys.executable, "-m", "pytest", "-p", "sanitized", *arguments]
    return subprocess.run(command, env=environment(), cwd=ROOT).returncode


def load() -> None:
    """Make `from noetherperf import _cpu` import the sanitized module."""
    import torch  # noqa: F401  (first: OpenMP then binds to torch's copy)

    path = BUILD / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("noetherperf._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["noetherperf._cpu"] = module


def main() -> None:
    if reason := missing():
        sys.exit(f"sanitize: {reason}")
    build()
    sys.exit(run(*(sys.argv[1:] or ["-q", *TESTS, "-k", "not cuda"])))


if __name__ == "__main__":
    main()
elif "libasan" in os.environ.get("LD_PRELOAD", ""):
    load()
