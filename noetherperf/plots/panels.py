"""One symmetry in one panel: measured groups in colour, the flow law as dots over them.

Curves are thinned: of a long record, the smallest and the largest value in each of some hundred bins are drawn, so that
no peak is lost and a picture takes seconds. The figure says so.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from noetherperf.plots.reading import columns_of, read_columns
from noetherperf.plots.sheet import fits, fitted, plain_numbers
from noetherperf.plots.style import FLOW, MEASURED, MUTED, WIDTH, colors
from noetherperf.record import Record
from noetherperf.record.series import SERIES

__all__ = [
    "CHARGE",
    "MAX_CURVES",
    "Curves",
    "Groups",
    "check_groups",
    "dot",
    "draw",
    "explain",
    "group_colors",
    "label_steps",
    "label_time",
    "read_curves",
    "some_groups",
    "thinned",
    "thinning",
    "unit",
]

MAX_CURVES = 10
BY_CHARGE = "measured, coloured by the initial charge"
POINTS = 400  # of a drawn curve
CHARGE = {
    "translation": "⟨θ, 1⟩",
    "scale": "|θ|²",
    "rescale": "|θ₁|² − |θ₂|²",
    "norm": "|θ|²",
}

Groups = int | Sequence[int]  # how many, or which


class Curves(NamedTuple):
    """What is drawn of one symmetry.

    Attributes:
        name: The symmetry's.
        notes: Its kind, how many of its groups are drawn, whether its law is open; in other words, longest first.
        measured: The quantity, [n rows, n drawn].
        law: The flow law, alike; None if it is not drawn.
        colors: Of the curves, [n drawn, 4].
    """

    name: str
    notes: Sequence[str]
    measured: NDArray[np.float64]
    law: NDArray[np.float64] | None
    colors: NDArray[np.float64]


def read_curves(record: Record, names: Iterable[str], groups: Groups, quantity: str = "charge") -> dict[str, Curves]:
    """Some groups of each symmetry, read together; of its charge, the flow law too, if it was recorded.

    Args:
        record: The record.
        names: Of the symmetries.
        groups: Indices of groups, or how many to draw at evenly spaced ranks of their initial charge.
        quantity: One of `record.series`.
    """
    law = quantity == "charge" and "flow_total" in record.series
    initial = record.dataset["initial"].to_numpy()
    places = {name: columns_of(record, name) for name in names}
    chosen = {name: some_groups(initial[place], groups) for name, place in places.items()}
    wanted = [place.start + group for name, place in places.items() for group in chosen[name]]
    values = read_columns(record, [quantity, *["flow_total"] * law], wanted)
    found, start = {}, 0
    for name, drawn in chosen.items():
        columns = slice(start, start + len(drawn))
        start = columns.stop
        found[name] = Curves(
            name,
            _notes(record, name, len(drawn)),
            values[quantity][:, columns],
            values["flow_total"][:, columns] if law else None,
            group_colors(groups, drawn),
        )
    return found


def draw(axes: Axes, steps: NDArray[np.int64], curves: Curves, room: float) -> None:
    """Draw one symmetry.

    Args:
        axes: Where.
        steps: Of the rows.
        curves: What.
        room: Points of a title.
    """
    x, values = thinned(steps, curves.measured)
    for one_x, y, color in zip(x.T, values.T, curves.colors, strict=True):
        axes.plot(one_x, y, color=color, **MEASURED, **dot(y))
    if curves.law is not None:
        x, values = thinned(steps, curves.law)
        for one_x, y in zip(x.T, values.T, strict=True):
            axes.plot(one_x, y, **FLOW, **dot(y, size=2))
    note = next((note for note in curves.notes if fits(note, room)), curves.notes[-1])
    axes.set_title(f"{fitted(curves.name, room)}\n{note}", parse_math=False)
    label_steps(axes, steps)
    if not (finite := np.isfinite(curves.measured).all(axis=1)).all():
        axes.text(0.98, 0.95, f"not finite at step {steps[finite.argmin()]}", transform=axes.transAxes, ha="right",
                  va="top", fontsize=7, color=MUTED)  # fmt: skip


def dot(values: NDArray[np.float64], size: float = 5) -> dict[str, Any]:
    """How to draw a curve of which only one value is finite, and which would be invisible as a line."""
    return {"marker": "o", "markersize": size, "markeredgewidth": 0} if np.isfinite(values).sum() == 1 else {}


def label_steps(axes: Axes, steps: NDArray[np.int64]) -> None:
    """The axis of all steps, and plain numbers on both."""
    axes.set_xlabel("step")
    margin = 0.02 * float(steps[-1] - steps[0]) or 1.0
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    plain_numbers(axes.xaxis, axes.yaxis)


def check_groups(groups: Groups) -> None:
    """Check a choice of groups.

    Raises:
        ValueError: It is neither a number, at least 1, nor indices.
    """
    if (groups < 1) if isinstance(groups, int) else (not groups or min(groups) < 0):
        raise ValueError(f"groups: must be a number of groups, at least 1, or their indices from 0, got {groups!r}")


def some_groups(initial: NDArray[np.float64], groups: Groups) -> list[int]:
    """Indices of groups: those named that exist, or so many at evenly spaced ranks of the initial charge."""
    if not isinstance(groups, int):
        return [group for group in groups if group < len(initial)]
    order = np.argsort(initial)
    ranks = np.unique(np.linspace(0, len(order) - 1, min(groups, len(order))).round().astype(int))
    found: list[int] = order[ranks].tolist()
    return found


def group_colors(groups: Groups, drawn: Sequence[int]) -> NDArray[np.float64]:
    """A colour for each drawn group: by rank, or one for each index that was named, in all panels."""
    if isinstance(groups, int):
        return colors(len(drawn))
    return colors(len(groups))[[groups.index(group) for group in drawn]]


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
    size = _bin(n_rows)
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


def thinning(n_rows: int) -> str:
    """What `thinned` does to curves of so many rows, for the reader; "" where all are drawn."""
    if n_rows <= POINTS:
        return ""
    return f"Thinned: of every {_bin(n_rows)} of {n_rows:,} rows, the least and the greatest value."


def _bin(n_rows: int) -> int:
    return -(-n_rows // (POINTS // 2))


def explain(figure: Figure, groups: Groups, *, law: str, measured: str = BY_CHARGE) -> int:
    """A legend: the measured lines, and what their colours mean; the law.

    Args:
        figure: The figure, which `draw` has drawn into.
        groups: As drawn.
        law: What the dotted lines are; "" without any.
        measured: What the solid lines are, and what their colours follow if groups were not named.

    Returns:
        Lines of the legend.
    """
    if isinstance(groups, int):
        shades = tuple(Line2D([], [], color=color, **MEASURED, solid_capstyle="butt") for color in colors(24))
        handles: list[Any] = [shades]
        labels = [f"{measured}, small to large"]
    else:
        handles = [Line2D([], [], color=color, **MEASURED) for color in colors(len(groups))]
        labels = [f"group {group}" for group in groups]
    if law:
        handles.append(Line2D([], [], **FLOW))
        labels.append(law)
    n_columns = min(len(handles), 6) if figure.get_figwidth() > 0.9 * WIDTH else 1
    figure.legend(
        handles, labels, loc="lower center", ncols=n_columns, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}
    )
    return -(-len(handles) // n_columns)


def label_time(axes: Axes, record: Record) -> None:
    """A second axis for the time of the flow, if time increases at every step (it does not while lr is zero)."""
    steps, times = record.steps.astype(float), record.times
    if len(times) < 2 or not np.all(np.diff(times) > 0):
        return

    convert: Any = (partial(_interpolate, steps, times), partial(_interpolate, times, steps))
    top = axes.secondary_xaxis("top", functions=convert)
    top.set_xlabel("time η·steps", color=MUTED, fontsize=7)
    plain_numbers(top.xaxis)
    top.xaxis.set_major_locator(MaxNLocator(4))
    top.tick_params(colors=MUTED, labelsize=6.5)
    top.spines["top"].set(visible=True, color=MUTED)


def unit(quantity: str) -> str:
    """A quantity's name with its unit, for a legend."""
    units = SERIES[quantity].units
    name = quantity.replace("_", " ").replace("effective lr", "effective learning rate")
    return name if units == "1" else f"{name} ({units})"


def _notes(record: Record, name: str, n_drawn: int) -> tuple[str, str]:
    """A symmetry's kind, how many of its groups are drawn, whether its law is open; with fewer words."""
    index = list(record).index(name)
    kind, n_groups = record.symmetries[index].kind, record.attrs["n_groups"][index]
    some = f"{n_drawn} of {n_groups}" if n_drawn < n_groups else str(n_groups)
    long, short = f"{kind}, {some} group{'s' * (n_groups != 1)}", f"{kind}, {some}"
    return (long, short) if record.attrs["closed"][index] else (f"{long}, open law", f"{short}, open")


def _interpolate(known_x: NDArray[np.float64], known_y: NDArray[np.float64], x: NDArray[np.float64]) -> Any:
    """Linear interpolation, with linear extrapolation beyond both ends, which an axis with margins needs."""
    before = (x - known_x[0]) * (known_y[1] - known_y[0]) / (known_x[1] - known_x[0])
    after = (x - known_x[-1]) * (known_y[-1] - known_y[-2]) / (known_x[-1] - known_x[-2])
    return np.interp(x, known_x, known_y) + np.minimum(before, 0.0) + np.maximum(after, 0.0)
