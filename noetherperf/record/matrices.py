"""What is recorded of a Balance: spectra and norms, and its matrices where they are asked for; as vectors, like probes.

A record's attribute `balances` has the shapes, so that `Record.balance` can give the vectors their dimensions back.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from noetherperf.record.layout import probe_key
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from noetherperf.measure.balances import BalanceReadout
    from noetherperf.measure.readout import Readout

__all__ = ["MATRICES", "SPECTRA", "described", "initial_matrices", "of_balances", "read_balance", "refuse_names"]


class Vector(NamedTuple):
    """One recorded vector of a Balance.

    Attributes:
        name: Of its pseudo-probe, after the Balance's: "attn: eigenvalues".
        variables: Its parts side by side, by the names that they have in `Record.balance`.
        dims: Of each part.
        read: From a readout, [parts, ...] in that order.
    """

    name: str
    variables: tuple[str, ...]
    dims: tuple[str, ...]
    read: "Callable[[BalanceReadout], Tensor]"


def _norms(law: "BalanceReadout") -> "Tensor":
    """Frobenius norms of each block: of the terms, or the charge if that is larger; of residual, and of rounding."""
    import torch

    charge, free, forced, residual, rounding = (
        torch.linalg.matrix_norm(x)
        for x in (law.charge, law.discrete.free, law.discrete.forced, law.residual, law.rounding)
    )
    return torch.stack([torch.fmax(charge, free + forced), residual, rounding])


SPECTRA = (
    Vector("eigenvalues", ("eigenvalues",), ("block", "unit"), lambda law: law.eigenvalues),
    Vector(
        "predicted eigenvalues", ("predicted_eigenvalues",), ("block", "unit"), lambda law: law.predicted_eigenvalues
    ),
    Vector("norms", ("size", "residual", "rounding"), ("block",), _norms),
)
MATRICES = (
    Vector("charge", ("charge",), ("block", "unit", "other_unit"), lambda law: law.charge),
    Vector("predicted charge", ("predicted_charge",), ("block", "unit", "other_unit"), lambda law: law.discrete.total),
)


def of_balances(readout: "Readout", matrices: bool) -> "dict[str, Callable[[], Tensor]]":
    """Name -> vector of each Balance in a readout.

    Args:
        readout: With them.
        matrices: Whether to record the matrices, too.

    Returns:
        "attn: eigenvalues" and "attn: predicted eigenvalues", [blocks · n]; "attn: norms", [3 · blocks]; "attn: charge"
        and "attn: predicted charge", [blocks · n · n], if `matrices`.
    """

    def reading(law: "BalanceReadout", vector: Vector) -> "Callable[[], Tensor]":
        return lambda: vector.read(law).flatten()

    return {
        f"{name}: {vector.name}": reading(law, vector)
        for name, law in readout.balances.items()
        for vector in SPECTRA + (MATRICES if matrices else ())
    }


def described(readout: "Readout") -> dict[str, Any]:
    """Attributes of a record that describe its Balances, and those of them that change with the rows."""
    laws = list(readout.balances.values())
    return {
        "balances": [law.symmetry.to_dict() for law in laws],
        "balance_shapes": [list(law.charge.shape[:2]) for law in laws],
        "balance_reasons": [law.reason for law in laws],
        "balance_initial": initial_matrices(readout),
    }


def initial_matrices(readout: "Readout") -> list[str]:
    """A digest of the matrices that each Balance began with (SHA-256, hexadecimal): equal if all entries are."""

    def digest(matrices: "Tensor") -> str:
        numbers = matrices.numpy().astype("<f8") + 0.0  # one zero and one NaN, whatever their bits
        return hashlib.sha256(np.where(np.isnan(numbers), np.nan, numbers).tobytes()).hexdigest()

    return [digest(law.initial) for law in readout.balances.values()]


def refuse_names(what: str, names: Iterable[str], taken: Mapping[str, Any]) -> None:
    """Refuse names that a Balance's vectors have.

    Raises:
        ValueError: One is taken.
    """
    if names := [name for name in names if name in taken]:
        balance = names[0].rpartition(": ")[0]
        raise ValueError(
            f"{what}: {names[0]!r} is the name under which the Balance {balance!r} is recorded; choose another"
        )


def read_balance(
    path: Path,
    dataset: xr.Dataset,
    balances: Mapping[str, Symmetry],
    name: str,
    variables: Sequence[str] | None,
    rows: slice,
) -> xr.Dataset:
    """One Balance of a record; `Record.balance` describes it."""
    if name not in balances:
        raise KeyError(f"no Balance {name!r} is recorded in {str(path)!r}; {nearest(str(name), balances)}")
    index, probes = list(balances).index(name), dataset.attrs["probes"]
    blocks, n = dataset.attrs["balance_shapes"][index]
    sizes = {"block": blocks, "unit": n, "other_unit": n}
    known = {v: vector for vector in SPECTRA + MATRICES if f"{name}: {vector.name}" in probes for v in vector.variables}
    wanted = list(known) if variables is None else [variables] if isinstance(variables, str) else list(variables)
    if missing := [variable for variable in wanted if variable not in known]:
        raise ValueError(f"variables: {str(path)!r} has no {missing[0]!r}; {_why_not(missing[0], known)}")
    found: dict[str, xr.Variable] = {}
    for vector in dict.fromkeys(known[variable] for variable in wanted):
        values = dataset.variables[probe_key(probes.index(f"{name}: {vector.name}"))].isel(step=rows).to_numpy()
        shape = [len(vector.variables), *(sizes[dim] for dim in vector.dims)]
        if values[:1].size != min(len(values), 1) * math.prod(shape):
            raise ValueError(f"the record {str(path)!r} is damaged: {name!r} has {vector.name} of another shape")
        parts = values.reshape(len(values), *shape)
        for i, variable in enumerate(vector.variables):
            found[variable] = xr.Variable(("step", *vector.dims), parts[:, i])
    reason = dataset.attrs["balance_reasons"][index]
    attrs = {"name": name, "kind": balances[name].kind, "closed": not reason, "reason": reason}
    coords = {key: dataset[key].isel(step=rows) for key in ("step", "time")}
    return xr.Dataset({variable: found[variable] for variable in wanted}, coords, attrs)


def _why_not(variable: str, known: Collection[str]) -> str:
    if any(variable in vector.variables for vector in MATRICES):
        return "matrices have to be asked for: Recorder(..., matrices=True)"
    return nearest(str(variable), known)
