"""Parts "bench-…": the benchmarks of a part's cases, in the time that is left."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.process import Part
from bench.gpu.results import merge_bench
from bench.gpu.session import Session

COMPILE_SECONDS = 60.0  # at most; what is not compiled by then is compiled where it is timed


def benchmarks(session: Session, name: str) -> Iterator[Part]:
    """Compile Triton's kernels on all cores, run bench.gpu, and take up what it measured, however far it came."""
    chosen = ["--part", name, *(["--cases", session.cases] if session.cases else [])]
    if session.machine.found["triton"]:
        yield from _compile(session, name, chosen)
    out = session.work / f"{name}.json"
    out.unlink(missing_ok=True)
    limit = session.left - 5.0
    how = ["--seconds", str(max(5.0, limit - 25.0)), *chosen]
    part = session.run(name, [session.python, "-m", "bench.gpu", "--out", out, *how], limit)
    found = json.loads(out.read_text()) if out.exists() else None
    if found is not None:
        session.bench = merge_bench(session.bench, found)
    n_timed = len(found["cases"]) if found else 0
    part.detail = "; ".join(filter(None, [f"{n_timed} cases timed", part.detail]))
    yield part


def _compile(session: Session, name: str, chosen: list[str]) -> Iterator[Part]:
    """Processes that compile a share of the cases each."""
    n = max(1, (os.cpu_count() or 1) // 4)
    end = time.monotonic() + min(COMPILE_SECONDS, session.left / 3)

    def share(i: int) -> Part:
        command: list[str | Path] = [session.python, "-m", "bench.gpu", "--compile", f"{i}/{n}", *chosen]
        part = session.run(f"{name} compile {i} of {n}", command, end - time.monotonic())
        if part.status == "timed out":
            part.status, part.output = "passed", ""
        return part

    with ThreadPoolExecutor(1 if session.machine.is_exclusive else n) as pool:
        yield from pool.map(share, range(n))
