"""Figures made for a page of print; the only place that knows matplotlib.

    style      one look for all of them, readable in grey
    record     of a training run's record: charges, residuals, parameters, loss; and of a check: constraints
    planar     of the gallery, in the plane of two parameters: fields, manifolds, modified
    training   of the gallery, from training runs: neurons, dynamics, oscillation, errors, budget

Every function takes data and returns a matplotlib Figure of its own; nothing global is touched and no display is
needed.
"""

import os
import sys
from contextlib import suppress

if "matplotlib" not in sys.modules and (_backend := os.environ.pop("MPLBACKEND", None)) is not None:
    # The backend of a screen, which nothing here needs. One that is not installed, as in a process that a notebook
    # has started, would make importing matplotlib fail; one that is there becomes what matplotlib would have made it.
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
