"""Figures of the Balances of a record: spectra over time with the law over them, and matrices as pictures."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from noetherperf.plots.choice import chosen, rows_of_layers
from noetherperf.plots.layers import pages
from noetherperf.plots.panels import (
    MAX_CURVES,
    Curves,
    Groups,
    check_groups,
    group_colors,
    some_groups,
)
from noetherperf.plots.sheet import fitted, new_panel, new_sheet, panel_width, place, title_room
from noetherperf.plots.style import MEASURED, NothingToDraw, shown, style
from noetherperf.record import Record
from noetherperf.symmetry import Symmetry

__all__ = ["matrices", "spectra"]

ROWS = 5  # of matrices on a page
CHARGE = "X = W₁W₁ᵀ − W₂W₂ᵀ"
COLORS = "RdBu_r"  # negative blue, positive red: apart for every kind of colour vision


def spectra(
    record: Record, *, symmetries: Iterable[str] = (), modules: Iterable[str] = (), groups: Groups = MAX_CURVES
) -> list[Figure]:
    """Eigenvalues of the matrices of every Balance over time, the discrete law's over them; a row a layer.

    The eigenvalues of all blocks are pooled; a block is a head, for example.

    Args:
        record: From `open_record`.
        symmetries: Names of the Balances to draw; by default all.
        modules: Names of modules; Balances with a part in one of them are drawn. With `symmetries`, both are.
        groups: How many eigenvalues of each, at evenly spaced ranks of the first row's; or which: indices among
            blocks · n, the units of a block in ascending order of eigenvalues.

    Returns:
        The pages.

    Raises:
        ValueError: The record has no such symmetry or module; the message has the nearest names.
        NothingToDraw: No Balance was recorded, or none that was asked for.
    """
    check_groups(groups)
    found = _balances(record, symmetries, modules)
    curves = {balance.name: _curves(record, balance.name, groups) for balance in found}
    curves = {name: one for name, one in curves.items() if one.measured.size}
    if not curves:
        raise NothingToDraw(f"no Balance has the eigenvalues {groups}" if found else "no Balance was recorded")
    with style():
        return pages(
            record,
            rows_of_layers([balance for balance in found if balance.name in curves]),
            curves,
            groups,
            measured="eigenvalues, coloured by their first value",
            law="discrete law, free + forced",
            header=f"eigenvalues of {CHARGE}",
        )


def _curves(record: Record, name: str, groups: Groups) -> Curves:
    data = record.balance(name, ["eigenvalues", "predicted_eigenvalues"])
    blocks, n = data.sizes["block"], data.sizes["unit"]
    measured, law = (data[which].to_numpy().reshape(-1, blocks * n) for which in data)
    drawn = some_groups(measured[0], groups)
    some = f"{len(drawn)} of {blocks * n}" if len(drawn) < blocks * n else f"{blocks * n}"
    of = f" of {blocks} blocks" if blocks > 1 else ""
    note = "" if data.attrs["closed"] else ", open"
    return Curves(
        name,
        (f"balance, {some} eigenvalues{of}{note and ', open law'}", f"{some} eigenvalues{note}", f"{some}{note}"),
        measured[:, drawn],
        law[:, drawn],
        group_colors(groups, drawn),
    )


class Picture(NamedTuple):
    """One block's matrices at one row.

    Attributes:
        balance: Its name.
        note: Which block.
        charge, predicted: [n, n].
    """

    balance: str
    note: str
    charge: NDArray[np.float64]
    predicted: NDArray[np.float64]


def matrices(
    record: Record, *, symmetries: Iterable[str] = (), modules: Iterable[str] = (), blocks: Groups = 1
) -> list[Figure]:
    """Matrices of every Balance at the last row, as pictures: the charge, the discrete law's, and their difference.

    Args:
        record: From `open_record`, of a `Recorder(..., matrices=True)`.
        symmetries: Names of the Balances to draw; by default all.
        modules: Names of modules; Balances with a part in one of them are drawn. With `symmetries`, both are.
        blocks: How many blocks, such as heads, of each: those that the law misses most; or which.

    Returns:
        The pages, a row for each block. Charge and prediction have one scale, which its title tells.

    Raises:
        ValueError: The record has no such symmetry or module; the message has the nearest names.
        NothingToDraw: No matrices were recorded, or none that are finite.
    """
    check_groups(blocks)
    found = _balances(record, symmetries, modules)
    recorded = [one for one in found if f"{one.name}: charge" in record.probes]
    if not recorded:
        way = "no matrices were recorded; to record them, Recorder(..., matrices=True)"
        raise NothingToDraw(way if found else "no Balance was recorded")
    last = slice(len(record.steps) - 1, None)
    drawn = {one.name: _pictures(record, one.name, blocks, last) for one in recorded}
    if not any(drawn.values()):
        raise NothingToDraw(f"no matrix of the last row is finite, or none has a block {blocks}")
    rows = [
        (layer, picture)
        for layer, names in rows_of_layers(recorded, n_columns=1)
        for name in names
        for picture in drawn[name]
    ]
    with style():
        return [_page(record, rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]


def _pictures(record: Record, name: str, blocks: Groups, rows: slice) -> list[Picture]:
    """Those blocks of a Balance that are finite at the row."""
    data = record.balance(name, ["charge", "predicted_charge"], rows=rows).isel(step=0)
    charge, predicted = data["charge"].to_numpy(), data["predicted_charge"].to_numpy()
    missed = np.abs(charge - predicted).max((1, 2), initial=0.0)
    finite = np.flatnonzero(np.isfinite(missed))
    worst = finite[np.argsort(-missed[finite], kind="stable")][:blocks] if isinstance(blocks, int) else blocks
    return [
        Picture(name, f"block {block} of {len(missed)}", charge[block], predicted[block])
        for block in worst
        if block in finite
    ]


def _page(record: Record, rows: list[tuple[str, Picture]]) -> Figure:
    figure = new_sheet()
    panels = []
    room = title_room(figure, 3)
    for layer, picture in rows:
        size, difference = _size(picture.charge, picture.predicted), picture.charge - picture.predicted
        row = [new_panel(figure) for _ in range(3)]
        _draw(row[0], picture.charge, size, f"{fitted(picture.balance, room)}\ncharge, {picture.note}, ±{size:.2g}")
        _draw(row[1], picture.predicted, size, f"discrete law\nfree + forced, ±{size:.2g}")
        _draw(row[2], difference, _size(difference), f"charge − law\n±{_size(difference):.2g}")
        row[0].set_ylabel(shown(layer, 20), weight="bold", parse_math=False)
        panels.append(row)
    shades: Any = tuple(
        Line2D([], [], color=color, **MEASURED, solid_capstyle="butt")
        for color in matplotlib.colormaps[COLORS](np.linspace(0.0, 1.0, 24))
    )
    figure.legend(
        [shades],
        ["from −a to a, where ±a is in the title"],
        loc="lower center",
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
    place(
        figure,
        panels,
        panel_width(figure, 3),
        header=f"{CHARGE} at step {record.steps[-1]}; rows and columns are units",
    )
    return figure


def _size(*values: NDArray[np.float64]) -> float:
    """The largest |entry|, the end of a scale."""
    return float(max(np.abs(x).max(initial=0.0) for x in values))


def _draw(axes: Axes, values: NDArray[np.float64], size: float, title: str) -> None:
    end = size or 1.0
    axes.imshow(values, cmap=COLORS, vmin=-end, vmax=end, interpolation="nearest", aspect="auto")
    axes.set_title(title, parse_math=False)
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(True)


def _balances(record: Record, symmetries: Iterable[str], modules: Iterable[str]) -> list[Symmetry]:
    return [one for one in chosen(record, list(symmetries), list(modules)) if one.name in record.balances]
