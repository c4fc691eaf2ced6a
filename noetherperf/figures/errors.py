"""Figure: errors of both flow laws and of the discrete law over learning rate, batch size and momentum."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from noetherperf.figures.claims import Claim, Data, slope
from noetherperf.figures.runs import modified_flow, train
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.record import relative_error
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]

KINDS = ("translation", "scale", "rescale")
#: The laws, and what is shown of the groups' errors.
LAWS: dict[str, Callable[..., Any]] = {"flow": np.median, "modified": np.median, "discrete": np.max}
TIME = 1.5  # η·steps, the same for all runs
LR, MOMENTUM, BATCH, DECAY = 0.05, 0.9, 64, 0.05
SWEEPS: dict[str, tuple[str, Sequence[float]]] = {
    "lr": ("lr", [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]),
    "lr_plain": ("lr", [0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625]),
    "batch": ("batch", [4, 16, 64, 256, 1024]),
    "momentum": ("momentum", [0.0, 0.5, 0.8, 0.9, 0.95]),
}


def compute(quick: bool) -> Data:
    """Relative errors at a fixed time, in float64, over the groups of each kind: flow laws, median; discrete, worst.

    Arrays, for each sweep ("lr" at β = 0.9, "lr_plain" at β = 0, "batch", "momentum"): /values [n], and for each kind
    /<kind>/flow of the paper's flow law, /<kind>/modified of the one from the steps' own start, and /<kind>/discrete
    [n].
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
            for law in LAWS:
                data[f"{sweep}/{kind}/{law}"] = np.array([errors[kind, law] for errors in found])
    return data


def _errors(hyper: Hyper, batch: int) -> dict[tuple[str, str], float]:
    """Of each kind and law, the error after TIME with exact symmetries; flow laws: median group, discrete: worst."""
    torch.manual_seed(0)
    model, symmetries = digits_network(channels=4, hidden=16)
    model.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # the scale symmetry is exact in the limit eps → 0
    n_steps = round(TIME / hyper.lr)
    optimizer = SGD(model.named_parameters(), **asdict(hyper), symmetries=symmetries)
    data = digits.load(dtype=torch.float64)
    run = train(model, optimizer, data, n_steps, batch, every=n_steps, with_updates=True)
    found: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for name, law in run.readouts[-1].items():
        predictions = {
            "flow": (law.flow.free, law.flow.forced),
            "modified": tuple(term[-1] for term in modified_flow(run, name, hyper)),
            "discrete": (law.discrete.free, law.discrete.forced),
        }
        for which, (free, forced) in predictions.items():
            found.setdefault((law.symmetry.kind, which), []).append(_relative(law.charge, free, forced))
    return {(kind, law): float(LAWS[law](np.concatenate(errors))) for (kind, law), errors in found.items()}


def _relative(charge: Tensor, free: Tensor, forced: Tensor) -> NDArray[np.float64]:
    """Relative errors of all groups."""
    arrays = {"charge": charge, "flow_free": free, "flow_forced": forced}
    dataset = xr.Dataset({name: ("group", array.numpy()) for name, array in arrays.items()})
    return relative_error(dataset, "flow").to_numpy()


def claims(data: Data) -> list[Claim]:
    """The paper's flow law errs by O(η), the modified one by O(η²); the discrete law is exact in every setting."""
    found = []
    for sweep, beta in (("lr_plain", 0.0), ("lr", MOMENTUM)):
        for kind in ("translation", "scale"):
            flow, modified = (data[f"{sweep}/{kind}/{law}"] for law in ("flow", "modified"))
            power = slope(data[f"{sweep}/values"][-3:], flow[-3:])
            found.append(Claim(f"{kind}, β = {beta:g}: the flow law's error falls as η^p, p", power, 0.85, 1.15))
            # Norms under momentum: noise makes the modified law's error jump from run to run.
            if kind == "translation" or beta == 0.0:
                power = slope(data[f"{sweep}/values"][-3:], modified[-3:])
                text = f"{kind}, β = {beta:g}: the modified flow law's error falls as η^p, p"
                found.append(Claim(text, power, 1.6, 2.4))
            text = f"{kind}, β = {beta:g}: at the smallest η, the modified flow law's error, of the flow law's"
            found.append(Claim(text, float(modified[-1] / flow[-1]), high=0.3))
    for kind in KINDS:
        worst = max(float(data[f"{sweep}/{kind}/discrete"].max()) for sweep in SWEEPS)
        found.append(Claim(f"{kind}: the discrete law's largest error of all settings", worst, high=1e-11))
    return found
