"""Figure: single parameters are noisy, the column sums that they belong to are smooth."""

from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import modified_flow, series, train
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]

LAYER = "fc2"
HYPER = Hyper(lr=0.05, weight_decay=0.02)
N_COLUMNS, BATCH = 10, 4


def compute(quick: bool) -> Data:
    """One weight and the sum of each of ten columns of the last layer, during noisy training.

    Arrays: steps [n rows]; and [n rows, 10] each: parameters, charges, and the laws' predictions: flow
    (the paper's), modified (the flow law from the steps' own start) and discrete.
    """
    torch.manual_seed(0)
    model, symmetries = digits_network()
    weight = model.get_parameter("fc2.weight")
    sums = weight.detach().sum(0)
    columns = sums.argsort()[torch.linspace(0, len(sums) - 1, N_COLUMNS).round().long()]
    rows = torch.arange(N_COLUMNS) % len(weight)
    wanted = [symmetry for symmetry in symmetries if symmetry.name == LAYER]
    n_steps = 300 if quick else 2000
    optimizer = SGD(model.named_parameters(), **asdict(HYPER), symmetries=wanted)
    run = train(
        model,
        optimizer,
        digits.load(),
        n_steps,
        BATCH,
        every=2 if quick else 4,
        probe=lambda: weight[rows, columns],
    )
    return {
        "steps": run.steps,
        "parameters": run.probes,
        "charges": series(run, LAYER, lambda law: law.charge)[:, columns],
        "flow": series(run, LAYER, lambda law: law.flow.total)[:, columns],
        "modified": modified_flow(run, LAYER, HYPER)[0].numpy()[:, columns],
        "discrete": series(run, LAYER, lambda law: law.discrete.total)[:, columns],
    }


def reversals(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of rows at which a curve changes direction, [n curves]: ½ for a random walk, 0 for a monotonic curve."""
    moves = np.diff(curves, axis=0)
    share: NDArray[np.float64] = (moves[1:] * moves[:-1] < 0).mean(0)
    return share


def claims(data: Data) -> list[Claim]:
    """Parameters change direction often, charges follow the flow laws."""
    turns = {name: float(np.median(reversals(data[name]))) for name in ("parameters", "charges")}
    away = {
        law: float(np.abs(data["charges"] - data[law]).max() / np.ptp(data["charges"]))
        for law in ("flow", "modified", "discrete")
    }
    return [
        Claim("share of rows at which the median parameter changes direction", turns["parameters"], low=0.2),
        Claim("share of rows at which the median charge does", turns["charges"], high=0.02),
        Claim("largest distance of a charge from the flow law, of the range of charges", away["flow"], high=0.02),
        Claim("from the modified flow law", away["modified"], high=1e-5),
        Claim("and from the discrete law", away["discrete"], high=1e-5),
    ]
