"""What the page shows of every unit: formulas of the recorded series."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from noetherperf.record import TERMS, LawName
from noetherperf.record.law_error import DIFFERENCES, error_of

Data = Mapping[str, NDArray[np.float64]]  # series by name, [rows, groups]
Reduce = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def median_size(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of |values| over the last dimension, NaN left out; NaN where there is nothing else."""
    ordered = np.sort(np.abs(values), axis=-1)  # NaN last
    count = np.sum(~np.isnan(ordered), axis=-1, keepdims=True)
    if ordered.shape[-1] == 0:
        return np.full(ordered.shape[:-1], np.nan)
    below, above = np.maximum((count - 1) // 2, 0), np.minimum(count // 2, ordered.shape[-1] - 1)
    low, high = (np.take_along_axis(ordered, i, axis=-1) for i in (below, above))
    middle: NDArray[np.float64] = np.where(count > 0, low + (high - low) / 2, np.nan)[..., 0]
    return middle


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
        of: The formula, from these series.
        reduce: A layer's number, from those of its units.
        mapped: Whether the menu offers a heat map of it.
        predicts: Whether it is about the discrete law's prediction, and so means nothing where that law is open.
    """

    title: str
    meaning: str
    needs: tuple[str, ...]
    of: Callable[[Data], NDArray[np.float64]]
    reduce: Reduce
    mapped: bool = True
    predicts: bool = False


def _series(name: str, title: str, meaning: str, *, mapped: bool = True, predicts: bool = False) -> Quantity:
    """A quantity that a record has as it is."""
    return Quantity(title, meaning, (name,), lambda data: data[name], median_size, mapped, predicts)


def _error(law: LawName, title: str, meaning: str, *, mapped: bool = True, predicts: bool = True) -> Quantity:
    """How far a law is off; of a layer, the worst unit."""
    needs = ("charge", DIFFERENCES[law], *TERMS[law])
    return Quantity(title, meaning, needs, lambda data: error_of(data, law), largest, mapped, predicts)


QUANTITIES: dict[str, Quantity] = {
    "charge": _series("charge", "charge", "the measured charge; of a layer, the median of its size over units"),
    "effective_lr": _series(
        "effective_lr",
        "effective learning rate",
        "η/|θ|² (SGD) or η/|θ| (AdamW, Adam) of the last step; of a layer, the median over units",
    ),
    "angular_update": _series(
        "angular_update",
        "angular update",
        "the angle in radians by which the last step turned a unit's weights; of a layer, the median over units",
    ),
    "residual": _error(
        "discrete",
        "residual of the discrete law",
        "|charge − (free + forced)|, relative to the size of the terms; of a layer, the largest of its units",
    ),
    "rounding": _error(
        "budget",
        "rounding",
        "|charge − (free + forced + defect)|, relative to the size of the terms: what the stored dtype has lost; of a "
        "layer, the largest of its units",
        predicts=False,
    ),
    "discrete": _series(
        "discrete_total", "discrete law", "free + forced: the law of the update rule", mapped=False, predicts=True
    ),
    "flow": _series(
        "flow_total", "flow law", "the law of gradient flow, the limit of small steps", mapped=False, predicts=True
    ),
    "flow_error": _error(
        "flow",
        "residual of the flow law",
        "|charge − (free + forced)| of the flow law, relative to the size of the terms",
        mapped=False,
    ),
}

#: What the budget and the table of a symmetry are made of; with the split that needs no law where the rule has it.
TERMS_OF_CHANGE = ("charge", "discrete_decay", "discrete_forced", "discrete_defect", "rounding")
SPLIT = ("decayed", "growth", "transport")


def budget(data: Data, *, closed: bool) -> dict[str, NDArray[np.float64]]:
    """Why charges have changed since the start: decay + growth + defect + rounding = change.

    Where the law is open, they are the rule's own decay, growth and transport, if it has them: a split that needs no
    law.

    Args:
        data: Of TERMS_OF_CHANGE and `initial`; for an open law, of SPLIT too where it is recorded.
        closed: Whether the law is.

    Returns:
        [rows, groups] each: decay, growth, defect, rounding and change, which is charge − initial.
    """
    change = data["charge"] - data["initial"]
    sources = ("discrete_decay", "discrete_forced", "discrete_defect")
    if not closed and all(name in data and not np.isnan(data[name]).all() for name in SPLIT):
        sources = SPLIT
    decay, growth, defect = (data[name] for name in sources)
    return {"decay": decay, "growth": growth, "defect": defect, "rounding": data["rounding"], "change": change}
