"""Figures for print. Only this room imports matplotlib.

    style      the common style, readable in grey
    panels     one symmetry in a panel, thinned
    record     figures of a record: charges, residuals, parameters, loss
    layers     all symmetries of a record, a row a layer
    balances   those whose charges are matrices: spectra and matrices
    sheet, reading, choice   where panels stand, what is read for them, what they show
    constraints  of a check
    planar     gallery figures in the plane of two parameters: fields, manifolds, modified
    heads      gallery figure of matrices of charges: balance
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

from noetherperf.plots.balances import matrices, spectra
from noetherperf.plots.constraints import constraints, save_constraints
from noetherperf.plots.layers import layers
from noetherperf.plots.record import FIGURES, charges, loss, parameters, residuals, save_all
from noetherperf.plots.style import NothingToDraw, save

__all__ = [
    "FIGURES",
    "NothingToDraw",
    "charges",
    "constraints",
    "layers",
    "loss",
    "matrices",
    "parameters",
    "residuals",
    "save",
    "save_all",
    "save_constraints",
    "spectra",
]
