"""What the page shows of every unit: formulas of the recorded series."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from noetherperf.record import TERMS, relative_error

Reduce = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the last dimension, NaN left out; NaN where there is nothing else."""
    ordered = np.sort(values, axis=-1)  # NaN last
    count = np.sum(~np.isnan(ordered), axis=-1, keepdims=True)
    if ordered.shape[-1] == 0:
        return np.full(ordered.shape[:-1], np.nan)
    below, above = (count - 1) // 2, np.minimum(count // 2, ordered.shape[-1] - 1)
    low, high = (np.take_along_axis(ordered, np.maximum(i, 0), axis=-1) for i in (below, above))
    middle: NDArray[np.float64] = np.where(count > 0, low + (high - low) / 2, np.nan)[..., 0]
    return middle


def median_size(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of |values| over the last dimension."""
    return median(np.abs(values))


def smallest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smallest of the values over the last dimension, NaN left out; NaN where there is nothing else."""
    return -largest(-values)


def largest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest of the values over the last dimension, NaN left out; NaN where there is nothing else."""
    found: NDArray[np.float64] = np.fmax.reduce(values, axis=-1, initial=-np.inf)
    return np.where(found == -np.inf, np.nan, found)


class Quantity(NamedTuple):
    """One number of every unit and row.

    Attributes:
        title: As the page's menu has it.
        meaning: A sentence for the reader.
        needs: The recorded series that it is computed from.
        of: The formula, from a dataset of these series.
        reduce: A layer's number, from those of its units.
        mapped: Whether the menu offers a heat map of it.
        predicts: Whether it is about the discrete law's prediction, and so means nothing where that law is open.
    """

    title: str
    meaning: str
    needs: tuple[str, ...]
    of: Callable[[xr.Dataset], xr.DataArray]
    reduce: Reduce
    mapped: bool = True
    predicts: bool = False


def _recorded(name: str, title: str, meaning: str) -> Quantity:
    return Quantity(title, meaning, (name,), lambda data: data[name], median_size)


QUANTITIES: dict[str, Quantity] = {
    "charge": _recorded("charge", "charge", "the measured charge; of a layer, the median of its size over units"),
    "effective_lr": _recorded(
        "effective_lr",
        "effective learning rate",
        "η/|θ|² (SGD) or η/|θ| (AdamW, Adam) of the last step; of a layer, the median over units",
    ),
    "angular_update": _recorded(
        "angular_update",
        "angular update",
        "the angle in radians by which the last step turned a unit's weights; of a layer, the median over units",
    ),
    "residual": Quantity(
        "residual of the discrete law",
        "|charge − (free + forced)| relative to the size of the terms; of a layer, the largest of its units",
        ("charge", *TERMS["discrete"]),
        lambda data: relative_error(data, "discrete"),
        largest,
        predicts=True,
    ),
    "rounding": Quantity(
        "rounding",
        "|charge − (free + forced + defect)| relative to the size of the terms: what the stored dtype has lost; of a "
        "layer, the largest of its units",
        ("charge", *TERMS["budget"]),
        lambda data: relative_error(data, "budget"),
        largest,
    ),
    "discrete": Quantity(
        "discrete law",
        "free + forced: the law of the update rule",
        ("discrete_budget", "discrete_defect"),
        lambda data: data["discrete_budget"] - data["discrete_defect"],
        median_size,
        mapped=False,
        predicts=True,
    ),
    "flow": Quantity(
        "flow law",
        "the law of gradient flow, the limit of small steps",
        TERMS["flow"],
        lambda data: data["flow_free"] + data["flow_forced"],
        median_size,
        mapped=False,
        predicts=True,
    ),
    "flow_error": Quantity(
        "residual of the flow law",
        "|charge − (free + forced)| of the flow law, relative to the size of the terms",
        ("charge", *TERMS["flow"]),
        lambda data: relative_error(data, "flow"),
        largest,
        mapped=False,
        predicts=True,
    ),
}

#: Why the charge has changed since the start, in the order of the stack: what each term is, from a dataset.
BUDGET: dict[str, Callable[[xr.Dataset], xr.DataArray]] = {
    "decay": lambda data: data["discrete_free"] - data["initial"],
    "growth": lambda data: data["discrete_forced"],
    "defect": lambda data: data["discrete_defect"],
    "rounding": lambda data: data["charge"] - data["discrete_budget"],
}
BUDGET_NEEDS = ("charge", "discrete_free", "discrete_forced", "discrete_defect", "discrete_budget")
