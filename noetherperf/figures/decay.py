"""Figure: where weight decay is balanced by independent updates, and which schedule of it keeps norms from drifting."""

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, train
from noetherperf.optim.adam import AdamW
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.symmetry import Norm, Part

__all__ = ["claims", "compute"]

LAYERS = {"conv1": True, "conv2": True, "conv3": False, "fc1": False, "fc2": False}  # normalised or not
LR, DECAY, LOWEST = 2e-3, 1.0, 0.1  # the learning rate falls to LOWEST · LR
POWERS = {"constant": 0, "proportional": 1}  # of η, in the weight decay λ
SETTLED = 0.4  # the last share of the rows before the schedule


def compute(quick: bool) -> Data:
    """Norms of five weights under AdamW: first η and λ constant; then η falls as a cosine, with λ constant or λ ∝ η.

    Arrays: layers [5], names; normalised [5]; share [5], of what decay takes in the end of the first part, the share
    that the law does not give back. For each schedule ("constant", "proportional"): /steps [n rows]; /norm
    [n rows, 5]; /accuracy. Scalars lr, lowest, weight_decay.
    """
    torch.manual_seed(0)
    model, _ = digits_network(*((4, 16) if quick else (16, 64)))
    model.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # the scale symmetry is exact in the limit eps → 0
    norms = [Norm(name, [Part(f"{name}.weight", axis=None)]) for name in LAYERS]
    optimizer = AdamW(model.named_parameters(), lr=LR, weight_decay=DECAY, symmetries=norms)
    images, n_steps, batch = digits.load(dtype=torch.float64), 1000 if quick else 2500, 16
    first = train(model, optimizer, images, n_steps, batch, every=5)
    data: dict[str, Any] = {
        "layers": list(LAYERS),
        "normalised": list(LAYERS.values()),
        "lr": LR,
        "lowest": LOWEST,
        "weight_decay": DECAY,
        "share": _share(first),
    }
    for name, power in POWERS.items():
        torch.manual_seed(1)  # the same batches for both
        again, resumed = copy.deepcopy((model, optimizer))
        _schedule(resumed, n_steps, power)
        run = train(again, resumed, images, n_steps, batch, every=5)
        data |= {
            f"{name}/steps": run.steps,
            f"{name}/norm": _sums(run, "charge"),
            f"{name}/accuracy": run.accuracy,
        }
    return {name: np.asarray(array) for name, array in data.items()}


def _schedule(optimizer: AdamW, n_steps: int, power: int) -> None:
    """Before every step: η = s LR with s falling as a cosine from 1 to LOWEST, and λ = s^power DECAY."""
    step = 0

    def set_step(*_: object) -> None:
        nonlocal step
        share = LOWEST + (1.0 - LOWEST) * 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = LR * share, DECAY * share**power
        step += 1

    optimizer.register_step_pre_hook(set_step)


def _sums(run: Run, name: str) -> NDArray[np.float64]:
    """The charge or a term of its law, of every layer, [n rows, n layers]."""
    rows = [
        [float(law.charge if name == "charge" else getattr(law.discrete, name)) for law in readout.values()]
        for readout in run.readouts
    ]
    return np.array(rows)


def _share(run: Run) -> NDArray[np.float64]:
    """defect/(|θ|² − free), means over the settled rows, [n layers].

    Free of the start, |θ|² is forced + defect, and decay takes the same share of both: what updates that are
    independent of θ add is in `forced`, what they add because they are not is in `defect`.
    """
    late = slice(round((1.0 - SETTLED) * len(run.steps)), None)
    norm, free, defect = (_sums(run, name)[late].mean(0) for name in ("charge", "free", "defect"))
    share: NDArray[np.float64] = defect / (norm - free)
    return share


def drift(data: Data, schedule: str) -> NDArray[np.float64]:
    """|θ|² at the end of a schedule over that at its beginning, [n layers]."""
    norm = data[f"{schedule}/norm"]
    change: NDArray[np.float64] = norm[-1] / norm[0]
    return change


def claims(data: Data) -> list[Claim]:
    """Updates are independent of weights in normalised layers only: there norms drift less with λ ∝ η, and fall.

    Elsewhere λ ∝ η lets them grow. There a constant λ holds them better in the mean of the layers, not in every one.
    """
    normalised, share = data["normalised"].astype(bool), data["share"]
    away = {schedule: np.abs(np.log(drift(data, schedule))) for schedule in POWERS}
    kept = (away["proportional"] / away["constant"])[normalised].max()
    lost = away["proportional"][~normalised].mean() / away["constant"][~normalised].mean()
    grown = drift(data, "proportional")[~normalised].min()
    largest, smallest = float(np.abs(share[normalised]).max()), float(share[~normalised].min())
    return [
        Claim("normalised layers: largest share of decay not balanced by independent updates", largest, high=0.3),
        Claim("other layers: smallest such share", smallest, low=0.5),
        Claim("normalised layers: |log drift| with λ ∝ η over that with constant λ, worst", float(kept), high=0.8),
        Claim("other layers: |θ|² with λ ∝ η over that before, smallest", float(grown), low=1.05),
        Claim("other layers: |log drift| with λ ∝ η over that with constant λ, ratio of means", float(lost), low=1.1),
    ]
