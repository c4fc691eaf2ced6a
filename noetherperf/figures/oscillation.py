"""Figure: column sums of VGG-16's last layer under momentum, in the three regimes of damping."""

import math

import numpy as np
from numpy.typing import NDArray

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Vgg, modified_flow, series, train_vgg
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute", "measured_frequency"]

LAYER = "fc3"
N_COLUMNS = 8


def settings(quick: bool) -> list[Vgg]:
    """Four runs: overdamped, critical, and underdamped with a softer and a stiffer spring (ηλ).

    Charges oscillate if λ is above (1−β)²/(2η(1+β)). The network learns only if neither λ nor η/(1−β) is large. Both
    need a large β.
    """
    critical = theory.critical_decay("translation", Hyper(lr=0.001, momentum=0.99))
    hypers = [
        (Hyper(lr=0.0025, momentum=0.9, weight_decay=0.06), 300 if quick else 600),
        (Hyper(lr=0.001, momentum=0.99, weight_decay=critical), 600 if quick else 800),
        (Hyper(lr=0.0005, momentum=0.995, weight_decay=0.04), 1500),
        (Hyper(lr=0.001, momentum=0.995, weight_decay=0.03), 1200),
    ]
    size = 32 if quick else 64
    # At a width of 1/16, one seed in four does not learn, and which one depends on the processor.
    return [Vgg(False, 1 / 8, size, hyper, n_steps, every=5, dropout=0.0) for hyper, n_steps in hypers]


def compute(quick: bool) -> Data:
    """Column sums and the flow laws of four runs.

    Arrays, for run 0 to 3: /steps [n rows]; /charge, /flow of the paper's law and /modified of the one from the steps'
    own start [n rows, 8]; /accuracy, /loss, /lr, /momentum,
    /weight_decay, /regime, /width, /image_size; /gamma and /omega per unit of time; and in radians per step /frequency
    of the flow law, /discrete_frequency of the discrete law, and /measured from the data, NaN without oscillation.
    """
    data: dict[str, NDArray[np.generic]] = {}
    for index, vgg in enumerate(settings(quick)):
        run, motion = train_vgg(vgg), theory.oscillator("translation", vgg.hyper)
        charge = series(run, LAYER, lambda law: law.charge)
        columns = np.argsort(charge[0])[np.linspace(0, charge.shape[1] - 1, N_COLUMNS).round().astype(int)]
        modified, _ = modified_flow(run, LAYER, vgg.hyper)
        arrays = {
            "steps": run.steps,
            "charge": charge[:, columns],
            "flow": series(run, LAYER, lambda law: law.flow.total)[:, columns],
            "modified": modified.numpy()[:, columns],
            "accuracy": run.accuracy,
            "loss": run.losses,
            "lr": vgg.hyper.lr,
            "momentum": vgg.hyper.momentum,
            "weight_decay": vgg.hyper.weight_decay,
            "gamma": motion.gamma,
            "omega": motion.omega,
            "frequency": motion.frequency * vgg.hyper.duration,
            "discrete_frequency": theory.discrete_frequency("translation", vgg.hyper),
            "measured": measured_frequency(run.steps, charge),
            "regime": motion.regime,
            "width": vgg.width,
            "image_size": vgg.image_size,
        }
        data |= {f"{index}/{name}": np.asarray(array) for name, array in arrays.items()}
    return data


def measured_frequency(steps: NDArray[np.int64], charges: NDArray[np.float64]) -> float:
    """Frequency of charges [n rows, n] in radians per step: π over the mean distance of zero crossings.

    All columns follow one motion, and so does their sum with initial signs. A damped cosine crosses zero at
    equal distances. NaN if there are fewer than two crossings.
    """
    swing = charges @ np.sign(charges[0])
    before = np.flatnonzero(swing[:-1] * swing[1:] < 0)
    share = swing[before] / (swing[before] - swing[before + 1])
    crossings = steps[before] + share * (steps[before + 1] - steps[before])
    return math.pi / float(np.diff(crossings).mean()) if len(crossings) > 1 else math.nan


def claims(data: Data) -> list[Claim]:
    """Underdamped charges oscillate at the predicted frequency, the others do not; the flow laws fit all runs."""
    found = []
    for index in range(4):
        name = f"β = {data[f'{index}/momentum']:g}, λ = {data[f'{index}/weight_decay']:.3g}, {data[f'{index}/regime']}"
        charge = data[f"{index}/charge"]
        for key, law, bound in (("flow", "flow law", 0.03), ("modified", "modified flow law", 0.001)):
            error = np.abs(charge - data[f"{index}/{key}"]).max() / np.abs(charge[0]).max()
            found.append(Claim(f"{name}: {law}, worst column", float(error), high=bound))
        found.append(Claim(f"{name}: test accuracy, above chance", float(data[f"{index}/accuracy"]), low=0.2))
        if data[f"{index}/regime"] == "underdamped":
            for law, key, bound in (("flow", "frequency", 0.01), ("discrete", "discrete_frequency", 0.001)):
                distance = abs(float(data[f"{index}/measured"] / data[f"{index}/{key}"]) - 1.0)
                found.append(
                    Claim(f"{name}: distance of the measured frequency from the {law} law's", distance, high=bound)
                )
        else:
            swing = charge @ np.sign(charge[0])
            found.append(Claim(f"{name}: lowest value over the first", float(swing.min() / swing[0]), low=-1e-2))
    return found
