"""Figure: errors of the flow law and of the discrete law over learning rate, batch size and momentum."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from noetherperf.figures.claims import Claim, Data, slope
from noetherperf.figures.runs import train
from noetherperf.measure.readout import ChargeReadout
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.record import relative_error
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]

KINDS = ("translation", "scale", "rescale")
TIME = 1.5  # η·steps, the same for all runs
LR, MOMENTUM, BATCH, DECAY = 0.05, 0.9, 64, 0.05
SWEEPS: dict[str, tuple[str, Sequence[float]]] = {
    "lr": ("lr", [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]),
    "lr_plain": ("lr", [0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625]),
    "batch": ("batch", [4, 16, 64, 256, 1024]),
    "momentum": ("momentum", [0.0, 0.5, 0.8, 0.9, 0.95]),
}


def compute(quick: bool) -> Data:
    """Relative errors at a fixed time, in float64, over the groups of each kind: flow law, median; discrete law, worst.

    Arrays, for each sweep ("lr" at β = 0.9, "lr_plain" at β = 0, "batch", "momentum"): /values [n], and for each kind
    /<kind>/flow and /<kind>/discrete [n].
    """
    data: dict[str, NDArray[np.float64]] = {}
    for sweep, (what, values) in SWEEPS.items():
        chosen = list(values)[1:5] if quick else list(values)
        data[f"{sweep}/values"] = np.array(chosen, dtype=np.float64)
        found = []
        for value in chosen:
            hyper = Hyper(
                lr=value if what == "lr" else LR,
                momentum=value if what == "momentum" else 0.0 if sweep == "lr_plain" else MOMENTUM,
                weight_decay=DECAY,
            )
            found.append(_errors(hyper, int(value) if what == "batch" else BATCH))
        for kind in KINDS:
            for index, law in enumerate(("flow", "discrete")):
                data[f"{sweep}/{kind}/{law}"] = np.array([errors[kind][index] for errors in found])
    return data


def _errors(hyper: Hyper, batch: int) -> dict[str, tuple[float, float]]:
    """(flow law's error, median group; discrete law's, worst group) of each kind after TIME, with exact symmetries."""
    torch.manual_seed(0)
    model, symmetries = digits_network(channels=4, hidden=16)
    model.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # the scale symmetry is exact in the limit eps → 0
    n_steps = round(TIME / hyper.lr)
    optimizer = SGD(model.named_parameters(), **asdict(hyper), symmetries=symmetries)
    run = train(model, optimizer, digits.load(dtype=torch.float64), n_steps, batch, every=n_steps)
    laws = list(run.readouts[-1].values())
    return {
        kind: (
            float(np.median(_relative([law for law in laws if law.symmetry.kind == kind], "flow"))),
            float(np.max(_relative([law for law in laws if law.symmetry.kind == kind], "discrete"))),
        )
        for kind in KINDS
    }


def _relative(laws: Sequence[ChargeReadout], which: Literal["flow", "discrete"]) -> NDArray[np.float64]:
    """Relative errors of all groups of some laws."""
    found = []
    for law in laws:
        prediction = law.flow if which == "flow" else law.discrete
        arrays = {"charge": law.charge, f"{which}_free": prediction.free, f"{which}_forced": prediction.forced}
        dataset = xr.Dataset({name: ("group", array.numpy()) for name, array in arrays.items()})
        found.append(relative_error(dataset, which).to_numpy())
    return np.concatenate(found)


def claims(data: Data) -> list[Claim]:
    """The flow law's error is linear in the learning rate; the discrete law is exact in every setting."""
    found = []
    for sweep, beta in (("lr_plain", 0.0), ("lr", MOMENTUM)):
        for kind in ("translation", "scale"):
            power = slope(data[f"{sweep}/values"][-3:], data[f"{sweep}/{kind}/flow"][-3:])
            found.append(Claim(f"{kind}, β = {beta:g}: the flow law's error falls as η^p, p", power, 0.85, 1.15))
    for kind in KINDS:
        worst = max(float(data[f"{sweep}/{kind}/discrete"].max()) for sweep in SWEEPS)
        found.append(Claim(f"{kind}: the discrete law's largest error of all settings", worst, high=1e-11))
    return found
