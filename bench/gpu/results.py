"""The report's files: gpu.json, which keeps what was run before on the same machine and commit, and gpu.md."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.tables import report
from bench.gpu.targets import judged

#: In the order of the report.
PARTS = ("build", "tests", "memcheck", "bench")


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
        result["targets"] = judged(result["bench"])
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = report(result)
    path.with_suffix(".md").write_text(text)
    return text
