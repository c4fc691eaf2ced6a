"""A float64 copy of the model with random parameters and batches, and the gradients that they give.

The copy computes in float64 whatever the code casts to, with the eps of every normalisation near 0 (checks/exact.py).
It is in training mode with dropout active, for a symmetry must hold under every mask. Its parameters are drawn anew:
what holds then is a property of the architecture, and no dead unit or layer initialised to zero hides anything. The
model itself is only read.
"""

import copy
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from noetherperf.checks.exact import epsilons, evaluation, random_state, refuse_lazy, set_random_state
from noetherperf.detect.flow import Flow
from noetherperf.detect.outputs import Loss, class_axes, read
from noetherperf.detect.progress import Report, Stage
from noetherperf.detect.relations import Matrix
from noetherperf.detect.shapes import Shapes
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["Probe"]

EPS = 1e-20  # even variances of 1e-8 do not feel it; it still guards a variance of zero
EMPTY = (
    "no elements, as of an empty batch; laws are found from gradients on batches like it: give an example that has some"
)
BATCH = 4  # so many that BatchNorm leaves a gradient, and few units are dead on all of them
MOST_TANGENTS = 8  # of one forward pass
TANGENT_NUMBERS = 20_000_000  # that they take, or half as many as the model has parameters


class Probe:
    """Random batches and parameters of a copy of the model, and the gradients that they give.

    Args:
        model: The user's model; read, never changed.
        inputs, options: Example inputs of its forward.
        loss: What reads the output.
        seed: Of everything drawn.

    Attributes:
        outputs: Name of each tensor in the output -> whether the loss reads it; empty if the loss is a function.
        shapes: Sizes and slices in a forward pass.
        flow: Where the scale of each parameter goes in it.

    Raises:
        ValueError: A parameter is lazy; an unknown loss; cross entropy of one class; an example without elements.
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
        if (examples := self._examples()) and not any(x.numel() for x in examples):
            raise ValueError(f"the example inputs have {EMPTY}")
        self.model = _twin(model)
        for epsilon in epsilons(self.model):  # for good: checkpointed activations are evaluated again during backward
            setattr(epsilon.module, epsilon.attribute, EPS)
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        self.parameters = {name: p for name, p in trainable.items() if not p.is_complex()}
        self.initial = {name: _real(p.detach()) for name, p in model.named_parameters() if name in trainable}
        self._redrawn = {name: _real(p.detach()) for name, p in trainable.items()}
        self._padding = _padding(self.model)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.batch: int | None = BATCH
        self._vocabulary: dict[int, int] = {}
        self._buffers = {name: (x, x._version, x.clone()) for name, x in self.model.named_buffers()}
        self._written: set[str] = set()  # buffers that forward passes write
        self._integers = True  # whether those that no embedding reads are drawn, too
        self.class_axis = -1  # of logits with three axes
        self.outputs: dict[str, str] = {}
        self.flow = Flow(self.model)
        self.shapes = self._look()

    def _examples(self) -> list[Tensor]:
        """The tensors among the example inputs that have an axis."""
        return [x for x in tree_leaves((self.inputs, self.options)) if isinstance(x, Tensor) and x.ndim]

    @contextmanager
    def _pass(self, seed: int = 0) -> Iterator[None]:
        """One pass through the model: exact, with seeded generators, and with buffers as they were at first."""
        for name, (buffer, version, content) in self._buffers.items():
            module, _, own = name.rpartition(".")
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(content)
                self._written.add(name)
                self._buffers[name] = (buffer, buffer._version, content)
            setattr(self.model.get_submodule(module), own, buffer)
        with _evaluated(seed):
            yield

    def _look(self) -> Shapes:
        """One pass over the examples as they are, then two over a random batch, which has another size if it can."""
        shapes, other = Shapes(), Shapes()
        with self._pass(), shapes, self.flow, torch.no_grad():
            out = self.model(*self.inputs, **self.options)
        ends = tree_leaves(out) if callable(self.loss) else list(read(out).read.values())
        if not any(z.numel() for z in ends if isinstance(z, Tensor)):
            raise ValueError(f"the model's output for the example inputs has {EMPTY}")
        self.flow.ends(ends)
        self._vocabulary = shapes.vocabulary
        examples = self._examples()
        batched = bool(examples) and examples[0].ndim > 1 and not callable(self.loss)  # a function may hold targets
        resized = BATCH + (batched and len(examples[0]) == BATCH)
        for self.batch, self._integers in ((resized, True), (None, True), (None, False)):
            if self.batch is not None and not batched:
                continue
            inputs, options = self.draw()
            try:
                with self._pass(), other, torch.no_grad():
                    first = self._read(self.model(*inputs, **options))
                break
            except Exception:  # whatever the reason, the model has just taken the examples as they are
                if not self._integers:
                    raise
                other = Shapes()
        with self._pass(), torch.no_grad():
            second = self._read(self.model(*inputs, **options))
        for one, two in zip(first, second, strict=True):
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
        if self.batch is not None:
            self.batch = BATCH
        if not callable(self.loss):
            if self.loss == "cross_entropy" and all(z.shape[axis] == 1 for z in second for axis in class_axes(z)):
                raise ValueError(
                    "the output has one class, and the cross entropy of one class is constant; where the one number is "
                    'a logit of a binary cross entropy or a prediction, give loss="mse" or a function of the output'
                )
            if self.loss == "cross_entropy" and any(len(class_axes(z)) > 1 for z in second):
                self._place_classes()
            self.outputs = self._told(out)
        return shapes.joined(other, resized=self.batch is not None)

    def _read(self, out: Any) -> list[Tensor]:
        """What is differentiated: the loss itself if it is a function, else the logits that it reads."""
        if not callable(self.loss):
            return list(read(out).read.values())
        value = self.loss(out)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss= must give one number as a tensor, got {what}; give a function such as a mean")
        return [value]

    def redraw(self) -> None:
        """New parameters around the initial ones, none at 0 or 1, weights so large that no signal dies out.

        An embedding's row of padding stays, since training leaves it where it is.
        """
        with torch.no_grad():
            for name, p in self._redrawn.items():
                start = self.initial[name]
                size = float(torch.linalg.vector_norm(start, dtype=torch.float64)) / start.numel() ** 0.5
                if p.ndim < 2:
                    p.copy_(start + 0.3 * max(1.0, size) * (2 * self._uniform(p) - 1))
                else:  # in place, as a copy of an embedding takes much memory
                    size = max(size, (2 / p[0].numel()) ** 0.5)
                    p.copy_(self._drawn(p)).mul_(size).add_(start).div_(2**0.5)
                if name in self._padding:
                    p[self._padding[name]] = start[self._padding[name]]

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like.device)

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _normal(self, like: Tensor) -> Tensor:
        return self._drawn(like).to(like.device, torch.float64)

    def counted(self, name: str) -> Tensor:
        """A parameter as norms count it: with what is added to it wherever it is read, as in 1 + w."""
        p, offset = self.parameters[name].detach(), self.flow.offset(name)
        return p + offset if offset else p

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A random batch like the examples."""
        old = next((len(x) for x in self._examples()), None)

        def like(x: Tensor) -> Tensor:
            if not x.numel():
                return x
            shape = list(x.shape)
            if self.batch is not None and shape and shape[0] == old:
                shape[0] = self.batch
            if x.is_floating_point() and bool(x.isfinite().all()):
                mean, std = float(x.double().mean()), float(x.double().std(correction=0)) or 1.0
                return mean + std * self._normal(torch.empty(shape, device=x.device))
            if x.dtype == torch.bool or x.is_floating_point():  # a mask
                return x[torch.arange(shape[0], device=x.device) % len(x)] if shape else x
            low, high = int(x.min()), int(x.max()) + 1
            if x.data_ptr() in self._vocabulary:
                low, high = 0, self._vocabulary[x.data_ptr()]
            elif not self._integers:  # lengths in order, places in a graph
                return x
            return torch.randint(low, high, shape, generator=self.generator, dtype=x.dtype, device="cpu").to(x.device)

        inputs, options = tree_map_only(Tensor, like, (self.inputs, self.options))
        return inputs, options

    def gradients(self, n: int, *, constants: bool = False) -> Iterator[dict[str, Tensor]]:
        """Gradients of up to n losses on one random batch, by parameter; without those that no loss depends on.

        A loss given as a function is one loss. Else any cotangent v of the output is the gradient of some loss; one
        that reads logits only up to a constant, as cross entropy does, has cotangents with zero sum over the classes;
        with `constants`, losses are any that see it. Each is emptied before the next, so that there is memory for one.
        """
        parameters = list(self.parameters.values())
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        with self._pass(seed), torch.enable_grad():
            outputs = [z for z in self._read(self.model(*inputs, **options)) if z.requires_grad]
        if not outputs:
            return
        if callable(self.loss):  # one scalar has one gradient, whatever it is multiplied by
            n = 1
        for i in range(n):
            drawn = [self._normal(z) for z in outputs]
            cotangents = drawn if constants else [self._seen(v) for v in drawn]
            grads = torch.autograd.grad(outputs, parameters, cotangents, retain_graph=i + 1 < n, allow_unused=True)
            found = {name: g for name, g in zip(self.parameters, grads, strict=True) if g is not None}
            del grads
            yield found
            found.clear()

    def tangents(self, parts: Sequence[Part], law: Law, n: int, progress: Report) -> Matrix:
        """Derivatives of 2 n outputs of one random batch along the generator of each part.

        Column j is J ψ_j, with J the Jacobian of the outputs, up to what the loss does not see. Forward mode takes one
        pass for a few parts, which share the model's own values, where n losses would take n backward passes.

        Returns:
            [2 n, parts].

        Raises:
            NotImplementedError, RuntimeError: An operation has no forward derivative, there are fewer outputs, or the
                loss is a function, which has one.
        """
        if callable(self.loss):
            raise RuntimeError("a loss given as a function is one output, whose tangents are one number a batch")
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        columns: list[Tensor] = []
        for chunk in self._chunks(parts):
            values = {part.parameter: self.parameters[part.parameter].detach() for part in chunk}

            def changed(
                steps: Tensor,
                buffers: dict[str, Tensor],
                chunk: Sequence[Part] = chunk,
                values: dict[str, Tensor] = values,
            ) -> Tensor:
                """The change of the outputs, up to what the loss does not see, for a step along each direction."""
                directions: dict[str, Tensor] = {}
                for step, part in zip(steps, chunk, strict=True):
                    own = step * self._direction(part, law)
                    before = directions.get(part.parameter)
                    directions[part.parameter] = own if before is None else before + own

                def outputs(changed: dict[str, Tensor]) -> tuple[Tensor, ...]:
                    state = changed | {name: x.clone() for name, x in buffers.items()}
                    return tuple(self._read(torch.func.functional_call(self.model, state, inputs, options)))

                tangents = torch.func.jvp(outputs, (values,), (directions,))[1]
                return torch.cat([self._seen(t).flatten() for t in tangents])

            with warnings.catch_warnings(), self._pass(seed), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # of torch's own derivatives
                device = next(iter(values.values())).device
                steps = torch.eye(len(chunk), dtype=torch.float64, device=device)
                # Each tangent writes to buffers of its own.
                written = {name: torch.stack([self._buffers[name][0]] * len(chunk)) for name in self._written}
                found = torch.func.vmap(changed, randomness="same")(steps, written)
            if not columns:
                if found.shape[1] < 2 * n:
                    raise RuntimeError(f"{found.shape[1]} outputs are too few to tell {len(parts)} tensors apart")
                some = torch.randperm(found.shape[1], generator=self.generator, device="cpu")[: 2 * n].to(device)
            columns += found[:, some].cpu()
            progress(Stage.WHOLE_TENSORS, len(columns) / len(parts))
        matrix: Matrix = torch.stack(columns, 1).numpy()
        return matrix

    def _chunks(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """Neighbours, as many as one forward pass takes: each tensor has a tangent for each part of its chunk."""
        most = max(TANGENT_NUMBERS, sum(p.numel() for p in self.parameters.values()) // 2)
        chunk: list[Part] = []
        for part in parts:
            longer = [*chunk, part]
            n_numbers = len(longer) * sum(self.parameters[x].numel() for x in {y.parameter for y in longer})
            if chunk and (len(longer) > MOST_TANGENTS or n_numbers > most):
                yield chunk
                longer = [part]
            chunk = longer
        if chunk:
            yield chunk

    def _direction(self, part: Part, law: Law) -> Tensor:
        """The generator: the parameter as it counts, or ones, with zeros outside the part."""
        p = self.counted(part.parameter)
        psi = p if law == Law.NORM else torch.ones((), dtype=p.dtype, device=p.device).expand_as(p)
        if part.axis is None:
            return psi
        inside = torch.zeros(p.shape[part.axis], dtype=p.dtype, device="cpu")
        inside[part.gather(torch.arange(len(inside), device="cpu")).flatten()] = 1.0
        shape = [-1 if axis == part.axis else 1 for axis in range(p.ndim)]
        return psi * inside.to(p.device).view(shape)

    def _seen(self, z: Tensor) -> Tensor:
        """The part of a change of the output that the loss sees."""
        if self.loss != "cross_entropy":
            return z
        axes = class_axes(z)
        return z - z.mean(axes[0] if len(axes) == 1 else self.class_axis, keepdim=True)

    def _place_classes(self) -> None:
        """Where logits have three axes, the classes lie on the one that more parameters write to.

        A constant added to all classes is added to a parameter that writes them, so that its gradient sums to zero.
        """
        writers = {-1: 0, 1: 0}
        losses = self.gradients(len(writers))
        for axis in writers:
            self.class_axis = axis
            gradients = next(losses, {})
            sizes = {name: float(torch.linalg.vector_norm(g)) / g.numel() ** 0.5 for name, g in gradients.items()}
            writers[axis] = sum(
                sizes[name] > 1e-9 * max(sizes.values()) and abs(float(g.sum())) <= 1e-9 * sizes[name] * g.numel()
                for name, g in gradients.items()
            )
        self.class_axis = 1 if writers[1] > writers[-1] else -1

    def _told(self, out: Any) -> dict[str, str]:
        """What is read of an output, and what is not, by the names of its tensors."""
        reading = read(out)
        told = {}
        for name, z in reading.read.items():
            told[name] = "read"
            if self.loss == "cross_entropy" and len(class_axes(z)) > 1:
                where = "the last axis" if self.class_axis == -1 else f"axis {self.class_axis}"
                told[name] += f", with the classes on {where}; if they lie elsewhere, give loss= a function"
        for name in reading.unread:
            told[name] = "not read: a loss that reads it may break these laws; to count it, give loss= a function"
        return told


@contextmanager
def _evaluated(seed: int) -> Iterator[None]:
    """Exact arithmetic, seeded generators and nothing compiled inside; afterwards the random states are as before."""
    before = random_state()
    # A compiled model has imported torch._dynamo; to ask it would import it for all others.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with eager, evaluation("no_eps", eps=EPS):
            yield
    finally:
        set_random_state(before)


def _twin(model: nn.Module) -> nn.Module:
    """A float64 copy; modules kept in evaluation mode stay so."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):  # computes the weight anew in each pass
                computed = getattr(module, hook.name)
                memo[id(computed)] = computed.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
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
    return twin


def _padding(model: nn.Module) -> dict[str, int]:
    """The rows of embeddings that no gradient reaches, by the weight's name."""
    names = {id(p): name for name, p in model.named_parameters()}
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    rows = [(names.get(id(embedding.weight)), embedding.padding_idx) for embedding in embeddings]
    return {name: row for name, row in rows if name is not None and row is not None}


def _real(x: Tensor) -> Tensor:
    """Its numbers, in the same memory; those of complex ones in pairs."""
    return torch.view_as_real(x) if x.is_complex() else x


def _widened(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x
