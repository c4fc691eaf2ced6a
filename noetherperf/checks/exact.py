"""Evaluation of a model in float64, with the eps of every normalisation near 0.

A symmetry holds to rounding only in exact arithmetic, and a scale symmetry only where a normalisation divides by the
standard deviation itself, not by √(variance + eps). So a model is evaluated in up to three stages:

    as_is              the model as it is
    float64            in float64: what this removes was rounding
    no_eps             also with every eps near 0: what this removes was eps

The model's own tensors are the caller's to widen. The rest must follow: inputs, tensors made on the way, casts written
by hand. A torch function mode widens them where they enter an operation, and replaces lower precisions by float64. It
does not reach what runs again during backward (activation checkpointing).
"""

import inspect
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = [
    "EPS",
    "WIDE",
    "Epsilon",
    "Stage",
    "epsilons",
    "evaluation",
    "is_eps",
    "random_state",
    "refuse_lazy",
    "set_random_state",
]

Stage = Literal["as_is", "float64", "no_eps"]

EPS = 1e-14  # what replaces an eps: no sum of float64 squares is small enough to see it
LARGEST_EPS = 0.1  # from here on it is no guard against division by zero, but a setting of the model: label smoothing

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_NORMALISATIONS = {
    f: inspect.signature(f) for f in (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm)
}


def is_eps(attribute: str) -> bool:
    """Whether an attribute's name has the word eps or epsilon: `eps`, `layer_norm_eps`, `eps_inside`; not `steps`."""
    return not {"eps", "epsilon"}.isdisjoint(attribute.split("_"))


@dataclass(frozen=True)
class Epsilon:
    """An eps of one module, found as an attribute: normalisations written by hand keep it so, too."""

    module: nn.Module
    place: str  # "norm1.eps"
    attribute: str
    value: float


def epsilons(model: nn.Module) -> tuple[Epsilon, ...]:
    """Every attribute of a module that `is_eps` and holds a float between 0 and 0.1, both excluded."""
    return tuple(
        Epsilon(module, ".".join(filter(None, (name, attribute))), attribute, value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if is_eps(attribute) and isinstance(value, float) and 0 < value < LARGEST_EPS
    )


def refuse_lazy(model: nn.Module) -> None:
    """Raise ValueError where a parameter has no values to evaluate with."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run the model once on an example first")


@contextmanager
def evaluation(stage: Stage, replaced: Iterable[Epsilon] = (), eps: float = EPS) -> Iterator[None]:
    """Evaluate what stands inside as the stage asks; afterwards all settings are as before.

    Args:
        stage: How to evaluate.
        replaced: Attributes that hold `eps` meanwhile, in stage no_eps.
        eps: Also taken by normalisations that are called as functions, in stage no_eps.
    """
    with ExitStack() as stack:
        if stage == "no_eps":
            for epsilon in replaced:
                stack.callback(setattr, epsilon.module, epsilon.attribute, epsilon.value)
                setattr(epsilon.module, epsilon.attribute, eps)
        if stage != "as_is":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        stack.enter_context(_Operations(stage != "as_is", eps if stage == "no_eps" else None))
        yield


class _Operations(TorchFunctionMode):
    """What every operation passes through.

    Where wide, lower precisions become float64. A tensor from outside has one wide copy while the mode lasts, so that
    what is written into it is read again. Normalisations called as functions get the given eps. Weight normalisation is
    written out, for torch's fused one has a wrong second derivative (2.13; its Hessian is not symmetric), and grouped
    products of matrices, for torch has none in float64.
    """

    def __init__(self, wide: bool, eps: float | None) -> None:
        super().__init__()
        self._wide = wide
        self._eps = eps
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id, the narrow tensor kept so that its id stays taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = _WRITTEN_OUT.get(func, func) if self._wide or func is torch._weight_norm else func
        if self._wide:
            args, kwargs = tree_map(self._widen, (args, kwargs))
            if func in _CASTS:
                func = Tensor.double
        if self._eps is not None and func in _NORMALISATIONS:
            bound = _NORMALISATIONS[func].bind(*args, **kwargs)
            bound.arguments["eps"] = self._eps
            args, kwargs = bound.args, bound.kwargs
        return func(*args, **kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return WIDE.get(value, value)
        if not isinstance(value, Tensor) or value.dtype not in WIDE:
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = (value, value.to(WIDE[value.dtype]))
        return self._copies[id(value)][1]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Products of matrices: [g, m, k] @ [g, k, n]; where one of them is joined along an axis, offs are the ends."""
    if offs is None:
        out = a @ b
    else:
        sizes = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
        if a.ndim == 2 and b.ndim == 2:  # joined along k
            out = torch.stack([x @ y for x, y in zip(a.split(sizes, 1), b.split(sizes, 0), strict=True)])
        elif a.ndim == 2:
            rows = [x @ y for x, y in zip(a[: sum(sizes)].split(sizes), b, strict=True)]
            out = torch.cat([*rows, a.new_zeros(len(a) - sum(sizes), b.shape[-1])])
        else:
            out = torch.cat([x @ y for x, y in zip(a, b.split(sizes, 1), strict=True)], 1)
    return out if bias is None else out + bias


_WRITTEN_OUT = {torch._weight_norm: _weight_norm} | {
    function: _grouped_mm
    for place, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
    if (function := getattr(place, name, None)) is not None
}

RandomState = tuple[Any, ...]


def random_state() -> RandomState:
    """The states of torch's, Python's and numpy's global generators; CUDA's where CUDA has started."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def set_random_state(state: RandomState) -> None:
    """Set the global generators to what `random_state` returned."""
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
