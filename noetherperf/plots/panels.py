"""One symmetry in one panel: measured groups in colour, the flow law as dots over them.

Curves are thinned: of a long record, the smallest and the largest value in each of some hundred bins are drawn, so that
no peak is lost and a picture takes seconds.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from noetherperf.plots.style import FLOW, MEASURED, MUTED, WIDTH, colors, label_steps, room, shown
from noetherperf.record import Record
from noetherperf.record.series import SERIES

__all__ = ["CHARGE", "MAX_CURVES", "draw", "explain", "label_time", "letter", "some_groups", "thinned"]

MAX_CURVES = 10
POINTS = 300  # of a drawn curve
CHARGE = {
    "translation": "⟨θ, 1⟩",
    "scale": "|θ|²",
    "rescale": "|θ₁|² − |θ₂|²",
    "norm": "|θ|²",
}

Groups = int | Sequence[int]  # how many, or which


def draw(axes: Axes, record: Record, name: str, groups: Groups, quantity: str = "charge") -> None:
    """Draw one quantity of some groups of a symmetry; of its charge, the flow law too, if it was recorded.

    Args:
        axes: Where.
        record: The record.
        name: The symmetry's.
        groups: Indices of groups, or how many to draw at evenly spaced ranks of their initial charge.
        quantity: One of `record.series`.
    """
    law = ["flow_total"] if quantity == "charge" and "flow_total" in record.series else []
    data = record.read(name, [quantity, *law])
    chosen = list(some_groups(data["initial"].to_numpy(), groups))
    columns = [group for group, _ in chosen]
    for which, lines in ((quantity, [{"color": color, **MEASURED} for _, color in chosen]), *((x, None) for x in law)):
        steps, values = thinned(record.steps, data[which].to_numpy()[:, columns])
        for x, y, line in zip(steps.T, values.T, lines or [FLOW] * len(columns), strict=True):
            axes.plot(x, y, **line)
    axes.set_title(_title(axes, data, len(columns)), parse_math=False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    label_steps(axes)


def some_groups(initial: NDArray[np.float64], groups: Groups) -> Iterator[tuple[int, Any]]:
    """Indices of groups, each with a colour: those named that exist, or so many at even ranks of the initial charge."""
    if isinstance(groups, int):
        order = np.argsort(initial)
        ranks = np.unique(np.linspace(0, len(order) - 1, min(groups, len(order))).round().astype(int))
        chosen = order[ranks].tolist()
    else:
        chosen = [group for group in groups if group < len(initial)]
    return zip(chosen, colors(len(chosen)), strict=True)


def thinned(x: NDArray[Any], values: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """At most about POINTS points of each curve: the least and the largest value in each bin, the first and the last.

    Args:
        x: [n rows].
        values: [n rows, n curves].

    Returns:
        x and values of the points, [n points, n curves] each.
    """
    n_rows, n_curves = values.shape
    if n_rows <= POINTS:
        return np.repeat(x[:, None], n_curves, axis=1), values
    size = -(-n_rows // (POINTS // 2))
    n_bins = -(-n_rows // size)
    padded = np.full((n_bins * size, n_curves), np.nan)
    padded[:n_rows] = values
    bins, missing = padded.reshape(n_bins, size, n_curves), np.isnan(padded).reshape(n_bins, size, n_curves)
    first = (size * np.arange(n_bins))[:, None]
    low = first + np.where(missing, np.inf, bins).argmin(axis=1)
    high = first + np.where(missing, -np.inf, bins).argmax(axis=1)
    ends = np.broadcast_to([[0], [n_rows - 1]], (2, n_curves))
    points = np.minimum(np.sort(np.concatenate([low, high, ends]), axis=0), n_rows - 1)
    return x[points], np.take_along_axis(values, points, axis=0)


def letter(panels: Sequence[Axes]) -> None:
    """Letters a, b, c, … left of the panels' titles, if there are several."""
    for index, axes in enumerate(panels if len(panels) > 1 else ()):
        name = (chr(ord("a") + index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)
        axes.annotate(name, (0, 1), xycoords="axes fraction", xytext=(-8, 5), textcoords="offset points", ha="right",
                      va="bottom", weight="bold", fontsize=9)  # fmt: skip


def explain(figure: Figure, groups: Groups, *, law: bool, measured: str = "measured") -> None:
    """A legend: the measured lines, and what their colours mean; the law.

    Args:
        figure: The figure, which `draw` has drawn into.
        groups: As drawn.
        law: Whether a law is drawn.
        measured: What the solid lines are.
    """
    if isinstance(groups, int):
        shades = tuple(Line2D([], [], color=color, **MEASURED, solid_capstyle="butt") for color in colors(24))
        handles: list[Any] = [shades]
        labels = [f"{measured}, coloured by the initial charge, small to large"]
    else:
        handles = [Line2D([], [], color=color, **MEASURED) for color in colors(len(groups))]
        labels = [f"{measured if i == 0 else ''} group {group}".strip() for i, group in enumerate(groups)]
    if law:
        handles.append(Line2D([], [], **FLOW))
        labels.append("flow law, free + forced")
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(handles), 6) if figure.get_figwidth() > 0.9 * WIDTH else 1,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def label_time(axes: Axes, record: Record) -> None:
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


def unit(quantity: str) -> str:
    """A quantity's name with its unit, for a legend."""
    units = SERIES[quantity].units
    name = quantity.replace("_", " ").replace("effective lr", "effective learning rate")
    return name if units == "1" else f"{name} ({units})"


def _title(axes: Axes, data: xr.Dataset, n_drawn: int) -> str:
    """The symmetry's name; its kind, and how many of its groups are drawn."""
    n_groups, width = data.sizes["group"], room(axes)
    some = f"{n_drawn} of {n_groups}" if n_drawn < n_groups else str(n_groups)
    kind, note = data.attrs["kind"], "" if data.attrs["closed"] else ", open law"
    what = f"{kind}, {some} group{'s' * (n_groups != 1)}{note}"
    return f"{shown(data.attrs['name'], width)}\n{shown(what, width)}"


def _interpolate(known_x: NDArray[np.float64], known_y: NDArray[np.float64], x: NDArray[np.float64]) -> Any:
    """Linear interpolation, with linear extrapolation beyond both ends, which an axis with margins needs."""
    before = (x - known_x[0]) * (known_y[1] - known_y[0]) / (known_x[1] - known_x[0])
    after = (x - known_x[-1]) * (known_y[-1] - known_y[-2]) / (known_x[-1] - known_x[-2])
    return np.interp(x, known_x, known_y) + np.minimum(before, 0.0) + np.maximum(after, 0.0)
