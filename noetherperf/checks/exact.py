"""A user's closure evaluated on working copies: in its own precision, in float64, with a normalisation's eps near 0.

A closure holds the model itself, so a copy of the model would not be what it evaluates. Instead every parameter and
buffer lends its place to a working copy while the closure runs, and has it back afterwards, so that values, gradients,
buffers, mode and random state are bit for bit what they were.

In float64 the rest of the closure must follow: its inputs, what it creates on the way, what it casts by hand. A
torch function mode widens them where they meet an operation, and asks for float64 where a lower precision was named.
What runs again during backward (checkpointed activations) is beyond it.
"""

import inspect
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Stage = Literal["as_is", "float64", "no_eps"]

EPS_NAME = re.compile(r"(^|_)eps(ilon)?$")
NORMALISATIONS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm)
WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)


@dataclass(frozen=True)
class Epsilon:
    """An eps of one module: found as an attribute, as normalisations written by hand keep it too."""

    module: nn.Module
    place: str  # "norm1.eps"
    attribute: str
    value: float


def epsilons(model: nn.Module) -> tuple[Epsilon, ...]:
    """Every positive float attribute of a module that is named eps, epsilon, or ends with _eps or _epsilon."""
    return tuple(
        Epsilon(module, ".".join(filter(None, (name, attribute))), attribute, value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if EPS_NAME.search(attribute) and isinstance(value, float) and value > 0
    )


class Workbench:
    """A model whose closure can be evaluated at will, and which is as it was when the bench is left.

    Every evaluation starts from the same buffers, mode and random state, so that a closure with dropout is a fixed
    function of the parameters. Attention takes torch's math kernel, for the fused ones have no second derivative.

    Args:
        model: Whose parameters the closure uses; none of them is copied before the bench is entered.
        eps: What stands for eps → 0 in stage "no_eps".
    """

    def __init__(self, model: nn.Module, eps: float) -> None:
        self._model = model
        self._eps = eps
        self.epsilons = epsilons(model)

    def __enter__(self) -> "Workbench":
        self._parameters = dict(self._model.named_parameters())
        self._values = {name: parameter.data for name, parameter in self._parameters.items()}
        self._grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in self._parameters.values()]
        self._required = [(p, p.requires_grad) for p in self._parameters.values()]
        self._modules = [(module, module.training, dict(module._buffers)) for module in self._model.modules()]
        self._random = _random_state()
        return self

    def __exit__(self, *_: object) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = self._values[name]
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        for parameter, grad, content in self._grads:
            parameter.grad = grad
            if grad is not None and content is not None:
                grad.copy_(content)
        for module, training, buffers in self._modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        _set_random_state(self._random)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Put working copies in place, always from the same state, for one evaluation and its derivatives."""
        wide, no_eps = stage != "as_is", stage == "no_eps"
        self._rewind(wide)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if no_eps:
                for epsilon in self.epsilons:
                    setattr(epsilon.module, epsilon.attribute, self._eps)
                    stack.callback(setattr, epsilon.module, epsilon.attribute, epsilon.value)
            if wide:
                stack.enter_context(_default_dtype(torch.float64))
            stack.enter_context(_Operations(wide, self._eps if no_eps else None))
            yield

    def _rewind(self, wide: bool) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = _copy(self._values[name], wide)
            parameter.requires_grad_(parameter.is_floating_point())  # a frozen parameter has its constraint, too
        copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
        for module, training, buffers in self._modules:
            module.training = training
            module._buffers.clear()
            for name, buffer in buffers.items():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = _copy(buffer, wide)
                module._buffers[name] = None if buffer is None else copies[id(buffer)]
        _set_random_state(self._random)


def _copy(values: Tensor, wide: bool) -> Tensor:
    with torch.no_grad():
        return values.to(WIDE.get(values.dtype, values.dtype) if wide else values.dtype, copy=True)


class _Operations(TorchFunctionMode):
    """What every operation of the closure passes through.

    Where wide, lower precisions become float64. A tensor from outside has one wide copy while the mode lasts, so that
    what is written into it is read again. Normalisations called as functions get the given eps. Weight normalisation is
    written out, for torch's fused one has a wrong second derivative (2.13; its Hessian is not symmetric).
    """

    def __init__(self, wide: bool, eps: float | None) -> None:
        super().__init__()
        self._wide = wide
        self._eps = eps
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id, the narrow tensor kept so that its id stays taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            func = _weight_norm
        if self._wide:
            args, kwargs = tree_map(self._widen, (args, kwargs))
            if func in NARROWING:
                func = Tensor.double
        if self._eps is not None and func in NORMALISATIONS:
            bound = inspect.signature(func).bind(*args, **kwargs)
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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _random_state() -> tuple[Any, ...]:
    """The states of torch's, Python's and numpy's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
