"""noetherperf: the measurement engine for the mechanics of learning.

import noetherperf as nperf

optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries)
...                                        # the training loop as it was
law = optimizer.readout()["features.3"]    # charge, discrete and flow law, residual, defect
"""

import importlib
from types import ModuleType

from noetherperf import distributed
from noetherperf.backends import backends
from noetherperf.constraints import Constraints, check_constraints
from noetherperf.cost import Cost, cost
from noetherperf.detect import Symmetries, find_symmetries
from noetherperf.readout import ChargeReadout, Prediction, Readout
from noetherperf.recorder import Record, Recorder, open_record
from noetherperf.sgd import SGD
from noetherperf.symmetry import Norm, Part, Rescale, Scale, Symmetry, Translation, layers, neurons

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
    "cost",
    "distributed",
    "find_symmetries",
    "layers",
    "neurons",
    "open_record",
]


def __getattr__(name: str) -> ModuleType:
    """`nperf.theory` and `nperf.plots`, loaded when asked for: they need scipy and matplotlib."""
    if name in ("plots", "theory"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
