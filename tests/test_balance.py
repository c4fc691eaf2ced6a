"""Matrices of charges: against plain loops, exact laws in every entry, constraints, checkpoints, what is refused."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

import noetherperf as nperf
from noetherperf import Balance, Part, Rescale
from noetherperf.symmetry import from_json, to_json, validate

DIM, HEAD, N_OUT = 6, 3, 4


class Attention(nn.Module):
    """Attention of several layouts, then a linear head.

    fused: None; "split": rows of all queries, then all keys, then all values; "heads": q, k, v of each head together.
    """

    def __init__(self, n_heads: int = 2, n_kv: int = 2, fused: str | None = None, cross: bool = False) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.fused, self.cross = n_heads, n_kv, fused, cross
        if fused is None:
            self.q, self.k, self.v = (
                nn.Linear(DIM, n_heads * HEAD),
                nn.Linear(DIM, n_kv * HEAD),
                nn.Linear(DIM, n_kv * HEAD),
            )
        else:
            self.qkv = nn.Linear(DIM, 3 * n_heads * HEAD)
        self.o = nn.Linear(n_heads * HEAD, DIM, bias=False)
        self.head = nn.Linear(DIM, N_OUT)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(0) if self.cross else x
        if self.fused is None:
            q, k, v = self.q(x), self.k(memory), self.v(memory)
        elif self.fused == "split":
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = (y.flatten(-2) for y in self.qkv(x).unflatten(-1, (self.n_heads, 3 * HEAD)).chunk(3, -1))
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(-2, -3) for y in (q, k, v))
        k, v = (y.repeat_interleave(self.n_heads // self.n_kv, -3) for y in (k, v))
        mixed = softmax(q @ k.mT / HEAD**0.5, -1) @ v
        logits: Tensor = self.head(x + self.o(mixed.transpose(-2, -3).flatten(-2)))
        return logits.mean(-2)


class Low(nn.Module):
    """A frozen weight with a trained B A beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, N_OUT).requires_grad_(False)
        self.a, self.b = nn.Linear(DIM, 2, bias=False), nn.Linear(2, N_OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x) + self.b(self.a(x))
        return logits.mean(-2)


def linear_pair() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 5), nn.Linear(5, N_OUT), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 7))).append(
        Mean()
    )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


Params = dict[str, Tensor]


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    balances: list[Balance]
    by_hand: Callable[[Params], dict[str, list[tuple[Tensor, Tensor]]]]  # each block's W₁ and W₂, [n, rest]


def with_bias(p: Params, name: str, rows: slice) -> Tensor:
    return torch.cat([p[f"{name}.weight"][rows], p[f"{name}.bias"][rows, None]], 1)


def heads(n: int) -> list[slice]:
    return [slice(h * HEAD, (h + 1) * HEAD) for h in range(n)]


def both(name: str, axis: int = 0, **where: Any) -> list[Part]:
    return [Part(f"{name}.weight", axis, **where), Part(f"{name}.bias", axis, **where)]


def plain_by_hand(p: Params) -> dict[str, list[tuple[Tensor, Tensor]]]:
    qk = [(with_bias(p, "q", rows), with_bias(p, "k", rows)) for rows in heads(2)]
    vo = [(with_bias(p, "v", rows), p["o.weight"][:, rows].T) for rows in heads(2)]
    return {"q, k": qk, "v, o": vo}


def grouped_by_hand(p: Params) -> dict[str, list[tuple[Tensor, Tensor]]]:
    qk, vo = [], []
    for kv, rows in enumerate(heads(2)):
        of_queries = [heads(4)[2 * kv], heads(4)[2 * kv + 1]]
        qk.append((torch.cat([with_bias(p, "q", own) for own in of_queries], 1), with_bias(p, "k", rows)))
        vo.append((with_bias(p, "v", rows), torch.cat([p["o.weight"][:, own].T for own in of_queries], 1)))
    return {"q, k": qk, "v, o": vo}


def split_by_hand(p: Params) -> dict[str, list[tuple[Tensor, Tensor]]]:
    def rows(k: int, h: slice) -> Tensor:
        return with_bias(p, "qkv", slice(2 * HEAD * k + h.start, 2 * HEAD * k + h.stop))

    return {
        "q, k": [(rows(0, h), rows(1, h)) for h in heads(2)],
        "v, o": [(rows(2, h), p["o.weight"][:, h].T) for h in heads(2)],
    }


def by_heads_by_hand(p: Params) -> dict[str, list[tuple[Tensor, Tensor]]]:
    def rows(k: int, number: int) -> Tensor:
        start = 3 * HEAD * number + k * HEAD
        return with_bias(p, "qkv", slice(start, start + HEAD))

    return {
        "q, k": [(rows(0, h), rows(1, h)) for h in range(2)],
        "v, o": [(rows(2, h), p["o.weight"][:, own].T) for h, own in enumerate(heads(2))],
    }


GROUPED = {"fold": 2, "stride": HEAD, "period": 2 * HEAD}
SPLIT = [{"start": 2 * HEAD * k, "stop": 2 * HEAD * (k + 1)} for k in range(3)]
BY_HEADS = [{"start": HEAD * k, "stop": HEAD * (k + 1), "period": 3 * HEAD} for k in range(3)]
O = [Part("o.weight", 1)]  # noqa: E741
QK_AND_VO = [Balance("q, k", both("q"), both("k"), size=HEAD), Balance("v, o", both("v"), O, size=HEAD)]

CASES = {
    "plain": Case(Attention, QK_AND_VO, plain_by_hand),
    "cross": Case(lambda: Attention(cross=True), QK_AND_VO, plain_by_hand),
    "grouped": Case(
        lambda: Attention(4, 2),
        [
            Balance("q, k", both("q", **GROUPED), both("k"), size=HEAD),
            Balance("v, o", both("v"), [Part("o.weight", 1, **GROUPED)], size=HEAD),
        ],
        grouped_by_hand,
    ),
    "split": Case(
        lambda: Attention(fused="split"),
        [
            Balance("q, k", both("qkv", **SPLIT[0]), both("qkv", **SPLIT[1]), size=HEAD),
            Balance("v, o", both("qkv", **SPLIT[2]), O, size=HEAD),
        ],
        split_by_hand,
    ),
    "by heads": Case(
        lambda: Attention(fused="heads"),
        [
            Balance("q, k", both("qkv", **BY_HEADS[0]), both("qkv", **BY_HEADS[1]), size=HEAD),
            Balance("v, o", both("qkv", **BY_HEADS[2]), O, size=HEAD),
        ],
        by_heads_by_hand,
    ),
    "linear pair": Case(
        linear_pair,
        [Balance("pair", both("0"), [Part("1.weight", 1)])],
        lambda p: {"pair": [(with_bias(p, "0", slice(None)), p["1.weight"].T)]},
    ),
    "low rank": Case(
        Low,
        [Balance("b a", [Part("a.weight", 0)], [Part("b.weight", 1)])],
        lambda p: {"b a": [(p["a.weight"], p["b.weight"].T)]},
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return case.model().to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    p = next(model.parameters())
    random = torch.Generator().manual_seed(step)
    x = torch.randn(5, 7, DIM, generator=random, dtype=torch.float64)
    y = torch.randint(N_OUT, (5,), generator=random)
    return cross_entropy(model(x.to(p.dtype)), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, schedule: bool = False) -> None:
    for step in steps:
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1.0 + 0.5 * torch.cos(torch.tensor(0.02 * step)).item())
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def plain(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """X of each block, entry by entry."""
    blocks = []
    for w_1, w_2 in pairs:
        n = len(w_1)
        entries = [[(w_1[i] * w_1[j]).sum() - (w_2[i] * w_2[j]).sum() for j in range(n)] for i in range(n)]
        blocks.append(torch.stack([torch.stack(row) for row in entries]))
    return torch.stack(blocks).double()


def largest(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest sum of |terms| of an entry."""
    return max(float((w.double().abs() @ w.double().abs().T).max()) for pair in pairs for w in pair)


def detached(model: nn.Module) -> Params:
    return {name: p.detach() for name, p in model.named_parameters()}


@each_case
def test_the_charge_is_that_of_plain_loops(case: Case) -> None:
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=case.balances)
    train(model, optimizer, range(3))
    readout, params = optimizer.readout(), detached(model)
    for name, pairs in case.by_hand(params).items():
        expected = plain(pairs)
        bound = 1e-14 * largest(pairs)
        assert torch.allclose(readout.balances[name].charge, expected, rtol=0, atol=bound)
        own = next(balance for balance in case.balances if balance.name == name)
        assert torch.allclose(own.charge(params), expected, rtol=0, atol=bound)
        assert (own.charge(params, magnitude=True) >= own.charge(params).abs()).all()


@each_case
def test_the_constraint_holds_in_every_entry(case: Case) -> None:
    model = make(case)
    loss_of(model, 0).backward()
    values = case.by_hand(detached(model))
    grads = case.by_hand(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    )
    for name, pairs in values.items():
        for (w_1, w_2), (g_1, g_2) in zip(pairs, grads[name], strict=True):
            scale = float((w_1.abs() @ g_1.abs().T).max())
            assert scale > 1e-6
            assert float((w_1 @ g_1.T - (w_2 @ g_2.T).T).abs().max()) <= 1e-12 * scale


@each_case
def test_the_law_of_sgd_is_exact_in_every_entry(case: Case) -> None:
    model = make(case)
    optimizer = nperf.SGD(
        model.named_parameters(), lr=0.1, momentum=0.9, dampening=0.2, weight_decay=5e-3, symmetries=case.balances
    )
    train(model, optimizer, range(300), schedule=True)
    for name, pairs in case.by_hand(detached(model)).items():
        law = optimizer.readout().balances[name]
        scale = float(law.initial.abs().max()) + largest(pairs)
        assert law.closed, law.reason
        assert float(law.residual.abs().max()) <= 1e-10 * scale
        assert float(law.rounding.abs().max()) <= 1e-12 * scale
        assert float(law.discrete.forced.abs().max()) > 1e-4  # there is something to predict
        assert float((law.charge - law.initial).abs().max()) > 1e-2
        assert float(law.relative_defect.max()) < 1e-12
        assert law.growth is None


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.05},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        {"lr": 1e-3, "momentum": 0.5, "maximize": True, "weight_decay": 0.01},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_law_with_other_options_of_sgd(options: dict[str, Any]) -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), symmetries=case.balances, **options)
    train(model, optimizer, range(40))
    for law in optimizer.readout().balances.values():
        scale = float(law.charge.abs().max() + law.initial.abs().max())
        assert law.closed
        assert float(law.residual.abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("kind", [nperf.AdamW, nperf.Adam])
@each_case
def test_the_identity_of_adam(case: Case, kind: Any) -> None:
    model = make(case)
    n_steps = 300 if case is CASES["grouped"] and kind is nperf.AdamW else 30
    optimizer = kind(model.named_parameters(), lr=0.01, weight_decay=0.05, symmetries=case.balances)
    train(model, optimizer, range(n_steps))
    for name, pairs in case.by_hand(detached(model)).items():
        law = optimizer.readout().balances[name]
        scale = float(law.initial.abs().max()) + largest(pairs)
        assert float(law.rounding.abs().max()) <= 1e-11 * scale
        assert law.growth is not None
        assert law.transport is not None
        if kind is nperf.AdamW:
            decay = (1.0 - 0.01 * 0.05) ** (2 * n_steps)
            split = decay * law.initial + law.growth + law.transport
            assert torch.allclose(split, law.charge, rtol=0, atol=1e-11 * scale)


def diagonal_rescales() -> list[Rescale]:
    return [Rescale("rows of q, k", both("q"), both("k")), Rescale("rows of v, o", both("v"), O)]


@pytest.mark.parametrize("kind", [nperf.SGD, nperf.AdamW])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_diagonal_is_the_rescale_of_the_same_parts(kind: Any, backend: str) -> None:
    case = CASES["plain"]
    model = make(case)
    options = {"momentum": 0.9} if kind is nperf.SGD else {}
    optimizer = kind(
        model.named_parameters(),
        lr=0.01,
        weight_decay=0.05,
        backend=backend,
        symmetries=[*case.balances, *diagonal_rescales()],
        **options,
    )
    train(model, optimizer, range(30))
    readout = optimizer.readout()
    assert list(readout) == ["rows of q, k", "rows of v, o"]
    for name, balance in readout.balances.items():
        rows = readout[f"rows of {name}"]

        def diagonal(x: Tensor) -> Tensor:
            return x.diagonal(dim1=-2, dim2=-1).flatten()

        for quantity in ("charge", "initial", "defect"):
            assert torch.allclose(diagonal(getattr(balance, quantity)), getattr(rows, quantity), rtol=1e-12, atol=1e-14)
        for law in ("discrete", "flow"):
            for source in ("free", "forced", "defect", "budget"):
                mine, theirs = (getattr(getattr(x, law), source) for x in (balance, rows))
                assert torch.allclose(diagonal(mine), theirs, rtol=1e-11, atol=1e-14), (law, source)


def test_with_matrices_alone() -> None:
    """Parameters take the same steps, and the rest of a readout is empty."""
    case = CASES["plain"]
    nets = [make(case), make(case)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [
        nperf.SGD(nets[0].named_parameters(), symmetries=case.balances, **options),
        nperf.SGD(nets[1].named_parameters(), **options),
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(5))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    readout = optimizers[0].readout()
    assert not readout
    assert list(readout.balances) == ["q, k", "v, o"]
    assert {"q, k/abs_charge", "v, o/off_diagonal", "v, o/residual"} <= {
        key.replace("_ ", ", ") for key in readout.scalars()
    }
    with pytest.raises(KeyError, match=r"readout\.balances"):
        readout["q, k"]
    assert {row.name for row in readout.table().rows} == {"q, k", "v, o"}
    for law in readout.balances.values():
        assert law.name in str(readout)
        assert law.name in readout._repr_html_()
        assert law.name in repr(readout)
    assert "nothing is measured" not in str(readout)


def test_eigenvalues_trace_and_share_off_the_diagonal() -> None:
    case = CASES["plain"]
    model = make(case)
    law = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=case.balances).readout().balances["q, k"]
    assert law.eigenvalues.shape == (2, HEAD)
    for block, x in enumerate(law.charge):
        assert torch.allclose(law.eigenvalues[block], torch.linalg.eigvalsh(x))
        assert torch.allclose(law.trace[block], sum(x[i, i] for i in range(HEAD)))
        off = sum(float(x[i, j]) ** 2 for i in range(HEAD) for j in range(HEAD) if i != j)
        assert float(law.off_diagonal[block]) == pytest.approx((off / float(x.square().sum())) ** 0.5)
    assert torch.equal(law.predicted_eigenvalues, law.eigenvalues)
    assert "2 × [3, 3]" in repr(law)
    assert str(law).startswith("q, k: 2 blocks of 3 units, |eigenvalue| ")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_probe_measures_any_optimizer(backend: str) -> None:
    case = CASES["grouped"]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ]
    for kind, options in kinds:
        model = make(case)
        optimizer = kind(model.parameters(), **options)
        probe = nperf.Probe(optimizer, case.balances, model.named_parameters(), backend=backend)
        train(model, optimizer, range(60))
        for name, pairs in case.by_hand(detached(model)).items():
            law = probe.readout().balances[name]
            scale = float(law.initial.abs().max()) + largest(pairs)
            assert torch.allclose(law.charge, plain(pairs), rtol=0, atol=1e-14 * scale)
            assert float(law.rounding.abs().max()) <= 1e-12 * scale
            if kind is torch.optim.SGD:  # whose updates are decaying sums of gradients
                assert law.closed
                assert float(law.residual.abs().max()) <= 1e-11 * scale


def read_all(optimizer: Any) -> list[Tensor]:
    return [x for law in optimizer.readout().balances.values() for x in (law._matrices, law.relative_defect)]


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [nperf.SGD, nperf.AdamW])
def test_a_checkpoint_resumes_exactly(way: str, kind: Any) -> None:
    case = CASES["plain"]
    options = {"momentum": 0.9} if kind is nperf.SGD else {}

    def new(model: nn.Module) -> Any:
        return kind(model.named_parameters(), lr=0.01, weight_decay=0.1, symmetries=case.balances, **options)

    through, model = make(case), make(case)
    straight, optimizer = new(through), new(model)
    train(through, straight, range(12))
    train(model, optimizer, range(7))
    if way in ("deepcopy", "pickle"):
        model, optimizer = (
            copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
        )
    else:
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        model = make(case)
        optimizer = new(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(read_all(straight), read_all(optimizer), strict=True))


def test_a_damaged_checkpoint_is_refused() -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=case.balances)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["measurement"]["tensors"][0]["gram_state"] = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'gram_state"\] must have shape'):
        optimizer.load_state_dict(saved)
    del saved["measurement"]["tensors"][0]["gram_defect"]
    saved["measurement"]["tensors"][0]["gram_state"] = optimizer.state_dict()["measurement"]["tensors"][0]["gram_state"]
    with pytest.raises(ValueError, match=r'gram_defect"\] is missing'):
        optimizer.load_state_dict(saved)


def test_changes_between_steps_are_defect() -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, symmetries=case.balances)
    train(model, optimizer, range(10))
    with torch.no_grad():
        model.get_parameter("q.weight").mul_(1.5)
    train(model, optimizer, range(10, 20))
    readout = optimizer.readout()
    changed, other = readout.balances["q, k"], readout.balances["v, o"]
    assert "q.weight was changed outside step()" in changed.reason
    assert float(changed.discrete.defect.abs().max()) > 1e-2
    assert float(changed.rounding.abs().max()) <= 1e-12
    assert other.closed
    assert float(other.residual.abs().max()) <= 1e-12


def test_parts_in_several_parameter_groups() -> None:
    """No decay on biases, as is usual: the law is open, and the identity holds."""
    case = CASES["plain"]
    model = make(case)
    named = list(model.named_parameters())
    groups = [
        {"params": [x for x in named if x[0].endswith("weight")], "weight_decay": 0.1},
        {"params": [x for x in named if not x[0].endswith("weight")], "weight_decay": 0.0},
    ]
    optimizer = nperf.SGD(groups, lr=0.1, momentum=0.9, symmetries=case.balances)
    train(model, optimizer, range(20))
    law = optimizer.readout().balances["q, k"]
    assert "different weight_decay" in law.reason
    assert float(law.rounding.abs().max()) <= 1e-12
    assert torch.allclose(law.charge, plain(case.by_hand(detached(model))["q, k"]), rtol=0, atol=1e-14)


def test_without_a_gradient() -> None:
    case = CASES["linear pair"]
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, symmetries=case.balances)
    train(model, optimizer, range(3))
    before = optimizer.readout().balances["pair"]
    optimizer.zero_grad()
    optimizer.step()  # of none: nothing moves, and nothing is lost
    still = optimizer.readout().balances["pair"]
    assert torch.equal(still.discrete.budget, before.discrete.budget)
    assert torch.equal(still.defect, torch.zeros_like(still.defect))
    loss_of(model, 0).backward()
    model.get_parameter("0.bias").grad = None
    optimizer.step()
    law = optimizer.readout().balances["pair"]
    assert "0.bias had no gradient" in law.reason
    assert law.rounding.isnan().all()
    assert law.charge.isfinite().all()
    optimizer.reset_measurement()
    train(model, optimizer, range(3))
    law = optimizer.readout().balances["pair"]
    assert law.closed
    assert float(law.residual.abs().max()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_dtypes_whatever_torchs_precision(dtype: torch.dtype) -> None:
    case = CASES["plain"]
    found = []
    for precision in ("highest", "medium"):
        model = make(case, dtype)
        optimizer = nperf.SGD(model.named_parameters(), lr=0.01, momentum=0.9, symmetries=case.balances)
        train(model, optimizer, range(4))
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            optimizer.zero_grad()
            torch.manual_seed(0)
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
            found.append(optimizer.readout().balances["q, k"])
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
        pairs = case.by_hand(detached(model))["q, k"]
        expected = plain([(a.double(), b.double()) for a, b in pairs])
        assert torch.allclose(found[-1].charge, expected, rtol=0, atol=1e-14 * largest(pairs))
        epsilon = torch.finfo(dtype).eps
        assert float(found[-1].rounding.abs().max()) <= 10 * epsilon * largest(pairs)
    assert torch.equal(found[0].discrete.budget, found[1].discrete.budget)


class TestConstraints:
    @each_case
    def test_hold(self, case: Case) -> None:
        model = make(case)
        found = nperf.check_constraints(model, lambda: loss_of(model, 0), case.balances, progress=False)
        assert not found.failed, found
        for balance in case.balances:
            n_entries = plain(case.by_hand(detached(model))[balance.name]).numel()
            assert found[balance.name].sizes["group"] == n_entries
            assert found.worst(balance.name, "gradient", "no_eps") < 1e-12
            assert found.worst(balance.name, "hessian", "no_eps") < 1e-11

    def test_estimates_are_those_of_every_product(self) -> None:
        """Of a pair with a nonlinearity, which breaks the law: estimates, and exact norms."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(DIM, 3), nn.Tanh(), nn.Linear(3, N_OUT), Mean()).double()
        balance = Balance("broken", both("0"), [Part("2.weight", 1)])
        found = [
            nperf.check_constraints(
                model, lambda: loss_of(model, 0), [balance], probes=64, float64=False, exact=exact, progress=False
            )["broken"]
            for exact in (False, True)
        ]
        ratio = (found[0]["hessian"] / found[1]["hessian"]).to_numpy()
        assert (abs(ratio - 1) < 0.5).all()
        assert float(found[1]["hessian_relative"].min()) > 1e-6

    def test_only_the_diagonal_survives_a_relu(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(DIM, 3), nn.ReLU(), nn.Linear(3, N_OUT), Mean()).double()
        symmetries = [
            Balance("pair", both("0"), [Part("2.weight", 1)]),
            Rescale("units", both("0"), [Part("2.weight", 1)]),
        ]
        found = nperf.check_constraints(model, lambda: loss_of(model, 0), symmetries, progress=False)
        assert found.failed == ("pair",)
        defects = found["pair"]["gradient_relative"].sel(stage="no_eps").to_numpy().reshape(3, 3)
        assert defects.diagonal().max() < 1e-12
        assert defects.max() > 1e-3


class TestData:
    def test_out_and_in_again(self) -> None:
        for case in CASES.values():
            assert from_json(to_json(case.balances)) == tuple(case.balances)
            assert pickle.loads(pickle.dumps(case.balances)) == case.balances
        balance = CASES["grouped"].balances[0]
        assert eval(repr(balance)) == balance
        assert balance != Balance("q, k", balance.inward, balance.outward)
        assert balance.named("other").content == balance.content
        assert balance.named("other").size == HEAD
        assert Balance(None, both("attn.q"), both("attn.k")).name == "attn.q<->k"

    @pytest.mark.parametrize(
        ("size", "error", "words"),
        [
            (0, ValueError, "size must be at least 1"),
            (2.5, TypeError, "must be an integer"),
            (True, TypeError, "integer"),
        ],
    )
    def test_sizes_that_are_none(self, size: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            Balance("pair", [Part("a", 0)], [Part("b", 1)], size=size)

    def test_weights_are_refused(self) -> None:
        with pytest.raises(ValueError, match="weight"):
            Balance("pair", [Part("a", 0)], [Part("b", 1, weight=2)])
        with pytest.raises(ValueError, match="negative weight"):
            Balance("pair", [Part("a", 0, weight=-1)], [Part("b", 1)])
        with pytest.raises(ValueError, match="offset"):
            Balance("pair", [Part("a", 0, offset=1.0)], [Part("b", 1)])

    def test_what_does_not_fit_a_model(self) -> None:
        shapes = {"a": (6, 5), "b": (4, 6), "c": (4, 5)}
        with pytest.raises(ValueError, match="blocks of size 4"):
            validate([Balance("pair", [Part("a", 0)], [Part("b", 1)], size=4)], shapes)
        with pytest.raises(ValueError, match="same number of groups"):
            validate([Balance("pair", [Part("a", 0)], [Part("c", 1)])], shapes)
        with pytest.raises(ValueError, match="twice"):
            validate([Balance("pair", [Part("a", 0), Part("a", 0)], [Part("b", 1)])], shapes)
        with pytest.raises(ValueError, match="no parameter is named"):
            validate([Balance("pair", [Part("d", 0)], [Part("b", 1)])], shapes)

    def test_in_words(self) -> None:
        text = Balance("pair", both("fc1"), [Part("fc2.weight", 1)]).explain()
        assert "X = ⟨fc1.weight[i], fc1.weight[j]⟩ + ⟨fc1.bias[i], fc1.bias[j]⟩" in text
        assert "− ⟨fc2.weight[:,i], fc2.weight[:,j]⟩, symmetric" in text
        assert "⟨∇fc1.weight[i], fc1.weight[j]⟩" in text
        assert "⟨fc2.weight[:,i], ∇fc2.weight[:,j]⟩ = 0" in text
        assert max(map(len, text.splitlines())) <= 110


class TestSearch:
    @pytest.mark.parametrize("name", ["plain", "grouped", "by heads", "linear pair"])
    def test_claims_what_is_written_by_hand(self, name: str) -> None:
        case = CASES[name]
        model = make(case)
        x = torch.randn(5, 7, DIM, dtype=torch.float64)
        found = nperf.find_symmetries(model, x, matrix=True, progress=False)
        balances = [symmetry for symmetry in found if isinstance(symmetry, Balance)]
        params = detached(model)
        charges = [balance.charge(params) for balance in case.balances]
        assert len(balances) == len(charges)
        for balance in balances:  # the signs of sides are free, and so is which bias is listed
            own = balance.charge(params)
            assert any(own.shape == x.shape and torch.allclose(own.abs(), x.abs()) for x in charges), balance
            assert found.defects[balance.name] < 1e-9
            assert "claimed whole" in found.meanings[balance.name]
        diagonals = {tuple(part.parameter for part in balance.parts) for balance in balances}
        assert not [s for s in found if isinstance(s, Rescale) and tuple(p.parameter for p in s.parts) in diagonals]

    def test_claims_none_through_a_relu_or_when_not_asked(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(DIM, 3), nn.ReLU(), nn.Linear(3, N_OUT), Mean()).double()
        x = torch.randn(5, 7, DIM, dtype=torch.float64)
        found = nperf.find_symmetries(model, x, matrix=True, progress=False)
        assert [type(symmetry) for symmetry in found if symmetry.kind != "translation"] == [Rescale]
        pair = nperf.find_symmetries(make(CASES["linear pair"]), x, progress=False)
        assert not [symmetry for symmetry in pair if isinstance(symmetry, Balance)]
        with pytest.raises(ValueError, match="verify"):
            nperf.find_symmetries(model, x, matrix=True, verify=False)


def test_the_cost_on_paper() -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=case.balances)
    train(model, optimizer, range(1))
    (meter,) = optimizer._prepare()
    found, without = nperf.cost(model, case.balances), nperf.cost(model)
    assert found.state == sum(x.numel() * x.element_size() for x in meter.tensors())
    assert without.products == 0
    # ⟨W, g⟩ and ⟨u, u⟩: q, k and v [6, 7] with their biases, o [6, 6]; n multiplications for each of their elements.
    assert found.products == 2 * 2 * HEAD * (3 * 6 * 7 + 6 * 6)
    assert found.measuring > without.measuring
    assert "GFLOP" in str(found)
    assert "GFLOP" not in str(without)


class TestWhatTheHostDoesNotRead:
    """Learning rates, scales and skips that lie on a device; here the CPU is in its place."""

    def prepared(self, kind: Any, **inputs: Any) -> list[Tensor]:
        """What the second step leaves, with inputs of Grams.prepare replaced."""
        case = CASES["plain"]
        model = make(case)
        options = {"momentum": 0.9} if kind is nperf.SGD else {}
        optimizer = kind(model.named_parameters(), lr=0.01, weight_decay=0.1, symmetries=case.balances, **options)
        train(model, optimizer, range(1))
        optimizer.zero_grad()
        loss_of(model, 1).backward()
        (meter,) = optimizer._prepare()
        buffers = optimizer._gather()
        optimizer._measuring.options.read(optimizer.param_groups)
        grads = [p.grad for p in model.parameters()]
        scale = inputs.pop("grad_scale", None)
        if scale is not None:
            grads = [g * scale for g in grads]
        ages = [1] * len(grads)
        known: dict[str, Any] = {"lrs": [None], "grad_scale": scale, "found_inf": None}
        with torch.no_grad():
            arguments = grads, buffers.here, optimizer._measuring.options.options, ages
            calls = meter.grams.prepare(*arguments, **(known | inputs))
            for call in calls:
                call()
        return [x.clone() for x in meter.grams.tensors()]

    @pytest.mark.parametrize("kind", [nperf.SGD, nperf.AdamW])
    def test_is_read_where_it_is(self, kind: Any) -> None:
        expected, before = self.prepared(kind), self.prepared(kind, found_inf=torch.tensor(1.0))
        assert not any(torch.equal(a, b) for a, b in zip(expected, before, strict=True))
        for inputs in (
            {"lrs": [torch.tensor(0.01)]},
            {"lrs": [torch.tensor([0.01], dtype=torch.float64)], "found_inf": torch.tensor(0.0)},
            {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)},
        ):
            found = self.prepared(kind, **inputs)
            bound = 1e-7 if len(inputs) == 1 else 1e-14  # float32 has the number 0.01 to 2e-8
            assert all(torch.allclose(a, b, rtol=bound, atol=bound) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("skipped", [False, True])
    def test_a_gradient_scalers_step(self, skipped: bool) -> None:
        case = CASES["plain"]
        readouts = []
        for scale in (1.0, 16.0):
            model = make(case)
            optimizer: Any = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=case.balances)
            train(model, optimizer, range(2))
            (loss_of(model, 2) * scale).backward()
            optimizer.zero_grad()
            (loss_of(model, 2) * scale).backward()
            if scale != 1.0 or skipped:
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.found_inf = torch.tensor(float(skipped))
            optimizer.step()
            readouts.append(read_all(optimizer))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*readouts, strict=True))


def test_graph_capture_is_refused() -> None:
    from noetherperf.engines import OnDevice

    case = CASES["plain"]
    model = make(case)
    optimizer = nperf.AdamW(model.named_parameters(), symmetries=case.balances)
    train(model, optimizer, range(1))
    (meter,) = optimizer._prepare()
    n, buffers = len(list(model.parameters())), optimizer._gather()
    counts = OnDevice([None], counts=torch.ones(n))
    arguments = [None] * n, [None] * n, buffers.here, optimizer._measuring.options.options, [1] * n
    with pytest.raises(RuntimeError, match="capturable"):
        meter.prepare(*arguments, counts)


class Positions(nn.Module):
    """One head of four units, whose queries and keys are rotated by position, or divided by their norm."""

    def __init__(self, rotates: bool) -> None:
        super().__init__()
        self.rotates = rotates
        self.q, self.k, self.v = (nn.Linear(DIM, 4, bias=False) for _ in range(3))
        self.o, self.head = nn.Linear(4, DIM, bias=False), nn.Linear(DIM, N_OUT)

    def placed(self, x: Tensor) -> Tensor:
        if not self.rotates:
            length: Tensor = x.norm(dim=-1, keepdim=True)
            return x / length
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = softmax(self.placed(self.q(x)) @ self.placed(self.k(x)).mT, -1) @ self.v(x)
        logits: Tensor = self.head(x + self.o(mixed)).mean(-2)
        return logits


@pytest.mark.parametrize("rotates", [True, False], ids=["rotary", "qk-norm"])
def test_no_matrix_through_rotary_positions_or_a_norm_of_queries(rotates: bool) -> None:
    torch.manual_seed(0)
    model = Positions(rotates).double()
    x = torch.randn(5, 7, DIM, dtype=torch.float64)
    found = nperf.find_symmetries(model, x, matrix=True, progress=False)
    balances = [symmetry for symmetry in found if isinstance(symmetry, Balance)]
    assert [[part.parameter for part in balance.parts] for balance in balances] == [["v.weight", "o.weight"]]
    claim = Balance("q, k", [Part("q.weight", 0)], [Part("k.weight", 0)])
    checked = nperf.check_constraints(model, lambda: loss_of(model, 0), [claim], hessian=False, progress=False)
    assert checked.failed == ("q, k",)


SPECTRA = ("eigenvalues", "predicted eigenvalues", "norms")


class TestRecords:
    @pytest.mark.parametrize("with_groups", [False, True])
    def test_spectra_always_and_matrices_when_asked(self, with_groups: bool, tmp_path: Path) -> None:
        case = CASES["plain"]
        model = make(case)
        symmetries = [*case.balances, *(diagonal_rescales() if with_groups else [])]
        optimizer = nperf.AdamW(model.named_parameters(), lr=0.01, symmetries=symmetries)
        readouts = [optimizer.readout().balances["q, k"]]
        for name, matrices in (("spectra.zarr", False), ("all.zarr", True)):
            with nperf.Recorder(optimizer, tmp_path / name, matrices=matrices):
                train(model, optimizer, range(2))
            record = nperf.open_record(tmp_path / name)
            assert len(record) == 2 * with_groups
            own = {f"{law}: {what}" for law in ("q, k", "v, o") for what in SPECTRA}
            more = {f"{law}: {what}" for law in ("q, k", "v, o") for what in ("charge", "predicted charge")}
            assert set(record.probes) == own | (more if matrices else set())
            found = torch.from_numpy(record.probes["q, k: eigenvalues"].to_numpy())
            readouts.append(optimizer.readout().balances["q, k"])
            assert torch.equal(found[[0, -1]], torch.stack([law.eigenvalues.flatten() for law in readouts[-2:]]))
        last = torch.from_numpy(record.probes["q, k: predicted charge"].to_numpy())[-1]
        assert torch.equal(last, readouts[-1].discrete.total.flatten())

    def test_goes_on(self, tmp_path: Path) -> None:
        case = CASES["plain"]
        model = make(case)
        optimizer = nperf.SGD(model.named_parameters(), lr=0.01, symmetries=case.balances)
        for steps in (range(2), range(2, 4)):
            with nperf.Recorder(optimizer, tmp_path / "r.zarr", exists="resume", probes={"one": lambda: 1.0}):
                train(model, optimizer, steps)
        record = nperf.open_record(tmp_path / "r.zarr")
        assert record.steps.tolist() == [0, 1, 2, 3, 4]
        assert record.probes["v, o: eigenvalues"].shape == (5, 2 * HEAD)
        assert record.probes["one"].to_numpy().tolist() == [1.0] * 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_of_transformers() -> None:
    """GPT-2's fused weights lie [in, out]; Llama's rotary positions leave the values, with two heads for each key."""
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {"vocab_size": 50, "attn_implementation": "eager", "use_cache": False}
    gpt2 = {"n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = {"hidden_size": 24, "intermediate_size": 20, **heads}
    torch.manual_seed(0)
    for model, expected in (
        (
            transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **options)),
            {"c_attn[0:24]<->c_attn[24:48]": 8, "c_attn[48:]<->c_proj": 8},
        ),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **options)), {"v_proj<->o_proj": 6}),
    ):
        found = nperf.find_symmetries(model, torch.randint(50, (2, 8)), matrix=True, progress=False)
        sizes = {s.name.rpartition("attn.")[2]: s.size for s in found if isinstance(s, Balance)}
        assert sizes == expected
