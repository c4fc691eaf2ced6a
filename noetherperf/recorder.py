"""Time series of readouts on disk: appended while training runs, safe to kill at any moment, and to resume.

A record is one zarr (version 3) group of numeric arrays and JSON, which any zarr or xarray reads without this package:

    xr.open_zarr(path)        dims (step, group), (step, parameter_group); nothing in it is ever executed

Every variable is **one** array over the groups of all symmetries, side by side; the coordinates `symmetry` and
`position` say whose group a column is. A node per symmetry would look neater in a tree and costs a file per variable,
symmetry and flush: about 4 ms each, seconds a flush for a ResNet, where this takes tens of milliseconds for any model.
Names of symmetries are then data (attributes) and never file names, so they may hold any character.

What is committed is what the root's `zarr.json` says: it holds the metadata, and so the length, of all arrays
(consolidated metadata), and is replaced atomically after the rows are written. Chunks are replaced atomically too (zarr
does so from 3.1.3 on), so a process that is killed between any two instructions leaves a record that ends with its last
commit. Losing power is another matter: nothing waits for the disk.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import time
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from uuid import uuid4

import numpy as np
import torch
import xarray as xr
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.errors import ZarrUserWarning

from noetherperf.locking import Lock
from noetherperf.moments import READOUT_MOMENTS
from noetherperf.readout import Charges, Readout
from noetherperf.sgd import SGD
from noetherperf.symmetry import Symmetry

__all__ = ["Record", "Recorder", "open_record", "relative_error"]

FORMAT = 1
FLUSH_SECONDS = 10.0
CHUNK_VALUES = 2**18  # a chunk is 2 MiB of float64, and the rows of one chunk are what memory holds at most
CHUNK_GROUPS = 2**14
CODECS = ("bytes", "zstd", "gzip", "blosc", "crc32c")  # of arrays of numbers; none of them executes anything

_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")

Probe = Callable[[], Any]
Law = Literal["flow", "discrete", "budget"]
Row = dict[str, NDArray[np.float64]]


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
    "flow_free": Series(lambda charge: charge.flow.free, "flow law: what the initial charge became"),
    "flow_forced": Series(lambda charge: charge.flow.forced, "flow law: what the gradient's norm drove"),
    "defect": Series(lambda charge: charge.defect, "gradient constraint of the last step"),
    "relative_defect": Series(lambda charge: charge.relative_defect, "gradient constraint, as a cosine"),
    **{name: _moment(name) for name in READOUT_MOMENTS},
}
TERMS: dict[Law, tuple[str, ...]] = {
    "flow": ("flow_free", "flow_forced"),
    "discrete": ("discrete_free", "discrete_forced"),
    "budget": ("discrete_free", "discrete_forced", "discrete_defect"),
}
HYPERPARAMETERS = ("lr", "momentum", "weight_decay")


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


class Recorder:
    """Writes the readouts of an optimizer to disk as it steps; the training loop needs no line for it.

        with nperf.Recorder(optimizer, "runs/digits.zarr", every=10, probes={"loss": lambda: loss.item()}):
            ...                                                     # the training loop as it was

    A row is written when the recorder starts and after every step whose number is a multiple of `every`. Rows reach the
    disk in chunks, at the latest ten seconds after they were taken if training goes on; whenever the optimizer's
    `state_dict()` is taken, so that a record is never behind a checkpoint; and at `flush` and `close`.

    Rows are keyed by the step: when the optimizer is set back (a checkpoint is loaded), rows later than its present
    step are dropped as soon as the next row is written, so that no step is there twice.

    While recording, a disk that fails costs rows and not the training: a RuntimeWarning says so once, waiting rows are
    kept within bounded memory and tried again, and nothing half-written is ever read as data.

    One process at a time writes to a record: the first to make or resume it, until `close` or its end, however it ends.
    Any number may read.

    Args:
        optimizer: `nperf.SGD`.
        path: Directory of the record; its parents are made where they are missing.
        every: Steps between rows.
        exists: What to do where the path exists: "error"; "resume", continue the record of the same measurement;
            "overwrite", delete it (a noetherperf record only) and begin anew.
        probes: Name -> callable without arguments, called for each row; returns a number, or a 1-D tensor whose length
            never changes.

    Raises:
        TypeError: The optimizer cannot be read out.
        ValueError: `every` or `exists` is of no use, a probe returns neither number nor vector, or the record to be
            resumed is of other symmetries, other probes or another measurement.
        FileExistsError: The path exists and `exists` does not allow to touch it.
        BlockingIOError: Another process is writing to the record.
    """

    def __init__(
        self,
        optimizer: SGD,
        path: str | os.PathLike[str],
        every: int = 1,
        *,
        exists: Literal["error", "resume", "overwrite"] = "error",
        probes: Mapping[str, Probe] | None = None,
    ) -> None:
        if not hasattr(optimizer, "readout"):
            raise TypeError(f"optimizer: {type(optimizer).__name__} measures no charges; record a noetherperf.SGD")
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if exists not in ("error", "resume", "overwrite"):
            raise ValueError(f"exists: must be 'error', 'resume' or 'overwrite', got {exists!r}")
        self.path = Path(path).resolve()
        self.every = int(every)
        self._optimizer = optimizer
        self._probes = dict(probes or {})
        self._probe_shapes: dict[str, tuple[int, ...]] = {}
        self._rows: list[Row] = []  # taken, not yet on disk
        self._steps: list[int] = []  # of the rows on disk
        self._n_kept = 0  # so many of them still count; less than all after the optimizer was set back
        self._warned = False
        self._closed = False

        readout = optimizer.readout()
        row = self._take(readout)
        self._attributes = _attributes(optimizer, readout, self.every, list(self._probes))
        self._initial = _concatenate(readout, lambda charge: charge.initial)
        occupied = self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        if occupied and exists == "resume":
            self._hold(_lock(self.path))
            self._resume()
        else:
            if occupied:
                _require_overwritable(self.path, exists)
            self._hold(_create(self.path, self._attributes, self._initial, row))
        self._arrays = _open_arrays(self.path)
        self._n_rows_chunk: int = self._arrays["charge"].chunks[0]

        self._seen = readout.step
        self._last_flush = time.monotonic()
        self._rewind(self._seen)
        if self._n_kept == 0:
            self._rows.append(row)
            self.flush()  # so that the record has its first row from the beginning
        elif self._steps[self._n_kept - 1] != self._seen and self._seen % every == 0:
            self._rows.append(row)
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self.flush()),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits and leave the optimizer alone. A second call does nothing."""
        if not self._closed:
            self._closed = True
            for hook in self._hooks:
                hook.remove()
            self.flush()
            self._let_go()

    def _hold(self, lock: Lock) -> None:
        """Keep the record to this process until the recorder is closed, or gone without having been closed."""
        self._let_go = weakref.finalize(self, lock.release)

    def flush(self) -> None:
        """Write all rows taken so far to disk and commit them. Warns, once, where the disk refuses."""
        self._last_flush = time.monotonic()
        if not self._rows:
            return
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the record {str(self.path)!r} could not be written ({error}); training goes on, and the last "
                    f"{4 * self._n_rows_chunk} rows are kept and tried again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            del self._rows[: -4 * self._n_rows_chunk]

    def _after_step(self, *_: object) -> None:
        # A GPU tells only when it is read which steps a gradient scaler skipped; until then they count as steps.
        step = self._optimizer.step_count
        if step == self._seen:
            return
        if step != self._seen + 1:
            self._check_initial(_concatenate(self._optimizer.readout(), lambda charge: charge.initial))
            self._rewind(step - 1)
        self._seen = step
        if step % self.every == 0:
            readout = self._optimizer.readout()
            self._seen = readout.step
            if readout.step == step:
                self._record(readout)

    def _record(self, readout: Readout) -> None:
        self._rows.append(self._take(readout))
        self._attributes |= _law_states(readout)
        if len(self._rows) % self._n_rows_chunk == 0 or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def _take(self, readout: Readout) -> Row:
        """One row: every array's values at this step."""
        row = {name: _concatenate(readout, series.read) for name, series in SERIES.items()}
        row["step"] = np.asarray(readout.step, dtype=np.float64)
        row["time"] = np.asarray(readout.time, dtype=np.float64)
        for name in HYPERPARAMETERS:
            row[name] = np.asarray([float(group[name]) for group in self._optimizer.param_groups], dtype=np.float64)
        for index, (name, probe) in enumerate(self._probes.items()):
            value = torch.as_tensor(probe()).detach().to("cpu", torch.float64).numpy().copy()
            if value.ndim > 1:
                raise ValueError(f"probes: {name!r} returned shape {value.shape}; return a number, or flatten it")
            shape = self._probe_shapes.setdefault(name, value.shape)
            if value.shape != shape:
                raise ValueError(f"probes: {name!r} returned shape {value.shape} after {shape}; it must not change")
            row[_probe_key(index)] = value
        return row

    def _rewind(self, step: int) -> None:
        """Forget rows later than a step; those on disk go when the next rows are written over them."""
        self._n_kept = bisect_right(self._steps, step)
        last = self._steps[self._n_kept - 1] if self._n_kept else -1
        self._rows = [row for row in self._rows if last < row["step"] <= step]

    def _resume(self) -> None:
        record = open_record(self.path)
        for key, what in (("symmetries", "symmetries"), ("n_groups", "numbers of groups"), ("probes", "probes")):
            if record.attrs[key] != self._attributes[key]:
                raise ValueError(
                    f"exists='resume': {str(self.path)!r} records other {what} than this optimizer and recorder have; "
                    "record to another path, or say exists='overwrite'"
                )
        for name, values in record.probes.items():
            if values.shape[1:] != self._probe_shapes[name]:
                raise ValueError(
                    f"probes: {name!r} returned shape {self._probe_shapes[name]}, but {str(self.path)!r} holds it with "
                    f"shape {values.shape[1:]}"
                )
        self._check_initial(record.dataset["initial"].to_numpy())
        self._steps = record.steps.tolist()

    def _check_initial(self, initial: NDArray[np.float64]) -> None:
        """A record is of one measurement, and a measurement is known by the charges that it began with."""
        if not np.array_equal(initial, self._initial, equal_nan=True):
            raise ValueError(
                f"the record {str(self.path)!r} is of another measurement: the charges that the optimizer's laws start "
                "from are not those of the record. Load the checkpoint before the Recorder is made; after "
                "reset_measurement(), or for a new run, record to another path"
            )

    def _write(self) -> None:
        """Append the waiting rows, then commit. Repeating it after a failure at any point is safe."""
        n_kept, rows = self._n_kept, self._rows
        if n_kept < len(self._steps):  # first commit that the dropped rows are gone, only then write over them
            self._commit(n_kept)
            del self._steps[n_kept:]
        for name, array in self._arrays.items():
            # A parameter group added during training widens its arrays; earlier rows are NaN there.
            width = [max(array.shape[1], *(row[name].shape[0] for row in rows))] if array.ndim > 1 else []
            block = np.full((len(rows), *width), np.nan)
            for target, row in zip(block, rows, strict=True) if width else ():
                target[: row[name].shape[0]] = row[name]
            if not width:
                block[:] = [row[name] for row in rows]
            array.resize((n_kept + len(rows), *width))
            array[n_kept:] = block
        self._commit(n_kept + len(rows))
        self._steps += [int(row["step"]) for row in rows]
        self._n_kept, self._rows = len(self._steps), []

    def _commit(self, n_rows: int) -> None:
        """Say how many rows count: one atomic replacement of the root's metadata, which holds every array's length."""
        root = self.path / "zarr.json"
        metadata = json.loads(root.read_bytes())
        metadata["attributes"] |= self._attributes
        for name, array in self._arrays.items():
            metadata["consolidated_metadata"]["metadata"][name]["shape"] = [n_rows, *array.shape[1:]]
        temporary = root.with_name(f".zarr.json.{uuid4().hex}")
        try:
            temporary.write_text(json.dumps(metadata), encoding="utf-8")
            temporary.replace(root)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


class Record(Mapping[str, xr.Dataset]):
    """A record as labelled arrays: symmetry name -> dataset. `open_record` makes one.

    `record[name]` has dims (step, group) and holds what was recorded (`charge`, `discrete_free`, `discrete_forced`,
    `discrete_defect`, `flow_free`, `flow_forced`, `defect`, `relative_defect`, the moments `sum_p`, `sq_p`, `sum_g`,
    `sq_g`, `dot_pg`, `sq_u`), what follows from it (`discrete_total`, `flow_total`, `residual`, `rounding`), `initial`
    [group], and coordinates `step` and `time`. Its attributes are `name`, `kind`, `closed` and `reason`.

    Arrays are read from disk when they are asked for, each time anew.

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

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self._slices:
            raise KeyError(f"no symmetry {name!r} in {str(self.path)!r}; recorded: {', '.join(map(repr, self))}")
        index, groups = self._slices[name]
        data = self.dataset[["initial", *SERIES]].drop_vars(["symmetry", "position"]).isel(group=groups).load()
        data = data.assign_coords(group=np.arange(data.sizes["group"]))
        data["discrete_total"] = data.discrete_free + data.discrete_forced
        data["flow_total"] = data.flow_free + data.flow_forced
        data["residual"] = data.charge - data.discrete_total
        data["rounding"] = data.charge - (data.discrete_total + data.discrete_defect)
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
        return {name: self.dataset[_probe_key(index)].rename(name) for index, name in enumerate(self.attrs["probes"])}


def open_record(path: str | os.PathLike[str]) -> Record:
    """Open a record, also while a training process still writes it: the rows that were committed by now.

    Nothing in a record is executed: it is numbers and JSON.

    Args:
        path: Directory that a `Recorder` wrote.

    Returns:
        The record; see `Record`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: What is there is no record, is damaged, or is of a later format.
    """
    path = Path(path).resolve()
    metadata = _read_metadata(path)
    attributes = metadata["attributes"]
    if attributes.get("noetherperf_record") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is a record of format {attributes.get('noetherperf_record')!r}, but this version of "
            f"noetherperf reads format {FORMAT}; use the version that wrote it: {attributes.get('versions')}"
        )
    if fault := _fault(metadata):
        raise ValueError(f"the record {str(path)!r} is damaged: {fault}")
    dataset = xr.open_zarr(path, consolidated=True, chunks=None)
    try:
        steps = dataset["step"].to_numpy()
    except RuntimeError as error:
        raise ValueError(f"the record {str(path)!r} is damaged: its steps cannot be read ({error})") from error
    if np.any(np.diff(steps, prepend=-1) <= 0):
        raise ValueError(f"the record {str(path)!r} is damaged: its steps do not increase, so chunks of it are missing")
    return Record(path, dataset)


def _concatenate(readout: Readout, read: Callable[[Charges], Tensor]) -> NDArray[np.float64]:
    """One variable of all symmetries side by side, [all groups], float64."""
    charges = [readout.together] if isinstance(readout, Readout) else readout.values()
    values: NDArray[np.float64] = torch.cat([_NOTHING, *map(read, charges)]).numpy()
    return values


def _probe_key(index: int) -> str:
    """Array of a probe: counted, since the user's name for it may be no file name."""
    return f"probe_{index}"


def _law_states(readout: Readout) -> dict[str, Any]:
    charges = readout.values()
    return {"closed": [charge.closed for charge in charges], "reason": [charge.reason for charge in charges]}


def _attributes(optimizer: SGD, readout: Readout, every: int, probes: Sequence[str]) -> dict[str, Any]:
    dtypes = {str(p.dtype).removeprefix("torch.") for group in optimizer.param_groups for p in group["params"]}
    packages = ("noetherperf", "torch", "numpy", "xarray", "zarr")
    return {
        "noetherperf_record": FORMAT,
        "symmetries": [charge.symmetry.to_dict() for charge in readout.values()],
        "n_groups": [charge.charge.numel() for charge in readout.values()],
        **_law_states(readout),
        "probes": list(probes),
        "every": every,
        "backend": optimizer.backend,
        "dtypes": sorted(dtypes),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "coordinates": "time symmetry position",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_metadata(path: Path) -> dict[str, Any]:
    """The root's metadata, where the path is a record of any format."""
    if not path.exists():
        raise FileNotFoundError(f"there is no record at {str(path)!r}")
    try:
        metadata = json.loads((path / "zarr.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        metadata = {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the record {str(path)!r} is damaged: its zarr.json cannot be read ({error})") from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict) or "noetherperf_record" not in attributes:
        raise ValueError(f"{str(path)!r} is no noetherperf record")
    whole: dict[str, Any] = metadata
    return whole


def _fault(metadata: Mapping[str, Any]) -> str | None:
    """What in a record's metadata no recorder has written, if there is something; found before zarr acts on it.

    zarr knows data types and codecs that are not plain numbers, packages may register more, and some (pickle) execute
    what they read. So only what a recorder writes gets as far as zarr.
    """
    attributes = metadata["attributes"]
    for key in ("symmetries", "n_groups", "closed", "reason", "probes"):
        if not isinstance(attributes.get(key), list):
            return f"its attribute {key} is no list"
    n_groups = attributes["n_groups"]
    if not all(type(n) is int and n >= 0 for n in n_groups):
        return "its attribute n_groups must hold whole numbers"
    if any(len(attributes[key]) != len(n_groups) for key in ("symmetries", "closed", "reason")):
        return "its attributes tell of different numbers of symmetries"
    if not all(isinstance(name, str) for name in attributes["probes"]):
        return "its attribute probes must hold names"
    consolidated = metadata.get("consolidated_metadata")
    arrays = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(arrays, dict):
        return "it does not say which arrays it has"
    probes = map(_probe_key, range(len(attributes["probes"])))
    for name in ("step", "time", *HYPERPARAMETERS, *SERIES, "initial", "symmetry", "position", *probes):
        if name not in arrays:
            return f"its array {name} is missing"
    for name, array in arrays.items():
        plain = isinstance(array, dict) and array.get("zarr_format") == 3 and array.get("node_type") == "array"
        if not plain or array.get("data_type") not in ("int64", "float64"):
            return f"its array {name} is of another kind than numbers"
        codecs = array.get("codecs")
        if not isinstance(codecs, list) or not all(isinstance(c, dict) and c.get("name") in CODECS for c in codecs):
            return f"its array {name} asks for a codec other than {', '.join(CODECS)}"
    for name in ("initial", *SERIES):
        shape = arrays[name].get("shape")
        if not isinstance(shape, list) or not shape or shape[-1] != sum(n_groups):
            return f"its array {name} has shape {shape}, but its symmetries have {sum(n_groups)} groups"
    return None


def _require_overwritable(path: Path, exists: str) -> None:
    """Raise FileExistsError unless the path may be deleted: asked for, a record, and nothing but a record."""
    if exists == "error":
        raise FileExistsError(
            f"path: {str(path)!r} exists; say exists='resume' to continue that record, exists='overwrite' to delete "
            "it, or record to another path"
        )
    try:
        ours = {"zarr.json", *_read_metadata(path)["consolidated_metadata"]["metadata"]}
    except (ValueError, KeyError) as error:
        raise FileExistsError(
            f"exists='overwrite' deletes noetherperf records only, and {error}; remove it yourself, or record to "
            "another path"
        ) from error
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and not _is_leftover(entry))
    if others:
        raise FileExistsError(
            f"exists='overwrite' would delete {others[0]!r} too, which lies in {str(path)!r} and is no part of the "
            "record; move it away, or record to another path"
        )


def _is_leftover(entry: Path) -> bool:
    """Whether a file was left by a process that was killed while it wrote one of the record's."""
    return entry.name.startswith(".zarr.json.") or entry.suffix == ".partial"


def _lock(path: Path) -> Lock:
    """Keep a record to this process.

    Raises:
        BlockingIOError: Another process writes to it.
    """
    try:
        return Lock(path / "initial" / "zarr.json")  # of what is written once; files that change are replaced by others
    except BlockingIOError:
        raise BlockingIOError(
            f"path: another process is writing to the record {str(path)!r}; end it or close its Recorder, or record to "
            "another path"
        ) from None


def _create(path: Path, attributes: Mapping[str, Any], initial: NDArray[np.float64], row: Row) -> Lock:
    """Make a record without rows beside the path, then move it there: a path holds a whole record or none.

    Returns:
        The lock on it.

    Raises:
        BlockingIOError: Another process writes to the record that is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building, old = (path.with_name(f".{path.name}.{uuid4().hex}") for _ in range(2))
    try:
        _build(building, attributes, initial, row)
        lock = _lock(building)
        if path.exists():
            with _lock(path):
                path.replace(old)
        building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return lock


def _build(path: Path, attributes: Mapping[str, Any], initial: NDArray[np.float64], row: Row) -> None:
    root = zarr.create_group(path)
    n_groups = attributes["n_groups"]
    n_rows = min(1024, max(16, CHUNK_VALUES // max(1, len(initial))))

    def series(name: str, dims: Sequence[str], chunk: Sequence[int], **labels: str) -> None:
        root.create_array(
            name,
            shape=(0, *row[name].shape),
            chunks=(n_rows, *chunk),
            dtype=np.int64 if name == "step" else np.float64,
            fill_value=-1 if name == "step" else np.nan,  # of a chunk that went missing: no valid step, no number
            dimension_names=["step", *dims],
            attributes=dict(labels),
        )

    def coordinate(name: str, data: NDArray[Any], **labels: str) -> None:
        array = root.create_array(
            name,
            shape=data.shape,
            chunks=(max(1, data.size),),
            dtype=data.dtype,
            dimension_names=["group"],
            attributes=dict(labels),
        )
        array[:] = data

    series("step", [], [], long_name="optimizer step", units="1")
    series("time", [], [], long_name="time", units="lr · steps")
    for name in HYPERPARAMETERS:
        series(name, ["parameter_group"], [16])
    for name, (_, meaning) in SERIES.items():
        series(name, ["group"], [min(CHUNK_GROUPS, max(1, len(initial)))], long_name=meaning)
    for index, name in enumerate(attributes["probes"]):
        key = _probe_key(index)
        dims = [f"{key}_element"] if row[key].ndim else []
        series(key, dims, [max(1, size) for size in row[key].shape], long_name=name)
    coordinate("initial", initial, long_name="charge when measuring began")
    coordinate("symmetry", np.repeat(np.arange(len(n_groups)), n_groups), long_name="index into attribute symmetries")
    positions = np.concatenate([np.empty(0, np.int64), *map(np.arange, n_groups)])
    coordinate("position", positions, long_name="index of the group in its symmetry")
    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata still find every array by itself.
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        zarr.consolidate_metadata(root.store)
    # Attributes come last: zarr would write them again with every array, and of many symmetries they are megabytes.
    file = path / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"attributes": dict(attributes)}), encoding="utf-8")


def _open_arrays(path: Path) -> dict[str, zarr.Array[Any]]:
    """The arrays that grow, with the lengths that were committed."""
    arrays = zarr.open_group(path, mode="r+", use_consolidated=True).arrays()
    return {name: array for name, array in arrays if name not in ("initial", "symmetry", "position")}
