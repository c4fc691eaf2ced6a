"""The settings of a training run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from noetherperf.optim.adam import Adam, AdamW
from noetherperf.optim.sgd import SGD

__all__ = ["OPTIMIZERS", "Settings"]


class Choice(NamedTuple):
    """An optimizer, and its options with the values for a training of these recipes."""

    make: type[SGD] | type[Adam]
    options: Mapping[str, Any]


OPTIMIZERS: Mapping[str, Choice] = {
    "sgd": Choice(SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": False}),
    "adam": Choice(Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}),
    "adamw": Choice(AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}),
}
OPTIONS = tuple(dict.fromkeys(name for choice in OPTIMIZERS.values() for name in choice.options))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. Two runs on one machine with equal settings give equal numbers.

    Args:
        optimizer: One of OPTIMIZERS.
        lr, momentum, nesterov, betas, weight_decay: As in torch's optimizer; None: the value in OPTIMIZERS.
        epochs: Passes over the training images.
        batch_size: Images in a step; the last step of an epoch may have fewer.
        seed: Draws the split of the data, the initial parameters, the batches and dropout's masks.
        backend: One of `noetherperf.backends()`, or "auto".
        every: Steps between two records of the charges.
        device: Where to train.
        dtype: Dtype of parameters and images.

    Raises:
        ValueError: A number is out of range; there is no such optimizer, or it has no such option.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    epochs: int = 40
    batch_size: int = 32
    seed: int = 0
    backend: str = "auto"
    every: int = 5
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"there is no optimizer {self.optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
        own = OPTIMIZERS[self.optimizer].options
        for name in self._given:
            if name not in own:
                raise ValueError(f"{self.optimizer} has no {name}; it has {', '.join(own)}")

    @property
    def _given(self) -> dict[str, Any]:
        """The optimizer's options that are given."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, those that are not given from OPTIMIZERS."""
        return {**OPTIMIZERS[self.optimizer].options, **self._given}

    @property
    def plain(self) -> dict[str, Any]:
        """All settings as plain data, the optimizer's options by their names."""
        rest = {name: value for name, value in asdict(self).items() if name not in OPTIONS}
        return {**rest, **self.options}
