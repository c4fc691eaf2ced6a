"""The checkout that figures are of: its folders, its commit. Needs nothing but Python."""

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"  # that are kept
RUNS = ROOT / "runs" / "bench"  # where a run leaves its own; git does not look there


def answer(command: Sequence[str | Path], limit: float = 20.0) -> str | None:
    """Output of a program run in ROOT; None if it does not exist, fails or takes longer than `limit` seconds."""
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=limit, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """{"commit": its short hash, "dirty": whether there are uncommitted changes}; both None without git.

    Pages and kept results do not count: commands write them, one after the other.
    """
    written = [f":(exclude){path}" for path in ("docs", "bench/results", "README.md")]
    status = answer(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written])
    return {
        "commit": answer(["git", "rev-parse", "--short=12", "HEAD"]),
        "dirty": None if status is None else bool(status),
    }


def describe_commit(environment: Mapping[str, Any], otherwise: str) -> str:
    """The commit of an environment as text, `otherwise` where it has none."""
    return f"{environment['commit'] or otherwise}{' with uncommitted changes' if environment['dirty'] else ''}"


def now() -> str:
    """The date as results write it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
