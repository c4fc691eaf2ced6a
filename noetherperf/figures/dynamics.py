"""Figure: the dynamics of all three charges, measured and predicted, for VGG-16 with and without BatchNorm."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, Vgg, modified_flow, series, train_vgg
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]

NETWORKS = {"bn": "VGG-16 with BatchNorm", "plain": "VGG-16"}
LAWS = ("flow", "modified", "discrete", "budget")
SHOWN = ("charge", "flow", "modified")
KINDS = {"bn": ("translation", "scale", "rescale"), "plain": ("translation", "rescale")}


def settings(quick: bool) -> dict[str, Vgg]:
    """Plain SGD on both networks, with weight decay strong enough to be visible within the run."""
    width, image_size = 1 / 8, 32 if quick else 64  # narrower ones may not learn
    n_steps = 250 if quick else 600
    size: dict[str, Any] = {"width": width, "image_size": image_size, "with_updates": True}
    return {
        "bn": Vgg(True, hyper=Hyper(lr=0.1, weight_decay=0.015), n_steps=n_steps, dropout=0.2, **size),
        "plain": Vgg(False, hyper=Hyper(lr=0.05, weight_decay=0.015), n_steps=n_steps, dropout=0.2, **size),
    }


def compute(quick: bool) -> Data:
    """Charges and laws of both networks: for each layer the mean over its groups; for the translation, single columns.

    Arrays, for each network ("bn", "plain") and each of its kinds: /layers [n], names; /charge, /flow of the paper's
    law and /modified of the one from the steps' own start [n rows, n]; and the largest relative errors over all
    groups, /flow_error, /modified_error, /discrete_error, /budget_error [n rows]. For each network: /steps [n rows],
    /loss [n steps], /accuracy, /lr, /weight_decay, /width, /image_size.
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
            data |= {f"{network}/{kind}/{name}": array for name, array in _of_kind(run, kind, vgg.hyper).items()}
    return data


def _of_kind(run: Run, kind: str, hyper: Hyper) -> dict[str, NDArray[np.generic]]:
    names = [name for name, law in run.readouts[0].items() if law.symmetry.kind == kind]
    if kind == "translation":  # of the last layer's weight; its bias starts at zero
        names = ["fc3"]
    curves = {name: _curves(run, name, hyper) for name in names}
    errors = {law: np.array([_errors(curves[name], law) for name in names]).max(0) for law in LAWS}
    if kind == "translation":
        initial = run.readouts[0]["fc3"].charge  # columns at evenly spaced ranks of their sums
        columns = initial.argsort()[torch.linspace(0, len(initial) - 1, min(10, len(initial))).round().long()]
        labels = [f"column {int(column)}" for column in columns]
        shown = {what: curves["fc3"][what][:, columns] for what in SHOWN}
    else:
        labels = names
        shown = {what: np.stack([curves[name][what].mean(1) for name in names], 1) for what in SHOWN}
    return {"layers": np.array(labels), **shown, **{f"{law}_error": error for law, error in errors.items()}}


def _curves(run: Run, name: str, hyper: Hyper) -> dict[str, NDArray[np.float64]]:
    """Charge and laws of a symmetry, [n rows, n groups] each."""
    free, forced = modified_flow(run, name, hyper)
    return {
        "charge": series(run, name, lambda law: law.charge),
        "flow": series(run, name, lambda law: law.flow.total),
        "modified": (free + forced).numpy(),
        "discrete": series(run, name, lambda law: law.discrete.total),
        "budget": series(run, name, lambda law: law.discrete.budget),
    }


def _errors(curves: dict[str, NDArray[np.float64]], law: str) -> NDArray[np.float64]:
    """The worst group's error at each row, relative to the layer's largest initial charge, [n rows]."""
    charge = curves["charge"]
    error: NDArray[np.float64] = np.abs(charge - curves[law]).max(1) / np.abs(charge[0]).max()
    return error


def claims(data: Data) -> list[Claim]:
    """The flow laws follow the charges of all layers; the update's budget closes to float32's rounding."""
    found = []
    for network, kinds in KINDS.items():
        accuracy = float(data[f"{network}/accuracy"])
        found.append(Claim(f"{NETWORKS[network]}: test accuracy, above chance", accuracy, low=0.2))
        for kind in kinds:
            stem, name = f"{network}/{kind}", f"{NETWORKS[network]}, {kind}"
            worst = {law: float(data[f"{stem}/{law}_error"].max()) for law in LAWS}
            found.append(Claim(f"{name}: the paper's flow law, worst group of all layers", worst["flow"], high=0.05))
            found.append(Claim(f"{name}: modified flow law, worst group", worst["modified"], high=0.05))
            # What a large step adds comes with a delay of about a step, so that the error jumps.
            modified, flow = (float(np.median(data[f"{stem}/{law}_error"][1:])) for law in ("modified", "flow"))
            text = f"{name}: the modified flow law's error, of the paper's, medians over time"
            found.append(Claim(text, modified / flow, high=0.8))
            found.append(Claim(f"{name}: discrete law with the defect, worst group", worst["budget"], high=1e-5))
            change = np.abs(data[f"{stem}/charge"][-1] / data[f"{stem}/charge"][0] - 1.0)
            found.append(Claim(f"{name}: the charges change by, median", float(np.median(change)), low=0.1))
    return found
