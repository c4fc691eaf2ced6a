"""Figures of a record, for print: measured charges in colour, the flow law as dotted lines over them.

Every function takes a `Record` and returns a new matplotlib Figure. Colours are ordered by lightness and lines differ
in their dashes, so the figures are readable in grey. A figure without data is not made: it raises NothingToDraw, which
says what the record lacks.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.plots.layers import layers
from noetherperf.plots.panels import CHARGE, MAX_CURVES, draw, explain, label_time, letter, some_groups, thinned
from noetherperf.plots.style import (
    BLUE,
    HEIGHT,
    KIND_LINES,
    MUTED,
    WIDTH,
    NothingToDraw,
    label_steps,
    log_axis,
    save,
    styled,
)
from noetherperf.record import TERMS, LawName, Record, relative_error
from noetherperf.record.law_error import DIFFERENCES

__all__ = ["FIGURES", "charges", "loss", "parameters", "residuals", "save_all"]

ROWS = 500  # of a law's errors
LAWS: dict[LawName, str] = {
    "flow": "flow law\nfree + forced",
    "discrete": "discrete law\nfree + forced",
    "budget": "budget of the update\nfree + forced + defect",
}


@styled
def charges(record: Record) -> Figure:
    """Measured charges with the flow law over them, one panel for each kind of symmetry.

    A panel shows one symmetry of its kind: the one with the most groups among those with a closed law. Of its groups,
    at most 10 are drawn, at evenly spaced ranks of their initial charge. The colours follow this rank. `layers` draws
    all symmetries.

    Args:
        record: From `open_record`.

    Returns:
        A figure of one to four panels.

    Raises:
        NothingToDraw: No charge of any group was recorded.
    """
    names = _representatives(record)
    n_rows = 1 if len(names) < 4 else 2
    n_columns = -(-len(names) // n_rows)
    width = WIDTH * (1, 0.5, 0.75, 1)[n_columns]
    figure = Figure(figsize=(width, HEIGHT * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).ravel()[: len(names)])
    for axes, (kind, name) in zip(panels, names.items(), strict=True):
        draw(axes, record, name, MAX_CURVES)
        axes.set_ylabel(CHARGE[kind])
        label_time(axes, record)
    letter(panels)
    explain(figure, MAX_CURVES, law="flow_total" in record.series)
    return figure


@styled
def residuals(record: Record) -> Figure:
    """Relative errors of flow law, discrete law and the update's budget over training, worst group of each kind.

    The error is `relative_error`, the largest over all groups of all symmetries of a kind with a closed law; of a long
    record, at about 500 evenly spaced rows. The grey line is the machine epsilon of the parameters' dtype, the
    relative rounding error of one stored value.

    Args:
        record: From `open_record`.

    Returns:
        A figure of a panel for each law, with one logarithmic axis.

    Raises:
        NothingToDraw: No law is closed, or no law's terms were recorded.
    """
    laws = [law for law in LAWS if {"charge", *TERMS[law], DIFFERENCES[law]} <= {*record.series}]
    if not laws:
        raise NothingToDraw("the terms of no law were recorded; they are by default")
    closed = {kind: [name for name, _, closed in _of_kind(record, kind) if closed] for kind in CHARGE}
    if not any(closed.values()):
        reason = next(filter(None, record.attrs["reason"]), "")
        why = f"no law is closed ({reason})" if reason else "no symmetry was recorded"
        raise NothingToDraw(f"{why}, so that none predicts anything")
    rows = slice(None, None, -(-len(record.steps) // ROWS) or 1)
    worst = {kind: _worst_errors(record, names, laws, rows) for kind, names in closed.items() if names}
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panels = list(figure.subplots(1, len(laws), sharey=True, squeeze=False)[0])
    floors = {name: torch.finfo(getattr(torch, name)).eps for name in record.attrs["dtypes"]}
    for axes, law in zip(panels, laws, strict=True):
        axes.set_title(LAWS[law])
        for kind, errors in worst.items():
            axes.plot(record.steps[rows], errors[law], **KIND_LINES[kind])
        for name, floor in floors.items():
            axes.axhline(floor, color="0.7", linewidth=0.8, zorder=0)
            axes.annotate(f"{name} ε", (1, floor), xycoords=("axes fraction", "data"), color=MUTED, fontsize=6.5,
                          xytext=(0, 2), textcoords="offset points", ha="right")  # fmt: skip
        label_steps(axes)
    panels[0].set_ylabel("relative error of the worst group")
    drawn = [errors[law] for errors in worst.values() for law in laws]
    log_axis(panels[0], [*drawn, np.array(list(floors.values()))])
    letter(panels)
    handles = [Line2D([], [], **KIND_LINES[kind], label=kind) for kind in worst]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@styled
def parameters(record: Record) -> Figure:
    """Single parameters, from the probe named "parameters", beside charges: the noisy and the predictable.

    Args:
        record: From `open_record`, of a Recorder with a probe "parameters" that returns a 1-D tensor.

    Returns:
        A figure of two panels. The charges are those of the first kind in the record.

    Raises:
        NothingToDraw: The record has no such probe, or no charges.
    """
    values = _probe(record, "parameters", "Recorder(..., probes={'parameters': lambda: weight[0]})")
    kind, name = next(iter(_representatives(record).items()))
    figure = Figure(figsize=(WIDTH * 0.75, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("parameters\nsingle entries")
    values = values.reshape(len(record.steps), -1)
    for index, color in some_groups(values[:1].ravel(), MAX_CURVES):
        steps, points = thinned(record.steps, values[:, [index]])
        left.plot(steps, points, color=color, linewidth=0.8)
    left.set_ylabel(r"$\theta_i$")
    label_steps(left)
    label_time(left, record)
    draw(right, record, name, MAX_CURVES)
    right.set_ylabel(CHARGE[kind])
    label_time(right, record)
    letter([left, right])
    explain(figure, MAX_CURVES, law="flow_total" in record.series)
    return figure


@styled
def loss(record: Record) -> Figure:
    """The training loss, from `recorder.log(loss=loss)` or the probe named "loss": every recorded value, and its mean.

    Args:
        record: From `open_record`.

    Returns:
        A figure of one panel, logarithmic where the loss is positive and spans more than a decade.

    Raises:
        NothingToDraw: No loss was recorded.
    """
    values = _probe(record, "loss", "recorder.log(loss=loss) before optimizer.step()")
    figure = Figure(figsize=(WIDTH / 2, HEIGHT), layout="constrained")
    axes = figure.subplots()
    values = values.reshape(len(record.steps), -1)[:, 0]
    window = max(1, len(values) // 50)
    smooth = record.probes["loss"].rolling(step=window, center=True, min_periods=1).mean()
    axes.plot(*thinned(record.steps, values[:, None]), color="0.75", linewidth=0.7, label="measured")
    mean = smooth.to_numpy()[:, None]
    axes.plot(*thinned(record.steps, mean), color=BLUE, linewidth=1.4, label=f"mean of {window} rows")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if positive.size and finite.min() >= 0 and positive.max() > 10 * positive.min():
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("training loss of the batch")
    figure.legend(loc="outside lower center", ncols=2)
    label_steps(axes)
    return figure


FIGURES = (charges, residuals, parameters, loss)


def save_all(
    record: Record,
    directory: str | os.PathLike[str],
    formats: Iterable[str] = ("png", "pdf"),
    *,
    dpi: int = 150,
    left_out: Callable[[str, str], object] = lambda *_: None,
) -> list[Path]:
    """Save every figure of a record that it has the data of.

    Args:
        record: From `open_record`.
        directory: Created if missing; files of the same names are replaced.
        formats: Among "png", "pdf", "svg".
        dpi: Pixels per inch of a png.
        left_out: Called with the name of each figure that is not made, and what the record lacks.

    Returns:
        The files: charges, residuals, parameters, loss; layers, in several pages, if charges does not show all
        symmetries.
    """
    formats, files = list(formats), list[Path]()
    folder = local_path(directory, "directory")
    for make in (*FIGURES[:1], _others, *FIGURES[1:]):
        name = "layers" if make is _others else make.__name__
        try:
            files += save(make(record), folder / name, formats, dpi)
        except NothingToDraw as error:
            left_out(name, str(error))
    return files


def _others(record: Record) -> list[Figure]:
    """All symmetries, if `charges` shows only some."""
    if len(record) == len(_representatives(record)):
        raise NothingToDraw("the figure charges shows all symmetries")
    return layers(record)


def _probe(record: Record, name: str, way: str) -> NDArray[np.float64]:
    """Values of a probe, or logged under that name.

    Raises:
        NothingToDraw: There are none.
    """
    if name not in record.probes:
        raise NothingToDraw(f"no {name!r} was recorded; to record it, {way}")
    values: NDArray[np.float64] = record.probes[name].to_numpy()
    if not np.isfinite(values).any():
        raise NothingToDraw(f"every recorded value of {name!r} is missing or not finite")
    return values


def _of_kind(record: Record, kind: str) -> Iterator[tuple[str, int, bool]]:
    """(name, number of groups, whether the law is closed) of every symmetry of a kind that has groups."""
    every = zip(record.symmetries, record.attrs["n_groups"], record.attrs["closed"], strict=True)
    return ((symmetry.name, n, closed) for symmetry, n, closed in every if symmetry.kind == kind and n)


def _representatives(record: Record) -> dict[str, str]:
    """Of each kind in the record, the name of the symmetry with the most groups, if possible of a closed law.

    Raises:
        NothingToDraw: There is none, or no charge was recorded.
    """
    if "charge" not in record.series:
        raise NothingToDraw("no charge was recorded; it is by default")
    of_kinds = {kind: list(_of_kind(record, kind)) for kind in CHARGE}
    found = {kind: max(them, key=lambda one: (one[2], one[1]))[0] for kind, them in of_kinds.items() if them}
    if not found:
        raise NothingToDraw("no symmetry was recorded")
    return found


def _worst_errors(
    record: Record, names: Iterable[str], laws: Iterable[LawName], rows: slice
) -> dict[LawName, NDArray[np.float64]]:
    """The largest relative error over all groups of some symmetries, [n rows] for each law; NaN if any is."""
    worst: dict[LawName, NDArray[np.float64]] = {}
    for name in names:
        needed = dict.fromkeys(series for law in laws for series in ("charge", *TERMS[law], DIFFERENCES[law]))
        data = record.read(name, list(needed), rows=rows)
        for law in laws:
            errors = relative_error(data, law).max("group", skipna=False).to_numpy()
            worst[law] = np.maximum(worst[law], errors) if law in worst else errors
    return worst
