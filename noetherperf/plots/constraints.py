"""Figure of a check: relative defects of every symmetry's constraints."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from noetherperf.common.paths import local_path
from noetherperf.plots.style import BLUE, GREEN, HEIGHT, RED, WIDTH, save, say, shown, styled

if TYPE_CHECKING:
    from noetherperf.checks import Constraints
    from noetherperf.checks.exact import Stage

__all__ = ["constraints", "save_constraints"]

STAGES: "dict[Stage, dict[str, Any]]" = {
    "as_is": {"color": RED, "marker": "o", "label": "as the model is"},
    "float64": {"color": GREEN, "marker": "s", "label": "in float64"},
    "no_eps": {"color": BLUE, "marker": "D", "label": "in float64, eps → 0"},
}
CONSTRAINT_FORMULAS = {
    "gradient": r"gradient: $\langle g, \psi_A\rangle = 0$",
    "hessian": r"Hessian: $H\psi_A + C_A g = 0$",
}


@styled
def constraints(checked: "Constraints") -> Figure:
    """Relative defects of every symmetry's constraints: a row for each symmetry, in it a line of strokes a stage.

    A stroke is a group, and the marker is at their median. If a stage's strokes lie left of the previous stage's, the
    difference was rounding (float64) or eps (eps → 0). Strokes right of the tolerance in the last stage break the
    symmetry, and its name is red. Defects of exactly zero stand at the left edge.

    Args:
        checked: From `check_constraints`.

    Returns:
        A figure of one panel for each checked constraint, with a height proportional to the number of symmetries.
    """
    symmetries, kinds = checked.symmetries, checked.constraints
    height = HEIGHT / 2 + 0.22 * max(len(symmetries), 3)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    if not symmetries:
        for axes in panels:
            say(axes, "no symmetry was checked")
        return figure
    defects = {
        (kind, stage): [checked[s.name][f"{kind}_relative"].sel(stage=stage).to_numpy() for s in symmetries]
        for kind in kinds
        for stage in checked.stages
    }
    pooled = np.concatenate([np.concatenate(rows) for rows in defects.values()])
    positive = pooled[np.isfinite(pooled) & (pooled > 0)]
    left = 10 ** np.floor(np.log10(min(positive.min(initial=1.0), checked.tolerance)) - 0.5)
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set_title(CONSTRAINT_FORMULAS[kind])
        axes.set_xscale("log")
        axes.set_xlim(left, 2.0)
        axes.axvline(checked.tolerance, color="0.7", linewidth=0.8, zorder=0)
        for position, stage in enumerate(checked.stages):
            offset = (position - (len(checked.stages) - 1) / 2) * 0.26
            for row, values in enumerate(defects[kind, stage]):
                look, shown_at = STAGES[stage], np.maximum(values, left)
                axes.plot(shown_at, np.full(len(values), row + offset), linestyle="", marker="|", markersize=5.5,
                          markeredgewidth=0.7, alpha=0.6, clip_on=False, color=look["color"])  # fmt: skip
                if len(finite := shown_at[np.isfinite(shown_at)]):
                    axes.plot(np.median(finite), row + offset, **look | {"label": None}, markersize=4.5,
                              markeredgecolor="white", markeredgewidth=0.6, clip_on=False, zorder=4)  # fmt: skip
        axes.set_xlabel("relative defect")
    panels[0].set_yticks(range(len(symmetries)), [shown(s.name) for s in symmetries], parse_math=False)
    panels[0].set_ylim(len(symmetries) - 0.5, -0.5)
    for label, symmetry in zip(panels[0].get_yticklabels(), symmetries, strict=True):
        label.set_color(STAGES["as_is"]["color"] if symmetry.name in checked.failed else "black")
    handles = [Line2D([], [], linestyle="", markersize=5, **STAGES[stage]) for stage in checked.stages]
    handles.append(Line2D([], [], color="0.7", linewidth=0.8, label=f"tolerance {checked.tolerance:.0e}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def save_constraints(checked: "Constraints", directory: str | os.PathLike[str]) -> list[Path]:
    """Save the figure `constraints`, as png (150 dpi) and pdf.

    Args:
        checked: From `check_constraints`.
        directory: Created if missing; files of the same names are replaced.

    Returns:
        The files: constraints.png and constraints.pdf.
    """
    return save(constraints(checked), local_path(directory, "directory") / "constraints")
