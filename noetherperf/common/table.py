"""A table that truncates nothing: on a narrow terminal its columns go below each other, or its rows become blocks."""

import io
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from noetherperf.common.printing import encodable, printable

__all__ = ["ReportTable", "as_text"]

LEAST = 16  # the smallest width to which a column of text is folded, in characters


class ReportTable:
    """Rows of plain text, printed by rich: no markup, no emoji codes, no control characters.

    Columns of numbers are never folded, columns of text to no fewer than LEAST characters. If the terminal is narrower
    than that, a row becomes a block: its first cell, and below it each heading with its cell.

    Args:
        title: Printed above the table.
        stacks: Whether, before that, the columns that have no room go below, beside the first column again.
        **options: Options of rich's Table.
    """

    def __init__(self, title: str = "", *, stacks: bool = False, **options: Any) -> None:
        self.title = title
        self._stacks = stacks
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
        widths = [
            self._least(folds, cells) for (_, folds, _), *cells in zip(self._columns, headings, *rows, strict=True)
        ]
        stack = self._stack(console, widths, options.max_width)
        if any(self._needed(console, [widths[i] for i in columns]) > options.max_width for columns in stack):
            yield from self._blocks(title, headings, rows)
            return
        for columns in stack:
            table = Table(title=Text(title) if title else None, title_justify="left", **self._options)
            for i in columns:
                _, folds, column = self._columns[i]
                table.add_column(Text(headings[i]), no_wrap=not folds, overflow="fold", **column)
            for row in rows:
                table.add_row(*(Text(row[i]) for i in columns))
            yield table
            if columns is not stack[-1]:
                yield Text()
            title = ""

    @staticmethod
    def _least(folds: bool, cells: list[str]) -> int:
        """The smallest width of a column."""
        width = max(Text(cell).cell_len for cell in cells)
        return min(width, LEAST) if folds else width

    def _needed(self, console: Console, widths: list[int]) -> int:
        """The width that columns and the gaps between them need."""
        between = Table(*[""] * len(widths), **self._options)
        between.add_row()
        return console.measure(between).maximum + sum(widths)

    def _stack(self, console: Console, widths: list[int], max_width: int) -> list[list[int]]:
        """The columns of each table: the first one, and as many others as have room."""
        stack = [[0]]
        for i in range(1, len(widths)):
            if self._stacks and self._needed(console, [widths[j] for j in (*stack[-1], i)]) > max_width:
                stack.append([0])
            stack[-1].append(i)
        return stack

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


def as_text(renderable: object, width: int) -> str:
    """What rich prints of something, as plain text without spaces at the ends of lines.

    In a notebook, too, where a Console of rich would show it instead of writing to its file.
    """
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
