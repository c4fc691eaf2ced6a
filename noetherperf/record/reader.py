"""Time series of readouts on disk, read: numbers and JSON, from whoever they come.

A record is one zarr (version 3) group of numeric arrays and JSON, which any zarr or xarray reads without this package:

    xr.open_zarr(path)        dims (step, group), (step, parameter_group); nothing in it is ever executed

Every variable is **one** array over the groups of all symmetries, side by side; the coordinates `symmetry` and
`position` say whose group a column is. A node per symmetry would look neater in a tree and costs a file per variable,
symmetry and flush. Names of symmetries are then data (attributes) and never file names, so they may hold any character.

What is committed is what the root's `zarr.json` says: it holds the metadata, and so the length, of all arrays
(consolidated metadata). Files may be damaged, or made up: what the metadata say is compared with what a recorder writes
and with the size of the files before anything is allocated, and a number that does not match its checksum is not read.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from xarray.backends import BackendArray
from xarray.core import indexing

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import Charges
from noetherperf.record.chunks import LARGEST, Array, Damaged
from noetherperf.rules.moments import Moment
from noetherperf.symmetry import Symmetry

__all__ = ["Record", "open_record", "relative_error"]

FORMAT = 1
LARGEST_METADATA = 2**30  # bytes

Law = Literal["flow", "discrete", "budget"]


class Series(NamedTuple):
    """One recorded variable of every symmetry: where the readout has it, and what it is."""

    read: Callable[[Charges], Tensor]
    meaning: str


def _moment(name: str) -> Series:
    return Series(lambda charge: charge.moments[name], f"moment {name} of the last step, summed over parts")


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
}
TERMS: dict[Law, tuple[str, ...]] = {
    "flow": ("flow_free", "flow_forced"),
    "discrete": ("discrete_free", "discrete_forced"),
    "budget": ("discrete_free", "discrete_forced", "discrete_defect"),
}
LATER = ("discrete_budget",)  # of the arrays, those that the first records do without
HYPERPARAMETERS = ("lr", "momentum", "weight_decay")
COORDINATES = ("time", "symmetry", "position")


class Kind(NamedTuple):
    """What an array of a record is like."""

    dims: tuple[str, ...]
    labels: dict[str, str]
    dtype: str = "float64"


KINDS: dict[str, Kind] = {
    "step": Kind(("step",), {"long_name": "optimizer step", "units": "1"}, "int64"),
    "time": Kind(("step",), {"long_name": "time", "units": "lr · steps"}),
    **{name: Kind(("step", "parameter_group"), {}) for name in HYPERPARAMETERS},
    **{name: Kind(("step", "group"), {"long_name": series.meaning}) for name, series in SERIES.items()},
    "initial": Kind(("group",), {"long_name": "charge when measuring began"}),
    "symmetry": Kind(("group",), {"long_name": "index into attribute symmetries"}, "int64"),
    "position": Kind(("group",), {"long_name": "index of the group in its symmetry"}, "int64"),
}
UNITS = {kind.labels["units"] for kind in KINDS.values() if "units" in kind.labels}
NOT_A_NUMBER = ("NaN", "AAAAAAAA+H8=")  # as xarray writes it where it copies a record


def probe_key(index: int) -> str:
    """Array of a probe: counted, since the user's name for it may be no file name."""
    return f"probe_{index}"


def probe_kind(index: int, name: str, n_dims: int) -> Kind:
    """What a probe's array is like: a number or a vector a step."""
    return Kind(("step", f"{probe_key(index)}_element")[:n_dims], {"long_name": name})


def positions(n_groups: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """Of each group, which symmetry it belongs to, and which of its groups it is."""
    return {
        "symmetry": np.repeat(np.arange(len(n_groups)), n_groups),
        "position": np.concatenate([np.empty(0, np.int64), *map(np.arange, n_groups)]),
    }


def relative_error(data: xr.Dataset, law: Law) -> xr.DataArray:
    """How far a prediction is from the measured charge, relative to what both are made of.

        |charge − Σ terms| / max(|charge|, Σ |terms|)

    The terms are free and forced; of the budget, the defect as well. The denominator keeps its size where a charge
    passes through zero or is a small difference of large terms. The error is zero where charge and terms all are.

    Args:
        data: `record[name]`, or any dataset with `charge` and the terms.
        law: "flow", "discrete" or "budget".

    Returns:
        (step, group), float64, no unit.
    """
    terms = [data[name] for name in TERMS[law]]
    error = abs(data["charge"] - sum(terms[1:], terms[0]))
    size, of_terms = abs(data["charge"]), sum(map(abs, terms[1:]), abs(terms[0]))
    size = size.where(size > of_terms, of_terms)
    relative: xr.DataArray = (error / size.where(size != 0, 1.0)).rename(f"{law}_relative_error")
    return relative


class Record(Mapping[str, xr.Dataset]):
    """A record as labelled arrays: symmetry name -> dataset. `open_record` makes one.

    `record[name]` has dims (step, group) and holds what was recorded (`charge`, `discrete_free`, `discrete_forced`,
    `discrete_defect`, `discrete_budget`, `flow_free`, `flow_forced`, `defect`, `relative_defect`, the moments `sum_p`,
    `sq_p`, `sum_g`, `sq_g`, `dot_pg`, `sq_u`), what follows from it (`discrete_total`, `flow_total`, `residual`,
    `rounding`), `initial` [group], and coordinates `step` and `time`. Its attributes are `name`, `kind`, `closed` and
    `reason`.

    Arrays are read from disk when they are asked for, each time anew. Where a chunk of one is missing or damaged, it is
    NaN, and a RuntimeWarning says where.

    Attributes:
        path: The record's directory.
        dataset: Everything in one dataset, the groups of all symmetries side by side, as `xr.open_zarr` gives it.
        attrs: The record's attributes: symmetries as JSON data, backend, versions and the like.
        symmetries: The recorded symmetries, in order.
    """

    def __init__(self, path: Path, dataset: xr.Dataset) -> None:
        self.path = path
        self.dataset = dataset
        self.attrs: dict[str, Any] = dict(dataset.attrs)
        self.symmetries = tuple(Symmetry.from_dict(data) for data in self.attrs["symmetries"])
        stops = np.cumsum([0, *self.attrs["n_groups"]]).tolist()
        self._slices = {
            symmetry.name: (index, slice(stops[index], stops[index + 1]))
            for index, symmetry in enumerate(self.symmetries)
        }
        if len(self._slices) < len(self.symmetries):
            raise ValueError("two of its symmetries have one name")

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self._slices:
            raise KeyError(f"no symmetry {name!r} in {str(self.path)!r}; recorded: {', '.join(map(repr, self))}")
        index, groups = self._slices[name]
        recorded = [series for series in SERIES if series in self.dataset]
        data = self.dataset[["initial", *recorded]].drop_vars(["symmetry", "position"]).isel(group=groups).load()
        data = data.assign_coords(group=np.arange(data.sizes["group"]))
        if "discrete_budget" not in data:
            data["discrete_budget"] = data.discrete_free + data.discrete_forced + data.discrete_defect
        data["discrete_total"] = data.discrete_budget - data.discrete_defect
        data["flow_total"] = data.flow_free + data.flow_forced
        data["residual"] = data.charge - data.discrete_total
        data["rounding"] = data.charge - data.discrete_budget
        laws = {key: self.attrs[key][index] for key in ("closed", "reason")}
        data.attrs = {"name": name, "kind": self.symmetries[index].kind, **laws}
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def __repr__(self) -> str:
        return f"<Record {str(self.path)!r}: {len(self.steps)} steps of {len(self)} symmetries>"

    @property
    def steps(self) -> NDArray[np.int64]:
        """Optimizer steps of the rows, [n rows], increasing."""
        return self.dataset["step"].to_numpy()

    @property
    def times(self) -> NDArray[np.float64]:
        """Time of the rows in units of lr · steps, [n rows]."""
        return self.dataset["time"].to_numpy()

    @property
    def hyperparameters(self) -> xr.Dataset:
        """`lr`, `momentum` and `weight_decay`, (step, parameter_group)."""
        return self.dataset[list(HYPERPARAMETERS)]

    @property
    def probes(self) -> dict[str, xr.DataArray]:
        """What the probes returned, by name: (step,) or (step, element)."""
        return {name: self.dataset[probe_key(index)].rename(name) for index, name in enumerate(self.attrs["probes"])}


def open_record(path: str | PathLike[str]) -> Record:
    """Open a record, also while a training process still writes it: the rows that were committed by now.

    Nothing in a record is executed: it is numbers and JSON. Of a record with damaged rows those that can be read are
    given, and a RuntimeWarning says what is missing.

    Args:
        path: Directory that a `Recorder` wrote.

    Returns:
        The record; see `Record`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: What is there is no record, is damaged throughout, or is of a later format.
    """
    record, fault = read_record(local_path(path).resolve())
    if fault:
        warnings.warn(f"{fault}, and those rows are left out", RuntimeWarning, stacklevel=2)
    return record


def read_record(path: Path) -> tuple[Record, str]:
    """A record, as `open_record` gives it, and what is wrong with its rows; nothing, as a rule.

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """
    metadata = read_metadata(path)
    attributes = metadata["attributes"]
    if attributes.get("noetherperf_record") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is a record of format {attributes.get('noetherperf_record')!r}, but this version of "
            f"noetherperf reads format {FORMAT}; use the version that wrote it: {attributes.get('versions')}"
        )
    try:
        _check_attributes(attributes)
        arrays = arrays_of(path, metadata)
        initial = _whole(arrays["initial"])
        steps, lost = arrays["step"].read()
        rows, fault = _usable(steps), ""
        if len(rows) < len(steps):
            why = f"cannot be read (its array step{lost[0]})" if lost else "do not increase"
            fault = f"the steps of {len(steps) - len(rows)} of its {len(steps)} rows {why}"
            if not len(rows):
                raise Damaged(fault)
        record = Record(path, _dataset(arrays, attributes, initial, steps, rows))
    except (ValueError, TypeError, RecursionError) as error:  # of symmetries too, and of arrays that others added
        raise ValueError(f"the record {str(path)!r} is damaged: {error}") from error
    return record, fault and f"the record {str(path)!r} is damaged: {fault}"


def read_metadata(path: Path) -> dict[str, Any]:
    """The root's metadata, where the path is a record of any format.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: What is there is no record, or its metadata cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no record at {str(path)!r}")
    root, metadata = path / "zarr.json", None
    if root.is_file():  # reading a pipe would never end
        if root.stat().st_size > LARGEST_METADATA:
            raise ValueError(f"the record {str(path)!r} is damaged: its zarr.json has {root.stat().st_size} bytes")
        try:
            metadata = json.loads(root.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the record {str(path)!r} is damaged: its zarr.json cannot be read ({error})") from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(attributes, dict) or "noetherperf_record" not in attributes:
        raise ValueError(f"{str(path)!r} is no noetherperf record")
    return metadata


def _check_attributes(attributes: Mapping[str, Any]) -> None:
    """See that a recorder may have written them; the symmetries are for `Record` to understand.

    Raises:
        Damaged: No recorder has.
    """
    of = {"n_groups": int, "symmetries": dict, "closed": bool, "reason": str, "probes": str}
    for name, kind in of.items():
        items = attributes.get(name)
        if not isinstance(items, list) or not all(type(item) is kind for item in items):
            raise Damaged(f"its attribute {name} is no list of {kind.__name__}")
    n_groups, probes = attributes["n_groups"], attributes["probes"]
    if not all(0 <= n <= LARGEST for n in n_groups):
        raise Damaged("its attribute n_groups must hold numbers of groups")
    if any(len(attributes[name]) != len(n_groups) for name in ("symmetries", "closed", "reason")):
        raise Damaged("its attributes tell of different numbers of symmetries")
    if len(set(probes)) < len(probes):
        raise Damaged("two of its probes have one name")
    for name in ("record", "measurement", "writer"):
        if not isinstance(attributes.get(name, ""), str | None):
            raise Damaged(f"its attribute {name} is no text")


def arrays_of(path: Path, metadata: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a record whose attributes are in order.

    Raises:
        Damaged: They are not the ones that a recorder writes.
    """
    attributes = metadata["attributes"]
    consolidated = metadata.get("consolidated_metadata")
    listed = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(listed, dict):
        raise Damaged("it does not say which arrays it has")
    arrays = {}
    for name, array in listed.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise Damaged(f"its array {name!r} has a name that leads elsewhere")
        arrays[name] = Array.parse(path / name, attributes.get("record") or "", array)
    kinds = dict(KINDS)
    for index, name in enumerate(attributes["probes"]):
        key = probe_key(index)
        kinds[key] = probe_kind(index, name, len(arrays[key].shape) if key in arrays else 1)
    sizes = {"group": sum(attributes["n_groups"])}
    if missing := [name for name in kinds if name not in arrays and name not in LATER]:
        raise Damaged(f"its array {missing[0]} is missing")
    for name, array in arrays.items():
        kind = kinds.get(name, array)  # others may add arrays of their own
        if (array.dims, array.dtype) != (kind.dims, kind.dtype):
            raise Damaged(f"its array {name} has dimensions {array.dims} of {array.dtype}, not {kind.dims}")
        for dim, n in zip(array.dims, array.shape, strict=True):
            if sizes.setdefault(dim, n) != n:
                raise Damaged(f"its array {name} has {n} values along {dim}, where others have {sizes[dim]}")
        if odd := [label for label, value in array.attributes.items() if not _harmless(label, value)]:
            raise Damaged(f"its array {name} has the attribute {odd[0]}, by which readers would change its numbers")
    return arrays


def _harmless(label: str, value: Any) -> bool:
    """Whether the attribute of an array leaves its numbers as they are, for all who follow the CF conventions."""
    match label:
        case "units":
            return value in UNITS
        case "_FillValue":
            return value in NOT_A_NUMBER or value != value
        case _:
            return label not in ("scale_factor", "add_offset", "missing_value", "dtype", "_Unsigned", "calendar")


def _whole(array: Array) -> NDArray[Any]:
    """All of an array without which a record has no meaning.

    Raises:
        Damaged: A part of it cannot be read.
    """
    values, lost = array.read()
    if lost:
        raise Damaged(f"its array {array.folder.name} {lost[0]}")
    return values


def _usable(steps: NDArray[np.int64]) -> NDArray[np.intp]:
    """The rows whose step is known, up to the first that is not later than the one before."""
    rows = np.flatnonzero(steps >= 0)
    falls = np.flatnonzero(np.diff(steps[rows]) <= 0)
    return rows[: falls[0] + 1] if len(falls) else rows


class _OnDisk(BackendArray):
    """An array that xarray reads when it is asked for."""

    def __init__(self, path: Path, array: Array) -> None:
        self.path, self.array = path, array
        self.shape, self.dtype = array.shape, np.dtype(array.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> Any:
        box, select = [], []
        for part, n in zip(key, self.shape, strict=True):
            wanted = range(*part.indices(n)) if isinstance(part, slice) else range(n)[part : part + 1]
            box.append(range(min(wanted), max(wanted) + 1) if len(wanted) else range(0))
            select.append(slice(None, None, wanted.step) if isinstance(part, slice) else 0)
        try:
            values, lost = self.array.read(box)
        except Damaged as error:
            raise ValueError(f"the record {str(self.path)!r} is damaged: {error}") from error
        if lost:
            more = f" (and {len(lost) - 1} more)" if lost[1:] else ""
            warnings.warn(
                f"the record {str(self.path)!r} is damaged: {self.array.folder.name}{lost[0]}{more}; read as NaN",
                RuntimeWarning,
                stacklevel=2,
            )
        return values[tuple(select)]


def _dataset(
    arrays: Mapping[str, Array],
    attributes: Mapping[str, Any],
    initial: NDArray[np.float64],
    steps: NDArray[np.int64],
    rows: NDArray[np.intp],
) -> xr.Dataset:
    """What xarray makes of a record, of the rows that can be used."""
    known = {"initial": initial, "step": steps, **positions(attributes["n_groups"])}
    keep: Any = slice(len(rows)) if np.array_equal(rows, np.arange(len(rows))) else rows
    variables = {}
    for name, array in sorted(arrays.items()):
        path = array.folder.parent
        data = known[name] if name in known else indexing.LazilyIndexedArray(_OnDisk(path, array))
        variable = xr.Variable(array.dims, data, dict(array.attributes))
        variables[name] = variable.isel(step=keep) if "step" in array.dims else variable
    coords = {name: variables.pop(name) for name in ("step", *COORDINATES)}
    attrs = {name: value for name, value in attributes.items() if name != "coordinates"}
    return xr.Dataset(variables, coords, attrs)
