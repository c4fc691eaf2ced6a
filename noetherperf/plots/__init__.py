"""Figures for print. Only this room imports matplotlib.

    style      the common style, readable in grey
    record     figures of a record: charges, residuals, parameters, loss; and of a check: constraints
    planar     gallery figures in the plane of two parameters: fields, manifolds, modified
    matrices   gallery figure of matrices of charges: balance
    training   gallery figures of training runs: neurons, dynamics, oscillation, errors, budget

Every function takes data and returns a new matplotlib Figure. None changes global state or needs a display.
"""

import os
import sys
from contextlib import suppress

if "matplotlib" not in sys.modules and (_backend := os.environ.pop("MPLBACKEND", None)) is not None:
    # No figure here needs the backend that MPLBACKEND names. If it is not installed, as in a process started from a
    # notebook, importing matplotlib fails. So import without it, and then set it as matplotlib would have.
    try:
        import matplotlib

        with suppress(ValueError):
            matplotlib.rcParams["backend"] = _backend
    finally:
        os.environ["MPLBACKEND"] = _backend

from noetherperf.plots.record import (
    FIGURES,
    charges,
    constraints,
    loss,
    parameters,
    residuals,
    save_all,
    save_constraints,
)

__all__ = [
    "FIGURES",
    "charges",
    "constraints",
    "loss",
    "parameters",
    "residuals",
    "save_all",
    "save_constraints",
]
