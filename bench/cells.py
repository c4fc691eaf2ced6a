"""The figures of one case as cells of a table. Needs nothing but Python."""

from collections.abc import Mapping
from typing import Any

from bench.markdown import Notes, ratio, seconds
from bench.timing import Spread

#: A case and its figures, as a run writes them.
Info = Mapping[str, Any]

NONE = "—"
PLAIN = " plain"  # after a backend's name: its steps without measuring

#: What tables and pictures call variants.
LABELS = {
    "ours": "noetherperf",
    "unmeasured": "noetherperf, not measuring",
    "fused": "torch fused",
    "foreach": "torch foreach",
    "forloop": "torch for-loop",
    "compiled": "torch.compile",
    "eager": "torch fused, then sums",
    "norms": "torch fused, then norms",
    "probed": "torch fused, in a Probe",
    "compiled_measured": "torch.compile of step and sums",
    "paper": "torch fused, and a buffer of squared gradients",
    "copy": "copy",
}


def figure(info: Info, variant: str, key: str) -> Spread | None:
    """A variant's figure: "seconds", "per <baseline>", "of copy"; None where it was not measured."""
    found = info["figures"].get(variant, {}).get(key)
    return None if found is None else Spread(*found)


def median(info: Info, variant: str, key: str) -> float | None:
    found = figure(info, variant, key)
    return None if found is None else found.median


def ratio_cell(info: Info, variant: str, key: str, notes: Notes) -> str:
    """A figure with its quartiles, or a dash with the reason why there is none."""
    found = figure(info, variant, key)
    if found is not None:
        return ratio(found)
    reason = info.get("wrong", {}).get(variant) or info["not run"].get(variant) or "not part of this comparison"
    return NONE + notes.mark(reason)


def time_cell(info: Info, variant: str) -> str:
    """Median time of a step."""
    found = median(info, variant, "seconds")
    return NONE if found is None else seconds(found)


def bandwidth_cell(info: Info, variant: str) -> str:
    """The bytes that a step must move, by its median time."""
    found = median(info, variant, "seconds")
    return NONE if found is None else f"{info['bytes moved'] / found / 1e9:.0f} GB/s"
