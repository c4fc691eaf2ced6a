"""Figures of a record, for print: measured charges in colour, the flow law as dotted lines over them.

Every function takes a `Record` and returns a new matplotlib Figure. Colours are ordered by lightness and lines differ
in their dashes, so the figures are readable in grey. A figure without data is not made: it raises NothingToDraw, which
says what the record lacks.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.plots.balances import matrices, spectra
from noetherperf.plots.layers import layers
from noetherperf.plots.panels import (
    CHARGE,
    MAX_CURVES,
    dot,
    draw,
    explain,
    label_steps,
    label_time,
    read_curves,
    some_groups,
    thinned,
    thinning,
)
from noetherperf.plots.reading import columns_of, read_blocks
from noetherperf.plots.sheet import new_panel, new_sheet, place, title_room
from noetherperf.plots.style import BLUE, KIND_LINES, MUTED, WIDTH, NothingToDraw, colors, log_axis, save, styled
from noetherperf.record import TERMS, LawName, Record
from noetherperf.record.files import outside_records
from noetherperf.record.law_error import DIFFERENCES, error_of

__all__ = ["FIGURES", "charges", "loss", "parameters", "residuals", "save_all"]

PANEL = 1.75  # height in inches
MEANS = 500  # of a running mean, at most
#: Machine epsilon of the dtypes that parameters may have: the relative rounding error of one stored value.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOW_LAW = "flow law, free + forced"
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
    n_columns = min(len(names), 3) if len(names) != 4 else 2
    figure = new_sheet(WIDTH * (0.5, 0.8, 1)[n_columns - 1])
    curves = read_curves(record, names.values(), MAX_CURVES)
    panels = []
    for kind, name in names.items():
        panels.append(new_panel(figure))
        draw(panels[-1], record.steps, curves[name], title_room(figure, n_columns))
        panels[-1].set_ylabel(CHARGE[kind])
        label_time(panels[-1], record)
    lines = explain(figure, MAX_CURVES, law=FLOW_LAW * ("flow_total" in record.series))
    rows = [panels[start : start + n_columns] for start in range(0, len(panels), n_columns)]
    place(figure, rows, PANEL, legend_lines=lines, footer=thinning(len(record.steps)))
    return figure


@styled
def residuals(record: Record) -> Figure:
    """Relative errors of flow law, discrete law and the update's budget over training, worst group of each kind.

    The error is `relative_error`, the largest over all groups of all symmetries of a kind with a closed law, at every
    row. The grey line is the machine epsilon of the parameters' dtype, the
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
        why = f"no law is closed ({reason})" if reason else "no symmetry with a charge for each group was recorded"
        raise NothingToDraw(f"{why}, so that none predicts anything")
    worst = _worst_errors(record, {kind: names for kind, names in closed.items() if names}, laws)
    if not any(_are_visible(errors[law]) for errors in worst.values() for law in laws):
        raise NothingToDraw("no recorded error of a law is finite and above 0")
    figure = new_sheet()
    panels = []
    floors = {name: EPSILON[name] for name in record.attrs["dtypes"] if name in EPSILON}
    for law in laws:
        panels.append(axes := new_panel(figure))
        axes.set_title(LAWS[law])
        for kind, errors in worst.items():
            steps, points = thinned(record.steps, errors[law][:, None])
            axes.plot(steps, points, **KIND_LINES[kind])
        if not any(_are_visible(errors[law]) for errors in worst.values()):
            axes.text(0.5, 0.5, "no error above 0", transform=axes.transAxes, ha="center", color=MUTED)
        for name, floor in floors.items():
            axes.axhline(floor, color="0.7", linewidth=0.8, zorder=0)
            axes.annotate(f"{name} ε", (1, floor), xycoords=("axes fraction", "data"), color=MUTED, fontsize=6.5,
                          xytext=(0, 2), textcoords="offset points", ha="right")  # fmt: skip
        log_axis(axes, [*(errors[law] for errors in worst.values() for law in laws), np.array(list(floors.values()))])
        label_steps(axes, record.steps)
    for axes in panels[1:]:
        axes.sharey(panels[0])
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel("relative error of the worst group")
    handles = [Line2D([], [], **KIND_LINES[kind], label=kind) for kind in worst]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles))
    place(figure, [panels], PANEL, footer=thinning(len(record.steps)))
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
    figure = new_sheet(0.8 * WIDTH)
    left, right = new_panel(figure), new_panel(figure)
    left.set_title("parameters\nsingle entries")
    values = values.reshape(len(record.steps), -1)
    chosen = some_groups(values[0], MAX_CURVES)
    steps, points = thinned(record.steps, values[:, chosen])
    for x, y, color in zip(steps.T, points.T, colors(len(chosen)), strict=True):
        left.plot(x, y, color=color, linewidth=0.8, **dot(y))
    left.set_ylabel("θᵢ")
    label_steps(left, record.steps)
    draw(right, record.steps, read_curves(record, [name], MAX_CURVES)[name], title_room(figure, 2))
    right.set_ylabel(CHARGE[kind])
    for axes in (left, right):
        label_time(axes, record)
    lines = explain(figure, MAX_CURVES, law=FLOW_LAW * ("flow_total" in record.series))
    place(figure, [[left, right]], PANEL, legend_lines=lines, footer=thinning(len(record.steps)))
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
    figure = new_sheet(WIDTH / 2)
    axes = new_panel(figure)
    values = values.reshape(len(record.steps), -1)[:, 0]
    logged = ~np.isnan(values)
    steps, values = record.steps[logged], values[logged]
    window = max(1, len(values) // 50)
    look: dict[str, Any] = {"color": "0.75", "linewidth": 0.7} if window > 1 else {"color": BLUE, "linewidth": 1.4}
    axes.plot(*thinned(steps, values[:, None]), **look, label="measured", **dot(values))
    if window > 1:
        rows = np.unique(np.linspace(0, len(values) - 1, MEANS).round().astype(int))
        means = _means(values, rows, window)
        axes.plot(steps[rows], means, color=BLUE, linewidth=1.4, label=f"mean of {window} values")
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if positive.size and finite.min() >= 0 and positive.max() > 10 * positive.min():
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("training loss of the batch")
    label_steps(axes, record.steps)
    figure.legend(loc="lower center", ncols=2)
    place(figure, [[axes]], PANEL, footer=thinning(len(values)))
    return figure


def _means(values: NDArray[np.float64], rows: NDArray[np.intp], window: int) -> NDArray[np.float64]:
    """The mean of so many values around each of some rows; fewer at both ends."""
    return np.array([values[max(0, row - window // 2) : row + (window - 1) // 2 + 1].mean() for row in rows])


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
        symmetries; spectra and matrices, of Balances.

    Raises:
        ValueError: The directory is inside a record.
    """
    formats, files = list(formats), list[Path]()
    folder = outside_records(local_path(directory, "directory"), "directory")
    makers: list[Callable[[Record], Figure | list[Figure]]] = [charges, _others, *FIGURES[1:]]
    if record.balances:
        makers += [spectra, matrices]
    for make in makers:
        name = "layers" if make is _others else make.__name__
        try:
            files += save(make(record), folder / name, formats, dpi)
        except NothingToDraw as error:
            left_out(name, str(error))
    return files


def _others(record: Record) -> list[Figure]:
    """All symmetries, if `charges` shows only some."""
    if len(_representatives(record)) == len(record):
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
        raise NothingToDraw("only Balances were recorded" if record.balances else "no symmetry was recorded")
    return found


def _are_visible(errors: NDArray[np.float64]) -> bool:
    """Whether a logarithmic axis shows any of them."""
    return bool((np.isfinite(errors) & (errors > 0)).any())


def _worst_errors(
    record: Record, of_kind: Mapping[str, Sequence[str]], laws: Sequence[LawName]
) -> dict[str, dict[LawName, NDArray[np.float64]]]:
    """The largest relative error over all groups of some symmetries of each kind, [n rows] by law; NaN if any is."""
    series = list(dict.fromkeys(name for law in laws for name in ("charge", *TERMS[law], DIFFERENCES[law])))
    kind_of = np.full(sum(record.attrs["n_groups"]), "", object)
    for kind, names in of_kind.items():
        for name in names:
            kind_of[columns_of(record, name)] = kind
    worst = {kind: {law: np.full(len(record.steps), -np.inf) for law in laws} for kind in of_kind}
    for rows, groups, values in read_blocks(record, series, np.flatnonzero(kind_of != "")):
        for law in laws:
            errors = error_of(values, law)
            for kind in of_kind:
                of = np.flatnonzero(kind_of[groups] == kind)
                if len(of):
                    so_far = worst[kind][law][rows]
                    np.maximum(so_far, errors[:, of].max(axis=1), out=so_far)
    return worst
