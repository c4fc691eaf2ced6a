"""Norms that count from an offset, as the gain 1 + w: their laws against plain loops, and all that reads them."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engines import ENGINES, HOST
from test_laws_end_to_end import RUNS, Run, size, worst_residual, worst_rounding
from test_rules import Lion
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import OnSphere

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Scale, Symmetry, Translation
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.sgd import SGD, Hyper

BACKENDS = [name for name, status in nperf.backends().items() if status == "available" and name != "auto"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Gains(nn.Module):
    """A normalisation that multiplies by 1 + w, and rows of which only the direction of row + 0.7 counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain, self.shift = nn.Parameter(0.3 * torch.randn(6)), nn.Parameter(0.3 * torch.randn(6))
        self.a, self.o = nn.Linear(6, 5), nn.Linear(5, 4)
        self.turned = nn.Parameter(torch.randn(5, 7))
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = (1 + self.gain) * x / x.norm(dim=-1, keepdim=True) + self.shift
        rows = self.turned + 0.7
        return self.o(torch.tanh(self.a(x) + y @ (rows / rows.norm(dim=1, keepdim=True)).T))  # type: ignore[no-any-return]


EXACT: list[Symmetry] = [
    Rescale("gain->a", [Part("gain", 0, offset=1.0), Part("shift", 0)], [Part("a.weight", 1)]),
    Scale("turned", [Part("turned", 0, offset=0.7)]),
    Translation("o", [Part("o.weight", 1)]),
]
BROKEN: list[Symmetry] = [
    Norm("whole", [Part("turned", None, offset=-2.0)]),
    Norm("halves", [Part("turned", 0, fold=5, offset=0.25, weight=2.0), Part("gain", None, offset=1.0)]),
]
SYMMETRIES = [*EXACT, *BROKEN]


def backward(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    p = next(net.parameters())
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64).to(p.device, p.dtype) for n in (6, 7))
    net.zero_grad()
    cross_entropy(net(x, y), torch.arange(8, device=p.device) % 4).backward()


def made(backend: str) -> nn.Module:
    return Gains().to("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


def train(net: nn.Module, optimizer: Any, run: Run, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group.update(run.change(step))
        backward(net, step)
        optimizer.step()


def counted(part: Part, x: Tensor) -> Tensor:
    """θ + offset of each group, [n groups, elements]."""
    x = x.detach().double().cpu() + part.offset
    return (
        x.reshape(1, -1) if part.axis is None else x.movedim(part.axis, 0).reshape(x.shape[part.axis] // part.fold, -1)
    )


def charge(symmetry: Symmetry, values: Mapping[str, Tensor]) -> Tensor:
    power = 1 if symmetry.law == "translation" else 2
    return torch.stack([p.weight * (counted(p, values[p.parameter]) ** power).sum(1) for p in symmetry.parts]).sum(0)


# ---- the laws -------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_law_closes(backend: str, run: Run) -> None:
    """Free + forced is the charge where the symmetry holds, and the budget always is."""
    net = made(backend)
    optimizer = nperf.SGD(net.named_parameters(), symmetries=SYMMETRIES, backend=backend, **run.options)
    initial = {name: p.detach().clone() for name, p in net.named_parameters()}
    begun = 0
    for step in (1, 40):
        train(net, optimizer, run, range(begun, step))
        begun = step
        readout = optimizer.readout()
        now = {name: p.detach() for name, p in net.named_parameters()}
        for s in SYMMETRIES:
            law = readout[s.name]
            assert law.closed == s.claimed
            assert (law.charge - charge(s, now)).abs().max() <= 1e-13 * size(law)
            assert (law.charge - s.charge(now).cpu()).abs().max() <= 1e-13 * size(law)
            assert (law.initial - charge(s, initial)).abs().max() <= 1e-13 * size(law)
        assert worst_rounding(readout, SYMMETRIES) <= 1e-12
        assert worst_residual(readout, EXACT) <= 1e-10
    if run.options["lr"] > 1e-3:
        assert worst_residual(readout, BROKEN) >= 1e-5, "what is no symmetry has no law"


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "weight_decay": 0.2},
        {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8},
        {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8, "dampening": 0.4},
        {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8, "nesterov": True},
    ],
)
def test_each_source_by_a_plain_loop(options: dict[str, Any], maximize: bool) -> None:
    """Gradients of no symmetry: x' of |θ + c|² with its sources one by one, C = c⟨θ + c, 1⟩ as measured."""
    lr, decay, beta = options["lr"], options["weight_decay"], options.get("momentum", 0.0)
    tau, nesterov, c = options.get("dampening", 0.0), options.get("nesterov", False), 1.5
    rng = np.random.default_rng(0)
    p = nn.Parameter(torch.from_numpy(rng.normal(size=(3, 4))))
    optimizer = nperf.SGD([("p", p)], maximize=maximize, symmetries=[Norm("n", [Part("p", 0, offset=c)])], **options)
    theta, v = p.detach().numpy().copy(), np.zeros((3, 4))
    x0 = ((theta + c) ** 2).sum(1)
    parts = {name: np.zeros((2, 3)) for name in ("free", "forced", "defect")}  # (x, y) by source
    parts["free"][0] = x0
    for step in range(30):
        g = rng.normal(size=(3, 4))
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        s = -1.0 if maximize else 1.0
        d = s * g + decay * theta
        a = 1.0 if step == 0 else 1.0 - tau
        v = beta * v + a * d if beta else v
        u = d if not beta else d + beta * v if nesterov else v
        pulled, delta = -decay * c * (theta + c).sum(1), s * (g * (theta + c)).sum(1)
        sources = {
            "free": (0.0, 0.0, 0.0),
            "forced": (pulled, (u * u).sum(1), (u * v).sum(1)),
            "defect": (delta, 0.0, 0.0),
        }
        for name, (along, uu, uv) in sources.items():
            x, y = parts[name]
            of_d = decay * x + along  # its share of ⟨θ + c, d⟩
            of_v = beta * y + a * of_d
            m = of_d if not beta else of_d + beta * of_v if nesterov else of_v
            parts[name] = np.array([x - 2 * lr * m + lr * lr * uu, of_v - lr * uv if beta else y])
        theta = theta - lr * u
    law = optimizer.readout()["n"]
    terms = sum(np.abs(x[0]) for x in parts.values())
    assert np.abs(((theta + c) ** 2).sum(1) - sum(x[0] for x in parts.values())).max() <= 1e-12 * terms.max()
    for name, (x, _) in parts.items():
        assert np.abs(getattr(law.discrete, name).numpy() - x).max() <= 1e-11 * terms.max(), name
    assert np.abs(law.rounding.numpy()).max() <= 1e-13 * terms.max()


ROWS = [Scale("rows", [Part("weight", 0, offset=0.7)])]
#: Preconditioners that are one number, and decay that goes through no buffer.
CONSTANT: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e13, "eps": 1e14, "weight_decay": 1e-14, "betas": (0.9, 0.99)}),
    "own AdamW": (nperf.AdamW, {"lr": 1e13, "eps": 1e14, "weight_decay": 1e-14, "betas": (0.9, 0.99)}),
}


@pytest.mark.parametrize("warm", [0, 7])
@pytest.mark.parametrize("name", CONSTANT)
def test_the_carried_law_is_exact_where_the_preconditioner_is_one_number(name: str, warm: int) -> None:
    kind, options = CONSTANT[name]
    net = OnSphere(offset=0.7)
    own = {"symmetries": ROWS} if kind is nperf.AdamW else {}
    optimizer = kind(net.named_parameters(), **options, **own)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for batch in range(warm):
        net.gradients(batch)
        optimizer.step()
    if own:
        optimizer.reset_measurement()
    measured = optimizer if own else nperf.Probe(optimizer, ROWS, net.named_parameters())
    for batch in range(warm, 40):
        net.gradients(batch)
        optimizer.step()
        schedule.step()
    law = measured.readout()["rows"]
    terms = law.discrete.free.abs() + law.discrete.forced.abs()
    assert law.closed
    assert (law.residual.abs() <= 1e-11 * terms).all()
    assert (law.rounding.abs() <= 1e-12 * terms).all()
    assert (law.discrete.forced.abs() > 1e-2 * terms).all()


def test_adamw_by_a_plain_loop() -> None:
    """Free, forced, growth and transport of θ̂ = θ + c, with the moments that the steps had."""
    lr, decay, beta, c, n = 3e-3, 0.5, 0.9, 1.0, 25
    r = 1.0 - lr * decay
    net = Gains()
    optimizer = nperf.AdamW(net.named_parameters(), lr=lr, weight_decay=decay, symmetries=SYMMETRIES)
    forced, w, growth, transport = np.zeros((4, 6))
    initial = (net.gain.detach().numpy() + c) ** 2
    for k in range(1, n + 1):
        backward(net, k)
        before = net.gain.detach().numpy() + c
        optimizer.step()
        u = (r * (before - c) - net.gain.detach().numpy()) / lr
        after = r * before + (1 - r) * c - lr * u
        growth = r * r * growth + lr * lr * u * u
        transport = after * after - r**2 * (before * before) + r * r * transport - lr * lr * u * u
        forced = r * r * forced - 2 * lr * r * w + lr * lr * u * u + 2 * (1 - r) * c * after - (1 - r) ** 2 * c * c
        w = beta * (1 - beta**k) / (1 - beta ** (k + 1)) * (r * w - lr * u * u + (1 - r) * c * u)
    readout = optimizer.readout()
    law, other = readout["gain->a"], rest(n)
    assert law.growth is not None
    assert law.transport is not None
    assert other.growth is not None
    assert other.transport is not None
    np.testing.assert_allclose(law.discrete.free - other.discrete.free, r ** (2 * n) * initial, rtol=1e-12)
    np.testing.assert_allclose(law.discrete.forced - other.discrete.forced, forced, rtol=1e-9)
    np.testing.assert_allclose(law.growth - other.growth, growth, rtol=1e-9)
    np.testing.assert_allclose(law.transport - other.transport, transport, rtol=1e-9)
    assert worst_rounding(readout, SYMMETRIES) <= 1e-12


def rest(n_steps: int) -> nperf.ChargeReadout:
    """What the other parts of gain->a contribute, in the same training."""
    net, (rescale, *_) = Gains(), EXACT
    others = Norm("others", [part for part in rescale.parts if not part.offset])
    optimizer = nperf.AdamW(net.named_parameters(), lr=3e-3, weight_decay=0.5, symmetries=[others])
    for k in range(1, n_steps + 1):
        backward(net, k)
        optimizer.step()
    return optimizer.readout()["others"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nperf.SGD, {}),
        (nperf.SGD, {"momentum": 0.8}),
        (nperf.SGD, {"momentum": 0.8, "nesterov": True}),
        (nperf.AdamW, {"betas": (0.0, 0.9)}),
    ],
    ids=["plain", "momentum", "Nesterov", "AdamW"],
)
def test_the_flow_law_nears_the_discrete_law_as_steps_shrink(kind: Any, options: dict[str, Any]) -> None:
    """Decay alone, of a tensor that starts where it counts most: twice the steps of half the size, half the error."""
    errors, time = [], 4.0 * (1.0 - options.get("momentum", 0.0))
    for n in (400, 800):
        p = nn.Parameter(torch.linspace(-1, 0, 4, dtype=torch.float64)[None])
        optimizer = kind(
            [("p", p)], lr=time / n, weight_decay=0.5, symmetries=[Norm("n", [Part("p", 0, offset=1.0)])], **options
        )
        for _ in range(n):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        law = optimizer.readout()["n"]
        assert (law.charge - law.initial).abs().min() > 0.1
        errors.append(float((law.flow.total - law.discrete.total).abs().max()))
    assert errors[0] < 0.2
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nperf.SGD, {"weight_decay": 0.1}),
        (nperf.SGD, {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.2}),
        (nperf.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
        (nperf.AdamW, {"weight_decay": 0.1}),
    ],
    ids=["plain", "momentum", "Nesterov", "AdamW"],
)
def test_the_angle_of_a_step(kind: Any, options: dict[str, Any]) -> None:
    net = Gains()
    optimizer = kind(net.named_parameters(), lr=0.05, symmetries=SYMMETRIES, **options)
    for step in range(4):
        backward(net, step)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.step()
    after = dict(net.named_parameters())
    readout = optimizer.readout()
    for s in (EXACT[0], EXACT[1], *BROKEN):
        a, b = (torch.cat([counted(part, values[part.parameter]) for part in s.parts], 1) for values in (before, after))
        angle = torch.acos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
        torch.testing.assert_close(readout[s.name].angular_update, angle, rtol=1e-6, atol=1e-9)
    decoupled = kind is nperf.AdamW or "momentum" not in options
    if not decoupled:  # else η u is not the whole of the move
        moved = torch.cat(
            [
                before[p.parameter][..., None].reshape(1, -1) - after[p.parameter].detach().reshape(1, -1)
                for p in BROKEN[0].parts
            ],
            1,
        )
        expected = moved.norm(dim=1) / charge(BROKEN[0], after).sqrt()
        torch.testing.assert_close(readout["whole"].relative_update, expected, rtol=1e-9, atol=0.0)
    rate = 0.05 / readout["turned"].charge ** (0.5 if kind is nperf.AdamW else 1.0)
    torch.testing.assert_close(readout["turned"].effective_lr, rate, rtol=1e-12, atol=0.0)


# ---- what else reads them -------------------------------------------------------------------------------------------


def test_the_defect_is_the_constraint() -> None:
    net = Gains()
    optimizer = nperf.SGD(net.named_parameters(), lr=0.05, symmetries=SYMMETRIES)
    backward(net, 0)
    g = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    readout = optimizer.readout()
    for s in (*EXACT[:2], *BROKEN):
        terms = [
            p.weight * (counted(p, before[p.parameter]) * (counted(p, g[p.parameter]) - p.offset)).sum(1)
            for p in s.parts
        ]
        torch.testing.assert_close(readout[s.name].defect, torch.stack(terms).sum(0), rtol=1e-10, atol=1e-15)
        assert (readout[s.name].relative_defect.max() < 1e-12) == s.claimed
        sums = [p.weight * counted(p, dict(net.named_parameters())[p.parameter]).sum(1) for p in s.parts]
        torch.testing.assert_close(readout[s.name].moments["sum_p"], torch.stack(sums).sum(0), rtol=1e-12, atol=1e-14)


def test_constraints() -> None:
    """The Hessian's too; and without the offset neither holds."""
    net = Gains()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 7, dtype=torch.float64)

    def closure() -> Tensor:
        return cross_entropy(net(x, y), torch.arange(8) % 4)

    plain = [Scale("no offset", [Part("turned", 0)])]
    for exact in (False, True):
        result = nperf.check_constraints(net, closure, [*EXACT, *plain], exact=exact, progress=False)
        for s in EXACT:
            assert float(result[s.name].gradient_relative.max()) < 1e-12
            assert float(result[s.name].hessian_relative.max()) < 1e-12
        assert float(result["no offset"].gradient_relative.min()) > 1e-6
        assert float(result["no offset"].hessian_relative.min()) > 1e-6


def test_json_and_text() -> None:
    (rescale, *_) = EXACT
    assert nperf.Symmetries.from_json(nperf.Symmetries(SYMMETRIES).to_json()) == nperf.Symmetries(SYMMETRIES)
    assert '"offset": 1.0' in nperf.Symmetries([rescale]).to_json()
    assert "offset" not in nperf.Symmetries([EXACT[2]]).to_json()
    assert eval(repr(rescale.parts[0])) == rescale.parts[0]
    text = " ".join(rescale.explain().split())
    for formula in (
        "1 + gain[i] and shift[i] are multiplied by α, and a.weight[:,i] is divided by α",
        "ψ = (1 + gain[i], shift[i], −a.weight[:,i])",
        "⟨∇gain[i], 1 + gain[i]⟩ + ⟨∇shift[i], shift[i]⟩ − ⟨∇a.weight[:,i], a.weight[:,i]⟩ = 0",
        "H ψ + (∇gain[i], ∇shift[i], −∇a.weight[:,i]) = 0",
        "Q = |1 + gain[i]|² + |shift[i]|² − |a.weight[:,i]|²",
        "weight decay draws gain[i] to 0 and not to −1",
        "C = 1·⟨1 + gain[i], 1⟩",
    ):
        assert formula in text, formula
    budget = " ".join(BROKEN[1].explain().split())
    assert "Q = 2·|0.25 + turned[5i:5+5i]|² + |1 + gain|²" in budget
    assert "θ counts as 0.25 + turned[5i:5+5i] and 1 + gain in ⟨θ, u⟩" in budget
    assert "−2·(0.5 + b)" in Rescale("r", [Part("w", None)], [Part("b", None, offset=0.5, weight=2)]).explain()


@pytest.mark.parametrize("n_steps", [0, 12])
def test_a_checkpoint_goes_on(n_steps: int) -> None:
    """Bit for bit; and one of other offsets is refused."""
    run = RUNS["everything changes"]
    one, two = Gains(), Gains()
    a = nperf.SGD(one.named_parameters(), symmetries=SYMMETRIES, **run.options)
    train(one, a, run, range(n_steps))
    b = nperf.SGD(two.named_parameters(), symmetries=SYMMETRIES, **run.options)
    two.load_state_dict(one.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for net, optimizer in ((one, a), (two, b)):
        train(net, optimizer, run, range(n_steps, n_steps + 10))
    for name, law in a.readout().items():
        for of in ("free", "forced", "defect", "budget"):
            assert torch.equal(getattr(law.discrete, of), getattr(b.readout()[name].discrete, of))
        assert torch.equal(law.flow.total, b.readout()[name].flow.total)
    moved = [Scale("turned", [Part("turned", 0, offset=0.8)]) if s.name == "turned" else s for s in SYMMETRIES]
    other = nperf.SGD(Gains().named_parameters(), lr=0.1, symmetries=moved)
    with pytest.raises(ValueError, match=r"other symmetries \(they differ in: turned\)"):
        other.load_state_dict(a.state_dict())


def test_a_warm_buffer() -> None:
    """Measured from the middle of a run on, from a buffer that is not zero."""
    run = RUNS["Nesterov"]
    net = Gains()
    optimizer = nperf.SGD(net.named_parameters(), symmetries=SYMMETRIES, **run.options)
    train(net, optimizer, run, range(9))
    optimizer.reset_measurement()
    train(net, optimizer, run, range(9, 30))
    readout = optimizer.readout()
    assert worst_rounding(readout, SYMMETRIES) <= 1e-12
    assert worst_residual(readout, EXACT) <= 1e-10


@pytest.mark.parametrize("kind", [nperf.SGD, nperf.AdamW])
def test_changes_between_steps(kind: Any) -> None:
    """What was written outside steps is in the defect, and the budget goes on."""
    net = Gains()
    options = {"momentum": 0.9} if kind is nperf.SGD else {}
    optimizer = kind(net.named_parameters(), lr=0.02, weight_decay=0.1, symmetries=SYMMETRIES, **options)
    run = Run({})
    train(net, optimizer, run, range(5))
    forced = optimizer.readout()["gain->a"].discrete.forced
    with torch.no_grad():
        net.gain.add_(0.5)
    changed = optimizer.readout()
    assert "gain was changed outside step()" in changed["gain->a"].reason
    assert worst_rounding(changed, SYMMETRIES) <= 1e-13
    torch.testing.assert_close(changed["gain->a"].discrete.forced, forced, rtol=1e-12, atol=1e-14)
    train(net, optimizer, run, range(5, 20))
    assert worst_rounding(optimizer.readout(), SYMMETRIES) <= 1e-12


def test_a_record_keeps_them(tmp_path: Path) -> None:
    net = Gains()
    optimizer = nperf.SGD(net.named_parameters(), lr=0.05, momentum=0.9, symmetries=SYMMETRIES)
    with nperf.Recorder(optimizer, tmp_path / "r", every=1):
        for step in range(4):
            backward(net, step)
            optimizer.step()
        charge_now = optimizer.readout()["gain->a"].charge
    record = nperf.open_record(tmp_path / "r")
    assert list(record.symmetries) == SYMMETRIES
    assert np.array_equal(record["gain->a"]["charge"].to_numpy()[-1], charge_now.numpy())


def test_a_rule_without_such_a_law_leaves_it_open() -> None:
    net = Gains()
    optimizer = Lion(net.named_parameters(), symmetries=SYMMETRIES)
    backward(net, 0)
    optimizer.step()
    readout = optimizer.readout()
    assert readout["turned"].reason == "the update rule 'lion' has no law of norms that count from an offset"
    assert readout["o"].closed
    assert worst_rounding_of(readout["turned"]) <= 1e-13
    again = Lion(net.named_parameters(), symmetries=SYMMETRIES)
    again.load_state_dict(optimizer.state_dict())
    assert not again.readout()["turned"].closed


def worst_rounding_of(law: nperf.ChargeReadout) -> float:
    return float((law.rounding.abs() / law.charge.abs()).max())


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Part("w", 0, offset=float("nan")), ValueError, "offset must be finite"),
        (lambda: Part("w", 0, offset="1"), TypeError, "offset must be a number"),  # type: ignore[arg-type]
        (lambda: Part("w", 0, offset=True), TypeError, "offset must be a number"),
        (lambda: Translation("t", [Part("w", 0, offset=1.0)]), ValueError, "has an offset"),
    ],
)
def test_refuses(build: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("rule", [SGD, ADAM], ids=lambda rule: rule.name)
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
def test_kernels_keep_what_the_reference_keeps(engine: str, rule: Any) -> None:
    """All numbers of all laws, which are data to kernels, after steps with different options."""
    symmetries = [Norm("rows", [Part("w", 0, offset=0.5)]), Norm("columns", [Part("w", 1)])]
    plan = make_plan(symmetries, ["w"], [(7, 9)], rule)
    found = []
    for name in ("reference", engine):
        generator = torch.Generator().manual_seed(0)
        w, *buffers = (torch.rand(7, 9, generator=generator, dtype=torch.float64) for _ in range(1 + len(rule.buffers)))
        made = ENGINES[name](plan, [w], ["w"], [0], Measurement.empty(plan))
        made.measure([[v] for v in buffers])
        made.measurement.start(plan, [True])
        for step in range(4):
            g = [torch.rand(7, 9, generator=generator, dtype=torch.float64)]
            options = (
                Hyper(0.1, 0.9, 0.0, 0.05, nesterov=step % 2 == 0)
                if rule is SGD
                else AdamOptions(0.1, weight_decay=0.3, decoupled=True)
            )
            made.admit(g)
            made.step(g, [[v] for v in buffers], [options], [step + 1 if rule is ADAM else 1], HOST)
        found.append(made.measurement)
    assert len(found[0].states[1]) > len(Measurement.empty(make_plan(symmetries[1:], ["w"], [(7, 9)], rule)).states[1])
    for one, two in zip(*(x.tensors() for x in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_a_parameter_has_one_offset() -> None:
    parts = [Part("w", 0, offset=1.0), Part("w", 1)]
    with pytest.raises(ValueError, match=r"symmetry 'n': the parts of 'w' have offsets 0\.0 and 1\.0"):
        nperf.SGD([("w", nn.Parameter(torch.ones(3, 3)))], symmetries=[Norm("n", parts)])


def test_offsets_of_nothing_cost_nothing() -> None:
    """Rows of a law's state are more only where some part has an offset."""
    net = Gains()
    for symmetries, n_rows in (([EXACT[2], Norm("n", [Part("turned", 0)])], 9), (SYMMETRIES, 13)):
        optimizer = nperf.SGD(net.named_parameters(), lr=0.1, symmetries=symmetries)
        optimizer.readout()
        (state,) = optimizer.state_dict()["measurement"]["tensors"]
        assert len(state["norm"]) == n_rows
