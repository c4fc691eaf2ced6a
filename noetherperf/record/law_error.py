"""How far a law's prediction is from the measured charge, on one scale for all laws and groups."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

LawName = Literal["flow", "discrete", "budget"]

TERMS: dict[LawName, tuple[str, ...]] = {
    "flow": ("flow_free", "flow_forced"),
    "discrete": ("discrete_free", "discrete_forced"),
    "budget": ("discrete_free", "discrete_forced", "discrete_defect"),
}
#: The charge less the terms, as measured: more exact than the difference of what may be recorded in float32.
DIFFERENCES: dict[LawName, str] = {"flow": "flow_residual", "discrete": "residual", "budget": "rounding"}


def relative_error(data: xr.Dataset, law: LawName) -> xr.DataArray:
    """Distance between prediction and measured charge, relative to the size of the terms.

        |charge − Σ terms| / max(|charge|, Σ |terms|)

    The terms are free and forced; for the budget, the defect as well. The denominator stays large where a charge
    passes through zero or is a small difference of large terms. The error is zero where charge and terms are all zero.

    Args:
        data: `record[name]`, or any dataset with `charge` and the terms. Where it has the difference of charge and
            terms itself (`flow_residual`, `residual`, `rounding`), the difference is taken from there.
        law: "flow", "discrete" or "budget".

    Returns:
        (step, group), float64, no unit.
    """
    names = ("charge", *TERMS[law], DIFFERENCES[law])
    values = {name: data[name].to_numpy() for name in names if name in data}
    return data["charge"].copy(data=error_of(values, law)).rename(f"{law}_relative_error").drop_attrs()


def error_of(values: Mapping[str, NDArray[Any]], law: LawName) -> NDArray[np.float64]:
    """As `relative_error`, of arrays of equal shape by name."""
    with np.errstate(all="ignore"):  # what is not finite stays so
        terms = [values[name] for name in TERMS[law]]
        difference = values.get(DIFFERENCES[law])
        error = np.abs(values["charge"] - sum(terms[1:], terms[0]) if difference is None else difference)
        size, of_terms = np.abs(values["charge"]), sum(map(np.abs, terms[1:]), np.abs(terms[0]))
        size = np.where(size > of_terms, size, of_terms)
        size[size == 0] = 1.0
        relative: NDArray[np.float64] = error / size
    return relative
