"""What the loss reads of a model's output: the logits of all heads, and which of their axes holds the classes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["Loss", "Reading", "class_axes", "read"]

Loss = Literal["cross_entropy", "mse"] | Callable[[Any], Tensor] | None

LOGITS = ("logits", "out", "last_hidden_state")
HEADS = {"logits", "aux", "auxiliary", "out"}  # words in the names of outputs that a training loss reads


@dataclass(frozen=True)
class Reading:
    """The tensors of one output by name: those that the loss reads, and the others."""

    read: dict[str, Tensor]
    unread: tuple[str, ...]


def class_axes(z: Tensor) -> tuple[int, ...]:
    """The axes that may hold the classes of logits, the usual one first.

    1 of dense predictions [N, C, H, W, ...]; the last of [N, C]; either of [N, L, C] and [N, C, L].
    """
    return (1,) if z.ndim > 3 else (-1, 1) if z.ndim == 3 else (-1,)


def read(out: Any) -> Reading:
    """The tensors that the loss reads.

    Of a tuple or list: the first tensor and all others with its number of axes and last size. Of a mapping or object:
    its logits. Of both: also what is named as a head, as `aux_logits` or `aux`.

    Raises:
        TypeError: There are none.
    """
    if isinstance(out, Tensor):
        return Reading({"output": out}, ())
    named = {name: x for name, x in _items(out) if isinstance(x, Tensor) and x.is_floating_point()}
    first = next((name for name in LOGITS if name in named), None)
    is_tuple = isinstance(out, tuple | list)
    if first is None and is_tuple and out and isinstance(out[0], Tensor):
        first = next(iter(named), None)
    if first is None and isinstance(out, Mapping) and len(named) == 1:
        first = next(iter(named))
    if first is None:
        raise TypeError(
            f"the model's output is {type(out).__name__}, in which find_symmetries finds no logits; wrap the model in "
            "a module whose forward returns the tensor that the loss reads, or give loss= a function of the output"
        )
    z = named[first]
    heads = {first: z}
    for name, x in named.items():
        alike = is_tuple and x.ndim == z.ndim and x.shape[-1] == z.shape[-1]
        if x.ndim > 0 and (alike or not HEADS.isdisjoint(name.split("_"))):
            heads.setdefault(name, x)
    return Reading(heads, tuple(name for name, x in _items(out) if name not in heads and _differentiable(x)))


def _items(out: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(out, Mapping):
        yield from ((str(name), x) for name, x in out.items())
    elif isinstance(out, tuple | list):
        yield from zip(getattr(out, "_fields", map(str, range(len(out)))), out, strict=True)
    elif isinstance(getattr(out, "logits", None), Tensor):
        yield from vars(out).items()


def _differentiable(x: Any) -> bool:
    """Whether a loss could read it: a tensor of numbers, or a container of such."""
    if isinstance(x, Tensor):
        return x.is_floating_point()
    return isinstance(x, tuple | list) and any(map(_differentiable, x))
