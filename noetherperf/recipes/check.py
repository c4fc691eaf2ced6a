"""The main job's network with one batch, for `noetherperf check noetherperf.recipes.check:digits_batch`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.symmetry import Symmetry

__all__ = ["digits_batch"]


def digits_batch(seed: int = 0, size: int = 128) -> tuple[nn.Module, Callable[[], Tensor], list[Symmetry]]:
    """The network of `digits_network` before training, its loss on the first images, and its symmetries.

    Sets torch's global seed.

    Args:
        seed: Draws the data split and the initial parameters.
        size: Images in the batch.

    Returns:
        (model, closure, symmetries), as `check_constraints` and `noetherperf check` take them.
    """
    torch.manual_seed(seed)
    data = digits.load(seed)
    model, symmetries = digits_network()
    images, labels = data.train_images[:size], data.train_labels[:size]
    return model, lambda: nn.functional.cross_entropy(model(images), labels), symmetries
