"""Collects what is recorded: a readout's row, and the attributes that describe the measurement."""

import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noetherperf.measure.charges import ChargeReadout, Charges
from noetherperf.measure.readout import Readout
from noetherperf.record.choice import Choice
from noetherperf.record.layout import COORDINATES, FORMAT, LOGGED, probe_key
from noetherperf.record.matrices import described, of_balances, refuse_names
from noetherperf.record.pending import Row
from noetherperf.record.series import SAMPLE_BITS, SERIES
from noetherperf.rules.rule import Rule, numbers_of

_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")

Probe = Callable[[], Any]


class Measured(Protocol):
    """An optimizer that can be recorded: it has readouts, and hooks around its steps."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def rule(self) -> Rule[Any]: ...
    @property
    def backend(self) -> str: ...
    @property
    def step_count(self) -> int: ...
    @property
    def measurement_id(self) -> str: ...
    def readout(self) -> Readout: ...
    def paused(self) -> AbstractContextManager[object]: ...
    def register_step_pre_hook(self, hook: Any) -> RemovableHandle: ...
    def register_step_post_hook(self, hook: Any) -> RemovableHandle: ...
    def register_state_dict_pre_hook(self, hook: Any) -> RemovableHandle: ...


class Collector:
    """Reads rows and attributes of an optimizer.

    Args:
        optimizer: What is recorded.
        probes: Name -> callable; see `Recorder`.
        choice: Of series.
        matrices: Whether to record those of every Balance, too.

    Attributes:
        series: Name -> precision of what is recorded of every group; empty until `begin`.
        logged: Names of the values of `Recorder.log`, in the order of their columns; None if the record has no place
            for them.
        probe_shapes: Shape of the values that each probe has returned so far.
    """

    def __init__(
        self, optimizer: Measured, probes: Mapping[str, Probe], choice: Choice, *, matrices: bool = False
    ) -> None:
        self._optimizer, self._probes, self.choice = optimizer, dict(probes), choice
        self.series: dict[str, str] = {}
        self.logged: list[str] | None = []
        self.probe_shapes: dict[str, tuple[int, ...]] = {}
        self._matrices = matrices
        self._of_balances: dict[str, Probe] = {}
        self._values: dict[str, Any] = {}  # logged since the last row

    def begin(self, readout: Readout) -> None:
        """Choose the series of a new record."""
        self.series = self.choice.among(list(readout.values())[:1])

    def resume(self, path: str, series: Mapping[str, str], logged: Sequence[str] | None) -> None:
        """Take over the series of a record that exists, and the names that it has logged.

        Raises:
            ValueError: Other series were asked for.
        """
        self.choice.check(series, path)
        self.series, self.logged = dict(series), None if logged is None else list(logged)

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep values for the next row; their names get columns there.

        Raises:
            ValueError: A value is no number, a name is a probe's, or the record has no place for them.
        """
        for name, value in values.items():
            if not isinstance(name, str):
                raise ValueError(f"log: names must be text, got {name!r}")
            if name in self._probes:
                raise ValueError(f"log: {name!r} is the name of a probe of this recorder; choose another")
            refuse_names("log", [name], self._of_balances)
            if not _is_number(value):
                raise ValueError(f"log: {name!r} must be a number or a tensor of one element, got {value!r}"[:300])
        if values and self.logged is None:
            raise ValueError(
                "log: this record was begun by an earlier version and has no place for logged values; name them as "
                "probes, or record to another path"
            )
        for name, value in values.items():  # copies: a running sum may go on before the row is taken
            self._values[name] = value.detach().clone() if isinstance(value, Tensor) else _float(value)

    def row(self, readout: Readout) -> Row:
        """Every array's values at this step.

        Raises:
            ValueError: A probe returns neither number nor vector, or changes its shape.
        """
        with np.errstate(over="ignore"):  # beyond float32's range: infinity
            row: Row = {
                name: _concatenate(readout, SERIES[name].read).astype(dtype, copy=False)
                for name, dtype in self.series.items()
            }
        for name, dtype in self.series.items():
            if dtype == "float32" and not self.choice.keeps_all_digits(name):
                row[name] = _rounded(row[name], SAMPLE_BITS)
        row["step"] = np.asarray(readout.step, dtype=np.float64)
        row["time"] = np.asarray(readout.time, dtype=np.float64)
        for name, values in self._hyperparameters().items():
            row[name] = np.asarray(values, dtype=np.float64)
        for index, (name, probe) in enumerate(self._all_probes(readout).items()):
            value = _tensor(name, probe()).detach().to("cpu", torch.float64).numpy().copy()
            if value.ndim > 1:
                raise ValueError(f"probes: {name!r} returned shape {value.shape}; return a number, or flatten it")
            shape = self.probe_shapes.setdefault(name, value.shape)
            if value.shape != shape:
                raise ValueError(f"probes: {name!r} returned shape {value.shape} after {shape}; it must not change")
            row[probe_key(index)] = value
        if self.logged is not None:
            logged, self._values = self._values, {}
            self.logged = list(dict.fromkeys([*self.logged, *logged]))
            row[LOGGED] = np.array([_float(logged.get(name, math.nan)) for name in self.logged], dtype=np.float64)
        return row

    def _all_probes(self, readout: Readout) -> dict[str, Probe]:
        """What is recorded of every Balance, then the probes that were given.

        Raises:
            ValueError: They have a name in common.
        """
        self._of_balances = dict(of_balances(readout, self._matrices))
        refuse_names("probes", self._probes, self._of_balances)
        return {**self._of_balances, **self._probes}

    def _hyperparameters(self) -> dict[str, list[float]]:
        """What the rule reads from the parameter groups, by name: a number of each group."""
        groups = [numbers_of(self._optimizer.rule, group) for group in self._optimizer.param_groups]
        return {name: [group[name] for group in groups] for name in groups[0]}

    def attributes(self, readout: Readout, measurement: str | None, every: int) -> dict[str, Any]:
        """Attributes of a record of the readout's measurement, except its identity and its writer's.

        Args:
            readout: Of the measurement.
            measurement: Its name, if the record is known by it.
            every: Steps between rows.
        """
        groups, packages = self._optimizer.param_groups, ("noetherperf", "torch", "numpy", "xarray", "zarr")
        charges = list(readout.values())
        return {
            "noetherperf_record": FORMAT,
            "measurement": measurement,
            "symmetries": [charge.symmetry.to_dict() for charge in charges],
            "n_groups": [charge.charge.numel() for charge in charges],
            **described(readout),
            **self.states(readout),
            "rule": self._optimizer.rule.name,
            "hyperparameters": list(self._hyperparameters()),
            "probes": list(self._all_probes(readout)),
            "every": every,
            "series": list(self.series),
            "backend": self._optimizer.backend,
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for group in groups for p in group["params"]}),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "coordinates": " ".join(COORDINATES),
        }

    def states(self, readout: Readout) -> dict[str, Any]:
        """The attributes that change with the rows: which laws are closed, why the others are open, names logged."""
        charges: list[ChargeReadout] = list(readout.values())
        laws = {"closed": [charge.closed for charge in charges], "reason": [charge.reason for charge in charges]}
        laws["balance_reasons"] = [law.reason for law in readout.balances.values()]
        return laws if self.logged is None else laws | {"logged": list(self.logged)}


def initial_charges(readout: Readout) -> NDArray[np.float64]:
    """The charges that a measurement began with, [all groups]."""
    return _concatenate(readout, lambda charge: charge.initial)


def _concatenate(readout: Readout, read: Callable[[Charges], Tensor | None]) -> NDArray[np.float64]:
    """One variable of all symmetries side by side, [all groups], float64; NaN where a rule does not have it."""
    charges: Sequence[Charges] = [readout.together] if isinstance(readout, Readout) else list(readout.values())
    read_out = ((read(one), one) for one in charges)
    found = (torch.full_like(one.charge, torch.nan) if x is None else x for x, one in read_out)
    values: NDArray[np.float64] = torch.cat([_NOTHING, *found]).numpy()
    return values


def _rounded(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Numbers with so many bits of the mantissa, the others zero: these are what compression cannot shorten."""
    dropped = np.finfo(np.float32).nmant - bits
    integers = (values.view(np.uint32) + np.uint32(1 << dropped - 1)) & np.uint32(-1 << dropped & 0xFFFFFFFF)
    return np.where(np.isfinite(values), integers.view(np.float32), values)


def _tensor(name: str, value: Any) -> Tensor:
    """What a probe returned.

    Raises:
        ValueError: It is text, None, or something else that is no number.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"probes: {name!r} returned {value!r:.200}, which is neither number nor vector ({error})"
        ) from error


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "fiub"
    try:
        return isinstance(value, Real) and isinstance(float(value), float)
    except OverflowError:
        return False


def _float(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor | np.ndarray) else value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
