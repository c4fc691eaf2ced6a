"""noetherperf: SGD, Adam and AdamW for PyTorch that also measure what training does to every layer.

import noetherperf as nperf

optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries)    # or AdamW, Adam
...                                        # the training loop as it was
law = optimizer.readout()["features.3"]    # charge, discrete and flow law, residual, defect
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noetherperf.checks import Constraints, check_constraints
    from noetherperf.detect import Symmetries, find_symmetries
    from noetherperf.engines.backends import backends
    from noetherperf.engines.cost import Cost, cost
    from noetherperf.measure.balances import BalanceReadout
    from noetherperf.measure.charges import ChargeReadout, Prediction
    from noetherperf.measure.readout import Readout
    from noetherperf.optim import control, distributed
    from noetherperf.optim.adam import Adam, AdamW
    from noetherperf.optim.measured import MeasuredOptimizer
    from noetherperf.optim.probe import Probe
    from noetherperf.optim.sgd import SGD
    from noetherperf.record import Record, Recorder, open_record
    from noetherperf.symmetry import Balance, Norm, Part, Rescale, Scale, Symmetry, Translation, layers, neurons

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Balance",
    "BalanceReadout",
    "ChargeReadout",
    "Constraints",
    "Cost",
    "MeasuredOptimizer",
    "Norm",
    "Part",
    "Prediction",
    "Probe",
    "Readout",
    "Record",
    "Recorder",
    "Rescale",
    "Scale",
    "Symmetries",
    "Symmetry",
    "Translation",
    "backends",
    "check_constraints",
    "control",
    "cost",
    "distributed",
    "find_symmetries",
    "layers",
    "neurons",
    "open_record",
]

#: Where the names are. They are loaded when asked for: the command line's help needs no torch, stepping and reading out
#: need torch and numpy alone, and other rooms xarray, zarr and rich, scipy, or matplotlib.
_HOMES = {
    "checks": ("Constraints", "check_constraints"),
    "detect": ("Symmetries", "find_symmetries"),
    "engines.backends": ("backends",),
    "engines.cost": ("Cost", "cost"),
    "measure.balances": ("BalanceReadout",),
    "measure.charges": ("ChargeReadout", "Prediction"),
    "measure.readout": ("Readout",),
    "optim.adam": ("Adam", "AdamW"),
    "optim.measured": ("MeasuredOptimizer",),
    "optim.probe": ("Probe",),
    "optim.sgd": ("SGD",),
    "record": ("Record", "Recorder", "open_record"),
    "symmetry": ("Balance", "Norm", "Part", "Rescale", "Scale", "Symmetry", "Translation", "layers", "neurons"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("control", "detect", "distributed", "plots", "theory")
_ALIASES = {"constraints": "checks", "recorder": "record"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found: Any = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        module = f"{__name__}.{_ALIASES.get(name, name)}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = importlib.import_module(module)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, *_ALIASES})
