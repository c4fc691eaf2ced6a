"""A copy of the model to ask questions of: exact arithmetic, fresh parameters and batches, and the gradients they give.

The copy computes in float64 whatever the code asks for, with the eps of every normalisation so small that it cannot be
seen. It trains as the model would: dropout is at work, for a symmetry must hold under every mask. Its parameters are
drawn anew, so that what holds is the architecture's doing and no dead unit or zero-initialised layer hides anything.
The model itself is only read.
"""

import contextlib
import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from noetherperf.detect.relations import Matrix

aten = torch.ops.aten

__all__ = ["EXACT_EPS", "Loss", "Probe", "Shapes"]

Loss = Literal["cross_entropy", "mse"] | Callable[[Any], Tensor] | None

EXACT_EPS = 1e-14
BATCH = 4  # enough that BatchNorm leaves a gradient, and that few units are dead on all of them
N_FUSED = 4  # at most so many equal maps are looked for in one fused tensor

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_NORMALISATIONS = {
    f: inspect.signature(f) for f in (F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm, F.rms_norm)
}


class _Exact(TorchFunctionMode):
    """float64 where the code casts to something narrower, and a tiny eps where it writes one down."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double()
        if func in _NORMALISATIONS:
            bound = _NORMALISATIONS[func].bind(*args, **kwargs)
            bound.arguments["eps"] = EXACT_EPS
            args, kwargs = bound.args, bound.kwargs
        if kwargs.get("dtype") in _NARROW:
            kwargs = kwargs | {"dtype": torch.float64}
        if any(isinstance(x, torch.dtype) and x in _NARROW for x in args):
            args = [torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x for x in args]
        return func(*args, **kwargs)


class Shapes(TorchDispatchMode):
    """What one forward pass tells of shapes: proposals for heads and fused maps, which gradients then judge.

    Attributes:
        runs: Neighbouring sizes of every tensor seen, up to three together.
        cuts: Length of an axis -> the slices that were taken of it or joined into it.
        vocabulary: Address of an integer input -> how many indices its embedding has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[tuple[int, ...]] = set()
        self.cuts: dict[int, set[tuple[int, int]]] = {}
        self.vocabulary: dict[int, int] = {}

    @property
    def sizes(self) -> set[int]:
        return {run[0] for run in self.runs if len(run) == 1 and run[0] > 1}

    def slices(self, length: int) -> set[tuple[int, int]]:
        """Slices that an axis of this length may be made of."""
        found = set(self.cuts.get(length, ()))
        for run in self.runs:
            if 1 < run[0] <= N_FUSED and len(run) > 1 and int(np.prod(run)) == length:
                step = length // run[0]
                found |= {(at, at + step) for at in range(0, length, step)}
        return found

    def periods(self, length: int) -> set[int]:
        """Periods in which an axis of this length may repeat: the last sizes of a run that multiplies up to it."""
        pairs = (run for run in self.runs if len(run) > 1 and int(np.prod(run)) == length)
        return {length // run[0] for run in pairs if 1 < run[0] < length}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        pieces = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        for x in pieces:
            if x.is_floating_point():
                self._see(tuple(x.shape))
        operation = func.overloadpacket
        if operation is aten.embedding:
            self.vocabulary[args[1].data_ptr()] = args[0].shape[0]
        elif operation is aten.cat:
            self._cut(out.shape, [x.shape for x in args[0]])
        elif operation is aten.slice:
            self._slice(*args)
        elif len(pieces) > 1 and isinstance(args[0], Tensor):  # split in one of its kinds
            self._cut(args[0].shape, [x.shape for x in pieces])
        return out

    def _see(self, shape: tuple[int, ...]) -> None:
        for i in range(len(shape)):
            self.runs |= {shape[i:j] for j in range(i + 1, min(i + 3, len(shape)) + 1)}

    def _cut(self, whole: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        for axis, length in enumerate(whole):
            sizes = [piece[axis] for piece in pieces if len(piece) == len(whole)]
            if len(sizes) > 1 and sum(sizes) == length:
                ends = np.cumsum(sizes).tolist()
                self.cuts.setdefault(length, set()).update(zip([0, *ends], ends, strict=False))

    def _slice(
        self, x: Tensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
    ) -> None:
        length = x.shape[axis]
        start, stop, _ = slice(start, stop).indices(length)
        if step == 1 and 0 < stop - start < length:
            pieces = {(0, start), (start, stop), (stop, length)}
            self.cuts.setdefault(length, set()).update((i, j) for i, j in pieces if i < j)


class Probe:
    """Random batches and parameters of a copy of the model, and the gradients that they give.

    Args:
        model: The user's model; read, never changed.
        inputs, options: Example inputs of its forward.
        loss: What the output goes into.
        seed: Of everything drawn.

    Raises:
        ValueError: No parameters; an unknown loss.
        TypeError: An output with no logits to be found.
        RuntimeError: The model cannot be copied, or is not deterministic.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any], loss: Loss, seed: int = 0
    ) -> None:
        if not (loss in ("cross_entropy", "mse", None) or callable(loss)):
            raise ValueError(f'loss={loss!r} is unknown; use "cross_entropy", "mse", None, or a function of the output')
        self.loss = loss
        self.inputs = _map(_widened, tuple(inputs))
        self.options = _map(_widened, dict(options))
        self.model = _exact_copy(model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.batch: int | None = BATCH
        self._vocabulary: dict[int, int] = {}
        self.shapes = self._look()

    def _look(self) -> Shapes:
        """One pass over the examples as they are, then with a batch of our own if the model lets us."""
        shapes = Shapes()
        with guarded(), shapes, torch.no_grad():
            logits(self.model(*self.inputs, **self.options))
        self._vocabulary = shapes.vocabulary
        first = next((x for x in _tensors((self.inputs, self.options)) if x.ndim), None)
        if first is None or first.ndim < 2:
            self.batch = None
        else:
            try:
                with guarded(), shapes, torch.no_grad():
                    inputs, options = self.draw()
                    self.model(*inputs, **options)
            except Exception:  # whatever it was, the examples as they are have just gone through
                self.batch = None
        with guarded(), torch.no_grad():
            inputs, options = self.draw()
        outputs = []
        for _ in range(2):
            with guarded(), torch.no_grad():
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
        """New parameters around the initial ones, none at 0 or 1, weights large enough that no signal dies out."""
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
        old = next((len(x) for x in _tensors((self.inputs, self.options)) if x.ndim), None)

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

        return _map(like, self.inputs), _map(like, self.options)

    def gradients(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of n losses on one random batch; a parameter that none reaches is left out.

        Any cotangent v of the output is the gradient of some loss. Those of losses that see logits only up to a
        constant, as cross entropy does, add up to zero over the classes.
        """
        parameters = list(self.parameters.values())
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        with guarded(seed), torch.enable_grad():
            out = self.model(*inputs, **options)
            outputs = [self.loss(out)] if callable(self.loss) else logits(out)
        outputs = [z for z in outputs if z.requires_grad]
        if not outputs:
            return
        for i in range(n):
            cotangents = [self._cotangent(z) for z in outputs]
            found = torch.autograd.grad(outputs, parameters, cotangents, retain_graph=i + 1 < n, allow_unused=True)
            yield {name: g for name, g in zip(self.parameters, found, strict=True) if g is not None}

    def tangents(self, names: Sequence[str], n: int) -> Matrix:
        """How 2 n outputs of one random batch change as one tensor after another is scaled as a whole.

        Forward differentiation: column j is J θ_j, with J the Jacobian of the outputs, up to what the loss does not
        see. One forward pass for each tensor and no gradients, where n losses would take n backward passes.

        Returns:
            [2 n, names].

        Raises:
            NotImplementedError, RuntimeError: An operation has no forward derivative, or there are fewer outputs.
        """
        inputs, options = self.draw()
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
        columns = []
        for name in names:
            p = self.parameters[name].detach()
            with warnings.catch_warnings(), guarded(seed), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), dual_level():
                warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # of torch's own derivatives
                scaled = make_dual(p, p.clone())
                outputs = logits(torch.func.functional_call(self.model, {name: scaled}, inputs, options))
                tangents = [unpack_dual(z).tangent for z in outputs]
                tangents = [torch.zeros_like(z) if t is None else t for z, t in zip(outputs, tangents, strict=True)]
            columns.append(torch.cat([self._seen(t).flatten() for t in tangents]))
            if len(columns) == 1:
                if len(columns[0]) < 2 * n:
                    raise RuntimeError(f"{len(columns[0])} outputs are too few to tell {len(names)} tensors apart")
                some = torch.randperm(len(columns[0]), generator=self.generator, device="cpu")[: 2 * n].to(p.device)
            columns[-1] = columns[-1][some].cpu()
        matrix: Matrix = torch.stack(columns, 1).numpy()
        return matrix

    def _cotangent(self, z: Tensor) -> Tensor:
        return self._seen(self._normal(z))

    def _seen(self, z: Tensor) -> Tensor:
        """The part of a change of the output that the loss sees."""
        return z - z.mean(class_axis(z), keepdim=True) if self.loss == "cross_entropy" else z


def class_axis(z: Tensor) -> int:
    """Which axis of the logits holds the classes: 1 of dense predictions [N, C, H, W, ...], else the last."""
    return 1 if z.ndim > 3 else -1


def logits(out: Any) -> list[Tensor]:
    """What of a model's output the loss reads: the tensor, the logits, or a tuple's first with all of its last size.

    Raises:
        TypeError: No such thing is there.
    """
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        for key in ("logits", "out", "last_hidden_state"):
            if isinstance(out.get(key), Tensor):
                return [out[key]]
        found = [x for x in out.values() if isinstance(x, Tensor)]
        if len(found) == 1:
            return found
    elif isinstance(getattr(out, "logits", None), Tensor):
        return [out.logits]
    elif isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        first = out[0]
        return [x for x in out if isinstance(x, Tensor) and x.ndim == first.ndim and x.shape[-1] == first.shape[-1]]
    raise TypeError(
        f"the model's output is {type(out).__name__}, in which find_symmetries finds no logits; wrap the model in a "
        "module whose forward returns the tensor that the loss reads, or give loss= a function of the output"
    )


@contextlib.contextmanager
def guarded(seed: int = 0) -> Iterator[None]:
    """Exact arithmetic inside; the random states of torch, numpy and Python, and torch's default dtype, as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()  # noqa: NPY002
    with torch.random.fork_rng(devices), _Exact():
        try:
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            torch.set_default_dtype(dtype)
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)


def _exact_copy(model: nn.Module) -> nn.Module:
    """A float64 copy that normalises exactly; modules kept in evaluation mode stay so."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be copied, and find_symmetries works on a copy: {error}"
        ) from error
    for name, p in twin.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run the model once on an example first")
        p.grad = None
    twin.double()
    if not twin.training:
        twin.train()
    for module in twin.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
        for field, value in vars(module).items():
            if "eps" in field and isinstance(value, float) and 0.0 < value < 0.1:
                setattr(module, field, EXACT_EPS)
    return twin


def _widened(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _map(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """The function of every tensor in nested tuples, lists and dicts."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, tuple | list):
        items = [_map(function, x) for x in data]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    if isinstance(data, dict):
        return type(data)({key: _map(function, value) for key, value in data.items()})
    return data


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, tuple | list):
        for value in data:
            yield from _tensors(value)
