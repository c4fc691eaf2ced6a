"""Which operations stand in the way of a law: where the scale of a parameter stops passing through.

    with flow: outputs = model(...)
    flow.obstacles("blocks.0.up.bias")      # "gelu (blocks.0.act) is not homogeneous"

While a forward pass runs, each tensor carries the parameters that it scales with, and the degree: 1 for what a linear
map writes, 2 after a square, 0 where it has been divided out. An operation without such a degree stops them. The search
does not ask this; it only serves to give reasons.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Flow"]

#: These hand a parameter on as it is.
_SEEN = frozenset(
    """
    view _unsafe_view reshape t transpose permute unsqueeze squeeze expand detach alias clone _to_copy
    """.split()  # noqa: SIM905
)
SHOWN = 3  # operations, or readers, that a reason names

Degrees = Mapping[str, float]  # of the parameters that a tensor scales with

#: Of these the output scales as the largest input does.
_SAME = frozenset(
    """
    view _unsafe_view reshape _reshape_alias t transpose permute movedim expand squeeze unsqueeze slice select
    index index_select gather unbind split split_with_sizes chunk unsafe_split narrow cat stack clone copy
    _to_copy detach alias contiguous as_strided diagonal unfold im2col col2im flip roll repeat tril triu
    lift_fresh slice_scatter select_scatter index_put index_add index_copy scatter scatter_add constant_pad_nd
    reflection_pad2d replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle add sub rsub neg sum mean
    cumsum max min amax amin maximum minimum abs norm linalg_vector_norm std relu leaky_relu threshold
    rrelu_with_noise where masked_fill native_dropout max_pool1d max_pool2d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d _embedding_bag _prelu_kernel
    """.split()  # noqa: SIM905
)
#: Products of two arguments, and where these stand; what else is given is added.
_PRODUCTS = {
    "mul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "dot": (0, 1),
    "mv": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addmv": (1, 2),
    "addcmul": (1, 2),
    "convolution": (0, 1),
    "embedding": (0, 0),
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
#: Normalisations divide their input's scale out; the arguments that then scale the output.
_NORMALISATIONS = {
    "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_batch_norm_impl_index": (1, 2),
    "_fused_rms_norm": (2,),
}


class Flow(TorchDispatchMode):
    """Follows the scales of a model's parameters through the forward passes that run while it is active.

    Args:
        model: Its modules' names tell where an operation stands.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._within: list[str] = [""]
        self._degrees = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        for name, p in model.named_parameters():
            self._degrees[p], self._names[p] = {name: 1.0}, name
        self._readers: dict[str, dict[str, None]] = {}
        self._bare = WeakTensorKeyDictionary()  # what is a parameter as it is, or a view or copy of it: its name
        for p, name in self._names.items():
            self._bare[p] = name
        self._added: dict[str, set[float]] = {}
        self._stops: dict[str, dict[tuple[str, str], None]] = {}
        self._hooks = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would import torch._dynamo to say so, which takes seconds."""
        return False

    def __enter__(self) -> "Flow":
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name: self._within.append(name))
            leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()
        self._within = [""]

    def _leave(self) -> None:
        self._within.pop()

    def ends(self, outputs: Iterable[Any]) -> None:
        """Note what the loss reads."""
        for z in outputs:
            for name in self._degrees.get(z, {}) if isinstance(z, Tensor) else ():
                self._stops.setdefault(name, {})["", ""] = None

    def obstacles(self, name: str) -> str:
        """What stops the scale of a parameter; empty where nothing is known to."""
        stops = list(self._stops.get(name, ()))
        operations = [f"{what}{f' ({where})' if where else ''}" for what, where in stops if what]
        parts = []
        if operations:
            parts.append(f"{_listed(operations)} {'are' if len(operations) > 1 else 'is'} not homogeneous")
        if ("", "") in stops:
            parts.append("the loss sees its scale")
        readers = [reader or "the model itself" for reader in self._readers.get(name, ())]
        if len(readers) > 1:
            parts.append(f"it is read by {_listed(readers)}")
        return "; ".join(parts)

    def offset(self, name: str) -> float:
        """The number that is added to a parameter wherever it is read, as in 1 + w; 0 if there is none."""
        added = self._added.get(name, ())
        return next(iter(added)) if len(added) == 1 else 0.0

    def is_read(self, name: str) -> bool:
        """Whether the forward pass uses a parameter."""
        return name in self._readers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        flows = [self._degrees.get(x, {}) for x in leaves]
        for x in leaves:
            if (name := self._names.get(x)) is not None:
                self._readers.setdefault(name, {})[self._within[-1]] = None
        operation = func.overloadpacket.__name__.removesuffix("_")
        self._follow(operation, args, kwargs or {}, leaves, out)
        if any(flows):
            degrees = self._degrees_of(operation, args, flows)
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self._degrees[x] = degrees
        return out

    def _follow(self, operation: str, args: Any, kwargs: Mapping[str, Any], leaves: Iterable[Tensor], out: Any) -> None:
        """Note what is added to parameters before they are used."""
        bare = {self._bare[x] for x in leaves if x in self._bare}
        if len(bare) != 1 or not isinstance(args[0], Tensor) or args[0] not in self._bare:
            pass
        elif operation in _SEEN:
            self._bare[out] = self._bare[args[0]]
            return
        elif operation in ("add", "sub", "rsub") and isinstance(args[1], int | float) and kwargs.get("alpha", 1) == 1:
            sign = 1.0 if operation == "add" else -1.0
            self._added.setdefault(self._bare[args[0]], set()).add(sign * float(args[1]))
            return
        for name in bare:
            self._added.setdefault(name, set()).add(0.0)

    def _degrees_of(self, operation: str, args: Any, flows: list[Degrees]) -> Degrees:
        """Of the output; what the operation stops is noted."""

        def of(i: int) -> Degrees:
            return self._degrees.get(args[i], {}) if i < len(args) and isinstance(args[i], Tensor) else {}

        if operation in _SAME:
            return _combined(max, flows)
        if operation in _PRODUCTS:
            first, second = _PRODUCTS[operation]
            product = _combined(lambda x: sum(x), [of(first), of(second)] if first != second else [of(first)])
            return _without_zeros(_combined(max, [product, *(of(i) for i in range(3) if i not in (first, second))]))
        if operation == "div":
            return _without_zeros(_combined(lambda x: sum(x), [of(0), _times(of(1), -1.0)]))
        if operation in _POWERS:
            return _times(of(0), _POWERS[operation])
        if operation == "pow" and isinstance(args[1], int | float):
            return _times(of(0), float(args[1]))
        if operation in _NORMALISATIONS:
            return _combined(max, [of(i) for i in _NORMALISATIONS[operation]])
        stopped, passed = flows, dict[str, float]()
        if operation.startswith("_scaled_dot_product"):
            stopped, passed, operation = flows[:2], dict(of(2)), "softmax of the scores"
        for degrees in stopped:
            for name in degrees:
                self._stops.setdefault(name, {})[operation.lstrip("_"), self._within[-1]] = None
        return passed


def _combined(how: Callable[[list[float]], float], flows: Iterable[Degrees]) -> dict[str, float]:
    flows = list(flows)
    return {name: how([x[name] for x in flows if name in x]) for name in dict.fromkeys(n for x in flows for n in x)}


def _times(degrees: Degrees, factor: float) -> dict[str, float]:
    return {name: factor * degree for name, degree in degrees.items()}


def _without_zeros(degrees: Degrees) -> dict[str, float]:
    return {name: degree for name, degree in degrees.items() if not math.isclose(degree, 0.0, abs_tol=1e-9)}


def _listed(items: list[str]) -> str:
    shown = items[:SHOWN] + ([f"{len(items) - SHOWN} more"] if len(items) > SHOWN else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
