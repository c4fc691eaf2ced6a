"""Panels placed on a page in inches, and axes without mathtext: figures of a record take seconds, not a minute.

What stands around a panel (title, ticks, labels, a second axis) has a known size in points. So panels are placed by
adding these sizes up, once they are drawn, where matplotlib's solver would have to lay out all text twice. Titles end
before the next panel begins. Numbers on the axes are plain Unicode text, which needs no parser of formulas.
"""

import re
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter, LogFormatterSciNotation, MaxNLocator, ScalarFormatter
from matplotlib.transforms import ScaledTranslation

from noetherperf.plots.style import MUTED, WIDTH, shown

__all__ = ["fits", "fitted", "new_panel", "new_sheet", "panel_width", "place", "plain_numbers", "title_room"]

POINTS = 72.0  # an inch
LEFT, GAP, RIGHT = 0.64, 0.66, 0.16  # inches left of the first panel, between panels, right of the last
Y_LABEL = 0.45  # left of a panel
TITLE = 0.135  # a line of it
ABOVE = 0.08  # between a panel and its title
TIME, TIME_LABEL = 0.38, 0.22  # the second axis on top; where its label is
OFFSET = 0.12  # the common factor of an axis' numbers
TICKS, LABEL = 0.2, 0.14  # numbers below a panel, and their label
LINE = 0.18  # of the legend
TEXT = 0.13  # a line of small text
MARGIN = 0.06
CHARACTER = 0.54  # average width of a character, in its font size
TITLE_SIZE, TEXT_SIZE, LETTER_SIZE = 8.0, 7.0, 9.0
TITLE_FONT = FontProperties(family="DejaVu Sans", size=TITLE_SIZE)
SUPERSCRIPTS = str.maketrans("0123456789-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻")


def new_sheet(width: float = WIDTH) -> Figure:
    """A figure for panels that `place` places; its height follows from them."""
    return Figure(figsize=(width, 1.0))


def new_panel(figure: Figure) -> Axes:
    """A panel whose place `place` finds."""
    return figure.add_axes((0.1, 0.1, 0.8, 0.8), label=str(len(figure.axes)))


def panel_width(figure: Figure, n_panels: int) -> float:
    """Width in inches of a panel in a row of so many."""
    return (figure.get_figwidth() - LEFT - RIGHT - GAP * (n_panels - 1)) / n_panels


def title_room(figure: Figure, n_panels: int) -> float:
    """Points of a title that ends before the next panel begins, in a row of so many panels."""
    return 0.96 * POINTS * (panel_width(figure, n_panels) + RIGHT)


def fits(text: str, room: float) -> bool:
    """Whether a title is no wider than so many points."""
    width: float = text_to_path.get_text_width_height_descent(text, TITLE_FONT, False)[0]
    return width <= room


def fitted(name: str, room: float) -> str:
    """A name on one line of a title, its middle replaced by … if it is longer than so many points."""
    longest = len(text := shown(name, len(name) * 12))
    while longest > 3 and not fits(text, room):
        longest -= 1 + int(longest > 2 * room / (CHARACTER * TITLE_SIZE))
        text = shown(name, longest)
    return text


def place(
    figure: Figure,
    rows: Sequence[Sequence[Axes]],
    height: float,
    *,
    legend_lines: int = 1,
    header: str = "",
    footer: str = "",
) -> None:
    """Place drawn panels, the figure's legend, and a line of small text above and below.

    Args:
        figure: From `new_sheet`; gets its height.
        rows: The panels; those of a row are equally wide.
        height: Of each panel, in inches.
        legend_lines: Lines of the figure's legend; 0 without one.
        header: Text above all panels.
        footer: Text below them.
    """
    n_characters = int(POINTS * (figure.get_figwidth() - 0.2) / (CHARACTER * TEXT_SIZE))
    header, footer = (fill(text, n_characters) for text in (header, footer))
    head, foot = (TEXT * (text.count("\n") + room) * bool(text) for text, room in ((header, 1.6), (footer, 1.1)))
    above = [max(_above(axes) for axes in row) for row in rows]
    below = [max(_below(axes) for axes in row) for row in rows]
    legend = LINE * legend_lines + MARGIN * (legend_lines > 0)
    total = head + sum(above) + sum(below) + height * len(rows) + legend + foot + 2 * MARGIN
    width = figure.get_figwidth()
    figure.set_figheight(total)
    top = total - MARGIN - head
    for row, over, under in zip(rows, above, below, strict=True):
        top -= over + height
        wide = panel_width(figure, len(row))
        for column, axes in enumerate(row):
            left = LEFT + column * (wide + GAP)
            axes.set_position((left / width, top / total, wide / width, height / total))
            _fix_labels(figure, axes)
        top -= under
    _letter([axes for row in rows for axes in row])
    for one in figure.legends:
        one.set_loc("lower center")
        one.set_bbox_to_anchor((0.5, (MARGIN + foot) / total), transform=figure.transFigure)
    for text, y in ((header, total - MARGIN - head + 0.6 * TEXT), (footer, MARGIN)):
        if text:
            figure.text(0.1 / width, y / total, text, fontsize=TEXT_SIZE, color=MUTED, va="bottom", parse_math=False)


def _above(axes: Axes) -> float:
    """Inches above a panel."""
    title: str = axes.get_title("left")
    return _title_starts(axes) + TITLE * (title.count("\n") + 1) * bool(title)


def _title_starts(axes: Axes) -> float:
    """Inches from a panel to its title."""
    formatter: Formatter = axes.yaxis.get_major_formatter()
    formatter.set_locs(axes.yaxis.get_majorticklocs())  # type: ignore[arg-type]
    has_time, has_factor = bool(axes.child_axes), bool(formatter.get_offset())
    return ABOVE + (TIME if has_time else OFFSET if has_factor else 0.0)


def _below(axes: Axes) -> float:
    """Inches below a panel."""
    has_ticks: bool = axes.xaxis.get_tick_params().get("labelbottom", True)
    return 0.04 + TICKS * has_ticks + LABEL * bool(axes.get_xlabel())


def _fix_labels(figure: Figure, axes: Axes) -> None:
    """Where title and labels stand; else matplotlib measures every number beside them to find out, at each drawing."""

    def moved(x: float, y: float) -> object:
        return axes.transAxes + ScaledTranslation(x, y, figure.dpi_scale_trans)

    title = axes.get_title("left")
    axes.set_title(title, y=1.0, pad=POINTS * _title_starts(axes), fontsize=TITLE_SIZE, parse_math=False)
    axes.yaxis.set_label_coords(0.0, 0.5, transform=moved(-Y_LABEL, 0.0))  # type: ignore[arg-type]
    axes.xaxis.set_label_coords(0.5, 0.0, transform=moved(0.0, -TICKS))  # type: ignore[arg-type]
    if axes.child_axes and (factor := axes.yaxis.get_major_formatter().get_offset()):
        axes.yaxis.get_offset_text().set_visible(False)  # it would be among the second axis' numbers
        axes.annotate(factor, (0, 1), xycoords="axes fraction", xytext=(3, -2), textcoords="offset points", va="top",
                      fontsize=TEXT_SIZE, bbox={"color": "white", "alpha": 0.7, "pad": 0.5})  # fmt: skip
    for top in axes.child_axes:
        top.xaxis.set_label_coords(0.5, 1.0, transform=moved(0.0, TIME_LABEL))  # type: ignore[arg-type]


def _letter(panels: Sequence[Axes]) -> None:
    """Letters a, b, c, … left of the panels' titles, if there are several."""
    for index, axes in enumerate(panels if len(panels) > 1 else ()):
        name = (chr(ord("a") + index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)
        axes.annotate(name, (0, 1), xycoords="axes fraction", xytext=(-8, POINTS * _title_starts(axes)), va="baseline",
                      textcoords="offset points", ha="right", weight="bold", fontsize=LETTER_SIZE)  # fmt: skip


def plain_numbers(*axes: Axis) -> None:
    """At most five numbers on each axis, as plain text."""
    for axis in axes:
        if axis.get_scale() == "log":
            axis.set_major_formatter(_Decades())
            axis.set_minor_formatter(_Decades())
        else:
            formatter = _Plain(useMathText=True)
            formatter.set_powerlimits((-3, 4))
            axis.set_major_formatter(formatter)
            axis.set_major_locator(MaxNLocator(5, integer=isinstance(axis, XAxis)))


class _Plain(ScalarFormatter):
    """Numbers whose common factor is "×10⁻³"."""

    def get_offset(self) -> str:
        return _unparsed(super().get_offset())

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _unparsed(super().__call__(x, pos))


class _Decades(LogFormatterSciNotation):
    """Powers of ten, "10⁻³"; and "2×10⁻³" where an axis spans less than that."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _unparsed(super().__call__(x, pos))


def _unparsed(formula: str) -> str:
    """A number that matplotlib has written as mathtext, in plain Unicode."""
    text = re.sub(r"\^\{([-−\d]+)\}", lambda power: power[1].translate(SUPERSCRIPTS), formula)
    text = re.sub(r"\\mathdefault\{([^{}]*)\}", r"\1", text.replace(r"\times", "×"))
    return re.sub(r"(?<=\S)\+", " + ", re.sub(r"[${}]", "", text))
