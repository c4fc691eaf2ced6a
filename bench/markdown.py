"""Numbers and tables as text; needs nothing but Python."""

from collections.abc import Iterable, Sequence

from bench.timing import Spread


def ratio(spread: Spread) -> str:
    """Median and quartiles: 1.04 (1.02–1.07), as many digits as mean something."""
    digits = 2 if spread.high < 9.995 else 1 if spread.high < 99.95 else 0
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def seconds(value: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


def size(n_bytes: float) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(n_bytes) >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes:.0f} B"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its first column a name and the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Notes:
    """Footnotes: one mark for each text."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self._texts:
            self._texts.append(text)
        return f"<sup>{self._texts.index(text) + 1}</sup>"

    def __str__(self) -> str:
        return "\n".join(f"{i}. {text}." for i, text in enumerate(self._texts, 1))
