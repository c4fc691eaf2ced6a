"""A user's closure evaluated on working copies of the model's tensors.

A closure holds the model itself, so it does not evaluate a copy of the model. Instead every parameter and buffer lends
its place to a working copy while the closure runs. Afterwards values, gradients, buffers, mode and random state are
bit for bit what they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noetherperf.checks.exact import WIDE, Stage, epsilons, evaluation, random_state, set_random_state

__all__ = ["Workbench"]


class Workbench:
    """A model whose closure can be evaluated at will, and which is as it was when the bench is left.

    Every evaluation starts from the same buffers, mode and random state, so that a closure with dropout is a fixed
    function of the parameters. Attention takes torch's math kernel, because the fused ones have no second derivative.

    Args:
        model: Whose parameters the closure uses; none of them is copied before the bench is entered.
        eps: What replaces every eps in stage "no_eps".

    Attributes:
        epsilons: What it replaces.
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
        self._random = random_state()
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
        set_random_state(self._random)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Put working copies in place, always from the same state, for one evaluation and its derivatives."""
        self._rewind(wide=stage != "as_is")
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), evaluation(stage, self.epsilons, self._eps):
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
        set_random_state(self._random)


def _copy(values: Tensor, wide: bool) -> Tensor:
    with torch.no_grad():
        return values.to(WIDE.get(values.dtype, values.dtype) if wide else values.dtype, copy=True)
