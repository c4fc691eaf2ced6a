"""A GPU run as Markdown: targets, tables, failures. Needs nothing but Python.

    python -m bench.gpu.tables [runs/bench/gpu.json]

keeps a record in bench/results, if one is named, and puts the one that is kept there into the page of figures.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import page
from bench.cells import LABELS, NONE, PLAIN, Info, bandwidth_cell, ratio_cell, time_cell
from bench.checkout import RESULTS, describe_commit
from bench.gpu.targets import targets_table
from bench.markdown import Notes, seconds, table
from bench.training import STEPS, TITLE, TRAIN, training_table

RESULT = RESULTS / "gpu.json"
COMMAND = "python -m bench.gpu.tables"


def ours_columns(backend: str) -> list[str]:
    return [f"{backend}: time", "bandwidth", "of copy", "× fused"]


def ours_cells(info: Info, backend: str, notes: Notes) -> list[str]:
    return [
        time_cell(info, backend),
        bandwidth_cell(info, backend),
        ratio_cell(info, backend, "of copy", notes),
        ratio_cell(info, backend, "per fused", notes),
    ]


def step_table(infos: Sequence[Info], backends: Sequence[str], notes: Notes) -> str:
    """The step alone."""
    peers = ("foreach", "compiled")
    head = ["case", "parameters", "tensors", "copy"]
    head += [column for backend in backends for column in ours_columns(backend)]
    head += ["torch fused, of copy", *(f"{LABELS[name]} × fused" for name in peers)]
    rows = [
        [
            info["case"],
            f"{info['parameters']:,}",
            f"{info['tensors']:,}",
            bandwidth_cell(info, "copy"),
            *(text for backend in backends for text in ours_cells(info, backend, notes)),
            ratio_cell(info, "fused", "of copy", notes),
            *(ratio_cell(info, name, "per fused", notes) for name in peers),
        ]
        for info in infos
    ]
    return table(head, rows)


def measured_table(infos: Sequence[Info], backends: Sequence[str], notes: Notes) -> str:
    """The step with its measurement: against torch's and our own without it, and against torch's with it."""
    peers = ("eager", "compiled_measured")
    head = ["case", "copy"]
    for backend in backends:
        head += [*ours_columns(backend), "× not measuring", *(f"{LABELS[name]}, × {backend}" for name in peers)]
    rows = [
        [
            info["case"],
            bandwidth_cell(info, "copy"),
            *(
                text
                for backend in backends
                for text in (
                    *ours_cells(info, backend, notes),
                    ratio_cell(info, backend, f"per {backend}{PLAIN}", notes),
                    *(ratio_cell(info, name, f"per {backend}", notes) for name in peers),
                )
            ),
        ]
        for info in infos
    ]
    return table(head, rows)


def host_table(infos: Sequence[Info], backends: Sequence[str]) -> str:
    """Host time of a step, and what it launches: kernels + copies and fills."""

    def one(info: Info, variant: str) -> str:
        time, launched = info["host seconds"].get(variant), info["launches"].get(variant)
        counted = "" if launched is None else f", {launched[0]} + {launched[1]}"
        return NONE if time is None else seconds(time) + counted

    variants = [*backends, "fused", "foreach", "compiled", "eager"]
    head = ["case", "tensors", *(LABELS.get(name, name) for name in variants)]
    return table(head, [[i["case"], f"{i['tensors']:,}", *(one(i, name) for name in variants)] for i in infos])


def bench_sections(bench: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    backends, infos, notes = bench["backends"], bench["cases"], Notes()
    timed = [info for info in infos if info["suite"] == STEPS]
    trained = [info for info in infos if info["suite"] == TRAIN]
    stepping = [info for info in timed if info["view"] == "none"]
    measuring = [info for info in timed if info["view"] != "none"]
    yield "Targets, as measured", targets_table(bench)
    if stepping:
        yield "The step alone", step_table(stepping, backends, notes)
    if measuring:
        yield "The step with its measurement", measured_table(measuring, backends, notes)
    if trained:
        yield TITLE, training_table(trained, notes)
    if str(notes):
        yield "Notes", str(notes)
    if stepped := [info for info in infos if info["suite"] != TRAIN]:
        yield "Host time of a step, and kernels + copies launched", host_table(stepped, backends)
    failures = [*bench["not timed"]]
    failures += [{"case": i["case"], "reason": f"{name}: {why}"} for i in infos for name, why in i["wrong"].items()]
    if failures:
        rows = [[failure["case"], failure["reason"].replace("|", "\\|")] for failure in failures]
        yield "Without a time", table(["case", "why"], rows)


def describe(environment: Mapping[str, Any]) -> str:
    """One line: device, versions, commit."""
    found = environment
    parts = [
        f"{found['device']} (compute capability {found['capability']}, {found['memory'] / 2**30:.0f} GiB)",
        f"driver {found['driver'] or 'unknown'}",
        f"torch {found['torch']} with CUDA {found['cuda']}",
        f"triton {found['triton'] or 'not there'}",
        f"nvcc {found['nvcc'] or 'not there'}",
        f"Python {found['python']}",
        f"commit {describe_commit(found, otherwise='unknown')}",
        found["date"],
    ]
    return ", ".join(parts)


def report(result: Mapping[str, Any]) -> str:
    """A whole run as Markdown."""
    pieces = [f"Measured on {describe(result['environment'])}."]
    rows = [[p["part"], p["status"], f"{p['seconds']:.0f} s", p["detail"]] for p in result["parts"]]
    pieces.append("### Parts\n\n" + table(["part", "result", "time", "what"], rows))
    if result.get("bench"):
        pieces += [f"### {title}\n\n{text}" for title, text in bench_sections(result["bench"])]
    for part in result["parts"]:
        if part.get("output"):
            pieces.append(f"### Last words of: {part['part']}\n\n```\n{part['output']}\n```")
    return "\n\n".join(pieces) + "\n"


def short_table(infos: Sequence[Info], backends: Sequence[str], notes: Notes) -> str:
    """The main figures of every case: fractions of the copy's bandwidth, multiples of torch's fused step."""
    head = ["case", "copy", *(f"{name}, of copy" for name in (*backends, "torch fused"))]
    head += [f"{name} × torch fused" for name in backends]
    head += [f"{LABELS['eager']}, × {backends[0]}"]
    rows = [
        [
            info["case"],
            bandwidth_cell(info, "copy"),
            *(ratio_cell(info, name, "of copy", notes) for name in (*backends, "fused")),
            *(ratio_cell(info, name, "per fused", notes) for name in backends),
            NONE if info["view"] == "none" else ratio_cell(info, "eager", f"per {backends[0]}", notes),
        ]
        for info in infos
    ]
    return table(head, rows)


def section(result: Mapping[str, Any]) -> str:
    """The part of a run that the documentation shows."""
    bench, notes = result["bench"], Notes()
    timed = [info for info in bench["cases"] if info["suite"] == STEPS]
    trained = [info for info in bench["cases"] if info["suite"] == TRAIN]
    pieces = [targets_table(bench), short_table(timed, bench["backends"], notes)]
    if trained:
        pieces += [f"{TITLE}:", training_table(trained, notes)]
    pieces.append(str(notes))
    source = (
        f"Written by `make gpu-report` on {describe(result['environment'])}; all of it is in `bench/results/gpu.md`."
    )
    return "\n\n".join(piece for piece in [*pieces, source] if piece) + "\n"


def publish(arguments: Sequence[str]) -> None:
    """Keep the record that is named, if one is, and write the page's section."""
    if arguments:
        record = Path(arguments[0])
        RESULT.write_text(record.read_text())
        RESULT.with_suffix(".md").write_text(record.with_suffix(".md").read_text())
    page.write("gpu", COMMAND, section(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    publish(sys.argv[1:])
