"""All symmetries of a record, or chosen ones: a row of panels for each layer, page by page."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from noetherperf.plots.panels import (
    CHARGE,
    MAX_CURVES,
    Curves,
    Groups,
    draw,
    explain,
    label_time,
    read_curves,
    thinning,
    unit,
)
from noetherperf.plots.sheet import new_panel, new_sheet, place, title_room
from noetherperf.plots.style import NothingToDraw, shown, style
from noetherperf.record import Record
from noetherperf.record.series import SERIES
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import meant, nearest

__all__ = ["layers"]

COLUMNS, ROWS = 3, 7  # of a page
PANEL = 0.8  # height in inches


def layers(
    record: Record,
    quantity: str = "charge",
    *,
    symmetries: Iterable[str] = (),
    modules: Iterable[str] = (),
    groups: Groups = MAX_CURVES,
) -> list[Figure]:
    """One quantity of every symmetry: a row of panels for each layer, at most seven rows a page.

    A layer is a module; a symmetry is in the row of its first part's. Charges are drawn with the flow law over them.

    Args:
        record: From `open_record`.
        quantity: One of `record.series`, such as "charge", "effective_lr", "angular_update", "residual".
        symmetries: Names of those to draw; by default all.
        modules: Names of modules; symmetries with a part in one of them are drawn. With `symmetries`, both are.
        groups: How many groups of each symmetry, at evenly spaced ranks of their initial charge; or the indices of
            groups.

    Returns:
        The pages.

    Raises:
        ValueError: The record has no such quantity, symmetry or module; the message has the nearest names.
        NothingToDraw: Nothing was recorded of any of them.
    """
    if quantity not in record.series:
        asked = "; record it with Recorder(..., series=[...])" if quantity in SERIES else ""
        raise ValueError(f"quantity: {quantity!r} is not in this record{asked}; {nearest(quantity, record.series)}")
    if (groups < 1) if isinstance(groups, int) else (not groups or min(groups) < 0):
        raise ValueError(f"groups: must be a number of groups, at least 1, or their indices from 0, got {groups!r}")
    chosen = _chosen(record, list(symmetries), list(modules))
    n_groups = dict(zip(record, record.attrs["n_groups"], strict=True))
    least = 0 if isinstance(groups, int) else min(groups)
    if not (drawn := [symmetry for symmetry in chosen if n_groups[symmetry.name] > least]):
        raise NothingToDraw(
            f"no symmetry of the record has a group {least}" if any(n_groups.values()) else "no symmetry was recorded"
        )
    rows = _rows(drawn)
    curves = read_curves(record, [symmetry.name for symmetry in drawn], groups, quantity)
    with style():
        return [
            _page(record, rows[start : start + ROWS], curves, quantity, groups) for start in range(0, len(rows), ROWS)
        ]


def _chosen(record: Record, names: Sequence[str], modules: Sequence[str]) -> list[Symmetry]:
    """The symmetries of these names, and those with a part in one of these modules; all if neither is given."""
    if not names and not modules:
        return list(record.symmetries)
    wanted = set[str]()
    for name in names:
        found = [name] if name in record else meant(name, record.symmetries)
        if not found:
            raise ValueError(f"symmetry: the record has no {name!r}; {nearest(name, list(record))}")
        wanted.update(found)
    known = {module for symmetry in record.symmetries for module in _modules(symmetry)}
    for module in modules:
        if module not in known:
            raise ValueError(f"layer: no recorded symmetry has a part in {module!r}; {nearest(module, sorted(known))}")
    return [s for s in record.symmetries if s.name in wanted or not _modules(s).isdisjoint(modules)]


def _modules(symmetry: Symmetry) -> set[str]:
    return {_module(part.parameter) for part in symmetry.parts}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _rows(symmetries: Collection[Symmetry]) -> list[tuple[str, list[str]]]:
    """Rows of panels: a layer, and names of at most COLUMNS of its symmetries."""
    of_layer: dict[str, list[str]] = {}
    for symmetry in symmetries:
        of_layer.setdefault(_module(symmetry.parts[0].parameter), []).append(symmetry.name)
    return [
        (layer, names[start : start + COLUMNS])
        for layer, names in of_layer.items()
        for start in range(0, len(names), COLUMNS)
    ]


def _page(
    record: Record, rows: Sequence[tuple[str, list[str]]], curves: Mapping[str, Curves], quantity: str, groups: Groups
) -> Figure:
    figure = new_sheet()
    panels: list[list[Axes]] = []
    for row, (layer, names) in enumerate(rows):
        is_last = row + 1 == len(rows)
        panels.append([])
        for name in names:
            axes = new_panel(figure)
            draw(axes, record.steps, curves[name], title_room(figure, len(names)))
            axes.set_xlabel("step" if is_last else "")
            axes.tick_params(labelbottom=is_last or len(rows[row + 1][1]) != len(names))
            if row == 0:
                label_time(axes, record)
            panels[-1].append(axes)
        panels[-1][0].set_ylabel(shown(layer, 20), weight="bold", parse_math=False)
    law = quantity == "charge" and "flow_total" in record.series
    place(
        figure,
        panels,
        PANEL,
        legend_lines=explain(figure, groups, law=law, measured=f"measured {unit(quantity)}"),
        header=_formula(record, rows, quantity),
        footer=thinning(len(record.steps)),
    )
    return figure


def _formula(record: Record, rows: Sequence[tuple[str, list[str]]], quantity: str) -> str:
    if quantity != "charge":
        return f"{unit(quantity)}: {SERIES[quantity].formula}"
    kind_of = {symmetry.name: symmetry.kind for symmetry in record.symmetries}
    kinds = dict.fromkeys(kind_of[name] for _, names in rows for name in names)
    return "charge: " + " · ".join(f"{kind} {CHARGE[kind]}" for kind in kinds)
