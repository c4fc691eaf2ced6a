"""Continuous models of SGD, the steps that they model, and the equilibrium of decay and growth.

    flows        gradient flow, modified loss, modified flow, and the discrete steps themselves
    stochastic   the stochastic equation, its noise taken from the gradients of examples or minibatches
    charges      what the models say of the conserved quantities: oscillators, closed forms
    rotation     rotational equilibrium of scale-invariant groups: SGD, AdamW, Lion, signSGD

One step lasts T = η(1−τ) with momentum, and T = η without. So a model and the steps that it describes meet at t = kT.
docs/theory.md derives every formula.
"""

from noetherperf.rules.sgd import Hyper
from noetherperf.theory.charges import (
    Oscillator,
    critical_decay,
    discrete_frequency,
    driven,
    free,
    oscillator,
)
from noetherperf.theory.flows import descent, gradient_flow, modified_flow, modified_loss
from noetherperf.theory.rotation import (
    RotationalEquilibrium,
    adamw_equilibrium,
    equilibrium,
    sgd_equilibrium,
    sign_equilibrium,
)
from noetherperf.theory.stochastic import noise, stochastic_flow

__all__ = [
    "Hyper",
    "Oscillator",
    "RotationalEquilibrium",
    "adamw_equilibrium",
    "critical_decay",
    "descent",
    "discrete_frequency",
    "driven",
    "equilibrium",
    "free",
    "gradient_flow",
    "modified_flow",
    "modified_loss",
    "noise",
    "oscillator",
    "sgd_equilibrium",
    "sign_equilibrium",
    "stochastic_flow",
]
