"""Figure: which laws AdamW keeps and which it breaks, beside SGD, which keeps all of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, series, train
from noetherperf.optim.adam import AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network

__all__ = ["claims", "compute"]

LAYERS = {"scale": "conv2", "translation": "fc2", "rescale": "fc1->fc2"}
RULES = ("SGD", "AdamW")


def compute(quick: bool) -> Data:
    """Charges of one network, trained by SGD and by AdamW from the same start, in float64 with exact symmetries.

    Arrays, for each rule: /steps [n rows]; /accuracy, /lr, /weight_decay. And for each kind, of one layer, [n rows, n]:
    /<kind>/charge; /<kind>/law, free + forced; /<kind>/missed, |charge − law| over |charge − initial|, the share of a
    change that the law misses, NaN in row 0; /<kind>/defect; /<kind>/identity_error, what rounding lost, over the
    largest initial |charge|. SGD's law misses what rounding lost and nothing else.
    """
    data: dict[str, NDArray[Any]] = {}
    for rule in RULES:
        run, lr, decay = _run(rule, quick)
        arrays: dict[str, Any] = {"steps": run.steps, "accuracy": run.accuracy, "lr": lr, "weight_decay": decay}
        for kind, name in LAYERS.items():
            charge, law = (series(run, name, read) for read in (lambda law: law.charge, lambda law: law.discrete.total))
            with np.errstate(invalid="ignore"):
                missed = np.abs(charge - law) / np.abs(charge - charge[0])
            arrays |= {
                f"{kind}/charge": charge,
                f"{kind}/law": law,
                f"{kind}/missed": missed,
                f"{kind}/defect": series(run, name, lambda law: law.discrete.defect),
                f"{kind}/identity_error": series(run, name, lambda law: law.rounding) / np.abs(charge[0]).max(),
            }
        data |= {f"{rule}/{name}": np.asarray(array) for name, array in arrays.items()}
    return data


def _run(rule: str, quick: bool) -> tuple[Run, float, float]:
    torch.manual_seed(0)
    model, symmetries = digits_network(*((16, 32) if quick else (16, 64)))
    model.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # the scale symmetry is exact in the limit eps → 0
    measured = [symmetry for symmetry in symmetries if symmetry.name in LAYERS.values()]
    lr, decay = (0.02, 5e-3) if rule == "SGD" else (1e-3, 0.01)
    optimizer: MeasuredOptimizer
    if rule == "SGD":
        optimizer = SGD(model.named_parameters(), lr=lr, momentum=0.9, weight_decay=decay, symmetries=measured)
    else:
        optimizer = AdamW(model.named_parameters(), lr=lr, weight_decay=decay, symmetries=measured)
    n_steps, batch = (500, 16) if quick else (1000, 64)
    return train(model, optimizer, digits.load(dtype=torch.float64), n_steps, batch, every=5), lr, decay


def claims(data: Data) -> list[Claim]:
    """SGD keeps all laws to rounding. AdamW keeps the norm of a normalised layer approximately, and no other."""
    found = []
    for kind in LAYERS:
        worst = float(np.median(data[f"SGD/{kind}/missed"][-1]))
        found.append(Claim(f"SGD, {kind}: share of a change that the law misses, median group", worst, high=1e-9))
    at_end = {kind: data[f"AdamW/{kind}/missed"][-1] for kind in LAYERS}
    change = data["AdamW/scale/charge"][-1] - data["AdamW/scale/charge"][0]
    layer = abs(float(data["AdamW/scale/defect"][-1].sum() / change.sum()))
    median, most = np.quantile(at_end["scale"], (0.5, 0.9)).tolist()
    found += [
        Claim("AdamW, scale: share of the layer's change that the law misses", layer, high=0.5),
        Claim("AdamW, scale: share of a unit's change, median", median, high=0.5),
        Claim("AdamW, scale: the same, 90th percentile", most, high=1.5),
        Claim("AdamW, translation: the same, median group", float(np.median(at_end["translation"])), 0.9, 1.1),
        Claim("AdamW, rescale: the same, median group", float(np.median(at_end["rescale"])), 0.4, 1.0),
    ]
    for rule in RULES:
        worst = max(float(np.abs(data[f"{rule}/{kind}/identity_error"]).max()) for kind in LAYERS)
        found.append(Claim(f"{rule}: largest error of the budget, an identity", worst, high=1e-11))
    return found
