"""Targets of the GPU backends, and which of them a run meets. Needs nothing but Python."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cells import PLAIN, Info, median
from bench.markdown import table

LARGE = 100_000_000  # parameters

Found = tuple[float, Info]  # a figure and the case it is of


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        text: In words.
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
