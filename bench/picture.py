"""Time of a step as multiples of the memory's floor, by case and variant: readable in grey and in colour."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.cells import LABELS

# variant: marker, colour, filled. Shape and filling tell them apart where colour does not.
STYLES: dict[str, tuple[str, str, bool]] = {
    "ours": ("o", "#000000", True),
    "unmeasured": ("o", "#000000", False),
    "fused": ("s", "#1f5f99", True),
    "foreach": ("^", "#7a7a7a", True),
    "forloop": ("v", "#7a7a7a", False),
    "compiled": ("D", "#1f5f99", False),
    "eager": ("X", "#b3541e", True),
    "norms": ("P", "#b3541e", False),
    "probed": ("h", "#2e7d32", True),
    "compiled_measured": ("D", "#b3541e", False),
    "paper": ("*", "#7a7a7a", False),
}
GREY = "#999999"


def case_label(info: Mapping[str, Any]) -> str:
    """A case by what sets it apart: float32 and SGD with momentum go without saying."""
    dtype = "" if info["dtype"] == "float32" else f", {info['dtype']}"
    rule = {"b0.9": "", "b0": ", β = 0", "adamw": ", AdamW"}[info["rule"]]
    return f"{info['model']}, {info['view']}{dtype}{rule}"


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draw a result's step cases, one line each; False where it has none."""
    infos = [b["extra_info"] for b in result["benchmarks"] if b["extra_info"]["suite"] == "step"]
    if not infos:
        return False
    with mpl.rc_context({"font.size": 8, "svg.hashsalt": "noetherperf", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 1.2 + 0.2 * len(infos)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(1.0, color=GREY, linewidth=0.8)
        seen: set[str] = set()
        for y, info in enumerate(infos):
            if y and info["model"] != infos[y - 1]["model"]:
                axes.axhline(y - 0.5, color=GREY, linewidth=0.4)
            for name, (marker, colour, filled) in STYLES.items():
                if name not in info["figures"]:
                    continue
                median, low, high = info["figures"][name]["per floor"]
                axes.plot([low, high], [y, y], color=colour, linewidth=0.8, zorder=2)
                axes.plot(
                    [median],
                    [y],
                    marker=marker,
                    markersize=5,
                    markeredgewidth=0.8,
                    color=colour,
                    markerfacecolor=colour if filled else "white",
                    linestyle="none",
                    label=None if name in seen else LABELS[name],
                    zorder=4 if name == "ours" else 3,
                )
                seen.add(name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time of a step, × the memory's floor (median and quartiles of rounds)")
        axes.set_yticks(range(len(infos)), [case_label(info) for info in infos])
        axes.set_ylim(len(infos) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True
