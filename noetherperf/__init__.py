"""noetherperf: the measurement engine for the mechanics of learning.

import noetherperf as nperf

optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries)    # or AdamW, Adam
...                                        # the training loop as it was
law = optimizer.readout()["features.3"]    # charge, discrete and flow law, residual, defect
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from noetherperf.engines.backends import backends
from noetherperf.engines.cost import Cost, cost
from noetherperf.measure.readout import ChargeReadout, Prediction, Readout
from noetherperf.optim import control, distributed
from noetherperf.optim.adam import Adam, AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.probe import Probe
from noetherperf.optim.sgd import SGD
from noetherperf.symmetry import Norm, Part, Rescale, Scale, Symmetry, Translation, layers, neurons

if TYPE_CHECKING:
    from noetherperf.checks import Constraints, check_constraints
    from noetherperf.detect import Symmetries, find_symmetries
    from noetherperf.record import Record, Recorder, open_record

__version__ = "0.1.0"

# Public modules are imported by their public names too: from noetherperf.control import ...
sys.modules[f"{__name__}.control"], sys.modules[f"{__name__}.distributed"] = control, distributed

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
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

#: What is loaded when asked for, and where it is: stepping and reading out need torch and numpy alone, and these need
#: xarray, zarr and rich, scipy, or matplotlib.
_LAZY = {
    "Constraints": "checks",
    "Record": "record",
    "Recorder": "record",
    "Symmetries": "detect",
    "check_constraints": "checks",
    "find_symmetries": "detect",
    "open_record": "record",
}
_LAZY_MODULES = {
    "constraints": "checks",
    "detect": "detect",
    "plots": "plots",
    "recorder": "record",
    "theory": "theory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{_LAZY_MODULES[name]}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
