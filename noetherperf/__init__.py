"""noetherperf: the measurement engine for the mechanics of learning.

import noetherperf as nperf

optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries)
...                                        # the training loop as it was
law = optimizer.readout()["features.3"]    # charge, discrete and flow law, residual, defect
"""

import importlib
from typing import TYPE_CHECKING, Any

from noetherperf import control, distributed
from noetherperf.backends import backends
from noetherperf.cost import Cost, cost
from noetherperf.readout import ChargeReadout, Prediction, Readout
from noetherperf.sgd import SGD
from noetherperf.symmetry import Norm, Part, Rescale, Scale, Symmetry, Translation, layers, neurons

if TYPE_CHECKING:
    from noetherperf.constraints import Constraints, check_constraints
    from noetherperf.detect import Symmetries, find_symmetries
    from noetherperf.recorder import Record, Recorder, open_record

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "ChargeReadout",
    "Constraints",
    "Cost",
    "Norm",
    "Part",
    "Prediction",
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
    "Constraints": "constraints",
    "Record": "recorder",
    "Recorder": "recorder",
    "Symmetries": "detect",
    "check_constraints": "constraints",
    "find_symmetries": "detect",
    "open_record": "recorder",
}
_LAZY_MODULES = ("constraints", "detect", "plots", "recorder", "theory")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
