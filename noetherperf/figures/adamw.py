"""Figure: which laws AdamW keeps and which it breaks, beside SGD, which keeps all of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, series, train
from noetherperf.measure.readout import ChargeReadout
from noetherperf.optim.adam import AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network

__all__ = ["claims", "compute"]

LAYERS = {"scale": "conv2", "translation": "fc2", "rescale": "fc1->fc2"}
N_SHOWN = 8
RULES = ("SGD", "AdamW")


def compute(quick: bool) -> Data:
    """Charges of one network, trained by SGD and by AdamW from the same start, in float64 with exact symmetries.

    Arrays, for each rule: /steps [n rows]; /accuracy, /lr, /weight_decay; and for each kind, of one layer: /<kind>/charge
    and /<kind>/law, free + forced, [n rows, n shown]; and of all its groups at the end [n]: /<kind>/change, charge −
    initial, /<kind>/defect, what the law does not have, /<kind>/identity_error, what rounding lost, over the largest
    initial |charge|.
    """
    data: dict[str, NDArray[Any]] = {}
    for rule in RULES:
        run, lr, decay = _run(rule, quick)
        arrays: dict[str, Any] = {"steps": run.steps, "accuracy": run.accuracy, "lr": lr, "weight_decay": decay}
        for kind, name in LAYERS.items():
            law = run.readouts[-1][name]
            ranks = law.initial.argsort()[torch.linspace(0, len(law.initial) - 1, N_SHOWN).round().long()]
            arrays |= {
                f"{kind}/charge": series(run, name, lambda law: law.charge)[:, ranks],
                f"{kind}/law": series(run, name, lambda law: law.discrete.total)[:, ranks],
                f"{kind}/change": law.charge - law.initial,
                f"{kind}/defect": law.discrete.defect,
                f"{kind}/identity_error": law.rounding.abs() / law.initial.abs().max(),
            }
        data |= {f"{rule}/{name}": np.asarray(array) for name, array in arrays.items()}
    return data


def _run(rule: str, quick: bool) -> tuple[Run, float, float]:
    torch.manual_seed(0)
    model, symmetries = digits_network(*((4, 32) if quick else (16, 64)))
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
    n_steps, batch = (400, 32) if quick else (600, 64)
    return train(model, optimizer, digits.load(dtype=torch.float64), n_steps, batch, every=5), lr, decay


def shares(data: Data, rule: str, kind: str) -> NDArray[np.float64]:
    """|defect| over |change| of each group at the end, [n]."""
    share: NDArray[np.float64] = np.abs(data[f"{rule}/{kind}/defect"] / data[f"{rule}/{kind}/change"])
    return share


def claims(data: Data) -> list[Claim]:
    """SGD keeps all laws to rounding; AdamW keeps the norm of a normalised layer, on average, and no other."""
    found = []
    for kind in LAYERS:
        found.append(Claim(f"SGD, {kind}: largest share of a change that the law misses", float(shares(data, "SGD", kind).max()), high=1e-8))
    mean = {kind: abs(float(data[f"AdamW/{kind}/defect"].mean() / data[f"AdamW/{kind}/change"].mean())) for kind in LAYERS}
    for kind in LAYERS:
        q = np.quantile(shares(data, "AdamW", kind), [.1,.5,.9])
        print(kind, mean[kind], q)
    return found
