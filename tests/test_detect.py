"""What find_symmetries finds against lists written by hand, that it holds, that it claims nothing false, and that the
model never notices."""

import copy
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from torch import Tensor, nn
from torch.nn import functional as F

import noetherperf as nperf
from noetherperf import Balance, Norm, Part, Rescale, Scale, Symmetries, Symmetry, Translation, find_symmetries
from noetherperf.detect.relations import independent, integer_relations, null_space
from noetherperf.detect.sums import Sums
from noetherperf.symmetry import balances_in, with_groups

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)

# ---- a short notation for symmetries --------------------------------------------------------------------------------

PART = re.compile(
    r"(?:(?P<weight>[\d.]+)\*)?(?P<name>[\w.]+):(?P<axis>\d|whole)"
    r"(?:\[(?P<start>\d*):(?P<stop>\d*)\])?(?:%(?P<period>\d+))?(?:/(?P<fold>\d+))?(?:~(?P<stride>\d+))?"
)


def part(text: str, sign: float = 1.0) -> Part:
    """`2*w:1[4:8]%12/2~3`: weight 2, axis 1, start 4, stop 8, period 12, fold 2, stride 3; `w:whole`: axis None."""
    found = PART.fullmatch(text)
    assert found, text
    fields = {
        key: int(value) for key, value in found.groupdict().items() if value and key not in ("name", "axis", "weight")
    }
    axis = None if found["axis"] == "whole" else int(found["axis"])
    return Part(found["name"], axis, weight=sign * float(found["weight"] or 1), **fields)


def law(text: str) -> tuple[str, frozenset[Part]]:
    """`scale a b`, `translation a − b`, `rescale a b > c d`, `balance/4 a > b` with size 4: kind and parts with signed
    weights."""
    kind, *words = text.split()
    sign, parts = 1.0, []
    for word in words:
        if word in (">", "−"):
            sign = -1.0
        else:
            parts.append(part(word, sign))
    return kind, frozenset(parts)


def laws(symmetries: Iterable[Symmetry]) -> set[tuple[str, frozenset[Part]]]:
    return {(kind(symmetry), frozenset(symmetry.parts)) for symmetry in symmetries}


def kind(symmetry: Symmetry) -> str:
    size = symmetry.size if isinstance(symmetry, Balance) else None
    return symmetry.kind if size is None else f"{symmetry.kind}/{size}"


def unit(inward: str, outward: str, bias: bool = True) -> str:
    """What enters a unit through `inward` leaves it through `outward`."""
    return f"rescale {inward}.weight:0 {f'{inward}.bias:0' if bias else ''} > {outward}.weight:1"


SOFTMAX = ["translation {0}.weight:1", "translation {0}.bias:whole"]


def softmax(head: str) -> list[str]:
    return [line.format(head) for line in SOFTMAX]


# ---- what each family conserves, from theory ------------------------------------------------------------------------


def vgg_bn() -> list[str]:
    found = []
    for conv, following in ((0, "features.3"), (3, "features.7"), (7, "features.10"), (10, None)):
        c, n = f"features.{conv}", f"features.{conv + 1}"
        found += [f"scale {c}.weight:0 {c}.bias:0", f"translation {c}.bias:0"]
        found.append(unit(n, following) if following else f"rescale {n}.weight:0 {n}.bias:0 > classifier.0.weight:1/4")
    return [
        *found,
        unit("classifier.0", "classifier.3"),
        unit("classifier.3", "classifier.6"),
        *softmax("classifier.6"),
    ]


def resnet(bottleneck: bool) -> list[str]:
    last = 3 if bottleneck else 2
    blocks = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    shortcuts = ["layer1.0", "layer2.0"] if bottleneck else ["layer2.0"]
    found = ["scale conv1.weight:0", *softmax("fc")]
    found += [f"scale {b}.conv{i}.weight:0" for b in blocks for i in range(1, last + 1)]
    found += [f"scale {b}.downsample.0.weight:0" for b in shortcuts]
    found += [unit(f"{b}.bn{i}", f"{b}.conv{i + 1}") for b in blocks for i in range(1, last)]
    # two branches that are added up: a shift of one undoes a shift of the other
    found += [f"translation {b}.bn{last}.bias:0 − {b}.downsample.1.bias:0" for b in shortcuts]

    def stream(writers: list[str], readers: list[str]) -> str:
        inward = " ".join(f"{w}.weight:0 {w}.bias:0" for w in writers)
        return f"rescale {inward} > {' '.join(f'{r}.weight:1' for r in readers)}"

    first = [f"layer1.{i}.bn{last}" for i in (0, 1)]
    entry = ["layer2.0.conv1", "layer2.0.downsample.0"]
    if bottleneck:
        found.append(stream(["bn1"], ["layer1.0.conv1", "layer1.0.downsample.0"]))
        found.append(stream([*first, "layer1.0.downsample.1"], ["layer1.1.conv1", *entry]))
    else:
        found.append(stream(["bn1", *first], ["layer1.0.conv1", "layer1.1.conv1", *entry]))
    second = [f"layer2.{i}.bn{last}" for i in (0, 1)]
    return [*found, stream([*second, "layer2.0.downsample.1"], ["layer2.1.conv1", "fc"])]


def separable() -> list[str]:
    return [
        "rescale stem.weight:0 stem.bias:0 > depthwise1.weight:0",
        unit("depthwise1", "pointwise1"),
        "rescale pointwise1.weight:0 pointwise1.bias:0 > depthwise2.weight:0/2",
        unit("depthwise2", "pointwise2"),
        "scale pointwise2.weight:0",
        unit("bn", "fc"),
        *softmax("fc"),
    ]


def fused_blocks() -> list[str]:
    """The blocks of ViT and GPT: gains against readers, V against O, Q against K, the cancelled key bias; what writes
    to the stream may be shifted along it, for LayerNorm takes the mean out. GELU leaves no more."""
    found = []
    for b in ("blocks.0", "blocks.1"):
        qkv, proj = f"{b}.attn.qkv", f"{b}.attn.proj"
        found += [
            unit(f"{b}.ln1", qkv),
            unit(f"{b}.ln2", f"{b}.mlp.0"),
            f"balance/6 {qkv}.weight:0[24:] {qkv}.bias:0[24:] > {proj}.weight:1",
            f"balance/6 {qkv}.weight:0[:12] {qkv}.bias:0[:12] > {qkv}.weight:0[12:24] {qkv}.bias:0[12:24]",
            f"translation {qkv}.bias:0[12:24]",
        ]
        found += [f"translation {w}.weight:1" for w in (proj, f"{b}.mlp.2")]
        found += [f"translation {w}.bias:whole" for w in (proj, f"{b}.mlp.2")]
    return found


WRITERS = " ".join(
    f"blocks.{i}.{w}.{p}:whole" for i in (0, 1) for w in ("attn.proj", "mlp.2") for p in ("weight", "bias")
)


def vit() -> list[str]:
    return [
        *fused_blocks(),
        unit("norm", "head"),
        *softmax("head"),
        *(f"translation patch.weight:{axis}" for axis in (1, 2, 3)),  # for each channel, row and column of a patch
        "translation patch.bias:whole",
        "translation cls:whole",
        "translation pos:1",
        "translation patch.bias:0 cls:2 − pos:2",
        f"scale patch.weight:whole patch.bias:whole cls:whole pos:whole {WRITERS}",
    ]


def gpt(tied: bool) -> list[str]:
    shared = [*fused_blocks(), "translation wpe.weight:0", "translation wte.weight:1 − wpe.weight:1"]
    stream = f"wte.weight:whole wpe.weight:whole {WRITERS}"
    if tied:  # a row is what it adds to the stream and what a logit reads, so no row is free
        return [*shared, f"rescale {stream} > ln_f.weight:whole ln_f.bias:whole"]
    return [*shared, "translation wte.weight:0", "translation head.weight:1", unit("ln_f", "head"), f"scale {stream}"]


def llama() -> list[str]:
    found = ["rescale norm.weight:0 > lm_head.weight:1", "translation lm_head.weight:1"]
    stream = "embed.weight:whole"
    for b in ("layers.0", "layers.1"):
        q, k, v, o = (f"{b}.attn.{x}_proj.weight" for x in "qkvo")
        found += [
            f"rescale {b}.input_norm.weight:0 > {q}:1 {k}:1 {v}:1",
            f"rescale {b}.post_norm.weight:0 > {b}.gate.weight:1 {b}.up.weight:1",
            f"rescale {b}.up.weight:0 > {b}.down.weight:1",
            f"balance/4 {v}:0 > {o}:1/2~4",  # one value head, two query heads of 4
            f"rescale {q}:0/4~2 > {k}:0/2~2",  # rotary pairs two apart
        ]
        stream += f" {o}:whole {b}.down.weight:whole"
    return [*found, f"scale {stream}"]


EXPECTED: dict[str, list[str]] = {
    "mlp": [unit("0", "2"), unit("2", "4"), unit("4", "6", bias=False), *softmax("6")],
    "vgg": [
        unit("features.0", "features.2"),
        unit("features.2", "features.5"),
        unit("features.5", "features.7"),
        "rescale features.7.weight:0 features.7.bias:0 > classifier.0.weight:1/4",
        unit("classifier.0", "classifier.3"),
        unit("classifier.3", "classifier.6"),
        *softmax("classifier.6"),
    ],
    "vgg_bn": vgg_bn(),
    "resnet_basic": resnet(bottleneck=False),
    "resnet_bottleneck": resnet(bottleneck=True),
    "separable": separable(),
    "autoencoder": [
        unit("0", "2"),
        "rescale 2.weight:0 2.bias:0 > 4.weight:0",
        "rescale 4.weight:1 4.bias:0 > 6.weight:0",
    ],
    "vit": vit(),
    "gpt": gpt(tied=False),
    "gpt_tied": gpt(tied=True),
    "llama": llama(),
}


@pytest.fixture(scope="module")
def found() -> Callable[[Family], Symmetries]:
    """Symmetries of a family as users have it, float32 with torch's eps; looked for once."""
    cache: dict[str, Symmetries] = {}

    def find(family: Family) -> Symmetries:
        if family.name not in cache:
            example = tuple(x.float() if x.is_floating_point() else x for x in family.example())
            model = family.make(eps=1e-5).float()
            cache[family.name] = find_symmetries(model, *example, loss=family.loss_name)  # type: ignore[arg-type]
        return cache[family.name]

    return find


class TestFamilies:
    @every_family
    def test_all_laws_and_no_others(self, family: Family, found: Callable[[Family], Symmetries]) -> None:
        symmetries = found(family)
        assert laws(symmetries) == {law(line) for line in EXPECTED[family.name]}
        assert symmetries.rejected == {}
        assert max(symmetries.defects.values()) < 1e-9
        parameters = {name for name, _ in family.make().named_parameters()}
        matched = {part.parameter for symmetry in symmetries for part in symmetry.parts}
        assert set(symmetries.unmatched) == parameters - matched

    @every_family
    def test_every_claim_holds_on_fresh_batches(self, family: Family, found: Callable[[Family], Symmetries]) -> None:
        """The family's own loss and parameters, dropout at work, eps → 0."""
        model = family.make(seed=1)
        p = dict(model.named_parameters())
        for seed in range(3):
            model.zero_grad()
            family.closure(model, seed)().backward()
            for symmetry in found(family):
                defect, size = constraint(symmetry, p)
                assert bool((defect <= 1e-9 * size).all()), symmetry.name

    @every_family
    def test_the_discrete_law_predicts_every_charge(
        self, family: Family, found: Callable[[Family], Symmetries]
    ) -> None:
        model = family.make(seed=2)
        optimizer = nperf.SGD(
            model.named_parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3, symmetries=found(family)
        )
        for step in range(50):
            optimizer.zero_grad()
            family.closure(model, step)().backward()
            optimizer.step()
        readout = optimizer.readout()
        p = dict(model.named_parameters())
        assert [*readout, *readout.balances] == [
            s.name for s in (*with_groups(found(family)), *balances_in(found(family)))
        ]
        for name, whole in readout.balances.items():
            size = whole.symmetry.charge(p, magnitude=True)
            assert whole.closed
            assert bool((whole.residual.abs() <= 1e-9 * size).all()), name
            assert float(((whole.charge - whole.initial).abs() / size).max()) > 1e-6, name
        for name, charge in readout.items():
            groups = torch.cat([part.grouped(p[part.parameter]) for part in charge.symmetry.parts], 1).detach()
            terms = groups.abs().sum(1) if charge.symmetry.law == "translation" else groups.square().sum(1)
            assert charge.closed
            assert bool((charge.residual.abs() <= 1e-9 * terms).all()), name
            moved = (charge.charge - charge.initial).abs() / terms
            assert float(moved.max()) > 1e-6, name


def constraint(symmetry: Symmetry, p: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """|⟨g, ψ⟩| and |g_A| |ψ_A| of each group; a gradient far below its module's counts as 1e-3 of that.

    Of a Balance, |W gᵀ − (V hᵀ)ᵀ| and the sum of the magnitudes of its terms, of each entry.
    """
    if isinstance(symmetry, Balance):
        entries: dict[bool, Tensor] = {}
        for magnitude in (False, True):
            terms = []
            for one in symmetry.parts:
                g, w = (symmetry.units(one, x.detach()) for x in (p[one.parameter].grad, p[one.parameter]))  # type: ignore[union-attr]
                g, w = (g.abs(), w.abs()) if magnitude else (g, w)
                terms.append(w @ g.mT if one.weight > 0 else (1 if magnitude else -1) * (g @ w.mT))
            entries[magnitude] = torch.stack(terms).sum(0).abs()
        return entries[False], entries[True]
    defect, sq_g, sq_psi = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for one in symmetry.parts:
        module = one.parameter.rpartition(".")[0]
        usual = max(
            float(q.grad.square().mean()) for n, q in p.items() if q.grad is not None and n.rpartition(".")[0] == module
        )
        grad = p[one.parameter].grad
        assert grad is not None
        g, theta = one.grouped(grad), one.grouped(p[one.parameter].detach())
        psi = one.weight * (torch.ones_like(theta) if symmetry.law == "translation" else theta)
        defect = defect + (g * psi).sum(1)
        sq_g = sq_g + g.square().sum(1).clamp(min=1e-6 * usual * g.shape[1])
        sq_psi = sq_psi + psi.square().sum(1)
    return defect.abs(), (sq_g * sq_psi).sqrt()


# ---- single structures ----------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.function(self, *inputs, **options)


def two_layers(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    return Lambda(lambda m, x: m.b(activation(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 5))


X = torch.randn(4, 6)
IMAGE = torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize(
    "activation", [F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.elu], ids=lambda f: f.__name__
)
def test_what_is_not_homogeneous_conserves_nothing(activation: Callable[[Tensor], Tensor]) -> None:
    symmetries = find_symmetries(two_layers(activation), X)
    assert laws(symmetries) == {law(line) for line in softmax("b")}
    assert set(symmetries.unmatched) == {"a.weight", "a.bias"}
    assert "is not homogeneous" in symmetries.unmatched["a.weight"]


@pytest.mark.parametrize("loss", ["mse", None, lambda out: out.square().mean()], ids=["mse", "none", "function"])
def test_without_softmax_there_is_no_translation(loss: Any) -> None:
    assert laws(find_symmetries(two_layers(F.relu), X, loss=loss)) == {law(unit("a", "b"))}


def test_a_loss_that_is_a_function_is_traced_with_the_model() -> None:
    target = torch.arange(4) % 5
    symmetries = find_symmetries(two_layers(F.relu), X, loss=lambda out: F.cross_entropy(out, target))
    assert laws(symmetries) == {law(line) for line in [unit("a", "b"), *softmax("b")]}


def test_a_unit_that_a_second_branch_reads_counts_all_readers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.a(x))
        return m.b(hidden) + torch.tanh(m.c(hidden))  # type: ignore[no-any-return]

    model = Lambda(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5))
    expected = ["rescale a.weight:0 a.bias:0 > b.weight:1 c.weight:1", *softmax("b")]
    assert laws(find_symmetries(model, X)) == {law(line) for line in expected}
    bounded = Lambda(lambda m, x: m.b(y := torch.relu(m.a(x))) + y[:, :5], a=nn.Linear(6, 8), b=nn.Linear(8, 5))
    expected = ["rescale a.weight:0[5:] a.bias:0[5:] > b.weight:1[5:]", *softmax("b")]  # the units that are not
    assert laws(find_symmetries(bounded, X)) == {law(line) for line in expected}


def test_shared_weights_are_one() -> None:
    shared = nn.Linear(6, 6)
    model = Lambda(lambda m, x: m.b(torch.relu(m.a(torch.relu(m.a(x))))), a=shared, b=nn.Linear(6, 5))
    assert laws(find_symmetries(model, X)) == {law(line) for line in softmax("b")}


def relu_to_the(degree: float) -> nn.Module:
    return two_layers(lambda x: torch.relu(x) ** degree)


def test_the_degree_of_homogeneity_is_found() -> None:
    assert law("rescale a.weight:0 a.bias:0 > 2*b.weight:1") in laws(find_symmetries(relu_to_the(2), X))
    assert law("rescale 2*a.weight:0 2*a.bias:0 > 3*b.weight:1") in laws(find_symmetries(relu_to_the(1.5), X))


def test_a_degree_that_is_no_small_fraction_is_reported_not_claimed() -> None:
    symmetries = find_symmetries(relu_to_the(1.2345), X)
    assert laws(symmetries) == {law(line) for line in softmax("b")}
    assert "not in small integers: +1 a.weight[0]" in symmetries.unmatched["a.weight"]
    assert "-1.23" in symmetries.unmatched["a.weight"]


def grouped(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)
    )


def flat(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


def channels_last_head(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]


def unet(m: Any, x: Tensor) -> Tensor:
    one = torch.relu(m.a(x))
    two = torch.relu(m.b(x))
    return m.c(torch.cat([one, two], 1))  # type: ignore[no-any-return]


def heads_of_three(m: Any, x: Tensor) -> Tensor:
    """Each head holds its queries, keys and values side by side, as in BLOOM."""
    q, k, v = m.qkv(x).unflatten(-1, (2, 3, 4)).transpose(1, 2).unbind(-2)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)).mean(1)  # type: ignore[no-any-return]


def normed_queries(m: Any, x: Tensor) -> Tensor:
    """Queries and keys are normalised within their head, as in Qwen 3."""
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v)
    return m.o(y.transpose(1, 2).flatten(-2)).mean(1)  # type: ignore[no-any-return]


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


STRUCTURES: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "GroupNorm": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)),
        IMAGE,
        [
            "scale 0.weight:0/4 0.bias:0/4",
            "translation 0.bias:0/4",
            "rescale 1.weight:0 1.bias:0 > 4.weight:1/16",
            *softmax("4"),
        ],
    ),
    "LayerNorm after": (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)),
        X,
        [
            "scale 0.weight:whole 0.bias:whole",
            "translation 0.weight:1",
            "translation 0.bias:whole",
            unit("1", "3"),
            *softmax("3"),
        ],
    ),
    "weight norm": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5)),
        X,
        [
            "scale 0.parametrizations.weight.original1:0",
            "rescale 0.bias:0 0.parametrizations.weight.original0:0 > 2.weight:1",
            *softmax("2"),
        ],
    ),
    "PReLU and pooling": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5)),
        IMAGE,
        [unit("0", "5"), *softmax("5")],
    ),
    "grouped convolution": (
        grouped(2),
        IMAGE,
        [
            "rescale 0.weight:0/4 0.bias:0/4 > 2.weight:0/6",
            "rescale 0.weight:0/2~4 0.bias:0/2~4 > 2.weight:1",
            "rescale 2.weight:0 2.bias:0 > 5.weight:1/4",
            *softmax("5"),
        ],
    ),
    "channels last flattened": (
        Lambda(channels_last_head, a=nn.Conv2d(3, 8, 3), b=nn.Linear(128, 5)),
        IMAGE,
        ["rescale a.weight:0 a.bias:0 > b.weight:1/16~8", *softmax("b")],
    ),
    "joined channels": (
        nn.Sequential(
            Lambda(unet, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 6, 3), c=nn.Conv2d(14, 7, 3)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(28, 5),
        ),
        IMAGE,
        [
            "rescale 0.a.weight:0 0.a.bias:0 > 0.c.weight:1[:8]",
            "rescale 0.b.weight:0 0.b.bias:0 > 0.c.weight:1[8:]",
            "rescale 0.c.weight:0 0.c.bias:0 > 3.weight:1/4",
            *softmax("3"),
        ],
    ),
    "heads of q, k, v": (
        Lambda(heads_of_three, qkv=nn.Linear(7, 24), o=nn.Linear(8, 5)),
        torch.randn(4, 3, 7),
        [
            "balance/4 qkv.weight:0[:4]%12 qkv.bias:0[:4]%12 > qkv.weight:0[4:8]%12 qkv.bias:0[4:8]%12",
            "balance/4 qkv.weight:0[8:]%12 qkv.bias:0[8:]%12 > o.weight:1",
            "translation qkv.bias:0[4:8]%12",
            *softmax("o"),
        ],
    ),
    "normalised queries": (
        Lambda(
            normed_queries,
            q=linear(7, 8),
            k=linear(7, 8),
            v=linear(7, 8),
            o=linear(8, 5),
            q_norm=nn.RMSNorm(4),
            k_norm=nn.RMSNorm(4),
        ),
        torch.randn(4, 3, 7),
        [
            "scale q.weight:0/4",
            "scale k.weight:0/4",
            "rescale q_norm.weight:0 > k_norm.weight:0",
            "balance/4 v.weight:0 > o.weight:1",
            "translation o.weight:1",
        ],
    ),
    "a scalar gate": (
        Lambda(
            lambda m, x: m.alpha * torch.tanh(m.a(x)) @ m.w,
            a=linear(6, 8),
            alpha=nn.Parameter(torch.ones(1)),
            w=nn.Parameter(torch.randn(8, 5)),
        ),
        X,
        ["rescale alpha:whole > w:whole", "translation w:0"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    model, example, expected = STRUCTURES[name]
    symmetries = find_symmetries(model, example)
    assert laws(symmetries) == {law(line) for line in expected}
    assert max(symmetries.defects.values()) < 1e-9


def test_multi_head_attention() -> None:
    model = Lambda(
        lambda m, x: m.head(m.attn(x, x, x)[0].mean(1)),
        attn=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 5),
    )
    symmetries = find_symmetries(model, torch.randn(4, 3, 8))
    w, b, o = "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"
    assert {
        law(f"balance/4 {w}:0[:8] {b}:0[:8] > {w}:0[8:16] {b}:0[8:16]"),
        law(f"balance/4 {w}:0[16:] {b}:0[16:] > {o}:1"),
        law(f"translation {b}:0[8:16]"),
        law("balance attn.out_proj.weight:0 attn.out_proj.bias:0 > head.weight:1"),
    } <= laws(symmetries)


def test_a_mask_on_what_a_branch_adds_breaks_its_translation() -> None:
    """LayerNorm takes out what is added to all features, but dropout adds it to some only."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(x + F.dropout(m.branch(x), 0.2, m.training)))  # type: ignore[no-any-return]

    model = Lambda(forward, branch=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 5))
    expected = [unit("norm", "head"), *softmax("head")]
    assert laws(find_symmetries(model, X)) == {law(line) for line in expected}


def test_a_frozen_batch_norm_is_no_normalisation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    assert law("scale 0.weight:0 0.bias:0") in laws(find_symmetries(model, IMAGE))
    assert law("scale 0.weight:0 0.bias:0") in laws(find_symmetries(copy.deepcopy(model).eval(), IMAGE))
    model[1].eval()
    assert not any(symmetry.kind == "scale" for symmetry in find_symmetries(model, IMAGE))


# ---- names and words ------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_modules(found: Callable[[Family], Symmetries]) -> None:
    names = {name: [symmetry.name for symmetry in found(FAMILIES[name])] for name in ("vgg", "vgg_bn", "gpt", "llama")}
    assert "features.5->features.7" in names["vgg"]
    assert {"features.0", "features.0.bias", "classifier.6"} <= set(names["vgg_bn"])
    assert {"blocks.0.attn.qkv[0:12]<->qkv[12:24]", "blocks.1.ln1->attn.qkv"} <= set(names["gpt"])
    assert {"layers.0.attn.v_proj<->o_proj", "layers.0.up->down"} <= set(names["llama"])
    for family in FAMILIES.values():
        symmetries = found(family)
        assert len({symmetry.name for symmetry in symmetries}) == len(symmetries)
        assert all(symmetry.name.isascii() for symmetry in symmetries)
        assert set(symmetries.meanings) == set(symmetries.defects) == {symmetry.name for symmetry in symmetries}


def test_the_table_tells_everything(found: Callable[[Family], Symmetries]) -> None:
    text = repr(found(FAMILIES["gpt"]))
    assert text.startswith("<24 symmetries: ")
    assert "blocks.0.ln1->attn.qkv" in text
    assert "|ln_f.weight[i]|² + |ln_f.bias[i]|² −" in text
    assert "softmax: the same for all classes" in text
    assert "in no symmetry:\n  blocks.0.mlp.0.bias: " in text
    assert "none" in repr(Symmetries())


@every_family
def test_json_gives_back_everything(family: Family, found: Callable[[Family], Symmetries]) -> None:
    symmetries = found(family)
    assert Symmetries.from_json(symmetries.to_json()) == symmetries


def test_a_sequence_that_knows_names(found: Callable[[Family], Symmetries]) -> None:
    symmetries = found(FAMILIES["mlp"])
    assert symmetries[0] is next(iter(symmetries))
    assert symmetries["0->2"] == Rescale("0->2", [Part("0.weight", 0), Part("0.bias", 0)], [Part("2.weight", 1)])
    assert symmetries[1:] == tuple(symmetries)[1:]
    assert [*symmetries, Norm("w", [Part("0.weight", None)])]
    assert symmetries != Symmetries(tuple(symmetries))
    with pytest.raises(KeyError, match="no symmetry is named '0'"):
        symmetries["0"]
    assert isinstance(symmetries["6.bias"], Translation)
    assert not any(isinstance(symmetry, Scale) for symmetry in symmetries)


@pytest.mark.parametrize(
    "text", ["[]", '{"version": 1, "symmetries": [], "meanings": []}', '{"version": 2, "symmetries": []}']
)
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="symmetries file"):
        Symmetries.from_json(text)


# ---- the model never notices ----------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[Any]:
    state: list[Any] = [(name, x.clone()) for name, x in (*model.named_parameters(), *model.named_buffers())]
    state += [(name, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()]
    state += [(name, m.training, getattr(m, "eps", None), getattr(m, "p", None)) for name, m in model.named_modules()]
    return state


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("name", ["vgg_bn", "gpt_tied"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    family = FAMILIES[name]
    model = family.make(eps=1e-5).train(training)
    family.closure(model, 0)().backward()
    example = family.example()
    kept = copy.deepcopy(example)
    before = state_of(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    randomness = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002
    find_symmetries(model, *example)
    assert equal(randomness, [torch.get_rng_state(), random.getstate(), np.random.get_state()])  # noqa: NPY002
    assert equal(before, state_of(model))
    assert equal(kept, example)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert torch.get_default_dtype() == torch.float32


def test_found_twice_is_found_alike(found: Callable[[Family], Symmetries]) -> None:
    family = FAMILIES["llama"]
    torch.manual_seed(5)
    assert laws(find_symmetries(family.make(seed=7), *family.example(seed=8))) == laws(found(family))


# ---- inputs and outputs ---------------------------------------------------------------------------------------------


class Output:
    """What some libraries return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, None),
        lambda z: [z, z.sum()],
        lambda z: {"logits": z, "hidden": 2 * z},
        lambda z: {"only": z},
        Output,
    ],
    ids=["tensor", "tuple", "list", "dict", "dict of one", "object"],
)
def test_outputs(wrap: Callable[[Tensor], Any]) -> None:
    model = Lambda(lambda m, x: wrap(m.net(x)), net=two_layers(F.relu))
    expected = [unit("net.a", "net.b"), *softmax("net.b")]
    assert laws(find_symmetries(model, X)) == {law(line) for line in expected}


def test_an_auxiliary_head_counts() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(m.a(x))
        return m.b(hidden), m.c(hidden)

    model = Lambda(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5))
    assert law("rescale a.weight:0 a.bias:0 > b.weight:1 c.weight:1") in laws(find_symmetries(model, X))


@pytest.mark.parametrize("output", ["text", {"a": X, "b": X}, (1, 2), None], ids=["str", "dict", "tuple", "None"])
def test_other_outputs_are_refused(output: Any) -> None:
    model = Lambda(lambda m, x: (m.a(x), output)[1], a=nn.Linear(6, 5))
    with pytest.raises(TypeError, match=rf"{type(output).__name__}.*wrap the model"):
        find_symmetries(model, X)


def test_inputs_of_every_kind() -> None:
    def forward(m: Any, tokens: Tensor, *, mask: Tensor, extra: dict[str, Tensor], scale: float) -> Tensor:
        x = torch.where(mask[..., None], m.embed(tokens), 0.0) + extra["shift"]
        return m.b(torch.relu(m.a(scale * x))).mean(1)  # type: ignore[no-any-return]

    model = Lambda(forward, embed=nn.Embedding(9, 6), a=nn.Linear(6, 8), b=nn.Linear(8, 5))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    symmetries = find_symmetries(
        model, torch.zeros(2, 3, dtype=torch.long), mask=mask, extra={"shift": torch.ones(2, 3, 6)}, scale=0.5
    )
    assert laws(symmetries) == {law(line) for line in [unit("a", "b"), *softmax("b")]}
    assert set(symmetries.unmatched) == {"embed.weight"}


def test_an_example_without_a_batch() -> None:
    assert laws(find_symmetries(two_layers(F.relu), torch.randn(6))) == {
        law(line) for line in [unit("a", "b"), *softmax("b")]
    }


def test_dense_predictions_have_their_classes_on_axis_1() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))
    expected = [unit("0", "2"), "translation 2.weight:1", "translation 2.bias:whole"]
    assert laws(find_symmetries(model, IMAGE)) == {law(line) for line in expected}


def test_parameters_that_take_no_part_say_why() -> None:
    model = Lambda(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 5), c=nn.Linear(2, 2))
    model.get_parameter("a.weight").requires_grad_(False)
    model.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    symmetries = find_symmetries(model, X)
    assert symmetries.unmatched["a.weight"] == "frozen: requires_grad is False"
    assert symmetries.unmatched["nothing"] == "it has no elements"
    assert symmetries.unmatched["c.bias"] == "the loss does not see it: the forward pass does not read it"
    assert set(symmetries.unmatched) >= {"a.weight", "nothing", "c.weight", "c.bias"}


def test_an_output_without_gradient_leaves_every_parameter_over() -> None:
    symmetries = find_symmetries(Lambda(lambda m, x: x, a=nn.Linear(6, 5)), X)
    assert len(symmetries) == 0
    unread = "the loss does not see it: the forward pass does not read it"
    assert symmetries.unmatched == dict.fromkeys(["a.weight", "a.bias"], unread)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    find_symmetries(two_layers(F.relu), X, progress=True)
    out, err = capsys.readouterr()
    assert "finding symmetries" in err
    assert out == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got function"):
        find_symmetries(F.relu, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        find_symmetries(nn.ReLU(), X)
    with pytest.raises(ValueError, match="loss='hinge' is unknown"):
        find_symmetries(two_layers(F.relu), X, loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'0\.weight' is lazy"):
        find_symmetries(nn.Sequential(nn.LazyLinear(3)), X)
    with pytest.raises(RuntimeError, match="not finite"):
        find_symmetries(two_layers(torch.log), X)
    with pytest.raises(ValueError, match=r"'a\.weight' is on the meta device"):
        find_symmetries(two_layers(F.relu).to("meta"), X)
    with pytest.raises(ValueError, match=r'one class, and .* give loss="mse"'):
        find_symmetries(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)), X)
    with pytest.raises(TypeError, match="is a ScriptModule"):
        find_symmetries(torch.jit.trace(two_layers(F.relu), X), X)


def test_a_model_that_changes_from_call_to_call_is_refused() -> None:
    calls = iter(range(1000))
    counting = Lambda(lambda m, x: m.a(x) * (1 + next(calls)), a=nn.Linear(6, 5))
    with pytest.raises(RuntimeError, match="not deterministic"):
        find_symmetries(counting, X)
    seeded = two_layers(lambda x: F.dropout(torch.relu(x), 0.3, training=True))
    assert law(unit("a", "b")) in laws(find_symmetries(seeded, X))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = two_layers(F.relu)
    model.hidden = model.a(X)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="Lambda cannot be copied"):
        find_symmetries(model, X)


def test_without_verification_nothing_is_said_of_defects() -> None:
    symmetries = find_symmetries(two_layers(F.relu), X, verify=False)
    assert len(symmetries) == 3
    assert symmetries.defects == {}


@pytest.mark.parametrize("name", ["gpt", "gpt_tied", "llama"])
def test_large_models_are_differentiated_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws of whole tensors come out alike where they are found with as many forward passes as there are tensors."""

    def collect_as_if_large(sums: Sums, n_losses: int) -> None:
        collect(sums, n_losses)
        sums.large = True

    def backward(sums: Sums, n_losses: int) -> None:
        raise AssertionError("went backward")

    collect = Sums._collect
    monkeypatch.setattr(Sums, "_shrink", lambda sums, batch: None)
    monkeypatch.setattr(Sums, "_collect", collect_as_if_large)
    monkeypatch.setattr(Sums, "_collect_more", backward)
    family = FAMILIES[name]
    assert laws(find_symmetries(family.make(), *family.example())) == {law(line) for line in EXPECTED[name]}


def test_what_fails_verification_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    from noetherperf import detect

    monkeypatch.setattr(detect, "TOLERANCE", 1e-30)
    symmetries = find_symmetries(two_layers(F.relu), X)
    assert "a->b" in symmetries.rejected
    assert "above 1e-30 " not in symmetries.rejected["a->b"]
    assert "a.weight" in symmetries.unmatched


# ---- linear algebra -------------------------------------------------------------------------------------------------


def test_relations_are_told_from_numbers() -> None:
    generator = np.random.default_rng(0)
    a, b, c = generator.normal(size=(3, 40))
    columns = np.stack([a, 2 * a, b, a + b, c, 1e-8 * (b - c)], axis=1)
    found, rest = integer_relations(null_space(columns[:, :5]))
    assert sorted(tuple(row.tolist()) for row in found) == [(1, 0, 1, -1, 0), (2, -1, 0, 0, 0)]
    assert len(rest) == 0
    assert len(null_space(columns)) == 3
    assert independent(columns) == [0, 2, 4]
    assert integer_relations(null_space(np.stack([a, b, c], 1)))[0] == []


def test_the_fewest_terms_are_found() -> None:
    """Five columns of one space: the shortest relations, not those that elimination gives first."""
    truth = np.array([[1.0, -1, 0, 0, 0], [0, 0, 1, -1, 0], [0, 1, 0, 1, -2]])
    mixed = np.random.default_rng(1).normal(size=(3, 3)) @ truth
    found, rest = integer_relations(mixed)
    assert len(rest) == 0
    assert sorted(np.count_nonzero(row) for row in found) == [2, 2, 3]


def test_laws_through_an_embedding_with_padding() -> None:
    """No gradient reaches the row of padding, which therefore must stay 0."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.read = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 4)

        def forward(self, words: Tensor) -> Tensor:
            read: Tensor = self.read(self.table(words)).mean(1)
            return read

    torch.manual_seed(0)
    found = find_symmetries(Bag(), torch.randint(9, (8, 5)))
    assert [law.kind for law in found if {part.parameter for part in law.parts} == {"table.weight", "read.weight"}] == [
        "balance"
    ]
    assert " kFLOP a step" in str(found)
    assert "bytesFLOP" not in str(find_symmetries(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(8, 2)))
