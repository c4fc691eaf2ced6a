"""A table that truncates nothing: where the terminal is too narrow for columns, every row becomes a block."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from noetherperf.common.printing import encodable, printable

__all__ = ["ReportTable"]

LEAST = 16  # the smallest width to which a column of text is folded, in characters


class ReportTable:
    """Rows of plain text, printed by rich: no markup, no emoji codes, no control characters.

    Columns of numbers are never folded, columns of text to no fewer than LEAST characters. If the terminal is narrower
    than that, a row becomes a block: its first cell, and below it each heading with its cell.

    Args:
        title: Printed above the table.
        **options: Options of rich's Table.
    """

    def __init__(self, title: str = "", **options: Any) -> None:
        self.title = title
        self._options: dict[str, Any] = {"box": SIMPLE, "padding": 0, "show_edge": False, **options}
        self._columns: list[tuple[str, bool, dict[str, Any]]] = []
        self._rows: list[tuple[str, ...]] = []

    def add_column(self, heading: str = "", *, folds: bool = False, **options: Any) -> None:
        """Add a column; `folds`: it holds text that may be wrapped."""
        self._columns.append((heading, folds, options))

    def add_row(self, *cells: str) -> None:
        """Add a row, with one cell for each column."""
        self._rows.append(tuple(map(printable, cells)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = encodable(self.title, console.encoding)
        headings = [encodable(heading, console.encoding) for heading, *_ in self._columns]
        rows = [[encodable(cell, console.encoding) for cell in row] for row in self._rows]
        if self._needed(console, headings, rows) > options.max_width:
            yield from self._blocks(title, headings, rows)
            return
        table = Table(title=Text(title) if title else None, title_justify="left", **self._options)
        for heading, (_, folds, column) in zip(headings, self._columns, strict=True):
            table.add_column(Text(heading), no_wrap=not folds, overflow="fold", **column)
        for row in rows:
            table.add_row(*map(Text, row))
        yield table

    def _needed(self, console: Console, headings: list[str], rows: list[list[str]]) -> int:
        """The width that the columns and the gaps between them need."""
        between = Table(*[""] * len(headings), **self._options)
        between.add_row()
        total = console.measure(between).maximum
        for (_, folds, _), *cells in zip(self._columns, headings, *rows, strict=True):
            width = max(Text(cell).cell_len for cell in cells)
            total += min(width, LEAST) if folds else width
        return total

    @staticmethod
    def _blocks(title: str, headings: list[str], rows: list[list[str]]) -> RenderResult:
        if title:
            yield Text(title, style="italic")
        for first, *others in rows:
            if first:
                yield Text(first, overflow="fold")
            for heading, cell in zip(headings[1:], others, strict=True):
                if cell:
                    yield Text(f"  {heading} {cell}" if heading else f"  {cell}", overflow="fold")
