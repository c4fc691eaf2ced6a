"""The style of every figure: colours ordered by lightness, lines with different dashes, readable in grey."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.common.printing import printable

Source = TypeVar("Source")
Picture = Figure  # for rooms that may not import matplotlib

WIDTH, HEIGHT = 7.2, 2.9  # inches; a figure across two columns
LONGEST_LABEL = 30  # characters
FORMATS: dict[str, dict[str, Any]] = {  # metadata without the date
    "png": {},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.4,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": 150,
    "pdf.fonttype": 42,  # TrueType: text stays text
    "svg.hashsalt": "noetherperf",  # equal data gives equal names inside
}
MEASURED: dict[str, Any] = {"linewidth": 2.2}
FLOW: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": (0, (1, 2.6)), "dash_capstyle": "round"}
MUTED = "0.45"
BLUE, RED, GREEN, SAND = "#1b3a6b", "#c8553d", "#5aa17f", "#d9b26f"  # dark to light

SYMMETRY_LINES: dict[str, dict[str, Any]] = {
    "translation": {"color": BLUE, "linestyle": "-"},
    "scale": {"color": RED, "linestyle": (0, (5, 1.5))},
    "rescale": {"color": GREEN, "linestyle": (0, (5, 1.5, 1, 1.5))},
}
KIND_LINES = {**SYMMETRY_LINES, "norm": {"color": SAND, "linestyle": (0, (2, 1))}}


class NothingToDraw(ValueError):
    """The record has no data for this picture; the message says what is missing."""


@contextmanager
def style() -> Iterator[None]:
    """Apply the style to matplotlib's defaults, independent of the user's settings, which are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def styled(draw: Callable[[Source], Figure]) -> Callable[[Source], Figure]:
    """Decorator: draw in the style, without changing the user's settings."""

    @wraps(draw)
    def draw_styled(source: Source) -> Figure:
        with style():
            return draw(source)

    return draw_styled


def save(
    figure: Figure | Sequence[Figure],
    stem: str | os.PathLike[str],
    formats: Iterable[str] = ("png", "pdf"),
    dpi: int = 150,
) -> list[Path]:
    """Save a figure as stem.png and stem.pdf, and create the folder. Equal data gives equal bytes.

    Args:
        figure: The figure; or several pages: a pdf has all of them, the others are stem.png, stem-2.png and so on.
        stem: Path without suffix.
        formats: Among "png", "pdf", "svg".
        dpi: Pixels per inch of a png.

    Raises:
        ValueError: There is no such format.
    """
    stem, formats = os.fspath(local_path(stem)), list(formats)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"format: must be among {', '.join(FORMATS)}, got {unknown[0]!r}")
    pages = [figure] if isinstance(figure, Figure) else list(figure)
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    files = []
    with style():
        for page in pages:
            if (engine := page.get_layout_engine()) is not None:
                engine.execute(page)  # once for all formats
                page.set_layout_engine("none")
        for name in formats:
            if name == "pdf":
                from matplotlib.backends.backend_pdf import PdfPages  # takes long to import

                files.append(Path(f"{stem}.pdf"))
                with PdfPages(files[-1], metadata=FORMATS[name]) as book:
                    for page in pages:
                        book.savefig(page)
                continue
            for number, page in enumerate(pages, 1):
                files.append(Path(f"{stem}{f'-{number}' * (number > 1)}.{name}"))
                backend = {"png": "agg"}.get(name, name)
                # as small as with the usual level 6, in half the time
                more: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if name == "png" else {}
                page.savefig(files[-1], metadata=FORMATS[name], dpi=dpi, format=name, backend=backend, **more)
    return files


def colors(n: int) -> NDArray[np.float64]:
    """Colours from dark to light, without the lightest ones, which are invisible on paper."""
    found: NDArray[np.float64] = matplotlib.colormaps["viridis"](np.linspace(0.2, 0.9, n))
    return found


def label_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)


def log_axis(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """A logarithmic axis over whole decades around the positive values; zeros are masked."""
    pooled = np.concatenate([np.ravel(value) for value in values])
    positive = pooled[np.isfinite(pooled) & (pooled > 0)]
    axes.set_yscale("log", nonpositive="mask")
    if positive.size:
        axes.set_ylim(10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(positive.max()) + 1e-9))


def shown(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name as a label for parse_math=False: one line, its middle replaced by … if it is long."""
    text, half = printable(name), longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[len(text) + 1 + half - longest :]}"


def say(axes: Axes, message: str) -> None:
    """Show a message instead of a panel."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=MUTED)
