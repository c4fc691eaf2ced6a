"""Gallery figure of matrices of charges: balance. noetherperf.figures.balance describes its arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from noetherperf.plots.style import BLUE, FLOW, GREEN, RED, WIDTH, colors, label_steps, log_axis, styled

__all__ = ["balance"]

Data = Mapping[str, NDArray[Any]]

DASHES: dict[str, Any] = {"law": "-", "identity": (0, (5, 1.5))}
TITLES = {
    "SGD/q, k": "SGD: queries and keys",
    "SGD/v, o": "values and output",
    "AdamW/q, k": "AdamW: queries and keys",
    "AdamW/v, o": "values and output",
    "linear/1, 2": "linear layers 1, 2 (SGD)",
    "linear/2, 3": "layers 2, 3",
}


@styled
def balance(data: Data) -> Figure:
    """Eigenvalues of imbalance over time, laws dotted; one head's matrix; what the laws miss."""
    figure = Figure(figsize=(WIDTH, 4.7), layout="constrained")
    panels = figure.subplots(3, 3)
    for row, rule in zip(panels, ("SGD", "AdamW", "linear"), strict=True):
        names = [name for name in TITLES if name.startswith(rule)]
        for axes, name in zip(row, names, strict=False):
            _spectra(axes, data, rule, name)
    _matrix(panels[0, 2], data["SGD/q, k/charge"][-1, 0])
    _missed(panels[1, 2], data, ("SGD", "AdamW"))
    _missed(panels[2, 2], data, ("linear",))
    return figure


def _spectra(axes: Axes, data: Data, rule: str, name: str) -> None:
    """Eigenvalues of the first block, and those of free + forced."""
    steps = data[f"{rule}/steps"]
    measured, law = (np.linalg.eigvalsh(data[f"{name}/{what}"][:, 0]) for what in ("charge", "law"))
    for values, color in zip(measured.T, colors(measured.shape[1]), strict=True):
        axes.plot(steps, values, color=color, linewidth=1.6)
    axes.plot(steps, law, **FLOW)
    axes.set_title(TITLES[name])
    axes.set_ylabel("eigenvalues of $X$")
    label_steps(axes)


def _matrix(axes: Axes, x: NDArray[np.float64]) -> None:
    """One matrix; red is positive, blue negative."""
    largest = float(np.abs(x).max())
    axes.pcolormesh(x, cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.set(aspect="equal", xticks=[], yticks=[], xlabel="unit", ylabel="unit")
    axes.set_title(f"$X$ of a head (±{largest:.2f})")
    axes.invert_yaxis()


def _missed(axes: Axes, data: Data, rules: tuple[str, ...]) -> None:
    """Largest distance of an entry from the law, and from the identity, relative to the sum of |terms|."""
    shown = []
    lines = {"SGD": BLUE, "AdamW": RED, "linear": GREEN}
    for rule in rules:
        names = [name for name in TITLES if name.startswith(rule)]
        steps = data[f"{rule}/steps"]
        for what, dash in DASHES.items() if len(rules) > 1 else (("law", "-"),):  # one law is as good as the identity
            errors = [
                np.abs(data[f"{name}/charge"] - data[f"{name}/law"] if what == "law" else data[f"{name}/rounding"]).max(
                    (1, 2, 3)
                )
                / data[f"{name}/scale"]
                for name in names
            ]
            shown.append(np.max(errors, axis=0))
            axes.plot(steps, shown[-1], color=lines[rule], linestyle=dash, label=f"{rule}: {what}")
    log_axis(axes, shown)
    axes.set_title("largest error of an entry")
    axes.set_ylabel(r"of $\Sigma$|terms|")
    axes.legend(loc="center right" if len(rules) > 1 else "lower right")
    label_steps(axes)
