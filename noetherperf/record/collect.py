"""Collects what is recorded: a readout's row, and the attributes that describe the measurement."""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from noetherperf.measure.readout import ChargeReadout, Charges, Readout
from noetherperf.record.layout import COORDINATES, FORMAT, SERIES, probe_key
from noetherperf.record.matrices import of_balances
from noetherperf.record.pending import Row
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
    """

    def __init__(self, optimizer: Measured, probes: Mapping[str, Probe]) -> None:
        self._optimizer, self._probes = optimizer, dict(probes)
        self.probe_shapes: dict[str, tuple[int, ...]] = {}  # of the values returned so far
        self.matrices = False  # whether those of a Balance are recorded, too

    def row(self, readout: Readout) -> Row:
        """Every array's values at this step.

        Raises:
            ValueError: A probe returns neither number nor vector, or changes its shape.
        """
        row = {name: _concatenate(readout, series.read) for name, series in SERIES.items()}
        row["step"] = np.asarray(readout.step, dtype=np.float64)
        row["time"] = np.asarray(readout.time, dtype=np.float64)
        for name, values in self._hyperparameters().items():
            row[name] = np.asarray(values, dtype=np.float64)
        for index, (name, probe) in enumerate(self._all_probes(readout).items()):
            value = torch.as_tensor(probe()).detach().to("cpu", torch.float64).numpy().copy()
            if value.ndim > 1:
                raise ValueError(f"probes: {name!r} returned shape {value.shape}; return a number, or flatten it")
            shape = self.probe_shapes.setdefault(name, value.shape)
            if value.shape != shape:
                raise ValueError(f"probes: {name!r} returned shape {value.shape} after {shape}; it must not change")
            row[probe_key(index)] = value
        return row

    def _all_probes(self, readout: Readout) -> dict[str, Probe]:
        """What is recorded of every Balance, then the probes that were given."""
        return {**of_balances(readout, self.matrices), **self._probes}

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
            **law_states(charges),
            "rule": self._optimizer.rule.name,
            "hyperparameters": list(self._hyperparameters()),
            "probes": list(self._all_probes(readout)),
            "every": every,
            "backend": self._optimizer.backend,
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for group in groups for p in group["params"]}),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "coordinates": " ".join(COORDINATES),
        }


def initial_charges(readout: Readout) -> NDArray[np.float64]:
    """The charges that a measurement began with, [all groups]."""
    return _concatenate(readout, lambda charge: charge.initial)


def law_states(charges: Sequence[ChargeReadout]) -> dict[str, Any]:
    """Which laws are closed, and the reasons of the open ones."""
    return {"closed": [charge.closed for charge in charges], "reason": [charge.reason for charge in charges]}


def _concatenate(readout: Readout, read: Callable[[Charges], Tensor]) -> NDArray[np.float64]:
    """One variable of all symmetries side by side, [all groups], float64."""
    charges = [readout.together] if isinstance(readout, Readout) else readout.values()
    values: NDArray[np.float64] = torch.cat([_NOTHING, *map(read, charges)]).numpy()
    return values


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
