"""Part "bench": the benchmarks, in the time that is left."""

import json
from collections.abc import Iterator

from bench.gpu.process import Part
from bench.gpu.session import Session


def benchmarks(session: Session) -> Iterator[Part]:
    """Run bench.gpu and take up what it measured, however far it came."""
    out = session.work / "bench.json"
    out.unlink(missing_ok=True)
    limit = session.left - 5.0
    how = ["--seconds", str(max(5.0, limit - 25.0)), *session.chosen_cases]
    part = session.run("bench", [session.python, "-m", "bench.gpu", "--out", out, *how], limit)
    session.bench = json.loads(out.read_text()) if out.exists() else None
    n_timed = len(session.bench["cases"]) if session.bench else 0
    part.detail = "; ".join(filter(None, [f"{n_timed} cases timed", part.detail]))
    yield part
