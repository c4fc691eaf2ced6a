"""The constraints of every kind of symmetry hold where it does and fail where it does not; the model is left alone."""

import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import xarray as xr
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Scale, Symmetry, Translation, plots
from noetherperf.checks import Constraints, check_constraints

Model = TypeVar("Model", bound=nn.Module)
Closure = Callable[[], Tensor]
Case = tuple[nn.Module, Closure, Sequence[Symmetry]]

N_CLASSES = 5
STAGES = ("as_is", "float64", "no_eps")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are too small to share."""
    torch.set_num_threads(1)


def randomized(model: Model, dtype: torch.dtype = torch.float64) -> Model:
    """No parameter at 0 or 1, where a wrong sign or index could hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return model.to(dtype)


def classified(model: nn.Module, inputs: Tensor) -> Closure:
    """Cross entropy of the last axis of the output, on labels that are part of the batch."""
    shape = model(inputs).shape
    labels = torch.randint(shape[-1], (shape[:-1].numel(),))
    return lambda: F.cross_entropy(model(inputs).flatten(0, -2), labels)


def ordered(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def worst(result: Constraints, stage: str = "no_eps") -> float:
    """The largest relative defect of all symmetries and constraints."""
    return max(
        float(result[name][f"{kind}_relative"].sel(stage=stage).max()) for name in result for kind in result.constraints
    )


# ---- every kind of symmetry, written by hand -------------------------------------------------------------------------


def rows(*names: str) -> list[Part]:
    return [Part(name, axis=0) for name in names]


def columns(*names: str) -> list[Part]:
    return [Part(name, axis=1) for name in names]


def softmax_translations(layer: str) -> list[Symmetry]:
    return [
        Translation(f"{layer}.weight", columns(f"{layer}.weight")),
        Translation(f"{layer}.bias", [Part(f"{layer}.bias", None)]),
    ]


def perceptron() -> Case:
    model = ordered(
        fc1=nn.Linear(6, 7), a=nn.ReLU(), fc2=nn.Linear(7, 8), b=nn.LeakyReLU(0.2), fc3=nn.Linear(8, 9), c=nn.PReLU(9),
        drop=nn.Dropout(0.3), fc4=nn.Linear(9, N_CLASSES),
    )  # fmt: skip
    model = randomized(model)
    units = [("fc1", "fc2"), ("fc2", "fc3"), ("fc3", "fc4")]
    symmetries = [Rescale(f"{a}->{b}", rows(f"{a}.weight", f"{a}.bias"), columns(f"{b}.weight")) for a, b in units]
    return model, classified(model, torch.randn(12, 6).double()), [*symmetries, *softmax_translations("fc4")]


def batch_norm() -> Case:
    model = ordered(
        conv1=nn.Conv2d(2, 4, 3), bn1=nn.BatchNorm2d(4), a=nn.ReLU(), pool=nn.AvgPool2d(2),
        conv2=nn.Conv2d(4, 6, 3, padding=1, groups=2), bn2=nn.BatchNorm2d(6), b=nn.ReLU(), flat=nn.Flatten(),
        fc=nn.Linear(6 * 4, N_CLASSES),
    )  # fmt: skip
    model = randomized(model)
    symmetries = [
        Scale("conv1", rows("conv1.weight", "conv1.bias")),
        Scale("conv2", rows("conv2.weight", "conv2.bias")),
        Translation("conv1.bias", rows("conv1.bias")),  # BatchNorm removes it, element by element
        Rescale("bn2->fc", rows("bn2.weight", "bn2.bias"), [Part("fc.weight", 1, fold=4)]),
    ]
    return model, classified(model, torch.randn(8, 2, 6, 6).double()), symmetries


def depthwise() -> Case:
    model = ordered(
        conv=nn.Conv2d(2, 4, 1), a=nn.ReLU(), depth=nn.Conv2d(4, 8, 3, groups=4), b=nn.ReLU(),
        up=nn.ConvTranspose2d(8, 3, 2), c=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(3 * 9, N_CLASSES),
    )  # fmt: skip
    model = randomized(model)
    symmetries = [
        Rescale("conv->depth", rows("conv.weight", "conv.bias"), [Part("depth.weight", 0, fold=2)]),
        Rescale("depth->up", rows("depth.weight", "depth.bias"), rows("up.weight")),
        Rescale("up->fc", [Part("up.weight", 1), Part("up.bias", 0)], [Part("fc.weight", 1, fold=9)]),
    ]
    return model, classified(model, torch.randn(8, 2, 4, 4).double()), symmetries


class Normalised(nn.Module):
    """Whole layers before LayerNorm, GroupNorm, an RMSNorm written by hand, and LayerNorm called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.ln = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 8)
        self.gn = nn.GroupNorm(2, 8)
        self.fc3 = nn.Linear(8, 8)
        self.variance_epsilon = 1e-6
        self.fc4 = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.fc5 = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.gain.dtype
        x = self.fc3(torch.tanh(self.gn(self.fc2(torch.tanh(self.ln(self.fc1(x)))))))
        x = x.float() * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        x = F.layer_norm(self.fc4(x.to(dtype)), (8,), eps=1e-5)
        return self.fc5(self.gain * x)  # type: ignore[no-any-return]


def normalised() -> Case:
    model = randomized(Normalised())
    whole = ("fc1", "fc3", "fc4")
    symmetries = [
        *(Scale(name, [Part(f"{name}.weight", None), Part(f"{name}.bias", None)]) for name in whole),
        Scale("fc2", [Part("fc2.weight", 0, fold=4), Part("fc2.bias", 0, fold=4)]),
        Translation("into ln", columns("fc1.weight")),
        Translation("into ln, bias", [Part("fc1.bias", None)]),
        Translation("into gn", [Part("fc2.bias", 0, fold=4)]),
        Rescale("gain->fc5", rows("gain"), columns("fc5.weight")),
    ]
    return model, classified(model, torch.randn(12, 6).double()), symmetries


class Powers(nn.Module):
    """Units that are homogeneous of degree 2 and 1/2, and a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 9)
        self.gate, self.up, self.down = nn.Linear(9, 7), nn.Linear(9, 7), nn.Linear(7, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.fc1(x).relu().square())
        x = self.fc3(x.abs().sqrt())
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def powers() -> Case:
    model = randomized(Powers())
    symmetries = [
        Rescale("squared", rows("fc1.weight", "fc1.bias"), [Part("fc2.weight", 1, weight=2)]),
        Rescale("root", rows("fc2.weight", "fc2.bias"), [Part("fc3.weight", 1, weight=0.5)]),
        Rescale("gated", rows("up.weight", "up.bias"), columns("down.weight")),
    ]
    return model, classified(model, torch.randn(12, 6).double()), symmetries


class Stream(nn.Module):
    """A residual stream of ReLU branches: a joint relation of all its writers and readers."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Embedding(11, 6), nn.Linear(6, N_CLASSES)
        self.into, self.out = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.write(tokens)
        return self.read(x + self.out(self.into(x).relu()))  # type: ignore[no-any-return]


def stream() -> Case:
    model = randomized(Stream())
    joint = Rescale(
        "stream", [Part("write.weight", 1), *rows("out.weight", "out.bias")], columns("into.weight", "read.weight")
    )
    branch = Rescale("into->out", rows("into.weight", "into.bias"), columns("out.weight"))
    return model, classified(model, torch.randint(11, (20,))), [joint, branch]


class Recurrent(nn.Module):
    """A ReLU network in time, whose recurrent weight both enters and leaves every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.RNN(3, 5, nonlinearity="relu", batch_first=True), nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])  # type: ignore[no-any-return]


def recurrent() -> Case:
    model = randomized(Recurrent())
    inward = rows("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0")
    symmetry = Rescale("rnn->fc", inward, columns("rnn.weight_hh_l0", "fc.weight"))
    return model, classified(model, torch.randn(4, 3, 3).double()), [symmetry]


class Rotary(nn.Module):
    """Fused softmax attention: heads hold their q, k and v side by side; the halves of q and k turn together."""

    heads, dim = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 2 * 3 * 4), nn.Linear(8, N_CLASSES)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.3])
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.o(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def rotary() -> Case:
    model = randomized(Rotary())

    def part(name: str, first: int, fold: int) -> Part:
        return Part(name, 0, start=first, stop=first + 4, period=12, fold=fold, stride=2 if fold > 1 else 1)

    both = ("qkv.weight", "qkv.bias")
    symmetries = [
        Rescale("q->k", [part(name, 0, 2) for name in both], [part(name, 4, 2) for name in both]),
        Rescale("v->o", [part(name, 8, 1) for name in both], columns("o.weight")),
    ]
    return model, classified(model, torch.randn(3, 5, 6).double()), symmetries


class Attention(nn.Module):
    """Softmax attention, two query heads to one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def attention() -> Case:
    model = randomized(Attention())
    heads = [(0, 4), (4, 8)]
    symmetries = [
        Rescale("v->o", rows("v.weight", "v.bias"), [Part("o.weight", 1, start=a, stop=b) for a, b in heads]),
        Rescale(
            "q->k",
            [Part(f"q.{name}", 0, start=a, stop=b) for a, b in heads for name in ("weight", "bias")],
            rows("k.weight", "k.bias"),
        ),
        Translation("k.bias", rows("k.bias")),  # softmax removes it
    ]
    return model, classified(model, torch.randn(3, 5, 6).double()), symmetries


def weight_norm() -> Case:
    model = ordered(fc1=nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)), a=nn.Tanh(), fc2=nn.Linear(7, 5))
    model = randomized(model)
    symmetries = [Scale("fc1", rows("fc1.parametrizations.weight.original1"))]
    return model, classified(model, torch.randn(12, 6).double()), symmetries


def weighted() -> Case:
    """A weighted translation: 2·b and a·1 do the same, under a loss that is symmetric under nothing."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(x + self.a + 2 * self.b))  # type: ignore[no-any-return]

    model, x = randomized(Sum()), torch.randn(7, 4).double()
    symmetry = Translation("a, b", [Part("a", 0, weight=2), Part("b", 0, weight=-1)])
    return model, lambda: model(x).square().mean(), [symmetry]


CASES = {
    case.__name__: case
    for case in (
        perceptron,
        batch_norm,
        depthwise,
        normalised,
        powers,
        stream,
        recurrent,
        attention,
        rotary,
        weight_norm,
        weighted,
    )
}


@pytest.mark.parametrize("case", CASES)
def test_every_symmetry_holds(case: str) -> None:
    result = check_constraints(*CASES[case]())
    assert result.failed == ()
    assert result.constraints == ("gradient", "hessian")
    assert worst(result) < 1e-9


@pytest.mark.parametrize("case", ["batch_norm", "normalised", "powers", "recurrent", "rotary", "weighted"])
def test_every_group_by_itself(case: str) -> None:
    """The exact norms are zero where the projections are, and some defect is really seen as the models are."""
    model, closure, symmetries = CASES[case]()
    result = check_constraints(model, closure, symmetries, exact=True)
    assert worst(result) < 1e-9
    assert result.failed == ()


class Wrong(nn.Module):
    def __init__(self, unit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.unit = nn.Linear(6, 7), nn.Linear(7, N_CLASSES), unit

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.unit(self.fc1(x)))  # type: ignore[no-any-return]


HIDDEN = Rescale("fc1->fc2", rows("fc1.weight", "fc1.bias"), columns("fc2.weight"))
FALSE: dict[str, tuple[Callable[[Tensor], Tensor], Symmetry]] = {
    "gelu": (F.gelu, HIDDEN),
    "tanh": (torch.tanh, HIDDEN),
    "sigmoid": (torch.sigmoid, HIDDEN),
    "wrong degree": (lambda x: x.relu().square(), HIDDEN),
    "degree of another": (F.relu, Rescale("k", rows("fc1.weight", "fc1.bias"), [Part("fc2.weight", 1, weight=2)])),
    "no bias": (F.relu, Rescale("k", rows("fc1.weight"), columns("fc2.weight"))),
    "wrong units": (F.relu, Rescale("k", rows("fc1.weight", "fc1.bias"), [Part("fc2.weight", 0, stop=5)])),
    "no normalisation": (F.relu, Scale("fc1", rows("fc1.weight", "fc1.bias"))),
    "not the classes": (F.relu, Translation("fc2", rows("fc2.weight"))),
    "not the last layer": (F.relu, Translation("fc1.bias", [Part("fc1.bias", None)])),
}


@pytest.mark.parametrize("case", [name for name in FALSE if name != "wrong units"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_false_claim_fails(case: str, exact: bool) -> None:
    unit, symmetry = FALSE[case]
    model = randomized(Wrong(unit))
    result = check_constraints(model, classified(model, torch.randn(12, 6).double()), [symmetry], exact=exact)
    assert result.failed == (symmetry.name,)
    for constraint in result.constraints:
        assert result.worst(symmetry.name, constraint, "no_eps") > 1e-3
    assert "FAILS" in repr(result)
    assert symmetry.name in result.summary()


def test_softmax_makes_the_translation() -> None:
    model = randomized(Wrong(F.relu))
    x, target = torch.randn(12, 6).double(), torch.randn(12, N_CLASSES).double()
    assert check_constraints(model, lambda: F.mse_loss(model(x), target), softmax_translations("fc2")).failed == (
        "fc2.weight",
        "fc2.bias",
    )


def test_one_wrong_group_among_right_ones_is_seen() -> None:
    """A unit that is read a second time spoils its own group only."""
    model = randomized(Wrong(F.relu))
    x, labels = torch.randn(12, 6).double(), torch.randint(N_CLASSES, (12,))

    def closure() -> Tensor:
        hidden: Tensor = model.fc1(x).relu()
        return F.cross_entropy(model.fc2(hidden), labels) + hidden[:, 3].square().mean()

    data = check_constraints(model, closure, [HIDDEN])["fc1->fc2"].sel(stage="no_eps")
    wrong = np.arange(7) == 3
    for variable in ("gradient_relative", "hessian_relative"):
        assert (data[variable].to_numpy()[wrong] > 1e-2).all()
        assert (data[variable].to_numpy()[~wrong] < 1e-12).all()


# ---- the numbers themselves ------------------------------------------------------------------------------------------


def tiny() -> tuple[nn.Module, Closure]:
    model = randomized(ordered(fc1=nn.Linear(2, 3), a=nn.Tanh(), fc2=nn.Linear(3, 3)))
    return model, classified(model, torch.randn(5, 2).double())


def dense(model: nn.Module, closure: Closure) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, gradient and the whole Hessian, each flat in the order of `named_parameters()`."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(closure(), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in grads])
    hessian = [
        torch.cat([c.flatten() for c in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in gradient
    ]
    return torch.cat([p.detach().flatten() for p in parameters]), gradient.detach(), torch.stack(hessian)


def coefficients(model: nn.Module, symmetry: Symmetry, group: int) -> Tensor:
    """The diagonal of C_A."""
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in symmetry.parts:
        assert part.axis is not None
        zeros[part.parameter].select(part.axis, group).add_(part.weight)
    return torch.cat([values.flatten() for values in zeros.values()])


BROKEN = [
    Rescale("r", rows("fc1.weight", "fc1.bias"), [Part("fc2.weight", 1, weight=2)]),
    Scale("s", rows("fc2.weight")),
    Translation("t", [Part("fc1.weight", 0), Part("fc2.weight", 0, weight=-0.5)]),
    Rescale("self", rows("fc2.weight"), columns("fc2.weight")),
    Norm("n", rows("fc1.weight")),
]


@pytest.mark.parametrize("symmetry", BROKEN, ids=lambda s: s.name)
def test_defects_are_those_of_the_whole_hessian(symmetry: Symmetry) -> None:
    """Nothing holds here, so every number is large and wrong ones would show."""
    model, closure = tiny()
    theta, gradient, hessian = dense(model, closure)
    data = check_constraints(model, closure, [symmetry], exact=True, probes=200, tolerance=1.0)[symmetry.name]
    translation = symmetry.law == "translation"
    for group in range(3):
        c = coefficients(model, symmetry, group)
        inside = coefficients(model, Norm("inside", [Part(p.parameter, p.axis) for p in symmetry.parts]), group) > 0
        psi = c * (1.0 if translation else theta)
        drift = 0.0 * gradient if translation else c * gradient
        residual = hessian @ psi + drift
        if symmetry.name == "self":  # where parts overlap, the scales count their terms apart, and no more is promised
            scale_g = scale_h = None
        else:
            scale_g = gradient[inside].norm() * psi.norm()
            scale_h = hessian[:, inside].norm() * psi.norm() + drift.norm()
        one = data.isel(group=group)
        for stage in STAGES:
            at = one.sel(stage=stage)
            assert float(at.gradient) == pytest.approx(float(gradient @ psi), rel=1e-9)
            assert float(at.hessian) == pytest.approx(float(residual.norm()), rel=1e-9)
            if scale_g is not None and scale_h is not None:
                assert float(at.gradient_relative) == pytest.approx(float((gradient @ psi).abs() / scale_g), rel=1e-9)
                assert float(at.hessian_relative) == pytest.approx(float(residual.norm() / scale_h), rel=0.2)


def test_probes_estimate_the_norm() -> None:
    model, closure = tiny()
    exact = check_constraints(model, closure, BROKEN, exact=True, probes=2, float64=False)
    many = check_constraints(model, closure, BROKEN, probes=400, float64=False)
    for symmetry in BROKEN:
        ratio = (many[symmetry.name].hessian / exact[symmetry.name].hessian) ** 2
        np.testing.assert_allclose(ratio, 1.0, atol=5 * np.sqrt(2 / 400))


def test_probes_are_the_seeds() -> None:
    model, closure = tiny()
    first, again, other = (check_constraints(model, closure, BROKEN, seed=seed)["r"] for seed in (1, 1, 2))
    xr.testing.assert_identical(first, again)
    assert not np.allclose(first.hessian, other.hessian)


def test_a_linear_loss_has_no_hessian() -> None:
    model = randomized(nn.Linear(3, 2))
    x = torch.randn(4, 3).double()
    data = check_constraints(model, lambda: model(x).sum(), [Translation("w", columns("weight"))], exact=True)["w"]
    assert (data.hessian == 0).all()
    assert (data.gradient != 0).all()


def test_what_is_cancelled_altogether_is_no_defect() -> None:
    """A bias before BatchNorm has a gradient of rounding errors only, and each of its elements is a group."""
    model, closure, _ = batch_norm()
    gradient = torch.autograd.grad(closure(), model.get_parameter("conv1.bias"))[0]
    assert 0 < gradient.abs().max() < 1e-15
    data = check_constraints(model, closure, [Translation("conv1.bias", rows("conv1.bias"))])["conv1.bias"]
    assert float(data.gradient_relative.max()) < 1e-11
    assert float(data.hessian_relative.max()) < 1e-11


# ---- stages: rounding and eps ----------------------------------------------------------------------------------------


def test_the_stages_tell_rounding_and_eps_apart() -> None:
    torch.manual_seed(1)
    model, _, symmetries = batch_norm()
    model.float()
    closure = classified(model, torch.randn(8, 2, 6, 6))
    result = check_constraints(model, closure, symmetries)
    assert result.failed == ()
    assert set(result.epsilons) == {"bn1.eps", "bn2.eps"}
    for constraint in result.constraints:
        by_stage = [result.worst("conv1", constraint, stage) for stage in result.stages]
        assert by_stage[0] == pytest.approx(by_stage[1], rel=0.05)  # eps, and not rounding, made the defect
        assert 1e-7 < by_stage[1] < 1e-2
        assert by_stage[2] < 1e-12
        assert result.eps_share("conv1", constraint) > 0.95
        by_stage = [result.worst("bn2->fc", constraint, stage) for stage in result.stages]
        assert 1e-9 < by_stage[0] < 1e-5  # here it was rounding
        assert max(by_stage[1:]) < 1e-14
        assert result.eps_share("bn2->fc", constraint) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_reaches_all_of_the_closure(dtype: torch.dtype) -> None:
    """Inputs, tensors made on the way, casts by hand, eps of normalisations called as functions or written by hand."""
    _, _, symmetries = normalised()
    model = randomized(Normalised(), dtype)
    x, labels = torch.randn(12, 6, dtype=dtype), torch.randint(N_CLASSES, (12,))

    def closure() -> Tensor:
        noise = 0.1 * torch.randn(12, 6, dtype=dtype)
        mixed = (x + noise).float() + torch.zeros(12, 6) + torch.full((1,), 0.25)
        return F.cross_entropy(model(mixed.to(dtype=dtype)).float(), labels)

    result = check_constraints(model, closure, symmetries)
    assert result.failed == ()
    assert worst(result, "as_is") > 1e-8
    assert result.losses["float64"] == pytest.approx(result.losses["as_is"], rel=0.2)
    assert result.losses["float64"] != result.losses["as_is"]


@pytest.mark.parametrize(
    "cast", [Tensor.float, Tensor.half, lambda x: x.to(torch.float32), lambda x: x.to(dtype=torch.bfloat16)]
)
def test_casts_by_hand_are_left_out(cast: Callable[[Tensor], Tensor]) -> None:
    model, labels = randomized(Wrong(F.relu)), torch.randint(N_CLASSES, (12,))
    x = torch.randn(12, 6, dtype=torch.float64)
    result = check_constraints(model, lambda: F.cross_entropy(model(cast(x).double()), labels), [HIDDEN])
    plain = F.cross_entropy(model(x), labels).item()
    assert result.losses["float64"] == pytest.approx(plain, rel=1e-14)
    assert abs(result.losses["as_is"] - plain) > 1e-12


def test_what_is_written_into_an_input_is_read_again() -> None:
    model = randomized(Wrong(F.relu), torch.float32)
    x, y, labels = torch.zeros(12, 6), torch.randn(12, 6), torch.randint(N_CLASSES, (12,))

    def closure() -> Tensor:
        x.copy_(y)
        loss = F.cross_entropy(model(x.clone()), labels)
        x.zero_()
        return loss

    result = check_constraints(model, closure, [HIDDEN])
    assert result.losses["float64"] == pytest.approx(result.losses["as_is"], rel=1e-5)


def test_every_stage_begins_alike() -> None:
    """The same mask of dropout, the same running statistics: in float64 and without eps, stages differ in nothing."""
    model = randomized(ordered(drop=nn.Dropout(), bn=nn.BatchNorm1d(6, eps=1e-14), fc=nn.Linear(6, N_CLASSES)))
    x, labels = torch.randn(12, 6).double(), torch.randint(N_CLASSES, (12,))

    def closure() -> Tensor:
        training = F.cross_entropy(model(x), labels)
        model.eval()
        return training + F.cross_entropy(model(x), labels)

    result = check_constraints(model, closure, softmax_translations("fc"))
    assert result.epsilons == {"bn.eps": 1e-14}
    assert len(set(result.losses.values())) == 1
    for data in result.values():
        xr.testing.assert_identical(data.sel(stage="as_is", drop=True), data.sel(stage="float64", drop=True))


def test_as_it_is_alone() -> None:
    model, _, symmetries = perceptron()
    model.float()
    closure = classified(model, torch.randn(12, 6))
    result = check_constraints(model, closure, symmetries, float64=False)
    assert result.stages == ("as_is",)
    assert result.tolerance == pytest.approx(torch.finfo(torch.float32).eps ** 0.5)
    assert result.failed == ()
    assert np.isnan(result.eps_share("fc1->fc2", "gradient"))
    assert "as the model is" in result.summary()
    model.double()
    assert check_constraints(model, classified(model, torch.randn(3, 6).double()), [], float64=False).tolerance == 1e-9


# ---- the model is left alone -----------------------------------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    """Whatever check_constraints could disturb, as comparable values."""

    def content(x: Tensor | None) -> Any:
        return None if x is None else (id(x), x.data_ptr(), x.dtype, x.detach().clone().flatten().tolist())

    return [
        {name: (content(p), content(p.grad), p.requires_grad) for name, p in model.named_parameters()},
        [{name: content(b) for name, b in module._buffers.items()} for module in model.modules()],
        [module.training for module in model.modules()],
        [getattr(module, "eps", None) for module in model.modules()],
        (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        (torch.get_default_dtype(), torch.is_grad_enabled()),
    ]


def disturbing(model: nn.Module, x: Tensor) -> Closure:
    labels = torch.randint(N_CLASSES, (len(x),))

    def closure() -> Tensor:
        model.zero_grad()
        model.train()
        random.random()
        np.random.rand()  # noqa: NPY002
        loss = F.cross_entropy(F.dropout(model(x), 0.3), labels)
        model.eval()
        return loss

    return closure


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model, _, symmetries = batch_norm()
    model.float()
    x = torch.randn(8, 2, 6, 6)
    closure = disturbing(model, x)
    closure().backward()
    model.get_parameter("fc.weight").grad = None
    model.get_parameter("fc.bias").requires_grad_(False)
    model.get_submodule("bn1").eval()
    calls = 0

    def perhaps_failing() -> Tensor:
        nonlocal calls
        calls += 1
        return closure() * (torch.nan if fails and calls == 4 else 1.0)

    before = everything(model)
    if fails:
        with pytest.raises(ValueError, match="nan"):
            check_constraints(model, perhaps_failing, symmetries)
    else:
        assert check_constraints(model, perhaps_failing, symmetries).failed == ()
    assert calls == 4
    assert everything(model) == before


def test_grads_accumulated_in_place_come_back() -> None:
    model, closure, symmetries = perceptron()
    closure().backward()
    before = everything(model)

    def zeroing() -> Tensor:
        model.zero_grad(set_to_none=False)
        return closure()

    check_constraints(model, zeroing, symmetries)
    assert everything(model) == before


def test_the_training_goes_on_as_without() -> None:
    def train(checked: bool) -> list[float]:
        torch.manual_seed(0)
        model, closure, symmetries = perceptron()
        optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            if checked:
                check_constraints(model, closure, symmetries, probes=2)
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(True) == train(False)


def test_frozen_parameters_are_checked() -> None:
    model, closure, symmetries = perceptron()
    model.get_parameter("fc1.weight").requires_grad_(False)
    assert check_constraints(model, closure, symmetries).failed == ()


def test_under_no_grad() -> None:
    model, closure, symmetries = perceptron()
    with torch.no_grad():
        assert check_constraints(model, closure, symmetries).failed == ()


@pytest.mark.parametrize("name", ["vgg_bn", "gpt_tied", "llama"])
def test_families_can_be_evaluated(name: str) -> None:
    """Models with every layer that there is: the translations that softmax gives their heads hold."""
    family = FAMILIES[name]
    model = family.make(eps=1e-5)
    head = {"vgg_bn": "classifier.6.weight", "gpt_tied": "wte.weight", "llama": "lm_head.weight"}[name]
    result = check_constraints(model, family.closure(model, seed=1), [Translation("head", columns(head))])
    assert result.failed == (("head",) if name == "gpt_tied" else ())


# ---- errors ----------------------------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Twice(torch.autograd.Function):
    """A square whose second derivative mixes its units up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Wrong.apply(x) * grad  # type: ignore[no-any-return]


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        flipped: Tensor = (x * grad).flip(-1)
        return flipped


def stepped(closure: Closure) -> Tensor:
    loss = closure()
    loss.backward()
    return loss


BAD: dict[str, tuple[Callable[[nn.Module, Closure], Any], str]] = {
    "no tensor": (lambda model, closure: lambda: closure().item(), "return the loss as a tensor, got float"),
    "no return": (lambda model, closure: lambda: None, "got NoneType; is a return missing"),
    "not scalar": (lambda model, closure: lambda: closure().expand(3), r"shape \(3,\); reduce it"),
    "detached": (lambda model, closure: lambda: closure().detach(), "has no gradient"),
    "nan": (lambda model, closure: lambda: closure() * torch.nan, "nan"),
    "another model": (lambda model, closure: tiny()[1], "depends on none of the model's parameters"),
    "backward": (lambda model, closure: lambda: stepped(closure), r"not call backward\(\)"),
    "once": (
        lambda model, closure: lambda: _Once.apply(closure()),
        "cannot be differentiated twice.*hessian=False",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_closure_of_no_use_is_refused(case: str) -> None:
    model, closure, symmetries = perceptron()
    spoil, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_constraints(model, spoil(model, closure), symmetries)


def test_a_closure_that_draws_its_batch_is_refused() -> None:
    model, _, symmetries = perceptron()
    generator = torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        return F.cross_entropy(model(x), torch.zeros(12, dtype=torch.long))

    with pytest.raises(ValueError, match=r"not deterministic: it returned .* and then"):
        check_constraints(model, closure, symmetries)


def test_a_wrong_second_derivative_is_seen() -> None:
    model = Wrong(_Twice.apply).double()
    symmetry = Rescale("k", rows("fc1.weight", "fc1.bias"), [Part("fc2.weight", 1, weight=2)])
    closure = classified(model, torch.randn(12, 6).double())
    with pytest.raises(ValueError, match="second derivatives contradict each other"):
        check_constraints(model, closure, [symmetry])
    assert check_constraints(model, closure, [symmetry], hessian=False).failed == ()


def test_global_random_numbers_are_repeated() -> None:
    model, _, symmetries = perceptron()

    def closure() -> Tensor:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        x = torch.randn(12, 6, dtype=torch.float64) + noise
        return F.cross_entropy(model(x), torch.zeros(12, dtype=torch.long))

    assert check_constraints(model, closure, symmetries).failed == ()


def test_not_twice_differentiable_is_fine_without_the_hessian() -> None:
    model, closure, symmetries = perceptron()
    result = check_constraints(model, lambda: _Once.apply(closure()), symmetries, hessian=False)
    assert result.constraints == ("gradient",)
    assert result.failed == ()
    assert "hessian" not in result["fc1->fc2"]


def test_a_fused_attention_kernel_that_the_closure_insists_on_is_named() -> None:
    model, closure, symmetries = attention()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def insisting() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return closure()

    with pytest.raises(ValueError, match=r"differentiated twice: .*flash_attention.*MATH"):
        check_constraints(model, insisting, symmetries)


def test_what_cannot_be_widened_is_told() -> None:
    model, _, symmetries = perceptron()
    model.float()
    x = torch.randn(12, 6)

    def narrow() -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.cross_entropy(model(x), torch.zeros(12, dtype=torch.long))

    with pytest.raises(ValueError, match=r"not in float64: .*float64=False"):
        check_constraints(model, narrow, symmetries)
    assert check_constraints(model, narrow, symmetries, float64=False).failed == ()


def test_other_arguments_of_no_use() -> None:
    model, closure, symmetries = perceptron()
    with pytest.raises(TypeError, match="closure must be callable"):
        check_constraints(model, closure(), symmetries)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"did you mean 'fc1\.weight'"):
        check_constraints(model, closure, [Scale("s", rows("fc1.weigth"))])
    with pytest.raises(ValueError, match="eps must be positive"):
        check_constraints(model, closure, symmetries, eps=0.0)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        check_constraints(model, closure, symmetries, tolerance=-1.0)
    with pytest.raises(ValueError, match="probes must be at least 2"):
        check_constraints(model, closure, symmetries, probes=1)
    with pytest.raises(ValueError, match="'weight' is lazy"):
        check_constraints(nn.LazyLinear(3), closure, [])


# ---- the result ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> Constraints:
    torch.manual_seed(0)
    model, _, symmetries = batch_norm()
    model.float()
    closure = classified(model, torch.randn(8, 2, 6, 6))
    wrong = Scale("bn2 (no claim that holds)", rows("bn2.weight"))
    unclaimed = Norm("fc", [Part("fc.weight", 0)])
    return check_constraints(model, closure, [*symmetries, wrong, unclaimed])


def test_the_result_is_a_mapping_of_labelled_arrays(result: Constraints) -> None:
    assert list(result) == [symmetry.name for symmetry in result.symmetries]
    data = result["conv1"]
    assert dict(data.sizes) == {"stage": 3, "group": 4}
    assert data.stage.to_numpy().tolist() == list(STAGES)
    assert all(values.dtype == np.float64 for values in data.values())
    with pytest.raises(KeyError, match="no symmetry 'nothing' was checked; there are: conv1"):
        result["nothing"]


@pytest.mark.parametrize("name", ["conv[relu]", "block[/attn]", ":smile:", "two\nlines", "\x1b[31mred"])
def test_the_table_takes_any_name(name: str) -> None:
    model = nn.Linear(3, 2).double()
    result = check_constraints(
        model,
        lambda: model(torch.ones(4, 3, dtype=torch.float64)).square().mean(),
        [Scale(name, [Part("weight", axis=0)])],
        hessian=False,
    )
    shown = name.encode("unicode_escape").decode()
    assert f"\n{shown} " in repr(result)
    assert f"these do not: {shown}" in repr(result)


def test_the_table_tells_all(result: Constraints) -> None:
    text = repr(result)
    assert result.failed == ("bn2 (no claim that holds)",)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert f"{result.worst('conv1', 'gradient', 'as_is'):.1e}" in lines["conv1"]
    assert f"{result.worst('conv1', 'gradient', 'no_eps'):.1e}" in lines["conv1"]
    assert "holds" in lines["conv1"]
    assert "no claim" in lines["fc"]
    assert lines["5"].startswith("4 of 5") if "5" in lines else "4 of 5 symmetries hold" in text
    assert "1e-05 in 2 modules" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_result_is_json(result: Constraints) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    assert data["failed"] == list(result.failed)
    first = data["symmetries"][0]
    assert Symmetry.from_dict(first["symmetry"]) == result.symmetries[0]
    assert first["holds"] is True
    assert data["symmetries"][-1]["holds"] is None
    assert first["defects"]["hessian"]["float64"] == result["conv1"].hessian.sel(stage="float64").to_numpy().tolist()


def test_unused_parameters_are_named() -> None:
    model = Wrong(F.relu).double()
    model.add_module("idle", nn.Linear(2, 2).double())
    closure = classified(model, torch.randn(12, 6).double())
    result = check_constraints(model, closure, [HIDDEN, Scale("idle", rows("idle.weight"))])
    assert result.unused == ("idle.weight", "idle.bias")
    assert "does not depend on idle.weight, idle.bias" in result.summary()
    assert (result["idle"].gradient_relative == 0).all()


def test_the_picture_shows_every_group(result: Constraints, tmp_path: Path) -> None:
    figure = plots.constraints(result)
    panels = figure.get_axes()
    assert [panel.get_title("left").partition(":")[0] for panel in panels] == ["gradient", "Hessian"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == list(result)
    red = [label.get_text() for label in panels[0].get_yticklabels() if label.get_color() != "black"]
    assert red == list(result.failed)
    (color,) = {line.get_color() for line in panels[0].get_lines() if line.get_marker() == "D"}  # medians
    strokes = [x for x in panels[0].get_lines() if x.get_marker() == "|" and x.get_color() == color]
    drawn = np.concatenate([np.asarray(stroke.get_xdata()) for stroke in strokes])
    expected = np.concatenate([result[name].gradient_relative.sel(stage="no_eps") for name in result])
    np.testing.assert_array_equal(drawn, np.maximum(expected, panels[0].get_xlim()[0]))
    files = plots.save_constraints(result, tmp_path / "new")
    assert [file.name for file in files] == ["constraints.png", "constraints.pdf"]
    assert all(file.stat().st_size > 1000 for file in files)


def test_the_picture_of_nothing_says_so() -> None:
    model, closure, _ = perceptron()
    nothing = check_constraints(model, closure, [])
    assert nothing.failed == ()
    assert "0 of 0 symmetries hold" in repr(nothing)
    assert any("no symmetry" in text.get_text() for text in plots.constraints(nothing).get_axes()[0].texts)
