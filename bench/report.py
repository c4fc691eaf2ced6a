"""Turns a run's JSON into tables and a picture.

python -m bench.report runs/bench/quick.json     keeps a run in bench/results and puts it into docs/performance.md, and
                                                 what training costs into README.md
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import page
from bench.cells import LABELS, NONE, Info, bandwidth_cell, figure, ratio_cell, time_cell
from bench.checkout import RESULTS, ROOT
from bench.environment import describe
from bench.markdown import Notes, size, table
from bench.picture import case_label, draw
from bench.training import RULES, TITLE, TRAIN, training_table
from bench.variants import MEASURING, STEPPING, VARIANTS

PICTURE = ROOT / "docs" / "images" / "performance.svg"
COMMAND = "make bench-page"

#: Aims on two cores, Python included. By model and rule: a figure of noetherperf's step, and its upper bound for each
#: view.
AIMS: dict[tuple[str, str], tuple[str, dict[str, float]]] = {
    ("matrix", "b0.9"): ("per floor", {"none": 1.03, "rows": 1.05, "columns": 1.15, "both": 1.20}),
    ("resnet50", "b0.9"): ("per fused", {"none": 0.92, "rows": 0.95, "columns": 1.00, "both": 1.05}),
    ("vgg16", "b0.9"): ("per fused", {"none": 1.00, "rows": 1.03, "columns": 1.15, "both": 1.20}),
    ("small2000", "b0.9"): ("per fused", {"none": 0.35, "rows": 0.40, "columns": 0.48, "both": 0.50}),
    ("matrix", "adamw"): ("per floor", {"none": 1.10, "rows": 1.12, "columns": 1.20, "both": 1.25}),
    ("resnet50", "adamw"): ("per fused", {"none": 0.90, "rows": 0.95, "columns": 1.00, "both": 1.05}),
    ("gpt2", "adamw"): ("per fused", {"none": 0.90, "rows": 0.95, "columns": 1.00, "both": 1.05}),
    ("small2000", "adamw"): ("per fused", {"none": 0.40, "rows": 0.50, "columns": 0.50, "both": 0.60}),
}
#: By view: the lower bound for the same sums made by torch after its fused step, × noetherperf.
EAGER_AIMS = {"rows": 3.0, "columns": 3.0, "both": 5.0}
#: By model, rule and view: the upper bound for a Probe around torch's fused step, × that step alone.
PROBE_AIMS = {("gpt2", "adamw", "rows"): 2.0, ("gpt2", "adamw", "both"): 2.2}

# ---- tables ---------------------------------------------------------------------------------------------------------


def floor_cell(info: Info) -> str:
    return f"{time_cell(info, 'floor')} ({bandwidth_cell(info, 'floor')})"


def comparison(infos: Sequence[Info], variants: Sequence[str], notes: Notes) -> str:
    """Multiples of the floor, by case and variant; noetherperf also as a multiple of torch's fused step."""
    head = ["case", "floor", *(label(name, notes) for name in variants), "copy", "noetherperf × torch fused"]
    rows = [
        [
            case_label(info),
            floor_cell(info),
            *(ratio_cell(info, name, "per floor", notes) for name in (*variants, "copy")),
            ratio_cell(info, "ours", "per fused", notes),
        ]
        for info in infos
    ]
    return table(head, rows)


def label(variant: str, notes: Notes) -> str:
    note = VARIANTS[variant].note
    return LABELS[variant] + (notes.mark(note) if note else "")


def against_ours(infos: Sequence[Info], notes: Notes) -> str:
    """The same measurement made by others, as multiples of noetherperf."""
    variants = [name for name in MEASURING if name not in ("ours", "unmeasured", "fused")]
    head = ["case", *(label(name, notes) for name in variants)]
    return table(head, [[case_label(i), *(ratio_cell(i, name, "per ours", notes) for name in variants)] for i in infos])


def against_point(infos: Sequence[Info], what: str, notes: Notes) -> str:
    """Cost against one number: seconds of a step, and multiples of floor and torch."""
    head = [what, "view", "floor", "noetherperf", "not measuring", "torch fused", "× floor", "× torch fused"]
    rows = []
    for info in infos:
        rows.append(
            [
                f"{info['point']:,}",
                info["view"],
                *(time_cell(info, name) for name in ("floor", "ours", "unmeasured", "fused")),
                ratio_cell(info, "ours", "per floor", notes),
                ratio_cell(info, "ours", "per fused", notes),
            ]
        )
    return table(head, rows)


def aims(infos: Sequence[Info]) -> str:
    """Aims beside figures, in float32; empty without such a case."""
    rows = []
    for info in infos:
        key, views = AIMS.get((info["model"], info["rule"]), ("", {}))
        found, aim = figure(info, "ours", key), views.get(info["view"])
        eager = figure(info, "eager", "per ours")
        if found is not None and aim is not None and info["dtype"] == "float32":
            verdict = "met" if round(found.median, 2) <= aim else f"missed by {found.median / aim - 1:.0%}"
            row = [case_label(info), f"{key.replace('per', '×')} ≤ {aim:.2f}", f"{found.median:.2f}", verdict]
            least = EAGER_AIMS.get(info["view"])
            if eager is not None and least is not None:
                row += [f"≥ {least:g}", f"{eager.median:.1f}", "met" if eager.median >= least else "missed"]
            rows.append(row + [NONE] * (7 - len(row)))
        probed, most = figure(info, "probed", "per fused"), PROBE_AIMS.get((info["model"], info["rule"], info["view"]))
        if probed is not None and most is not None and info["dtype"] == "float32":
            verdict = "met" if round(probed.median, 2) <= most else f"missed by {probed.median / most - 1:.0%}"
            cells = [f"Probe × fused ≤ {most:.2f}", f"{probed.median:.2f}", verdict]
            rows.append([f"{case_label(info)}, in a Probe", *cells, NONE, NONE, NONE])
    head = ["case", "aim", "measured", "", "torch fused, then sums, × noetherperf", "measured", ""]
    return table(head, rows) if rows else ""


def host(infos: Sequence[Info], notes: Notes) -> str:
    """Seconds of a step that has almost nothing to compute."""
    peers = ("torch fused", "torch foreach", "torch for-loop")
    head = ["tensors", "rule", "view", "noetherperf", *peers, "× torch fused"]
    rows = [
        [
            f"{info['point']:,}",
            RULES[info["rule"]],
            info["view"],
            *(time_cell(info, name) for name in ("ours", "fused", "foreach", "forloop")),
            ratio_cell(info, "ours", "per fused", notes),
        ]
        for info in infos
    ]
    return table(head, rows)


def memory(infos: Sequence[Info]) -> str:
    parts = ("moments", "law state", "workspace", "tables", "counted", "grown", "grown at peak")
    head = ["parameters", "groups", "rule", *parts, "buffer of squared gradients"]
    keys = (*parts, "buffer of squared gradients")
    rows = [
        [f"{i['parameters']:,}", f"{i['groups']:,}", RULES[i["rule"]], *(size(i[key]) for key in keys)] for i in infos
    ]
    return table(head, rows)


SCALING = {
    "parameters": ("Against the number of parameters", "parameters"),
    "groups": ("Against the number of groups, 16,000,000 parameters", "groups"),
    "tensors": ("Against the number of tensors, 16,000,000 parameters, none measured", "tensors"),
    "threads": ("Against the number of threads, 4096×4096", "threads"),
}


def in_readme(result: Mapping[str, Any]) -> str:
    """What training costs, for readers of README.md; "" where it was not measured."""
    infos = [one["extra_info"] for one in result["benchmarks"] if one["extra_info"]["suite"] == TRAIN]
    if not infos:
        return ""
    notes = Notes()
    pieces = [training_table(infos, notes), str(notes), f"Measured on {describe(result['environment'])}."]
    return "\n\n".join(filter(None, pieces)) + "\n"


def report(result: Mapping[str, Any]) -> str:
    """All tables of a run, as markdown."""
    notes = Notes()
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    suites: dict[str, list[Info]] = {}
    for info in infos:
        suites.setdefault(info["suite"], []).append(info)
    stepping = [info for info in suites.get("step", []) if info["view"] == "none"]
    measuring = [info for info in suites.get("step", []) if info["view"] != "none"]
    pieces = [f'Measured on {describe(result["environment"])}; set "{result["set"]}".']

    def section(title: str, text: str) -> None:
        pieces.append(f"### {title}\n\n{text}")

    if stepping:
        section("The step alone, × floor", comparison(stepping, STEPPING, notes))
    if measuring:
        section("The step with its measurement, × floor", comparison(measuring, MEASURING, notes))
        section("The same measurement otherwise, × noetherperf", against_ours(measuring, notes))
    if aimed := aims([*stepping, *measuring]):
        section("Aims", aimed)
    if TRAIN in suites:
        section(TITLE, training_table(suites[TRAIN], notes))
    if "host" in suites:
        section("Host time of a step: tiny tensors in the cache, Python included", host(suites["host"], notes))
    for suite, (title, what) in SCALING.items():
        if suite in suites:
            section(title, against_point(suites[suite], what, notes))
    if "memory" in suites:
        section("Memory that measuring takes", memory(suites["memory"]))
    if str(notes):
        pieces.append(str(notes))
    if result["not timed"]:
        failures = [[failure["case"], failure["reason"]] for failure in result["not timed"]]
        section("Without a time", table(["case", "why"], failures))
    return "\n\n".join(pieces) + "\n"


# ---- files ----------------------------------------------------------------------------------------------------------


def compact(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[[-+\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)


def write(path: Path) -> str:
    """Write a result's tables and picture beside it; returns the tables."""
    result = json.loads(path.read_text())
    text = report(result)
    path.with_suffix(".md").write_text(text)
    draw(result, path.with_suffix(".svg"))
    return text


def machine(environment: Mapping[str, Any]) -> str:
    """A machine's name in files: its processor and instruction set."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|processor|cpu", " ", environment["cpu"].lower()))
    return "-".join([*words, environment["instructions"]])


def publish(path: Path) -> None:
    """Keep a result among those of its machine, and put its tables and picture into the documentation."""
    result = json.loads(path.read_text())
    text = report(result)
    kept = RESULTS / f"{result['set']}-{machine(result['environment'])}.json"
    kept.write_text(path.read_text())
    kept.with_suffix(".md").write_text(text)
    drawn = draw(result, PICTURE)
    picture = f"![Time of a step as a multiple of the memory's floor](images/{PICTURE.name})\n\n" if drawn else ""
    page.write("results", COMMAND, picture + text)
    if cost := in_readme(result):
        page.write("training", COMMAND, cost, page.README)


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
