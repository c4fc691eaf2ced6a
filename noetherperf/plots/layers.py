"""All symmetries of a record, or chosen ones: a row of panels for each layer, page by page."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from noetherperf.plots.choice import Rows, chosen, rows_of_layers
from noetherperf.plots.panels import (
    CHARGE,
    MAX_CURVES,
    Curves,
    Groups,
    check_groups,
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
from noetherperf.symmetry.names import nearest

__all__ = ["layers", "pages"]

ROWS = 7  # of a page
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
    check_groups(groups)
    every = chosen(record, list(symmetries), list(modules))
    found = [symmetry for symmetry in every if symmetry.name not in record.balances]
    if every and not found:
        raise NothingToDraw("the charges of a Balance are matrices: draw its eigenvalues (spectra) or matrices")
    n_groups = dict(zip(record, record.attrs["n_groups"], strict=True))
    least = 0 if isinstance(groups, int) else min(groups)
    if not (drawn := [symmetry for symmetry in found if n_groups[symmetry.name] > least]):
        last = max((n_groups[symmetry.name] for symmetry in found), default=0) - 1
        raise NothingToDraw(
            "no symmetry was recorded" if last < 0 else f"no symmetry has a group {least}; the last index is {last}"
        )
    curves = read_curves(record, [symmetry.name for symmetry in drawn], groups, quantity)
    law = "flow law, free + forced" if quantity == "charge" and "flow_total" in record.series else ""
    with style():
        return pages(
            record,
            rows_of_layers(drawn),
            curves,
            groups,
            measured=f"{unit(quantity)}, coloured by the initial charge",
            law=law,
            header=_formula(drawn, quantity),
        )


def pages(
    record: Record, rows: Rows, curves: Mapping[str, Curves], groups: Groups, *, measured: str, law: str, header: str
) -> list[Figure]:
    """Rows of panels, page by page.

    Args:
        record: The record.
        rows: Layers, and the names of what is drawn of each.
        curves: By name.
        groups: As drawn.
        measured: What the solid lines are, and what their colours follow.
        law: What the dotted lines are; "" without any.
        header: Above the panels of each page.
    """
    return [
        _page(record, rows[start : start + ROWS], curves, groups, measured, law, header)
        for start in range(0, len(rows), ROWS)
    ]


def _page(
    record: Record, rows: Rows, curves: Mapping[str, Curves], groups: Groups, measured: str, law: str, header: str
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
    place(
        figure,
        panels,
        PANEL,
        legend_lines=explain(figure, groups, law=law, measured=f"measured {measured}"),
        header=header,
        footer=thinning(len(record.steps)),
    )
    return figure


def _formula(symmetries: Sequence[Symmetry], quantity: str) -> str:
    if quantity != "charge":
        return f"{unit(quantity)}: {SERIES[quantity].formula}"
    kinds = dict.fromkeys(symmetry.kind for symmetry in symmetries)
    return "charge: " + " · ".join(f"{kind} {CHARGE[kind]}" for kind in kinds)
