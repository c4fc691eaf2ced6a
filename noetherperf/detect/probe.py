"""A float64 copy of the model with random parameters and batches, and the gradients that they give.

The copy computes in float64 whatever the code casts to, with the eps of every normalisation near 0 (checks/exact.py).
It is in training mode with dropout active, for a symmetry must hold under every mask. Its parameters are drawn anew:
what holds then is a property of the architecture, and no dead unit or layer initialised to zero hides anything. The
model itself is only read.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from noetherperf.checks.exact import EPS, epsilons, evaluation, random_state, refuse_lazy, set_random_state
from noetherperf.detect.outputs import Loss, class_axis, logits
from noetherperf.detect.relations import Matrix
from noetherperf.detect.shapes import Shapes
from noetherperf.symmetry import Part

__all__ = ["Probe"]

BATCH = 4  # so many that BatchNorm leaves a gradient, and few units are dead on all of them


class Probe:
    """Random batches and parameters of a copy of the model, and the gradients that they give.

    Args:
        model: The user's model; read, never changed.
        inputs, options: Example inputs of its forward.
        loss: What reads the output.
        seed: Of everything drawn.

    Raises:
        ValueError: A parameter is lazy; an unknown loss.
        TypeError: The output has no logits.
        RuntimeError: The model cannot be copied, is not deterministic, or gives no finite output.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any], loss: Loss, seed: int = 0
    ) -> None:
        if not (loss in ("cross_entropy", "mse", None) or callable(loss)):
            raise ValueError(f'loss={loss!r} is unknown; use "cross_entropy", "mse", None, or a function of the output')
        self.loss = loss
        self.inputs, self.options = tree_map_only(Tensor, _widened, (tuple(inputs), dict(options)))
        self.model = _twin(model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.batch: int | None = BATCH
        self._vocabulary: dict[int, int] = {}
        self.shapes = self._look()

    def _examples(self) -> list[Tensor]:
        """The tensors among the example inputs that have an axis."""
        return [x for x in tree_leaves((self.inputs, self.options)) if isinstance(x, Tensor) and x.ndim]

    def _look(self) -> Shapes:
        """One pass over the examples as they are, then one over a random batch if the model takes it."""
        shapes = Shapes()
        with _evaluated(), shapes, torch.no_grad():
            logits(self.model(*self.inputs, **self.options))
        self._vocabulary = shapes.vocabulary
        examples = self._examples()
        if not examples or examples[0].ndim < 2:
            self.batch = None
        else:
            try:
                with _evaluated(), shapes, torch.no_grad():
                    inputs, options = self.draw()
                    self.model(*inputs, **options)
            except Exception:  # whatever the reason, the model has just taken the examples as they are
                self.batch = None
        with _evaluated(), torch.no_grad():
            inputs, options = self.draw()
        outputs = []
        for _ in range(2):
            with _evaluated(), torch.no_grad():
                outputs.append(logits(self.model(*inputs, **options)))
        for one, two in zip(*outputs, strict=True):
            if not torch.allclose(one, two, rtol=1e-10, atol=1e-12, equal_nan=True):
                raise RuntimeError(
                    f"{type(self.model).__name__} is not deterministic: two passes over one batch with one seed differ "
                    f"by {float((one - two).abs().max()):.1e}; take out what changes from call to call"
                )
            if not bool(one.isfinite().all()):
                raise RuntimeError(
                    f"{type(self.model).__name__} gives outputs that are not finite for inputs like the example's; "
                    "use an example with ordinary values"
                )
        return shapes

    def redraw(self) -> None:
        """New parameters around the initial ones, none at 0 or 1, weights so large that no signal dies out."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                start = self.initial[name]
                if p.ndim < 2:
                    size = max(1.0, float(start.square().mean().sqrt()))
                    p.copy_(start + 0.3 * size * (2 * self._uniform(p) - 1))
                else:
                    size = max(float(start.square().mean().sqrt()), (2 / p[0].numel()) ** 0.5)
                    p.copy_((start + size * self._normal(p)) / 2**0.5)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like.device)

    def _normal(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return drawn.to(like.device, torch.float64)

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A random batch like the examples."""
        old = next((len(x) for x in self._examples()), None)

        def like(x: Tensor) -> Tensor:
            if not x.numel():
                return x
            shape = list(x.shape)
            if self.batch is not None and shape and shape[0] == old:
                shape[0] = self.batch
            if x.is_floating_point():
                mean, std = float(x.double().mean()), float(x.double().std(correction=0)) or 1.0
                return mean + std * self._normal(torch.empty(shape, device=x.device))
            if x.dtype == torch.bool:
                return x[torch.arange(shape[0], device=x.device) % len(x)] if shape else x
            low, high = int(x.min()), int(x.max()) + 1
            if x.data_ptr() in self._vocabulary:
                low, high = 0, self._vocabulary[x.data_ptr()]
            return torch.randint(low, high, shape, generator=self.generator, dtype=x.dtype, device="cpu").to(x.device)

        inputs, options = tree_map_only(Tensor, like, (self.inputs, self.options))
        return inputs, options

    def gradients(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of up to n losses on one random batch, by parameter; without those that no loss depends on.

        A loss given as a function is one loss. Else any cotangent v of the output is the gradient of some loss; one that reads logits only up to a constant, as
        cross entropy does, has cotangents with zero sum over the classes.
        """
        parameters = list(self.parameters.values())
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        with _evaluated(seed), torch.enable_grad():
            out = self.model(*inputs, **options)
            outputs = [self.loss(out)] if callable(self.loss) else logits(out)
        outputs = [z for z in outputs if z.requires_grad]
        if not outputs:
            return
        if callable(self.loss):  # one scalar has one gradient, whatever it is multiplied by
            n = 1
        for i in range(n):
            cotangents = [self._seen(self._normal(z)) for z in outputs]
            grads = torch.autograd.grad(outputs, parameters, cotangents, retain_graph=i + 1 < n, allow_unused=True)
            yield {name: g for name, g in zip(self.parameters, grads, strict=True) if g is not None}

    def tangents(self, parts: Sequence[Part], n: int, progress: Callable[[float], None]) -> Matrix:
        """Derivatives of 2 n outputs of one random batch with respect to the scale of each part.

        Column j is J ψ_j, with J the Jacobian of the outputs, up to what the loss does not see. Forward mode takes one
        pass for each part, where n losses would take n backward passes.

        Returns:
            [2 n, parts].

        Raises:
            NotImplementedError, RuntimeError: An operation has no forward derivative, or there are fewer outputs.
        """
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        columns = []
        for part in parts:
            p = self.parameters[part.parameter].detach()
            direction = p.clone()
            if part.axis is not None:
                inside = torch.zeros(p.shape[part.axis], dtype=torch.bool)
                inside[part.gather(torch.arange(len(inside))).flatten()] = True
                direction.movedim(part.axis, 0)[~inside.to(p.device)] = 0
            with (
                warnings.catch_warnings(),
                _evaluated(seed),
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                dual_level(),
            ):
                warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # of torch's own derivatives
                scaled = make_dual(p, direction)
                outputs = logits(torch.func.functional_call(self.model, {part.parameter: scaled}, inputs, options))
                tangents = [unpack_dual(z).tangent for z in outputs]
                tangents = [torch.zeros_like(z) if t is None else t for z, t in zip(outputs, tangents, strict=True)]
            columns.append(torch.cat([self._seen(t).flatten() for t in tangents]))
            if len(columns) == 1:
                if len(columns[0]) < 2 * n:
                    raise RuntimeError(f"{len(columns[0])} outputs are too few to tell {len(parts)} tensors apart")
                some = torch.randperm(len(columns[0]), generator=self.generator, device="cpu")[: 2 * n].to(p.device)
            columns[-1] = columns[-1][some].cpu()
            progress(0.5 + 0.4 * len(columns) / len(parts))
        matrix: Matrix = torch.stack(columns, 1).numpy()
        return matrix

    def _seen(self, z: Tensor) -> Tensor:
        """The part of a change of the output that the loss sees."""
        return z - z.mean(class_axis(z), keepdim=True) if self.loss == "cross_entropy" else z


@contextmanager
def _evaluated(seed: int = 0) -> Iterator[None]:
    """Exact arithmetic and seeded generators inside; afterwards the random states are as before."""
    before = random_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with evaluation("no_eps"):
            yield
    finally:
        set_random_state(before)


def _twin(model: nn.Module) -> nn.Module:
    """A float64 copy that normalises exactly; modules kept in evaluation mode stay so.

    Its eps are replaced for good, since checkpointed activations are evaluated again during backward.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be copied, and find_symmetries works on a copy: {error}"
        ) from error
    refuse_lazy(twin)
    for p in twin.parameters():
        p.grad = None
    twin.double()
    if not twin.training:
        twin.train()
    for module in twin.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    for epsilon in epsilons(twin):
        setattr(epsilon.module, epsilon.attribute, EPS)
    return twin


def _widened(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x
