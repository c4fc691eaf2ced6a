"""A readout's table for people: text, a rich renderable, and HTML for a notebook."""

import html
import math
import shutil
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable, as_text
from noetherperf.measure.table import Row, Spread
from noetherperf.measure.verdict import number

__all__ = ["ReadoutTable"]

#: The columns, and whether each holds text.
COLUMNS = {
    "symmetry": True,
    "kind": True,
    "groups": False,
    "charge": False,
    "decay": False,
    "growth": False,
    "defect": False,
    "rounding": False,
    "angle": False,
    "eff. lr": False,
    "verdict": True,
}
FOLDED = ("symmetry", "verdict")
#: Where there is no terminal.
WIDTH = 120

_STYLE = "text-align: {}; white-space: {}; padding: 0 0.6em; vertical-align: top"


class ReadoutTable:
    """The symmetries of a readout as a table, worst first. `str()` and `print` give text, a notebook shows HTML.

    `charge` is the median over groups, and the range. The groups of a Balance are its eigenvectors, and their charges
    its eigenvalues. `decay`, `growth`, `defect` and `rounding` are the parts of its change since measuring began:
    medians of absolute values, with the sign, or with ± if groups differ in it. If a law is open and the rule has
    growth and transport, `growth` and `defect` are these. `angle` is in radians. measure/verdict.py lists the verdicts,
    and what proves each.

    Attributes:
        rows: All rows, as data (measure/table.py).
        step: Steps since measuring began.
        limit: How many rows are shown; None: all.
    """

    def __init__(self, rows: Sequence[Row], step: int, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"rows: must be a number of rows, or None for all, got {limit!r}")
        self.rows, self.step, self.limit = list(rows), step, limit

    @property
    def _shown(self) -> list[Row]:
        return self.rows[: self.limit]

    @property
    def _title(self) -> str:
        if not self.rows:
            return f"Step {self.step}: nothing is measured; give the optimizer symmetries"
        return f"Step {self.step}: charges and their change since the start, by median over groups; the worst first"

    def _notes(self) -> Iterator[str]:
        """The lines below the table."""
        more = len(self.rows) - len(self._shown)
        if more:
            yield f"and {more} more: print(readout.table(rows=None))"
        reasons: dict[str, list[str]] = {}
        for row in self._shown:
            if not row.closed and row.kind != "norm":
                reasons.setdefault(row.reason, []).append(row.name)
        for reason, names in reasons.items():
            yield f"open: {', '.join(names)}: {reason}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            yield Text(self._title)
            yield from (Text(printable(note), overflow="fold") for note in self._notes())
            return
        table = ReportTable(self._title, stacks=True)
        for heading, is_text in COLUMNS.items():
            table.add_column(heading, folds=heading in FOLDED, justify="left" if is_text else "right")
        for row in self._shown:
            table.add_row(*cells(row))
        yield table
        for note in self._notes():
            yield Text(printable(note), overflow="fold")

    def __str__(self) -> str:
        return as_text(self, shutil.get_terminal_size((WIDTH, 24)).columns)

    def __repr__(self) -> str:
        return f"<ReadoutTable of {len(self.rows)} symmetries; print it>"

    def _repr_html_(self) -> str:
        lines = [f"<table><caption>{_escaped(self._title)}</caption>"]
        if self.rows:
            lines += ["<thead>", _line("th", list(COLUMNS)), "</thead>", "<tbody>"]
            lines += [_line("td", cells(row)) for row in self._shown]
            lines.append("</tbody>")
        return "\n".join([*lines, "</table>", *(f"<p>{_escaped(note)}</p>" for note in self._notes())])


def cells(row: Row) -> list[str]:
    """The row's text for each of COLUMNS."""
    return [
        row.name,
        row.kind,
        str(row.n_groups),
        _range(row.charge),
        *map(_signed, (row.decay, row.growth, row.defect, row.rounding)),
        *map(_number, (row.angular_update, row.effective_lr)),
        row.verdict,
    ]


def _number(x: float) -> str:
    return "–" if math.isnan(x) else number(x, "#.2g") if x else "0"


def _range(x: Spread) -> str:
    """The median, and the range if there is one."""
    median, lowest, highest = map(_number, (x.median, x.lowest, x.highest))
    return median if lowest == highest else f"{median} ({lowest} … {highest})"


def _signed(x: Spread) -> str:
    """The median absolute value, with the sign of all groups, or ±."""
    if not x.size or math.isnan(x.size):
        return _number(x.size)
    return f"{'+' if x.lowest >= 0.0 else '-' if x.highest <= 0.0 else '±'}{_number(x.size)}"


def _line(tag: str, texts: Sequence[str]) -> str:
    line = []
    for text, is_text in zip(texts, COLUMNS.values(), strict=True):
        style = _STYLE.format("left" if is_text else "right", "normal" if is_text else "nowrap")
        line.append(f'<{tag} style="{style}">{_escaped(text).replace(" %", "&nbsp;%")}</{tag}>')
    return f"<tr>{''.join(line)}</tr>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
