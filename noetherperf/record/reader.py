"""Records, read: labelled arrays of what a Recorder wrote, whoever the files come from.

Nothing in a record is executed; it is numbers and JSON. A number that does not match its checksum is not read.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from noetherperf.common.paths import local_path
from noetherperf.record.array import Array
from noetherperf.record.chunks import Damaged
from noetherperf.record.layout import (
    COORDINATES,
    FIRST_HYPERPARAMETERS,
    FIRST_RULE,
    FORMATS,
    KINDS,
    LOGGED,
    positions,
    probe_key,
)
from noetherperf.record.matrices import read_balance
from noetherperf.record.metadata import arrays_of, check_attributes, read_metadata
from noetherperf.record.series import INITIAL, SERIES, derivations
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import find, nearest


def checked_rows(rows: Any) -> slice:
    """Rows as they were asked for.

    Raises:
        ValueError: They are no slice of whole numbers.
    """
    ends = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else (rows,)
    if not isinstance(rows, slice) or not all(end is None or isinstance(end, int | np.integer) for end in ends):
        raise ValueError(
            f"rows: must be a slice of positions in `steps`, such as slice(0, None, 10), got {rows!r}"[:300]
        )
    if rows.step == 0:
        raise ValueError("rows: a slice must not have the step 0")
    return rows


class Record(Mapping[str, xr.Dataset]):
    """A record as labelled arrays: symmetry name -> dataset. `open_record` makes one.

    `record[name]` has dims (step, group). It holds every series that was recorded or follows from recorded ones
    (`record.series` names them), `initial` [group], and coordinates `step` and `time`, all in float64, with `units` and
    `formula` among their attributes. What a `Recorder` writes by default gives

        charge                                            measured
        discrete_decay, discrete_forced, discrete_defect  the discrete law's parts of charge − initial
        discrete_free, discrete_total, discrete_budget    initial + decay; free + forced; total + defect
        residual, rounding                                charge − discrete_total; charge − discrete_budget
        flow_decay, flow_free, flow_forced, flow_total    the flow law's; flow_residual = charge − flow_total
        angular_update, effective_lr, relative_defect     of the last step, in four digits
        decayed, growth, transport                        with rules that have them

    What is recorded in float32 has seven digits of its own. So charge − free − forced is right to seven digits of these
    terms and of the initial charge, and `residual` to seven digits of itself.

    The dataset's attributes are `name`, `kind`, `closed` and `reason`. `record.read` reads some series, and some rows.
    `record.balance(name)` has the spectra of a Balance, and its matrices.

    Every access reads the arrays from disk. A missing or damaged chunk is NaN, and a RuntimeWarning says where.

    Attributes:
        path: The record's directory.
        dataset: Everything in one dataset, the groups of all symmetries side by side, as `xr.open_zarr` returns it: the
            recorded series alone, in the precision that they were recorded in.
        attrs: The record's attributes: symmetries as JSON data, backend, versions and more.
        symmetries: The recorded symmetries with one charge for each group, in order.
        balances: Those whose charges are matrices (Balance), by name.
    """

    def __init__(self, path: Path, dataset: xr.Dataset) -> None:
        self.path = path
        self.dataset = dataset
        self.attrs: dict[str, Any] = dict(dataset.attrs)
        self.symmetries = tuple(Symmetry.from_dict(data) for data in self.attrs["symmetries"])
        laws = (Symmetry.from_dict(data) for data in self.attrs.get("balances", []))
        self.balances: dict[str, Symmetry] = {law.name: law for law in laws}
        stops = np.cumsum([0, *self.attrs["n_groups"]]).tolist()
        self._slices = {
            symmetry.name: (index, slice(stops[index], stops[index + 1]))
            for index, symmetry in enumerate(self.symmetries)
        }
        if len(self._slices) < len(self.symmetries):
            raise ValueError("two of its symmetries have one name")

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self._slices:
            name = find(name, self.symmetries, self._miss(name))
        return self._load(name, None, slice(None))

    def __contains__(self, name: object) -> bool:
        return name in self._slices

    def read(self, name: str, series: Sequence[str] | str | None = None, *, rows: slice = slice(None)) -> xr.Dataset:
        """Some series of one symmetry, at some rows. Nothing else is read from disk.

            record.read("conv1", ["charge", "discrete_total"], rows=slice(0, None, 10))    # every tenth row

        Args:
            name: The symmetry's.
            series: Names among `record.series`, or one of them; by default all.
            rows: Which rows: positions in `record.steps`, `slice(*np.searchsorted(record.steps, [first, last]))` say.

        Returns:
            A dataset like `record[name]`, float64, (step, group).

        Raises:
            KeyError: No symmetry of that name is recorded.
            ValueError: A series was not recorded, and does not follow from those that were; or rows is no slice.
        """
        if name not in self._slices:
            name = find(name, self.symmetries, self._miss(name))
        series, known = [series] if isinstance(series, str) else series, self.series
        if series is not None and not len(series):
            raise ValueError("series: is empty; leave it out to read all")
        if missing := [one for one in series or () if one not in known]:
            raise ValueError(f"series: {str(self.path)!r} has no {missing[0]!r}; {self._hint(missing[0])}")
        return self._load(name, series, checked_rows(rows))

    def balance(self, name: str, variables: Sequence[str] | None = None, *, rows: slice = slice(None)) -> xr.Dataset:
        """One Balance: its spectrum, and its matrices if they were recorded (`Recorder(..., matrices=True)`).

            record.balance("attn")["eigenvalues"].isel(block=0).plot.line(x="step")

        Args:
            name: The Balance's.
            variables: Which of those below; by default all that were recorded. Nothing else is read from disk.
            rows: As in `read`.

        Returns:
            A dataset, float64. `eigenvalues` and `predicted_eigenvalues`, the law's, (step, block, unit), ascending.
            Frobenius norms of each block, (step, block): `residual` and `rounding`; and `size`, the larger of
            |charge| and |free| + |forced|, which they are relative to. With matrices: `charge` and
            `predicted_charge`, (step, block, unit, other_unit). Attributes: `name`, `kind`, `closed` and `reason`.

        Raises:
            KeyError: No Balance of that name is recorded.
            ValueError: A variable was not recorded.
        """
        return read_balance(self.path, self.dataset, self.balances, name, variables, checked_rows(rows))

    def numbers(
        self, series: Sequence[str], *, groups: slice = slice(None), rows: slice = slice(None)
    ) -> dict[str, NDArray[np.float64]]:
        """Series of columns among the groups of all symmetries, without labels; nothing else is read from disk.

        Args:
            series: Names among `series`.
            groups: Which columns, in the order of the symmetries.
            rows: Which rows.

        Returns:
            [n rows, n columns] by name, float64.
        """
        values: dict[str, NDArray[np.float64]] = {INITIAL: self.dataset.variables[INITIAL].to_numpy()[groups]}
        for name, terms in derivations(self.recorded, series).items():
            if terms:
                (_, first), *others = terms
                values[name] = values[first]
                with np.errstate(all="ignore"):  # infinity less infinity
                    for sign, term in others:
                        values[name] = (np.add if sign > 0 else np.subtract)(values[name], values[term])
            else:
                found = self.dataset.variables[name].isel(step=rows, group=groups)
                values[name] = found.to_numpy().astype(np.float64, copy=False)
        return {name: values[name] for name in series}

    def _miss(self, name: str) -> str:
        if name in self.balances:
            return f"{name!r} is a Balance, whose charges are matrices: record.balance({name!r})"
        return f"no symmetry {name!r} is recorded in {str(self.path)!r}"

    def _hint(self, series: str) -> str:
        if series in SERIES:
            return f"it has to be asked for: Recorder(..., series=[..., {series!r}])"
        return nearest(str(series), self.series)

    def _load(self, name: str, series: Sequence[str] | None, rows: slice) -> xr.Dataset:
        index, groups = self._slices[name]
        names = self.series if series is None else series
        numbers = self.numbers(names, groups=groups, rows=rows)
        data = xr.Dataset(
            {
                INITIAL: self.dataset.variables[INITIAL].isel(group=groups).load(),
                **{one: (("step", "group"), values, KINDS[one].labels) for one, values in numbers.items()},
            },
            {name: self.dataset[name].isel(step=rows).load() for name in ("step", "time")},
        )
        data = data.assign_coords(group=np.arange(data.sizes["group"]))
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
    def recorded(self) -> dict[str, str]:
        """The series on disk, and their precisions."""
        variables = self.dataset.variables
        return {name: str(variables[name].dtype) for name in SERIES if name in variables}

    @property
    def series(self) -> tuple[str, ...]:
        """All series that `record[name]` has: recorded, or following from recorded ones."""
        known = derivations(self.recorded)
        return tuple(name for name in SERIES if name in known)

    @property
    def rule(self) -> str:
        """Name of the update rule, "sgd" or "adam"."""
        return str(self.attrs.get("rule") or FIRST_RULE)

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
        """The options that the update rule reads, (step, parameter_group): `lr`, `weight_decay` and so on."""
        return self.dataset[list(self.attrs.get("hyperparameters", FIRST_HYPERPARAMETERS))]

    @property
    def probes(self) -> dict[str, xr.DataArray]:
        """Values of the probes, by name: (step,) or (step, element); and those of `Recorder.log`, (step,)."""
        found = {name: self.dataset[probe_key(index)].rename(name) for index, name in enumerate(self.attrs["probes"])}
        if LOGGED in self.dataset:
            # A name may be committed before its first value.
            for index, name in enumerate(self.attrs.get(LOGGED, [])[: self.dataset[LOGGED].shape[1]]):
                found[name] = self.dataset[LOGGED][:, index].rename(name)
        return found


def open_record(path: str | PathLike[str]) -> Record:
    """Open a record. A training process may still be writing it: the rows committed by now are read.

    Nothing in a record is executed: it is numbers and JSON. If rows are damaged, the others are read, and a
    RuntimeWarning says what is missing.

    Args:
        path: Directory that a `Recorder` wrote.

    Returns:
        The record; see `Record`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: The path holds no record, a record without readable rows, or one of a later format.
    """
    record, fault = read_record(local_path(path).resolve())
    if fault:
        warnings.warn(f"{fault}, and those rows are left out", RuntimeWarning, stacklevel=2)
    return record


def read_record(path: Path) -> tuple[Record, str]:
    """A record, as `open_record` returns it, and what is wrong with its rows ("" if nothing is).

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """
    metadata = read_metadata(path)
    attributes = metadata["attributes"]
    if attributes.get("noetherperf_record") not in FORMATS:
        raise ValueError(
            f"{str(path)!r} is a record of format {attributes.get('noetherperf_record')!r}, but this version of "
            f"noetherperf reads formats {FORMATS}; use the version that wrote it: {attributes.get('versions')}"
        )
    try:
        check_attributes(attributes)
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
    except (ValueError, TypeError, RecursionError) as error:  # from symmetries, and from other tools' arrays, too
        raise ValueError(f"the record {str(path)!r} is damaged: {error}") from error
    return record, fault and f"the record {str(path)!r} is damaged: {fault}"


def _whole(array: Array) -> NDArray[Any]:
    """A whole array that the record cannot do without.

    Raises:
        Damaged: A part of it cannot be read.
    """
    values, lost = array.read()
    if lost:
        raise Damaged(f"its array {array.folder.name} {lost[0]}")
    return values


def _usable(steps: NDArray[np.int64]) -> NDArray[np.intp]:
    """The rows whose step can be read, up to the first step that does not increase."""
    rows = np.flatnonzero(steps >= 0)
    falls = np.flatnonzero(np.diff(steps[rows]) <= 0)
    return rows[: falls[0] + 1] if len(falls) else rows


class _OnDisk(BackendArray):
    """An array that xarray reads lazily."""

    def __init__(self, path: Path, array: Array) -> None:
        self.path, self.array = path, array
        self.shape, self.dtype = array.shape, np.dtype(array.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> Any:
        box, select = [], []
        for part, n in zip(key, self.shape, strict=True):
            wanted = range(*part.indices(n)) if isinstance(part, slice) else range(n)[part : part + 1]
            box.append(wanted if wanted.step > 0 else wanted[::-1])
            select.append(slice(None, None, 1 if wanted.step > 0 else -1) if isinstance(part, slice) else 0)
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
    """A record's usable rows as an xarray dataset."""
    known = {"initial": initial, "step": steps, **positions(attributes["n_groups"])}
    keep: Any = slice(len(rows)) if np.array_equal(rows, np.arange(len(rows))) else rows
    variables = {}
    for name, array in sorted(arrays.items()):
        path = array.folder.parent
        data = known[name] if name in known else indexing.LazilyIndexedArray(_OnDisk(path, array))
        encoding = {"preferred_chunks": dict(zip(array.dims, array.chunk, strict=True))}
        variable = xr.Variable(array.dims, data, dict(array.attributes), encoding)
        variables[name] = variable.isel(step=keep) if "step" in array.dims else variable
    coords = {name: variables.pop(name) for name in ("step", *COORDINATES)}
    attrs = {name: value for name, value in attributes.items() if name != "coordinates"}
    return xr.Dataset(variables, coords, attrs)
