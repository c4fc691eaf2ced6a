"""Figure: every neuron of a normalised layer goes to the norm and the turning rate that theory predicts."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.runs import Run, series, train
from noetherperf.measure.charges import ChargeReadout
from noetherperf.optim.adam import AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.rules.sgd import Hyper
from noetherperf.symmetry import Part, Scale
from noetherperf.theory import RotationalEquilibrium

__all__ = ["claims", "compute"]

LAYER = "conv2"
SETTLED = 0.4  # the last share of the rows, over which claims average
LATE = 3  # the run that begins far from equilibrium and ends before it is reached
NEAR = (0.95, 1.05)  # measured over predicted, median neuron


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        make: Makes the optimizer of (named parameters, symmetries=...).
        lr, momentum, weight_decay: Its hyperparameters; momentum is β or β₁.
        n_steps: Steps of the quick version.
        spread: Every other neuron begins with |θ|² so many times larger than that of random
            gradients (SGD: than 1), the rest so many times smaller. None: as torch initialises them.
    """

    make: type[SGD] | type[AdamW]
    lr: float
    momentum: float
    weight_decay: float
    n_steps: int
    spread: float | None = 2.0

    def optimizer(self, model: nn.Module) -> MeasuredOptimizer:
        scale = Scale(LAYER, [Part(f"{LAYER}.weight", axis=0)])
        momentum = {"momentum": self.momentum} if self.make is SGD else {"betas": (self.momentum, 0.999)}
        return self.make(
            model.named_parameters(), lr=self.lr, weight_decay=self.weight_decay, symmetries=[scale], **momentum
        )

    def adamw(self, n_elements: int) -> RotationalEquilibrium:
        return theory.adamw_equilibrium(n_elements, self.lr, self.weight_decay, self.momentum)


SETTINGS = (
    Setting(SGD, 0.02, 0.9, 0.01, 1500),
    Setting(AdamW, 2e-3, 0.9, 1.0, 1500),
    Setting(AdamW, 2e-3, 0.0, 1.0, 1500),
    Setting(AdamW, 5e-4, 0.95, 2.0, 2400, spread=None),
)


def compute(quick: bool) -> Data:
    """Norms and angular updates of all neurons of a convolution before BatchNorm, in four settings.

    Arrays, for run 0 to 3: /steps [n rows]; [n rows, n neurons]: /norm, |θ|²; /free and /defect of its law; /angle of
    the row's last step, NaN in row 0; /predicted_norm [n neurons]; scalars /predicted_angle, /relaxation in steps,
    /accuracy, /rule, /lr, /momentum, /weight_decay; and [n neurons], means over the settled rows: /off, by how much
    |θ|² without what is left of the start is larger than predicted, and /told, the defect's part of it, both relative
    to the predicted. And for AdamW /sq_update [n neurons]: |u|² over that of independent
    gradients, n(1−β₁)/(1+β₁).
    """
    data: dict[str, NDArray[Any]] = {}
    for index, setting in enumerate(SETTINGS):
        run, n_elements = _run(setting, quick)
        arrays: dict[str, Any] = {
            "steps": run.steps,
            "norm": series(run, LAYER, lambda law: law.charge),
            "angle": series(run, LAYER, lambda law: law.angular_update),
            "free": series(run, LAYER, lambda law: law.discrete.free),
            "defect": series(run, LAYER, lambda law: law.discrete.defect),
            "accuracy": run.accuracy,
            "rule": setting.make.__name__,
            "lr": setting.lr,
            "momentum": setting.momentum,
            "weight_decay": setting.weight_decay,
            **_predicted(setting, run, n_elements),
        }
        norm, free, defect = (settled(arrays[name]) for name in ("norm", "free", "defect"))
        arrays["off"] = (norm - free) / arrays["predicted_norm"] - 1.0
        arrays["told"] = defect / arrays["predicted_norm"]
        data |= {f"{index}/{name}": np.asarray(array) for name, array in arrays.items()}
    return data


def _run(setting: Setting, quick: bool) -> tuple[Run, int]:
    """Train; and the number of elements of a neuron."""
    torch.manual_seed(0)
    channels, wide = (8, 16) if quick else (16, 32)
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, channels, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(channels, eps=1e-30),  # the scale symmetry is exact in the limit eps → 0
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(channels, wide, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(wide, eps=1e-30),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.5),  # keeps gradients noisy to the end
            fc=nn.Linear(16 * wide, 10),
        )
    ).double()
    weight = model.get_parameter(f"{LAYER}.weight")
    n_elements = weight[0].numel()
    if setting.spread is not None:  # the network computes the same with any of these norms
        with torch.no_grad():
            weight.div_(weight.square().sum((1, 2, 3), keepdim=True).sqrt())
            weight.mul_(setting.adamw(n_elements).sq_norm ** 0.5 if setting.make is AdamW else 1.0)
            weight[::2] *= setting.spread**0.5
            weight[1::2] /= setting.spread**0.5
    batch, every = (8, 2) if quick else (16, 4)
    n_steps = setting.n_steps if quick or setting.spread is None else 2 * setting.n_steps
    data = digits.load(dtype=torch.float64)
    return train(model, setting.optimizer(model), data, n_steps, batch, every=every), n_elements


def _predicted(setting: Setting, run: Run, n_elements: int) -> dict[str, Any]:
    """Equilibria of all neurons, each from its own |g|²|θ|² (SGD) or |u|² (AdamW), means over the settled rows.

    The law counts each |u|² as much as decay has left of what it added: `growth` is η² Σ r^{2j} |u|², a mean over the
    memory of the norm. SGD's law is exact, so that its |u|² would predict nothing; that gradients are independent does.
    """
    if setting.make is SGD:
        sq_gradient = settled(series(run, LAYER, lambda law: law.moments["sq_g"] * law.charge))
        hyper = Hyper(setting.lr, setting.momentum, weight_decay=setting.weight_decay)
        found = [theory.sgd_equilibrium(hyper, size) for size in sq_gradient]
        norm, extra = np.array([one.sq_norm for one in found]), {}
    else:
        found = [setting.adamw(n_elements)]
        growth = settled(series(run, LAYER, _growth))
        keep = 1.0 - setting.lr * setting.weight_decay
        share = growth * (1.0 - keep**2) / setting.lr**2 / found[0].sq_update
        norm, extra = share * found[0].sq_norm, {"sq_update": share}
    return {
        "predicted_norm": norm,
        "predicted_angle": found[0].angle,
        "relaxation": found[0].relaxation,
        **extra,
    }


def _growth(law: ChargeReadout) -> Tensor:
    assert law.growth is not None, "AdamW's decay is decoupled"
    return law.growth


def settled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last SETTLED of the rows, [n rows, n neurons] -> [n neurons]."""
    mean: NDArray[np.float64] = values[round((1.0 - SETTLED) * len(values)) :].mean(0)
    return mean


def ratios(data: Data, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|θ|² and angle (root mean square) of every settled neuron over the predicted ones."""
    norm = settled(data[f"{index}/norm"]) / data[f"{index}/predicted_norm"]
    angle: NDArray[np.float64] = np.sqrt(settled(data[f"{index}/angle"] ** 2)) / data[f"{index}/predicted_angle"]
    return norm, angle


def claims(data: Data) -> list[Claim]:
    """Norm and angle are those of theory; what is off is the law's defect, or a start that is not yet forgotten.

    Medians over neurons of means over time: one neuron's defect is up to a tenth of its norm.
    """
    found = []
    for index in range(len(SETTINGS)):
        get = {name: data[f"{index}/{name}"] for name in ("rule", "lr", "momentum", "weight_decay")}
        name = f"{get['rule']} η {get['lr']:g}, β {get['momentum']:g}, λ {get['weight_decay']:g}"
        norm, angle = (float(np.median(ratio)) for ratio in ratios(data, index))
        if index == LATE:
            rest = 1.0 + data[f"{index}/off"]
            found.append(Claim(f"{name}: |θ|² over predicted, median neuron, too early", norm, low=1.1))
            found.append(Claim(f"{name}: the same without what is left of the start", float(np.median(rest)), *NEAR))
            continue
        found.append(Claim(f"{name}: |θ|² over predicted, median neuron", norm, *NEAR))
        found.append(Claim(f"{name}: angle over predicted, median neuron", angle, *NEAR))
    off, told = (np.concatenate([data[f"{index}/{name}"] for index in range(1, 4)]) for name in ("off", "told"))
    found.append(
        Claim(
            "AdamW: correlation of what |θ|² is off with the measured defect",
            float(np.corrcoef(off, told)[0, 1]),
            low=0.9,
        )
    )
    text = "AdamW: what neither defect nor start explains of |θ|² over predicted, worst neuron"
    found.append(Claim(text, float(np.abs(off - told).max()), high=0.02))
    return found
