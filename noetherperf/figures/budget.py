"""Figure: the budget of every layer's norm over training, its effective learning rate, and its equilibrium."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Vgg, series, train_vgg
from noetherperf.rules.sgd import Hyper

__all__ = ["claims", "compute"]


def settings(quick: bool) -> Vgg:
    """Small images and many steps: reaching equilibrium takes several times 1/(2ηλ) steps."""
    width, n_steps = (1 / 16, 1000) if quick else (1 / 8, 2400)
    return Vgg(True, width, 32, Hyper(lr=0.1, weight_decay=0.04), n_steps, dropout=0.0)


def compute(quick: bool) -> Data:
    """Terms of the squared norm of each convolution before BatchNorm, summed over its channels.

    Arrays: steps [n rows]; layers [13], names; and [n rows, 13] each: norm; free, the initial norm after decay; forced,
    the growth by steps of finite size; defect, the violation of the symmetry by BatchNorm's eps; rounding, that of
    float32; effective_lr, η/|θ|² with the mean |θ|² of the channels; update, η|u|/|θ|, NaN in row 0. Scalars:
    equilibrium, the predicted update; lr; weight_decay.
    """
    vgg = settings(quick)
    run = train_vgg(vgg)
    names = [name for name, law in run.readouts[0].items() if law.symmetry.kind == "scale"]
    reads = {
        "norm": lambda law: law.charge,
        "free": lambda law: law.discrete.free,
        "forced": lambda law: law.discrete.forced,
        "defect": lambda law: law.discrete.defect,
        "rounding": lambda law: law.rounding,
        "sq_update": lambda law: law.moments["sq_u"],
    }
    data: dict[str, NDArray[Any]] = {
        quantity: np.stack([series(run, name, read).sum(1) for name in names], 1) for quantity, read in reads.items()
    }
    channels = np.array([run.readouts[0][name].charge.numel() for name in names])
    norm, sq_update = data["norm"], data.pop("sq_update")
    update = vgg.hyper.lr * np.sqrt(sq_update / norm)
    update[0] = np.nan  # before the first step
    return data | {
        "steps": run.steps,
        "layers": np.array(names),
        "effective_lr": vgg.hyper.lr * channels / norm,
        "update": update,
        "equilibrium": np.array(theory.equilibrium(vgg.hyper)),
        "lr": np.array(vgg.hyper.lr),
        "weight_decay": np.array(vgg.hyper.weight_decay),
    }


def settled(data: Data) -> NDArray[np.float64]:
    """η√(Σ|u|²/Σ|θ|²) of each layer over the second half of training, relative to the predicted equilibrium, [13].

    It is 1 where growth and decay balance on average over that time.
    """
    half = slice(len(data["steps"]) // 2, None)
    norm, update = data["norm"][half], data["update"][half]
    ratio: NDArray[np.float64] = np.sqrt((update**2 * norm).sum(0) / norm.sum(0)) / data["equilibrium"]
    return ratio


def claims(data: Data) -> list[Claim]:
    """The budget closes to float32's rounding, growth replaces what decay removes, and updates reach equilibrium."""
    norm = data["norm"]
    rounding, defect = (float(np.abs(data[name] / norm).max()) for name in ("rounding", "defect"))
    left = float((data["free"][-1] / norm[0]).max())
    grown = float(np.median(data["forced"][-1] / norm[-1]))
    balance = float(np.median(settled(data)))
    return [
        Claim("largest share of the norm that rounding lost", rounding, high=1e-5),
        Claim("largest share of the norm that the symmetry's defect made", defect, high=0.1),
        Claim("share of the initial norm that decay leaves, at the end, worst layer", left, high=0.2),
        Claim("share of the final norm that finite steps made, median layer", grown, low=0.5),
        Claim("update over predicted equilibrium, second half of training, median layer", balance, 0.8, 1.2),
    ]
