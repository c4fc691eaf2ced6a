"""The layout of a record: which arrays it has, their dimensions, types and chunks.

A record is one zarr (version 3) group of numeric arrays and JSON, which any zarr or xarray reads without this package:

    xr.open_zarr(path)        dims (step, group), (step, parameter_group); nothing in it is ever executed

Every variable is **one** array over the groups of all symmetries, side by side; the coordinates `symmetry` and
`position` give the owner of each column. A node per symmetry would look neater in a tree, but costs a file per
variable, symmetry and flush. Chunks are narrow instead, so that one symmetry is read without most of the others. Names
of symmetries are data (attributes) and never file names, so they may hold any character.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from noetherperf.record.series import SERIES

FORMAT = 2
FORMATS = (1, FORMAT)  # that are read, and resumed
CHUNK_VALUES = 2**20  # of all groups in the rows of one chunk, at most; they bound the memory of rows that wait
CHUNK_ROWS = (16, 1024)  # least, most
CHUNK_GROUPS = 64  # of a chunk, if that makes no more than
CHUNKS_WIDE = 16  # chunks side by side

#: Series of records of format 1, all float64; early ones lack some.
FIRST_SERIES = (
    "charge",
    "discrete_free",
    "discrete_forced",
    "discrete_defect",
    "discrete_budget",
    "flow_free",
    "flow_forced",
    "defect",
    "relative_defect",
    "sum_p",
    "sq_p",
    "sum_g",
    "sq_g",
    "dot_pg",
    "sq_u",
    "growth",
    "transport",
    "angular_update",
    "effective_lr",
)
OPTIONAL = ("discrete_budget", "growth", "transport", "angular_update", "effective_lr")
FIRST_HYPERPARAMETERS = ("lr", "momentum", "weight_decay")  # of records without the attribute: the first ones, of SGD
FIRST_RULE = "sgd"  # and their rule
COORDINATES = ("time", "symmetry", "position")
LOGGED = "logged"  # array of the values of Recorder.log
GROWING = ("parameter_group", "logged_value")  # dimensions that training may make longer


PLAIN = ("bytes", "zstd", "crc32c")
OF_GROUPS = (
    "transpose",
    "bytes",
    "blosc",
    "zstd",
    "crc32c",
)  # the numbers of one group side by side: they change little


class Kind(NamedTuple):
    """Dimensions, attributes, possible types and codecs of an array."""

    dims: tuple[str, ...]
    labels: dict[str, str]
    dtypes: tuple[str, ...] = ("float64",)
    codecs: tuple[str, ...] = PLAIN


def _of_groups(name: str) -> Kind:
    series = SERIES[name]
    labels = {"long_name": series.meaning, "formula": series.formula, "units": series.units}
    return Kind(("step", "group"), labels, ("float64", "float32"), OF_GROUPS)


KINDS: dict[str, Kind] = {
    "step": Kind(("step",), {"long_name": "optimizer step", "units": "1"}, ("int64",)),
    "time": Kind(("step",), {"long_name": "time", "units": "lr · steps"}),
    "initial": Kind(("group",), {"long_name": "charge when measuring began", "units": "1"}),
    "symmetry": Kind(("group",), {"long_name": "index into attribute symmetries"}, ("int64",)),
    "position": Kind(("group",), {"long_name": "index of the group in its symmetry"}, ("int64",)),
    LOGGED: Kind(("step", GROWING[1]), {"long_name": "values of Recorder.log, named by attribute logged"}),
    **{name: _of_groups(name) for name in SERIES},
}


def probe_key(index: int) -> str:
    """Name of a probe's array: numbered, since the user's name for the probe may be no file name."""
    return f"probe_{index}"


def kinds(
    series: Collection[str],
    hyperparameters: Sequence[str],
    probes: Sequence[str],
    n_dims: Callable[[str], int],
    *,
    logged: bool,
) -> dict[str, Kind]:
    """All arrays of a record.

    Args:
        series: Names of the recorded series.
        hyperparameters: The names of their arrays.
        probes: Their names.
        n_dims: Number of dimensions of a probe's array, by the array's name.
        logged: Whether it has a place for logged values, which early records lack.
    """
    keys = [probe_key(index) for index in range(len(probes))]
    absent = {*SERIES} - {*series} | ({LOGGED} if not logged else set())
    return {
        **{name: Kind(("step", GROWING[0]), {}) for name in hyperparameters},
        **{name: kind for name, kind in KINDS.items() if name not in absent},
        **{
            key: Kind(("step", f"{key}_element")[: n_dims(key)], {"long_name": name})
            for key, name in zip(keys, probes, strict=True)
        },
    }


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
    least, most = CHUNK_ROWS
    return min(most, max(least, CHUNK_VALUES // max(1, *(size for width in widths.values() for size in width))))


def chunk_width(kind: Kind, width: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a chunk without its rows, from the array's. Where training may add columns, there is room for them."""
    if kind.dims[-1] in GROWING:
        return (16,)
    return tuple(min(max(1, size), max(CHUNK_GROUPS, -(-size // CHUNKS_WIDE))) for size in width)
