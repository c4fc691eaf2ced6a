"""How far a law's prediction is from the measured charge, on one scale for all laws and groups."""

from typing import Literal

import xarray as xr

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
    terms = [data[name] for name in TERMS[law]]
    difference = data.get(DIFFERENCES[law])
    error = abs(data["charge"] - sum(terms[1:], terms[0]) if difference is None else difference)
    size, of_terms = abs(data["charge"]), sum(map(abs, terms[1:]), abs(terms[0]))
    size = size.where(size > of_terms, of_terms)
    relative: xr.DataArray = (error / size.where(size != 0, 1.0)).rename(f"{law}_relative_error")
    return relative
