"""What the loss reads of a model's output: the logits, and which of their axes holds the classes."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

__all__ = ["Loss", "class_axis", "logits"]

Loss = Literal["cross_entropy", "mse"] | Callable[[Any], Tensor] | None


def class_axis(z: Tensor) -> int:
    """The logits' axis of classes: 1 of dense predictions [N, C, H, W, ...], else the last."""
    return 1 if z.ndim > 3 else -1


def logits(out: Any) -> list[Tensor]:
    """The tensors that the loss reads.

    Of a tuple or list: the first tensor and all others with its number of axes and last size. Of a mapping or object:
    its logits.

    Raises:
        TypeError: There are none.
    """
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        for key in ("logits", "out", "last_hidden_state"):
            if isinstance(out.get(key), Tensor):
                return [out[key]]
        tensors = [x for x in out.values() if isinstance(x, Tensor)]
        if len(tensors) == 1:
            return tensors
    elif isinstance(getattr(out, "logits", None), Tensor):
        return [out.logits]
    elif isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        first = out[0]
        return [x for x in out if isinstance(x, Tensor) and x.ndim == first.ndim and x.shape[-1] == first.shape[-1]]
    raise TypeError(
        f"the model's output is {type(out).__name__}, in which find_symmetries finds no logits; wrap the model in a "
        "module whose forward returns the tensor that the loss reads, or give loss= a function of the output"
    )
