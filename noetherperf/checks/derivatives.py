"""Gradient and Hessian-vector products of a loss at one point."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from noetherperf.checks.closure import first_line
from noetherperf.measure.defect import mean_square

__all__ = ["Point", "Vector", "check_symmetric", "square"]

Vector = Mapping[str, Tensor]  # one tensor for each parameter of the model


class Point:
    """Gradient and Hessian-vector products of a loss with respect to parameters, at their present values."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], loss: Tensor, *, twice: bool) -> None:
        self._names, self._parameters = list(parameters), list(parameters.values())
        # The seed requires a gradient, too, so that what cannot be differentiated twice always leaves its mark.
        seed = torch.ones_like(loss).requires_grad_(twice)
        with _explained(twice):
            grads = torch.autograd.grad(loss, self._parameters, seed, create_graph=twice, allow_unused=True)
            _check_graph(grads)
        self.unused = tuple(name for name, g in zip(self._names, grads, strict=True) if g is None)
        if len(self.unused) == len(grads):
            raise ValueError("the closure's loss depends on none of the model's parameters; is it of another model?")
        self._grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, grads, strict=True)]
        self.values = self._vector(p.detach() for p in self._parameters)
        self.gradient = self._vector(g.detach() for g in self._grads)
        self.ones, self.nothing = self._constant(1.0), self._constant(0.0)

    def _vector(self, tensors: Iterable[Tensor]) -> Vector:
        return dict(zip(self._names, tensors, strict=True))

    def _constant(self, value: float) -> Vector:
        """A vector of one number that takes no memory."""
        return self._vector(p.detach().new_full((), value).expand(p.shape) for p in self._parameters)

    def zeros(self) -> Vector:
        """A vector to write into."""
        return self._vector(torch.zeros_like(p) for p in self._parameters)

    def mean_square(self, vector: Vector) -> float:
        """Of one element of a vector; parameters in which it is not finite are left out."""
        sq_norms = [float(values.double().square().sum()) for values in vector.values()]
        return mean_square(np.array(sq_norms), np.array([p.numel() for p in self._parameters]))

    def probes(self, n: int, seed: int) -> Iterator[Vector]:
        """Vectors of independent normal numbers, the same for every stage."""
        random = torch.Generator("cpu").manual_seed(seed)
        for _ in range(n):
            yield self._vector(
                torch.randn(p.shape, generator=random, dtype=torch.float64, device="cpu").to(p.device, p.dtype)
                for p in self._parameters
            )

    def product(self, x: Vector) -> Vector:
        """H x."""
        outputs = [(g, x[name]) for name, g in zip(self._names, self._grads, strict=True) if g.requires_grad]
        if not outputs:  # the loss is linear
            return self.nothing
        grads, directions = zip(*outputs, strict=True)
        with _explained(twice=True):
            products = torch.autograd.grad(grads, self._parameters, directions, retain_graph=True, allow_unused=True)
        return self._vector(
            torch.zeros_like(p) if product is None else product
            for p, product in zip(self._parameters, products, strict=True)
        )


def square(vector: Vector) -> float:
    """|vector|², over all parameters."""
    return _dot(vector, vector)


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((a[name].double() * b[name]).sum()) for name in a)


def check_symmetric(x: Vector, hx: Vector, y: Vector, hy: Vector) -> None:
    """Check ⟨y, H x⟩ = ⟨x, H y⟩ of two probes: free, and a wrong second derivative is not likely to pass."""
    difference = abs(_dot(y, hx) - _dot(x, hy))
    largest = math.sqrt(square(x) * square(hy)) + math.sqrt(square(y) * square(hx))
    epsilon = max(torch.finfo(values.dtype).eps for values in x.values())
    if difference > math.sqrt(epsilon) * largest:
        raise ValueError(
            "the second derivatives contradict each other: ⟨y, H x⟩ and ⟨x, H y⟩ should be equal, but differ by "
            f"{difference / largest:.0e} of the largest they could be; either the closure detaches something, or an "
            "operation in it is wrong when it is differentiated twice (torch.autograd.gradgradcheck tells); "
            "hessian=False checks the gradient only"
        )


@contextmanager
def _explained(twice: bool) -> Iterator[None]:
    """Translate autograd's errors into what they mean here."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "second time" in str(error):
            reason = "the closure must return the loss and not call backward() on it"
        elif twice:
            reason = (
                f"the loss cannot be differentiated twice: {first_line(error)}. Give the model uncompiled, do not "
                "checkpoint activations, and let attention that calls a fused kernel itself use the math kernel "
                "(attn_implementation='eager' or SDPBackend.MATH); or set hessian=False to check the gradient only"
            )
        else:
            reason = f"the loss cannot be differentiated: {first_line(error)}"
        raise ValueError(reason) from error


def _check_graph(grads: Iterable[Tensor | None]) -> None:
    """Raise for once_differentiable functions anywhere: autograd itself raises only on paths to a parameter."""
    found = {g.grad_fn for g in grads if g is not None and g.grad_fn is not None}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("an autograd.Function in it is marked once_differentiable")
        new = {following for following, _ in node.next_functions if following is not None} - found
        found |= new
        waiting += new
