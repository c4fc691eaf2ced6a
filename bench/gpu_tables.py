"""What a GPU run says, as Markdown: the targets as measured, the tables, what failed. Needs nothing but Python.

    python -m bench.gpu_tables

puts bench/results/gpu.json into the documentation's page of figures.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import page
from bench.markdown import Notes, ratio, seconds, table
from bench.timing import Spread

RESULT = page.DOCUMENT.parents[1] / "bench" / "results" / "gpu.json"
COMMAND = "python -m bench.gpu_tables"

Info = Mapping[str, Any]
Found = tuple[float, Info]  # a figure and the case it is of

PLAIN = " plain"  # after a backend's name, as in bench.gpu
LARGE = 100_000_000  # parameters
LABELS = {
    "fused": "torch fused",
    "foreach": "torch foreach",
    "compiled": "torch.compile",
    "eager": "torch fused, then sums",
    "compiled_measured": "torch.compile of step and sums",
    "copy": "copy",
}


def median(info: Info, variant: str, key: str) -> float | None:
    found = info["figures"].get(variant, {}).get(key)
    return None if found is None else float(found[0])


# ---- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One promise.

    Fields:
        text: What is promised.
        limit: The figure to reach: at most, or with `least` at least.
        applies: Whether a case counts.
        value: The case's figure for a backend; None where it was not measured.
        least: More is better.
        show: The figure as text.
    """

    text: str
    limit: float
    applies: Callable[[Info], bool]
    value: Callable[[Info, str], float | None]
    least: bool = False
    show: Callable[[float], str] = "{:.3f}".format

    def worst(self, infos: Sequence[Info], backend: str) -> Found | None:
        """The figure farthest from the limit, and its case."""
        found = [
            (value, info) for info in infos if self.applies(info) for value in [self.value(info, backend)] if value
        ]
        return (min if self.least else max)(found, key=lambda one: one[0], default=None)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def _of_copy(info: Info, backend: str) -> float | None:
    return median(info, backend, "of copy")


def _per_fused(info: Info, backend: str) -> float | None:
    return median(info, backend, "per fused")


def _overhead(info: Info, backend: str) -> float | None:
    found = median(info, backend, f"per {backend}{PLAIN}")
    return None if found is None else found - 1.0


def _eager(info: Info, backend: str) -> float | None:
    return median(info, "eager", f"per {backend}")


def _launched(info: Info, backend: str) -> float | None:
    found = info["launches"].get(backend)
    return None if found is None else float(found[0])


def _host(info: Info, backend: str) -> float | None:
    found = info["host seconds"]
    return found[backend] / found["fused"] if backend in found and "fused" in found else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _targets() -> Iterator[Target]:
    names = {"none": "plain", "rows": "rows", "both": "rows + columns"}

    def viewed(view: str, condition: Callable[[Info], bool] = lambda info: True) -> Callable[[Info], bool]:
        return lambda info: info["view"] == view and info["suite"] != "host" and condition(info)

    for view, limit in (("none", 0.92), ("rows", 0.92), ("both", 0.90)):
        text = f"{names[view]}: fraction of the copy's bandwidth, 1e8 parameters and more"
        yield Target(text, limit, viewed(view, lambda info: info["parameters"] >= LARGE), _of_copy, least=True)
    for view, limit in (("none", 1.00), ("rows", 1.00), ("both", 1.03)):
        yield Target(f"{names[view]}: × torch fused without measuring, every case", limit, viewed(view), _per_fused)
    for view, limit in (("rows", 0.03), ("both", 0.05)):
        resnet = viewed(view, lambda info: info["model"] == "resnet50")
        yield Target(f"{names[view]}: ResNet-50, overhead of measuring", limit, resnet, _overhead, show=_percent)
    for view, limit in (("rows", 5.0), ("both", 8.0)):
        text = f"{names[view]}: eager measurement after torch's fused step, × ours"
        yield Target(text, limit, viewed(view), _eager, least=True)
    yield Target("kernels launched a step, every case", 2.0, lambda info: True, _launched, show="{:.0f}".format)
    yield Target("plain: host time of a step, × torch fused, every case", 1.0, lambda i: i["view"] == "none", _host)


TARGETS = tuple(_targets())


def judged(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target against what was measured.

    Returns:
        One {"target", "limit", "backends": {name: {"value", "case", "met"} or None where nothing was measured}} each.
    """

    def judge(target: Target, backend: str) -> dict[str, Any] | None:
        worst = target.worst(bench["cases"], backend)
        if worst is None:
            return None
        value, info = worst
        return {"value": target.show(value), "case": info["case"], "met": target.met(value)}

    return [
        {
            "target": target.text,
            "limit": f"{'≥' if target.least else '≤'} {target.show(target.limit)}",
            "backends": {backend: judge(target, backend) for backend in bench["backends"]},
        }
        for target in TARGETS
    ]


def targets_table(bench: Mapping[str, Any]) -> str:
    def verdict(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "not measured"
        return f"{'met' if found['met'] else '**not met**'}: {found['value']} ({found['case']})"

    rows = [
        [one["target"], one["limit"], *(verdict(one["backends"][backend]) for backend in bench["backends"])]
        for one in judged(bench)
    ]
    return table(["target", "limit", *(f"{backend}, worst case" for backend in bench["backends"])], rows)


# ---- tables ---------------------------------------------------------------------------------------------------------


def bandwidth(info: Info, variant: str) -> str:
    found = median(info, variant, "seconds")
    return "—" if found is None else f"{info['bytes moved'] / found / 1e9:.0f} GB/s"


def cell(info: Info, variant: str, key: str, notes: Notes) -> str:
    """A figure with its quartiles, or a dash with the reason why there is none."""
    found = info["figures"].get(variant, {}).get(key)
    if found is not None:
        return ratio(Spread(*found))
    reason = info["wrong"].get(variant) or info["not run"].get(variant) or "not part of this comparison"
    return "—" + notes.mark(reason)


def ours_columns(backend: str) -> list[str]:
    return [f"{backend}: time", "bandwidth", "of copy", "× fused"]


def ours_cells(info: Info, backend: str, notes: Notes) -> list[str]:
    time = median(info, backend, "seconds")
    return [
        "—" if time is None else seconds(time),
        bandwidth(info, backend),
        cell(info, backend, "of copy", notes),
        cell(info, backend, "per fused", notes),
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
            bandwidth(info, "copy"),
            *(text for backend in backends for text in ours_cells(info, backend, notes)),
            cell(info, "fused", "of copy", notes),
            *(cell(info, name, "per fused", notes) for name in peers),
        ]
        for info in infos
    ]
    return table(head, rows)


def measured_table(infos: Sequence[Info], backends: Sequence[str], notes: Notes) -> str:
    """The step with its measurement: against torch's without, against our own without, and how else it is done."""
    peers = ("eager", "compiled_measured")
    head = ["case", "copy"]
    for backend in backends:
        head += [*ours_columns(backend), "× not measuring", *(f"{LABELS[name]}, × {backend}" for name in peers)]
    rows = [
        [
            info["case"],
            bandwidth(info, "copy"),
            *(
                text
                for backend in backends
                for text in (
                    *ours_cells(info, backend, notes),
                    cell(info, backend, f"per {backend}{PLAIN}", notes),
                    *(cell(info, name, f"per {backend}", notes) for name in peers),
                )
            ),
        ]
        for info in infos
    ]
    return table(head, rows)


def host_table(infos: Sequence[Info], backends: Sequence[str]) -> str:
    """What the host takes for a step, and what it has the device do: kernels + copies and fills."""

    def one(info: Info, variant: str) -> str:
        time, launched = info["host seconds"].get(variant), info["launches"].get(variant)
        counted = "" if launched is None else f", {launched[0]} + {launched[1]}"
        return "—" if time is None else seconds(time) + counted

    variants = [*backends, "fused", "foreach", "compiled", "eager"]
    head = ["case", "tensors", *(LABELS.get(name, name) for name in variants)]
    return table(head, [[i["case"], f"{i['tensors']:,}", *(one(i, name) for name in variants)] for i in infos])


def bench_sections(bench: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    backends, infos, notes = bench["backends"], bench["cases"], Notes()
    timed = [info for info in infos if info["suite"] != "host"]
    stepping = [info for info in timed if info["view"] == "none"]
    measuring = [info for info in timed if info["view"] != "none"]
    yield "Targets, as measured", targets_table(bench)
    if stepping:
        yield "The step alone", step_table(stepping, backends, notes)
    if measuring:
        yield "The step with its measurement", measured_table(measuring, backends, notes)
    if str(notes):
        yield "Notes", str(notes)
    if infos:
        yield "Host time of a step, and kernels + copies launched", host_table(infos, backends)
    failures = [*bench["not timed"]]
    failures += [{"case": i["case"], "reason": f"{name}: {why}"} for i in infos for name, why in i["wrong"].items()]
    if failures:
        rows = [[failure["case"], failure["reason"].replace("|", "\\|")] for failure in failures]
        yield "Without a time", table(["case", "why"], rows)


def describe(environment: Mapping[str, Any]) -> str:
    """One line: device, versions, commit."""
    found = environment
    state = " with uncommitted changes" if found["dirty"] else ""
    parts = [
        f"{found['device']} (compute capability {found['capability']}, {found['memory'] / 2**30:.0f} GiB)",
        f"driver {found['driver'] or 'unknown'}",
        f"torch {found['torch']} with CUDA {found['cuda']}",
        f"triton {found['triton'] or 'not there'}",
        f"nvcc {found['nvcc'] or 'not there'}",
        f"Python {found['python']}",
        f"commit {found['commit'] or 'unknown'}{state}",
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
    """Every case by what matters most of it: fractions of the copy's bandwidth, multiples of torch's fused step."""
    head = ["case", "copy", *(f"{name}, of copy" for name in (*backends, "torch fused"))]
    head += [f"{name} × torch fused" for name in backends]
    head += [f"{LABELS['eager']}, × {backends[0]}"]
    rows = [
        [
            info["case"],
            bandwidth(info, "copy"),
            *(cell(info, name, "of copy", notes) for name in (*backends, "fused")),
            *(cell(info, name, "per fused", notes) for name in backends),
            "—" if info["view"] == "none" else cell(info, "eager", f"per {backends[0]}", notes),
        ]
        for info in infos
    ]
    return table(head, rows)


def section(result: Mapping[str, Any]) -> str:
    """What the documentation shows of a run."""
    bench, notes = result["bench"], Notes()
    timed = [info for info in bench["cases"] if info["suite"] != "host"]
    pieces = [targets_table(bench), short_table(timed, bench["backends"], notes), str(notes)]
    source = (
        f"Written by `make gpu-report` on {describe(result['environment'])}; all of it is in `bench/results/gpu.md`."
    )
    return "\n\n".join(piece for piece in [*pieces, source] if piece) + "\n"


if __name__ == "__main__":
    page.write("gpu", COMMAND, section(json.loads(RESULT.read_text())))
