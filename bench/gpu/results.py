"""The report's record: gpu.json, to which every part adds, and gpu.md.

    python -m bench.gpu.results OUT RECORD...

merges records of the same machine and commit, such as those of parts that ran on borrowed machines, into OUT/gpu.json.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.tables import report
from bench.gpu.targets import judged

#: Parts that measure; bench.gpu.cases has the cases of each.
BENCHES = ("bench-adamw", "bench-small", "bench-16-bits", "bench-train", "bench-large", "bench-sgd")
#: In the order of the report, and of worth: time may run out.
PARTS = (
    "build",
    "tests-cuda",
    "tests-triton-engines",
    "tests-triton-optimizers",
    "memcheck",
    *BENCHES,
)


def place(result: Mapping[str, Any]) -> dict[str, Any]:
    """The machine and commit that a result is of."""
    return {key: value for key, value in result["environment"].items() if key != "date"}


def merge(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the parts and cases of an older one that were not run again, if that is of the same machine and
    commit."""
    if place(old) != place(new):
        return new
    again = {part["phase"] for part in new["parts"]}
    parts = [part for part in old["parts"] if part["phase"] not in again] + new["parts"]
    parts.sort(key=lambda part: PARTS.index(part["phase"]))
    return {**new, "parts": parts, "bench": merge_bench(old["bench"], new["bench"])}


def merge_bench(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    """The cases of both, each as it was measured last. A case that has no time now keeps the one that it had."""
    if old is None or new is None:
        return old if new is None else new
    cases = {case["case"]: case for case in (*old["cases"], *new["cases"])}
    failures = {failure["case"]: failure for failure in (*old["not timed"], *new["not timed"])}
    return {
        "backends": list(dict.fromkeys([*old["backends"], *new["backends"]])),
        "cases": list(cases.values()),
        "not timed": [failure for name, failure in failures.items() if name not in cases],
    }


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


def main(arguments: Sequence[str]) -> None:
    """Merge records into the folder that is named first.

    Raises:
        SystemExit: Two of them are of different machines or commits.
    """
    out, *records = map(Path, arguments)
    found = [json.loads(record.read_text()) for record in records]
    if not found:
        raise SystemExit("bench.gpu.results: name the folder to write to, and the records to merge")
    first = place(found[0])
    for record, result in zip(records, found, strict=True):
        unlike = sorted(key for key, value in place(result).items() if value != first.get(key))
        if unlike:
            raise SystemExit(f"bench.gpu.results: {record} differs from {records[0]} in {', '.join(unlike)}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").unlink(missing_ok=True)
    for result in found:
        write(result, out)


if __name__ == "__main__":
    main(sys.argv[1:])
