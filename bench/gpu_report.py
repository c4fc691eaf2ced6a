"""`make gpu-report`: builds for the GPU at hand, tests both GPU backends on it, measures. One command, no network.

    python bench/gpu_report.py [--only bench-adamw,tests] [--out DIR] [--minutes 20] [--cases PATTERNS]

It runs with the Python that starts it, or else with .venv's: the first whose torch finds a GPU. It installs into
neither: the build goes to build/gpu-report/venv, which borrows that Python's packages.

The report has parts of less than four minutes, the build included: each can run alone, --only names it ("bench" means
all whose names begin with it), and adds to the record in DIR. Each runs in processes of its own with a time limit; if
one fails or takes too long, the report says so and the others still run. What ran before, on the same machine and
commit, stays in the record. Writes DIR/gpu.json, DIR/gpu.md and the parts' output, DIR/gpu-*.log.

Exit code: 0 if every part passed (a target that is not met is no failure), else 1; without a GPU 1 and one line.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is started by its path

from bench.checkout import RUNS, now
from bench.gpu.benchmarks import benchmarks
from bench.gpu.build import build
from bench.gpu.machine import candidates, find_machine
from bench.gpu.memcheck import memcheck
from bench.gpu.process import Part
from bench.gpu.results import BENCHES, PARTS, write
from bench.gpu.session import WORK, Session
from bench.gpu.suite import TESTS, tests
from bench.gpu.tables import describe

PART_SECONDS = 230.0  # that one part may take

RUN: dict[str, Callable[[Session, str], Iterator[Part]]] = {
    "build": build,
    "memcheck": memcheck,
    **dict.fromkeys(TESTS, tests),
    **dict.fromkeys(BENCHES, benchmarks),
}


def parts_of(session: Session, wanted: Sequence[str], end: float) -> Iterator[tuple[str, Part]]:
    """Run the wanted parts, the build first where it is needed; (phase, part) of each.

    Args:
        session: Gets the deadline of each part.
        wanted: Parts.
        end: When everything must have ended, by time.monotonic.
    """
    for phase in PARTS:
        if phase == "build" and not ("build" in wanted or not session.ready.exists()):
            continue
        if phase not in ("build", *wanted):
            continue
        session.deadline = min(end, time.monotonic() + PART_SECONDS)
        if phase != "build" and not session.ready.exists():
            yield phase, Part(phase, "not run", detail="the build failed")
            continue
        if session.left < 10.0:
            yield phase, Part(phase, "not run", detail="there was no time left for it")
            continue
        for part in RUN[phase](session, phase):
            print(f"{part.part}: {part.status} in {part.seconds:.0f} s. {part.detail}", flush=True)
            yield phase, part


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-report", description="Build, test and measure on the GPU at hand.")
    parser.add_argument("--only", default="", help=f"parts to run, or how their names begin, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RUNS, help="where the record is")
    parser.add_argument("--minutes", type=float, help="that everything may take together; four a part, if not given")
    parser.add_argument("--cases", default="", help="names or patterns of the benchmarks' cases")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.only.split(",")] if options.only else list(PARTS)
    unknown = [name for name in names if not any(_belongs(part, name) for part in PARTS)]
    if unknown:
        parser.error(f"--only: there is no part {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    options.only = [part for part in PARTS if any(_belongs(part, name) for name in names)]
    if options.minutes is None:
        options.minutes = 4.0 * max(1, len(set(options.only) - {"build"}))
    return options


def _belongs(part: str, name: str) -> bool:
    return part == name or part.startswith(f"{name}-")


def main(arguments: Sequence[str] | None = None, pythons: Sequence[Path] | None = None, work: Path = WORK) -> int:
    """Run the parts and write the report after each; the exit code.

    Args:
        arguments: The command line's; None: this process's own.
        pythons: Where to look for a GPU; None: the Python that runs this, then .venv's.
        work: Where the build goes.
    """
    options = read_arguments(arguments)
    begin = time.monotonic()
    machine = find_machine(candidates() if pythons is None else pythons)
    if isinstance(machine, str):
        print(machine, file=sys.stderr)
        return 1
    work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**machine.describe(), "date": now()}
    print(f"gpu-report: {describe(environment)}", flush=True)
    end = begin + 60.0 * options.minutes - 10.0
    session = Session(machine, options.out.resolve(), end, options.cases, work)
    parts = []
    for phase, part in parts_of(session, options.only, end):
        parts.append({"phase": phase, **asdict(part)})
        write({"environment": environment, "parts": parts, "bench": session.bench}, options.out)
    text = (options.out / "gpu.md").read_text()
    print(text)
    return 0 if parts and all(part["status"] in ("passed", "not run") for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
