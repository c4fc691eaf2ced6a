"""Part "memcheck": a few tests under compute-sanitizer."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.process import Part
from bench.gpu.session import Session


def memcheck(session: Session, name: str) -> Iterator[Part]:
    """A small set under compute-sanitizer: accesses out of bounds or misaligned, memory that was never written."""
    checker = find_sanitizer(session.machine.nvcc)
    if checker is None:
        yield Part(name, "not run", detail="compute-sanitizer is not here")
        return
    tests = ["tests/test_gpu.py", "-k", "memory_checker and cuda", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command: list[str | Path] = [checker, "--tool", "memcheck", "--error-exitcode", "86"]
    command += [session.python, "-m", "pytest", *tests]
    part = session.run(name, command, min(75.0, session.left), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = re.findall(r"ERROR SUMMARY: .*", session.log(name).read_text(errors="replace"))
    part.detail = "; ".join(filter(None, [part.detail, summary[-1] if summary else "no summary"]))
    if part.status == "passed" and not summary:
        part.status = "failed"
    yield part


def find_sanitizer(nvcc: Path | None) -> Path | None:
    """compute-sanitizer, on PATH or beside nvcc."""
    on_path = shutil.which("compute-sanitizer")
    homes = [] if nvcc is None else [nvcc.resolve().parent, nvcc.resolve().parents[1] / "compute-sanitizer"]
    places = [*([Path(on_path)] if on_path else []), *(home / "compute-sanitizer" for home in homes)]
    places.append(Path("/usr/local/cuda/bin/compute-sanitizer"))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)
