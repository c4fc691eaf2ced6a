"""Figure: the dynamics of all three charges, measured and predicted, for VGG-16 with and without BatchNorm."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, Vgg, series, train_vgg
from noetherperf.measure.readout import ChargeReadout
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]

NETWORKS = {"bn": "VGG-16 with BatchNorm", "plain": "VGG-16"}
KINDS = {"bn": ("translation", "scale", "rescale"), "plain": ("translation", "rescale")}


def settings(quick: bool) -> dict[str, Vgg]:
    """Plain SGD on both networks, with weight decay strong enough to be visible within the run."""
    size: dict[str, Any] = {"width": 1 / 8, "image_size": 32 if quick else 64}  # narrower ones may not learn
    n_steps = 250 if quick else 600
    return {
        "bn": Vgg(True, hyper=Hyper(lr=0.1, weight_decay=0.015), n_steps=n_steps, dropout=0.2, **size),
        "plain": Vgg(False, hyper=Hyper(lr=0.05, weight_decay=0.015), n_steps=n_steps, dropout=0.2, **size),
    }


def compute(quick: bool) -> Data:
    """Charges and laws of both networks: for each layer the mean over its groups; for the translation, single columns.

    Arrays, for each network ("bn", "plain") and each of its kinds: /layers [n], names; /charge and /flow [n rows, n];
    and the largest relative errors over all groups, /flow_error, /discrete_error, /budget_error [n rows]. For each
    network: /steps [n rows], /loss [n steps], /accuracy, /lr, /weight_decay, /width, /image_size.
    """
    data: dict[str, NDArray[np.generic]] = {}
    for network, vgg in settings(quick).items():
        run = train_vgg(vgg)
        data |= {
            f"{network}/steps": run.steps,
            f"{network}/loss": run.losses,
            f"{network}/accuracy": np.array(run.accuracy),
            f"{network}/lr": np.array(vgg.hyper.lr),
            f"{network}/weight_decay": np.array(vgg.hyper.weight_decay),
            f"{network}/width": np.array(vgg.width),
            f"{network}/image_size": np.array(vgg.image_size),
        }
        for kind in KINDS[network]:
            data |= {f"{network}/{kind}/{name}": array for name, array in _of_kind(run, kind).items()}
    return data


def _of_kind(run: Run, kind: str) -> dict[str, NDArray[np.generic]]:
    names = [name for name, law in run.readouts[0].items() if law.symmetry.kind == kind]
    if kind == "translation":  # columns of the last layer at evenly spaced ranks of their sums; its bias starts at zero
        names = ["fc3"]
        initial = run.readouts[0]["fc3"].charge
        columns = initial.argsort()[torch.linspace(0, len(initial) - 1, min(10, len(initial))).round().long()]
        labels = [f"column {int(column)}" for column in columns]
        curves = {
            "charge": series(run, "fc3", lambda law: law.charge[columns]),
            "flow": series(run, "fc3", lambda law: law.flow.total[columns]),
        }
    else:
        labels = names
        curves = {
            "charge": np.hstack([series(run, name, lambda law: law.charge.mean(0, keepdim=True)) for name in names]),
            "flow": np.hstack([series(run, name, lambda law: law.flow.total.mean(0, keepdim=True)) for name in names]),
        }
    worst = [[max(_errors(readout[name])[law] for name in names) for law in range(3)] for readout in run.readouts]
    flow, discrete, budget = np.array(worst).T
    return {
        "layers": np.array(labels),
        **curves,
        "flow_error": flow,
        "discrete_error": discrete,
        "budget_error": budget,
    }


def _errors(law: ChargeReadout) -> tuple[float, float, float]:
    """Largest errors of flow law, discrete law and budget, relative to the layer's largest initial charge."""
    size = law.initial.abs().max()
    predictions = (law.flow.total, law.discrete.total, law.discrete.budget)
    flow, discrete, budget = (float((law.charge - prediction).abs().max() / size) for prediction in predictions)
    return flow, discrete, budget


def claims(data: Data) -> list[Claim]:
    """The flow law follows the charges of all layers; the update's budget closes to float32's rounding."""
    found = []
    for network, kinds in KINDS.items():
        accuracy = float(data[f"{network}/accuracy"])
        found.append(Claim(f"{NETWORKS[network]}: test accuracy, above chance", accuracy, low=0.2))
        for kind in kinds:
            stem, name = f"{network}/{kind}", f"{NETWORKS[network]}, {kind}"
            flow, budget = float(data[f"{stem}/flow_error"].max()), float(data[f"{stem}/budget_error"].max())
            found.append(Claim(f"{name}: flow law, worst group of all layers", flow, high=0.05))
            found.append(Claim(f"{name}: discrete law with the defect, worst group", budget, high=1e-5))
            change = np.abs(data[f"{stem}/charge"][-1] / data[f"{stem}/charge"][0] - 1.0)
            found.append(Claim(f"{name}: the charges change by, median", float(np.median(change)), low=0.1))
    return found
