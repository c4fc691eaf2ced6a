"""The settings of a training run."""

from dataclasses import dataclass

import torch

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. Two runs on one machine with equal settings give equal numbers.

    Args:
        lr, momentum, weight_decay, nesterov: As in torch.optim.SGD.
        epochs: Passes over the training images.
        batch_size: Images in a step; the last step of an epoch may have fewer.
        seed: Draws the split of the data, the initial parameters, the batches and dropout's masks.
        backend: One of `noetherperf.backends()`, or "auto".
        every: Steps between two records of the charges.
        device: Where to train.
        dtype: Dtype of parameters and images.
    """

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-3
    nesterov: bool = False
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
