"""Shared by the optimizers' tests: a small network, its symmetries, a training loop, comparisons with torch's."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Translation
from noetherperf.engines import backends

BACKENDS = [name for name, status in nperf.backends().items() if status == "available" and name != "auto"]


N_IN, N_HIDDEN, N_OUT, N_BATCH = 5, 7, 3, 16

SYMMETRIES = [
    Rescale("fc1->fc2", inward=[Part("fc1.weight", 0), Part("fc1.bias", 0)], outward=[Part("fc2.weight", 1)]),
    Translation("fc2", [Part("fc2.weight", 1)]),
    Translation("fc2.bias", [Part("fc2.bias", None)]),
    Norm("half of fc1", [Part("fc1.weight", 1, start=1, stop=5, fold=2)]),
]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def make_net(backend: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers = OrderedDict(fc1=nn.Linear(N_IN, N_HIDDEN), relu=nn.ReLU(), fc2=nn.Linear(N_HIDDEN, N_OUT))
    return nn.Sequential(layers).to(device_of(backend), dtype)


class Kind(NamedTuple):
    """An optimizer, and torch's of the same name."""

    ours: Any
    theirs: Any
    options: Mapping[str, Any]  # typical ones

    @property
    def backends(self) -> list[str]:
        """Those that have its kernels."""
        return [name for name in BACKENDS if backends.BACKENDS[name].steps(self.ours.rule)]

    def mine(self, net: nn.Module, backend: str, **options: Any) -> Any:
        """Ours of a net's parameters."""
        return self.ours(net.named_parameters(), backend=backend, **{"symmetries": SYMMETRIES, **options})

    def torchs(self, net: nn.Module, **options: Any) -> Any:
        """Torch's of a net's parameters, one tensor after the other."""
        return self.theirs(net.named_parameters(), foreach=False, **options)


SGD, ADAM, ADAMW = KINDS = [
    Kind(nperf.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}),
    Kind(nperf.Adam, torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    Kind(nperf.AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05}),
]


def each(kinds: Iterable[Kind], among: Container[str] = BACKENDS) -> pytest.MarkDecorator:
    """Run a test with each of these optimizers on each of its backends among these."""
    pairs = [(kind, name) for kind in kinds for name in kind.backends if name in among]
    ids = [f"{kind.ours.__name__}-{name}" for kind, name in pairs]
    return pytest.mark.parametrize(("kind", "backend"), pairs, ids=ids)


def ours(net: nn.Module, backend: str, **options: Any) -> nperf.SGD:
    optimizer: nperf.SGD = SGD.mine(net, backend, **options)
    return optimizer


def theirs(net: nn.Module, **options: Any) -> torch.optim.SGD:
    optimizer: torch.optim.SGD = SGD.torchs(net, **options)
    return optimizer


def loss_of(net: nn.Module, step: int) -> Tensor:
    """The loss on a batch that depends on the step's number alone."""
    p = next(net.parameters())
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N_BATCH, N_IN, generator=generator, dtype=torch.float64)
    y = torch.randint(N_OUT, (N_BATCH,), generator=generator)
    return cross_entropy(net(x.to(p.device, p.dtype)), y.to(p.device))


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    before_step: Callable[[int, nn.Module], object] = lambda step, net: None,
    after_step: Callable[[], None] = lambda: None,
    set_to_none: bool = True,
) -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(net, step).backward()
        before_step(step, net)
        optimizer.step()
        after_step()


def buffers(optimizer: torch.optim.Optimizer) -> Iterator[Tensor | None]:
    """Torch's state of each parameter, None for what it does not have."""
    is_adam = isinstance(optimizer, nperf.Adam | torch.optim.Adam)
    keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq") if is_adam else ("momentum_buffer",)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from map(optimizer.state.get(parameter, {}).get, keys)


def assert_same(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    other: nn.Module,
    peer: torch.optim.Optimizer,
    tolerance: float = 1e-12,
) -> None:
    """Parameters and states agree, relative to each tensor's largest element."""
    pairs = [
        *zip(net.parameters(), other.parameters(), strict=True),
        *zip(buffers(optimizer), buffers(peer), strict=True),
    ]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.isfinite().all()
            assert (a - b).abs().max() <= tolerance * b.abs().max()


def assert_same_readout(a: nperf.Readout, b: nperf.Readout) -> None:
    """Two readouts agree bit for bit."""
    assert (list(a), a.step, a.time) == (list(b), b.step, b.time)
    for name in a:
        for field in ("charge", "initial", "defect", "relative_defect"):
            assert torch.equal(getattr(a[name], field), getattr(b[name], field)), (name, field)
        for term in ("free", "forced", "defect"):
            assert torch.equal(getattr(a[name].discrete, term), getattr(b[name].discrete, term)), (name, term)
            assert torch.equal(getattr(a[name].flow, term), getattr(b[name].flow, term)), (name, term)
        assert a[name].moments.keys() == b[name].moments.keys()
        assert all(torch.equal(a[name].moments[key], b[name].moments[key]) for key in a[name].moments)
        assert (a[name].closed, a[name].reason) == (b[name].closed, b[name].reason)


def assert_identities(optimizer: nperf.MeasuredOptimizer, tolerance: float = 1e-12) -> None:
    """What was measured adds up: charge = free + forced + defect, to rounding, relative to the terms."""
    for name, law in optimizer.readout().items():
        terms = law.discrete.free.abs() + law.discrete.forced.abs() + law.discrete.defect.abs() + law.initial.abs()
        assert (law.rounding.abs() <= tolerance * (terms + 1e-300)).all(), name


class OnSphere(nn.Module):
    """A loss of the direction of each row + offset alone, for any batch: the scale symmetry holds to rounding."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.offset = offset

    def gradients(self, batch: int) -> None:
        x = torch.randn(6, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
        self.zero_grad()
        rows = self.weight + self.offset
        (rows / rows.norm(dim=1, keepdim=True) @ x).exp().sum().backward()
