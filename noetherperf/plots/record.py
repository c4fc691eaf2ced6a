"""Figures of a record, for print: measured charges in colour, the flow law as dotted lines over them.

Every function takes a `Record` (`constraints` takes the result of `check_constraints`) and returns a new matplotlib
Figure. Colours are ordered by lightness and lines differ in their dashes, so the figures are readable in grey. If a
record lacks the data of a panel, the panel says so.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from noetherperf.checks import Constraints
from noetherperf.checks.exact import Stage
from noetherperf.common.paths import local_path
from noetherperf.plots.style import (
    BLUE,
    FLOW,
    GREEN,
    HEIGHT,
    KIND_LINES,
    MEASURED,
    MUTED,
    RED,
    WIDTH,
    colors,
    label_steps,
    log_axis,
    save,
    say,
    shown,
    styled,
)
from noetherperf.record import LawName, Record, relative_error

__all__ = ["charges", "constraints", "loss", "parameters", "residuals", "save_all", "save_constraints"]

MAX_CURVES = 10
CHARGE = {
    "translation": r"$\langle\theta_A, 1\rangle$",
    "scale": r"$|\theta_A|^2$",
    "rescale": r"$|\theta_{A_1}|^2 - |\theta_{A_2}|^2$",
}
LAWS: dict[LawName, str] = {
    "flow": "flow law\nfree + forced",
    "discrete": "discrete law\nfree + forced",
    "budget": "budget of the update\nfree + forced + defect",
}
STAGES: dict[Stage, dict[str, Any]] = {
    "as_is": {"color": RED, "marker": "o", "label": "as the model is"},
    "float64": {"color": GREEN, "marker": "s", "label": "in float64"},
    "no_eps": {"color": BLUE, "marker": "D", "label": "in float64, eps → 0"},
}
CONSTRAINT_FORMULAS = {
    "gradient": r"gradient: $\langle g, \psi_A\rangle = 0$",
    "hessian": r"Hessian: $H\psi_A + C_A g = 0$",
}


@styled
def charges(record: Record) -> Figure:
    """Measured charges with the flow law over them, one panel each for translation, scale and rescale.

    A panel shows one symmetry of its kind: the one with the most groups among those with a closed law. Of its groups,
    at most 10 are drawn, at evenly spaced ranks of their initial charge. The colours follow this rank.

    Args:
        record: From `open_record`.

    Returns:
        A figure of three panels.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3), CHARGE, strict=True):
        _draw_charges(axes, record, kind)
    _explain_charges(figure)
    return figure


@styled
def residuals(record: Record) -> Figure:
    """Relative errors of flow law, discrete law and the update's budget over training, worst group of each kind.

    The error is `relative_error`, the largest over all groups of all symmetries of a kind with a closed law. The grey
    line is the machine epsilon of the parameters' dtype, the relative rounding error of one stored value.

    Args:
        record: From `open_record`.

    Returns:
        A figure of three panels with one logarithmic axis.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    worst = {kind: _worst_errors(record, kind) for kind in CHARGE}
    floors = {name: torch.finfo(getattr(torch, name)).eps for name in record.attrs["dtypes"]}
    for axes, (law, title) in zip(panels, LAWS.items(), strict=True):
        axes.set_title(title)
        for kind, errors in worst.items():
            if errors is not None:
                axes.plot(record.steps, errors[law], **KIND_LINES[kind])
        for name, floor in floors.items():
            axes.axhline(floor, color="0.7", linewidth=0.8, zorder=0)
            axes.annotate(f"{name} ε", (1, floor), xycoords=("axes fraction", "data"), color=MUTED, fontsize=6.5,
                          xytext=(0, 2), textcoords="offset points", ha="right")  # fmt: skip
        label_steps(axes)
    panels[0].set_ylabel("relative error of the worst group")
    drawn = [errors[law] for errors in worst.values() if errors is not None for law in LAWS]
    log_axis(panels[0], [*drawn, np.array(list(floors.values()))])
    handles = [
        Line2D([], [], **line, label=kind if worst[kind] is not None else f"{kind}: no closed law recorded")
        for kind, line in KIND_LINES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def parameters(record: Record) -> Figure:
    """Single parameters, from the probe named "parameters", beside charges: the noisy and the predictable.

    Args:
        record: From `open_record`, of a Recorder with a probe "parameters" that returns a 1-D tensor.

    Returns:
        A figure of two panels. The charges are those of the first kind in the record.
    """
    figure = Figure(figsize=(WIDTH * 2 / 3, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "parameters" in record.probes:
        left.set_title("parameters\nsingle entries")
        values = record.probes["parameters"].to_numpy().reshape(len(record.steps), -1)
        for index, color in _spread(values[:1].ravel()):
            left.plot(record.steps, values[:, index], color=color, linewidth=0.8)
        left.set_ylabel(r"$\theta_i$")
        label_steps(left)
        _label_time(left, record)
    else:
        say(left, "no probe named “parameters”\nwas recorded")
    kinds = [kind for kind in CHARGE if _representative(record, kind)]
    _draw_charges(right, record, kinds[0] if kinds else "translation")
    _explain_charges(figure)
    return figure


@styled
def loss(record: Record) -> Figure:
    """The training loss, from the probe named "loss": every recorded value, and its running mean.

    Args:
        record: From `open_record`, of a Recorder with a probe "loss" that returns a number.

    Returns:
        A figure of one panel, logarithmic where the loss is positive and spans more than a decade.
    """
    figure = Figure(figsize=(WIDTH / 2, HEIGHT), layout="constrained")
    axes = figure.subplots()
    if "loss" not in record.probes:
        say(axes, "no probe named “loss”\nwas recorded")
        return figure
    values = record.probes["loss"]
    window = max(1, len(values) // 50)
    smooth = values.rolling(step=window, center=True, min_periods=1).mean()
    axes.plot(record.steps, values, color="0.75", linewidth=0.7, label="measured")
    axes.plot(record.steps, smooth, color=BLUE, linewidth=1.4, label=f"mean of {window} rows")
    finite = values.to_numpy()[np.isfinite(values)]
    positive = finite[finite > 0]
    if positive.size and finite.min() >= 0 and positive.max() > 10 * positive.min():
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("training loss of the batch")
    axes.legend(loc="upper right")
    label_steps(axes)
    return figure


@styled
def constraints(checked: Constraints) -> Figure:
    """Relative defects of every symmetry's constraints: a row for each symmetry, in it one line of dots for each stage.

    A dot is a group. If a stage's dots lie left of the previous stage's, the difference was rounding (float64) or eps
    (eps → 0). Dots right of the tolerance in the last stage break the symmetry, and its name is red. Defects of exactly
    zero stand at the left edge.

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
                axes.plot(np.maximum(values, left), np.full(len(values), row + offset), linestyle="", markersize=2.4,
                          markeredgewidth=0, alpha=0.7, clip_on=False, **STAGES[stage] | {"label": None})  # fmt: skip
        axes.set_xlabel("relative defect")
    panels[0].set_yticks(range(len(symmetries)), [shown(s.name) for s in symmetries], parse_math=False)
    panels[0].set_ylim(len(symmetries) - 0.5, -0.5)
    for label, symmetry in zip(panels[0].get_yticklabels(), symmetries, strict=True):
        label.set_color(STAGES["as_is"]["color"] if symmetry.name in checked.failed else "black")
    handles = [Line2D([], [], linestyle="", markersize=4, **STAGES[stage]) for stage in checked.stages]
    handles.append(Line2D([], [], color="0.7", linewidth=0.8, label=f"tolerance {checked.tolerance:.0e}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


FIGURES = (charges, residuals, parameters, loss)


def save_all(record: Record, directory: str | os.PathLike[str]) -> list[Path]:
    """Save every figure of a record, as png (150 dpi) and pdf.

    Args:
        record: From `open_record`.
        directory: Created if missing; files of the same names are replaced.

    Returns:
        The files: charges, residuals, parameters, loss, each .png and .pdf.
    """
    return [file for draw in FIGURES for file in save(draw(record), local_path(directory, "directory") / draw.__name__)]


def save_constraints(checked: Constraints, directory: str | os.PathLike[str]) -> list[Path]:
    """Save the figure `constraints`, as png (150 dpi) and pdf.

    Args:
        checked: From `check_constraints`.
        directory: Created if missing; files of the same names are replaced.

    Returns:
        The files: constraints.png and constraints.pdf.
    """
    return save(constraints(checked), local_path(directory, "directory") / "constraints")


def _draw_charges(axes: Axes, record: Record, kind: str) -> None:
    name = _representative(record, kind)
    if name is None:
        say(axes, f"no {kind} symmetry\nwas recorded")
        return
    data = record[name]
    chosen = list(_spread(data["initial"].to_numpy()))
    for group, color in chosen:
        axes.plot(record.steps, data["charge"][:, group], color=color, **MEASURED)
    for group, _ in chosen:
        axes.plot(record.steps, data["flow_total"][:, group], **FLOW)
    n_groups = data.sizes["group"]
    some = (
        f"{len(chosen)} of {n_groups} groups" if len(chosen) < n_groups else f"{n_groups} group{'s' * (n_groups > 1)}"
    )
    note = "" if data.attrs["closed"] else ", open law"
    axes.set_title(f"{kind}\n{shown(name)}, {some}{note}", parse_math=False)
    axes.set_ylabel(CHARGE[kind])
    label_steps(axes)
    _label_time(axes, record)


def _explain_charges(figure: Figure) -> None:
    lines = [
        Line2D([], [], color=colors(3)[1], **MEASURED, label="measured"),
        Line2D([], [], **FLOW, label="flow law"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)


def _of_kind(record: Record, kind: str) -> Iterator[tuple[str, int, bool]]:
    """(name, number of groups, whether the law is closed) of every symmetry of a kind that has groups."""
    every = zip(record.symmetries, record.attrs["n_groups"], record.attrs["closed"], strict=True)
    return ((symmetry.name, n, closed) for symmetry, n, closed in every if symmetry.kind == kind and n)


def _representative(record: Record, kind: str) -> str | None:
    candidates = list(_of_kind(record, kind))
    return max(candidates, key=lambda candidate: (candidate[2], candidate[1]))[0] if candidates else None


def _worst_errors(record: Record, kind: str) -> dict[LawName, NDArray[np.float64]] | None:
    """The largest relative error over all groups of a kind's closed laws, [n rows] for each law; NaN if any is."""
    data = [record[name] for name, _, closed in _of_kind(record, kind) if closed]
    if not data:
        return None

    return {law: np.max([relative_error(one, law).max("group", skipna=False) for one in data], axis=0) for law in LAWS}


def _spread(initial: NDArray[np.float64]) -> Iterator[tuple[int, Any]]:
    """At most MAX_CURVES indices at evenly spaced ranks of the initial value, each with a colour."""
    order = np.argsort(initial)
    ranks = np.unique(np.linspace(0, len(order) - 1, min(MAX_CURVES, len(order))).round().astype(int))
    return zip(order[ranks].tolist(), colors(len(ranks)), strict=True)


def _label_time(axes: Axes, record: Record) -> None:
    """A second axis for the time of the flow, if time increases at every step (it does not while lr is zero)."""
    steps, times = record.steps.astype(float), record.times
    if len(times) < 2 or not np.all(np.diff(times) > 0):
        return

    convert: Any = (partial(_interpolate, steps, times), partial(_interpolate, times, steps))
    top = axes.secondary_xaxis("top", functions=convert)
    top.set_xlabel("time η·steps", color=MUTED, fontsize=7)
    top.xaxis.set_major_locator(MaxNLocator(4))
    top.tick_params(colors=MUTED, labelsize=6.5)
    top.spines["top"].set(visible=True, color=MUTED)


def _interpolate(known_x: NDArray[np.float64], known_y: NDArray[np.float64], x: NDArray[np.float64]) -> Any:
    """Linear interpolation, with linear extrapolation beyond both ends, which an axis with margins needs."""
    before = (x - known_x[0]) * (known_y[1] - known_y[0]) / (known_x[1] - known_x[0])
    after = (x - known_x[-1]) * (known_y[-1] - known_y[-2]) / (known_x[-1] - known_x[-2])
    return np.interp(x, known_x, known_y) + np.minimum(before, 0.0) + np.maximum(after, 0.0)
