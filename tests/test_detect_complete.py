"""Nothing along an axis is missed and nothing false is claimed, by the measure of completeness.py; and models with
awkward inputs, operations and outputs are searched."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from completeness import completeness
from families import FAMILIES, Family
from test_detect import Lambda, law, laws, linear, softmax, two_layers, unit
from torch import Tensor, nn
from torch.nn import functional as F

from noetherperf import Part, Symmetries, Translation, find_symmetries

Draw = Callable[[int, torch.Generator], tuple[Tensor, ...]]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_are_complete(family: Family) -> None:
    symmetries = find_symmetries(family.make(), *family.example(), loss=family.loss_name)  # type: ignore[arg-type]
    report = completeness(family.make(), family.inputs, family.loss_name, symmetries)
    assert report.missed == []
    assert report.false == []


def test_the_measure_knows_what_is_missed_and_what_is_false() -> None:
    family = FAMILIES["mlp"]
    found = find_symmetries(family.make(), *family.example())
    report = completeness(family.make(), family.inputs, "cross_entropy", found[1:])
    assert len(report.missed) == 9, report.missed
    assert "norm: +1 0.weight[0]:0 +1 0.bias[0]:0 -1 2.weight[1]:0" in report.missed
    wrong = [*found, Translation("wrong", [Part("0.bias", 0)])]
    assert len(completeness(family.make(), family.inputs, "cross_entropy", wrong).false) == 9


# ---- laws between slices, folds and whole tensors -------------------------------------------------------------------


def draws(*sizes: int) -> Draw:
    return lambda n, generator: (torch.randn(n, *sizes, generator=generator),)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, tokens, heads, size] each -> [batch, tokens, heads · size]."""
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return y.transpose(1, 2).flatten(-2)


def multi_query(m: Any, x: Tensor) -> Tensor:
    """One key and one value head for four query heads, cut out of the axis of heads (Falcon)."""
    heads = m.qkv(x).unflatten(-1, (6, 4))
    q, k, v = heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]
    return m.head(torch.tanh(m.o(attend(q, k.expand_as(q), v.expand_as(q)))))  # type: ignore[no-any-return]


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    """Two query heads, their key head and their value head side by side, twice."""
    heads = m.qkv(x).unflatten(-1, (2, 4, 4))
    q, k, v = heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]
    y = attend(*(t.expand_as(q).flatten(-3, -2) for t in (q, k, v)))
    return m.head(torch.tanh(m.o(y)))  # type: ignore[no-any-return]


def turned(x: Tensor) -> Tensor:
    """Rotary positions for the first half of each head, in pairs two apart; the rest as it is."""
    position = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
    a, b, rest = x.split([2, 2, 4], -1)
    angle = position / torch.tensor([1.0, 2.0], dtype=x.dtype)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def partial_rotary(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (2, 8)) for f in (m.q, m.k, m.v))
    return m.o(attend(turned(q), turned(k), v))  # type: ignore[no-any-return]


class Cross(nn.Module):
    """Queries of one normalised stream, keys and values of another, in one fused map."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.m = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.n(x), self.m(y)
        return self.head(torch.tanh(self.attn(x, y, y, need_weights=False)[0]))  # type: ignore[no-any-return]


class GroupNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.GroupNorm(2, 10), nn.Conv2d(10, 11, 1), nn.Conv2d(11, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(self.norm(x))))  # type: ignore[no-any-return]


def shuffled(m: Any, x: Tensor) -> Tensor:
    """The channels of two branches take turns, as after a channel shuffle."""
    y = torch.stack([torch.relu(m.a(x)), torch.relu(m.b(x))], -1).flatten(1)
    return m.o(torch.tanh(m.c(y)))  # type: ignore[no-any-return]


def gated_heads(m: Any, x: Tensor) -> Tensor:
    u = m.x(x).unflatten(-1, (3, 4))
    y = u * torch.sigmoid(torch.einsum("nhi,hij->nhj", u, m.gate))
    return m.head(torch.tanh(m.o(y.flatten(1))))  # type: ignore[no-any-return]


def cut(begin: str) -> str:
    """One projection of nn.MultiheadAttention: a slice of weight and bias."""
    return f"a.in_proj_weight:0{begin} a.in_proj_bias:0{begin}"


def parallel(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.relu(m.a(x)))  # type: ignore[no-any-return]


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], Draw, list[str]]] = {
    "recurrent gates": (
        lambda: Lambda(lambda m, x: m.o(m.r(x)[0]), r=nn.GRU(4, 5, batch_first=True), o=nn.Linear(5, 3)),
        draws(6, 4),
        ["translation r.bias_ih_l0:0[:5] − r.bias_hh_l0:0[:5]", "translation r.bias_ih_l0:0[5:10] − r.bias_hh_l0:0[5:10]"],
    ),
    "GLU": (
        lambda: Lambda(lambda m, x: m.o(F.glu(m.a(x))), a=nn.Linear(6, 10), o=nn.Linear(5, 4)),
        draws(6),
        ["rescale a.weight:0[:5] a.bias:0[:5] > o.weight:1"],
    ),
    "multi-query": (
        lambda: Lambda(multi_query, qkv=linear(9, 24), o=linear(16, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        ["rescale qkv.weight:0[:16]/4~4 > qkv.weight:0[16:20]", "rescale qkv.weight:0[20:] > o.weight:1/4~4"],
    ),
    "grouped queries in one map": (
        lambda: Lambda(grouped_queries, qkv=linear(9, 32), o=linear(16, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        [
            "rescale qkv.weight:0[:8]%16/2~4 > qkv.weight:0[8:12]%16",
            "rescale qkv.weight:0[12:]%16 > o.weight:1/2~4",
        ],
    ),
    "partial rotary": (
        lambda: Lambda(partial_rotary, q=linear(9, 16), k=linear(9, 16), v=linear(9, 16), o=nn.Linear(16, 3)),
        draws(5, 9),
        [
            "rescale q.weight:0[4:]%8 > k.weight:0[4:]%8",
            "rescale q.weight:0[:4]%8/2~2 > k.weight:0[:4]%8/2~2",
            "rescale v.weight:0 > o.weight:1",
        ],
    ),
    "cross attention": (
        Cross,
        lambda n, g: (torch.randn(n, 5, 8, generator=g), torch.randn(n, 4, 8, generator=g)),
        ["rescale n.weight:whole n.bias:whole > attn.in_proj_weight:0[:8]/8"],
    ),
    "key bias": (
        lambda: Lambda(
            lambda m, x, y: m.o(m.a(x, y, y)[0]),
            a=nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True, add_bias_kv=True),
            o=nn.Linear(8, 3),
        ),
        lambda n, g: (torch.randn(n, 5, 8, generator=g), torch.randn(n, 4, 5, generator=g)),
        ["translation a.in_proj_bias:0[8:16] a.bias_k:2"],
    ),
    "GroupNorm stream": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 10, 1),
            nn.Sequential(GroupNormBlock(), GroupNormBlock()),
            nn.GroupNorm(2, 10),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(90, 4),
        ),
        draws(3, 3, 3),
        ["scale 0.weight:0/5 0.bias:0/5 1.0.b.weight:0/5 1.0.b.bias:0/5 1.1.b.weight:0/5 1.1.b.bias:0/5"],
    ),
    "channel shuffle": (
        lambda: Lambda(shuffled, a=nn.Linear(4, 5), b=nn.Linear(4, 5), c=nn.Linear(10, 7), o=nn.Linear(7, 3)),
        draws(4),
        [
            "rescale a.weight:0 a.bias:0 > c.weight:1[:1]%2",
            "rescale b.weight:0 b.bias:0 > c.weight:1[1:]%2",
        ],
    ),
    "a gate in each head": (
        lambda: Lambda(
            gated_heads, x=linear(5, 12), gate=nn.Parameter(torch.randn(3, 4, 4)), o=nn.Linear(12, 7), head=nn.Linear(7, 4)
        ),
        draws(5),
        ["rescale o.weight:1/4 gate:0 > x.weight:0/4"],
    ),
    "a shift of all logits": (
        lambda: Lambda(lambda m, x: m.o(x) + m.t, t=nn.Parameter(torch.zeros(1)), o=nn.Linear(5, 3)),
        draws(5),
        ["translation t:whole"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_complete(name: str) -> None:
    build, draw, expected = STRUCTURES[name]
    torch.manual_seed(0)
    model = build()
    symmetries = find_symmetries(model, *draw(4, torch.Generator().manual_seed(0)))
    found = laws(symmetries)
    assert [line for line in expected if law(line) not in found and flipped(law(line)) not in found] == []
    report = completeness(model, draw, "cross_entropy", symmetries)
    assert report.missed == []
    assert report.false == []


def flipped(one: tuple[str, frozenset[Part]]) -> tuple[str, frozenset[Part]]:
    """The same law with the other sign."""
    kind, parts = one
    return kind, frozenset(Part.from_dict(p.to_dict() | {"parameter": p.parameter, "weight": -p.weight}) for p in parts)
