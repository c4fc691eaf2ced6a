"""The layout of a record: which arrays it has, their dimensions, types and chunks.

A record is one zarr (version 3) group of numeric arrays and JSON, which any zarr or xarray reads without this package:

    xr.open_zarr(path)        dims (step, group), (step, parameter_group); nothing in it is ever executed

Every variable is **one** array over the groups of all symmetries, side by side; the coordinates `symmetry` and
`position` give the owner of each column. A node per symmetry would look neater in a tree, but costs a file per
variable, symmetry and flush. Names of symmetries are data (attributes) and never file names, so they may hold any
character.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.measure.readout import Charges
from noetherperf.rules.moments import Moment

FORMAT = 1
CHUNK_VALUES = 2**18  # a chunk has at most 2 MiB of float64, and the rows of one chunk bound the memory
CHUNK_GROUPS = 2**14


class Series(NamedTuple):
    """One recorded variable of every symmetry: how to read it from a readout, and what it means."""

    read: Callable[[Charges], Tensor]
    meaning: str


def _moment(name: str) -> Series:
    return Series(lambda charge: charge.moments[name], f"moment {name} of the last step, summed over parts")


def _or_nan(x: Tensor | None, charge: Charges) -> Tensor:
    """x, and NaN for a rule that does not have it."""
    return torch.full_like(charge.charge, torch.nan) if x is None else x


SERIES: dict[str, Series] = {
    "charge": Series(lambda charge: charge.charge, "measured charge"),
    "discrete_free": Series(lambda charge: charge.discrete.free, "discrete law: what the initial charge became"),
    "discrete_forced": Series(lambda charge: charge.discrete.forced, "discrete law: what finite steps drove"),
    "discrete_defect": Series(lambda charge: charge.discrete.defect, "discrete law: what a broken constraint drove"),
    "discrete_budget": Series(lambda charge: charge.discrete.budget, "discrete law: the sum of these, kept by itself"),
    "flow_free": Series(lambda charge: charge.flow.free, "flow law: what the initial charge became"),
    "flow_forced": Series(lambda charge: charge.flow.forced, "flow law: what the gradient's norm drove"),
    "defect": Series(lambda charge: charge.defect, "gradient constraint of the last step"),
    "relative_defect": Series(lambda charge: charge.relative_defect, "gradient constraint, as a cosine"),
    **{moment.name.lower(): _moment(moment.name.lower()) for moment in Moment},
    "growth": Series(lambda charge: _or_nan(charge.growth, charge), "what the updates' own squares added"),
    "transport": Series(lambda charge: _or_nan(charge.transport, charge), "what their overlap with the group added"),
    "angular_update": Series(lambda charge: charge.angular_update, "angle that the last step turned the group by, rad"),
    "effective_lr": Series(lambda charge: charge.effective_lr, "effective learning rate of the last step"),
}
#: Older records do not have them.
OPTIONAL = ("discrete_budget", "growth", "transport", "angular_update", "effective_lr")
FIRST_HYPERPARAMETERS = ("lr", "momentum", "weight_decay")  # of records without the attribute: the first ones, of SGD
FIRST_RULE = "sgd"  # and their rule
COORDINATES = ("time", "symmetry", "position")


class Kind(NamedTuple):
    """Dimensions, attributes and type of an array."""

    dims: tuple[str, ...]
    labels: dict[str, str]
    dtype: str = "float64"


KINDS: dict[str, Kind] = {
    "step": Kind(("step",), {"long_name": "optimizer step", "units": "1"}, "int64"),
    "time": Kind(("step",), {"long_name": "time", "units": "lr · steps"}),
    **{name: Kind(("step", "group"), {"long_name": series.meaning}) for name, series in SERIES.items()},
    "initial": Kind(("group",), {"long_name": "charge when measuring began"}),
    "symmetry": Kind(("group",), {"long_name": "index into attribute symmetries"}, "int64"),
    "position": Kind(("group",), {"long_name": "index of the group in its symmetry"}, "int64"),
}


def probe_key(index: int) -> str:
    """Name of a probe's array: numbered, since the user's name for the probe may be no file name."""
    return f"probe_{index}"


def probe_kind(index: int, name: str, n_dims: int) -> Kind:
    """Kind of a probe's array: a number or a vector per step."""
    return Kind(("step", f"{probe_key(index)}_element")[:n_dims], {"long_name": name})


def kinds(probes: Sequence[str], hyperparameters: Sequence[str], n_dims: Callable[[str], int]) -> dict[str, Kind]:
    """All arrays of a record.

    Args:
        probes: Their names.
        hyperparameters: The names of their arrays.
        n_dims: Number of dimensions of a probe's array, by the array's name.
    """
    keys = [probe_key(index) for index in range(len(probes))]
    of_groups = {name: Kind(("step", "parameter_group"), {}) for name in hyperparameters}
    of_probes = {
        key: probe_kind(index, name, n_dims(key)) for index, (key, name) in enumerate(zip(keys, probes, strict=True))
    }
    return of_groups | KINDS | of_probes


def positions(n_groups: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """For each group, the index of its symmetry and its own index in that symmetry."""
    return {
        "symmetry": np.repeat(np.arange(len(n_groups)), n_groups),
        "position": np.concatenate([np.empty(0, np.int64), *map(np.arange, n_groups)]),
    }


def rows_per_chunk(widths: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of a chunk: the same for all arrays, so that they are flushed together.

    Args:
        widths: Shape of one row of each array with a step dimension.
    """
    return min(1024, max(16, CHUNK_VALUES // max(1, *(size for width in widths.values() for size in width))))


def chunk_width(kind: Kind, width: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a chunk without its rows, from the array's. Parameter groups have room, since training may add some."""
    return tuple(16 if "parameter_group" in kind.dims else min(CHUNK_GROUPS, max(1, size)) for size in width)
