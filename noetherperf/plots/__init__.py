"""Figures made for a page of print; the only place that knows matplotlib.

    style      one look for all of them, readable in grey
    record     of a training run's record: charges, residuals, parameters, loss; and of a check: constraints
    planar     of the gallery, in the plane of two parameters: fields, manifolds, modified
    training   of the gallery, from training runs: neurons, dynamics, oscillation, errors, budget

Every function takes data and returns a matplotlib Figure of its own; nothing global is touched and no display is
needed.
"""

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
