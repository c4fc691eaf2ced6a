"""Nothing along an axis is missed and nothing false is claimed, by the measure of completeness.py; and models with
awkward inputs, operations and outputs are searched."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from completeness import completeness
from families import FAMILIES, Family
from test_detect import Lambda, law, laws, linear, unit
from torch import Tensor, nn
from torch.nn import functional as F

from noetherperf import Balance, Part, Rescale, Translation, find_symmetries

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
    assert len(report.missed) == 9
    assert "norm: +1 0.weight[0]:1 +1 0.bias[0]:1 -1 2.weight[1]:1" in report.missed
    wrong = [*found, Translation("wrong", [Part("0.bias", 0)])]
    assert len(completeness(family.make(), family.inputs, "cross_entropy", wrong).false) == 9


def test_the_measure_knows_matrices() -> None:
    """Diagonals alone miss the other entries of linear pairs and heads; through ReLU and rotary positions, matrices are
    false."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x)[..., None, :] for f in (m.q, m.k, m.v))
        y = m.b(m.a(attend(turned(q), turned(k), v)))
        return m.d(torch.relu(m.c(y)))  # type: ignore[no-any-return]

    shapes = {"q": (3, 8), "k": (3, 8), "v": (3, 5), "a": (5, 3), "b": (3, 4), "c": (4, 4), "d": (4, 3)}
    model = Lambda(forward, **{name: linear(*shape) for name, shape in shapes.items()})
    found = find_symmetries(model, torch.randn(4, 4, 3))
    assert [s.name for s in found if isinstance(s, Balance)] == ["q[4:]<->k[4:]", "v<->a", "a<->b", "b<->c"]
    report = completeness(model, draws(4, 3), "cross_entropy", found)
    assert report.missed == []
    assert report.false == []
    diagonals = find_symmetries(model, torch.randn(4, 4, 3), matrix=False)
    report = completeness(model, draws(4, 3), "cross_entropy", diagonals)
    assert len(report.missed) == 4 * 3 + 5 * 4 + 3 * 2 + 4 * 3
    assert all(line.startswith("matrix: ") for line in report.missed)
    assert report.false == []
    (turning,) = [s for s in found if "q[0:4]" in s.name]
    false = [Balance(f"all {s.name}", s.inward, s.outward) for s in (turning, found["c->d"])]  # type: ignore[attr-defined]
    assert len(completeness(model, draws(4, 3), "cross_entropy", [*found, *false]).false) == 2 * 1 + 4 * 3


# ---- laws between slices, folds and whole tensors -------------------------------------------------------------------


def draws(*sizes: int) -> Draw:
    return lambda n, generator: (torch.randn(n, *sizes, generator=generator),)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, tokens, heads, size] each -> [batch, tokens, heads · size]."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
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


def shared_key(m: Any, x: Tensor) -> Tensor:
    """Each head holds its queries and its values side by side; one key serves all."""
    q, v = m.qv(x).unflatten(-1, (-1, 8)).split(4, -1)
    return m.head(torch.tanh(m.o(attend(q, m.k(x)[..., None, :].expand_as(q), v))))  # type: ignore[no-any-return]


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


def shuffled_by_view(m: Any, x: Tensor) -> Tensor:
    """One half stays, the other is mapped, and the channels of both take turns (ShuffleNet)."""
    x, y = torch.relu(m.a(x)).chunk(2, 1)
    y = torch.cat([x, torch.relu(m.b(y))], 1).view(-1, 2, 4).transpose(1, 2).flatten(1)
    return m.o(torch.tanh(m.c(y)))  # type: ignore[no-any-return]


def gated_heads(m: Any, x: Tensor) -> Tensor:
    u = m.x(x).unflatten(-1, (3, 4))
    y = u * torch.sigmoid(torch.einsum("nhi,hij->nhj", u, m.gate))
    return m.head(torch.tanh(m.o(y.flatten(1))))  # type: ignore[no-any-return]


def block(n: int, middle: int, out: int) -> nn.Sequential:
    """A bottleneck. Behind a middle of one unit, the last map's weights are divided out one by one."""
    return nn.Sequential(
        nn.Conv2d(n, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, out, 1, bias=False),
        nn.BatchNorm2d(out),
    )


def heads_last(m: Any, x: Tensor) -> Tensor:
    """The number of the head is the fastest index, so that a head's units are four apart."""
    q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(-1, -2) for f in (m.q, m.k, m.v))
    return m.head(torch.tanh(m.o(attend(q, k, v).unflatten(-1, (4, 3)).transpose(-1, -2).flatten(-2))))  # type: ignore[no-any-return]


def towers(m: Any, x: Tensor) -> Tensor:
    """Units of one map behind gates of their own: two towers that differ in width."""
    wide, narrow = m.a(x).split([8, 4], -1)
    gates = torch.sigmoid(x[:, :2])
    return m.head(torch.tanh(m.o(torch.cat([wide * gates[:, :1], narrow * gates[:, 1:]], -1))))  # type: ignore[no-any-return]


def latent(m: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of low rank; one key with rotary positions for both heads (DeepSeek's attention)."""

    def placed(z: Tensor) -> Tensor:
        a, b = z.chunk(2, -1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, turning_q = m.q_b(m.q_a(x)).unflatten(-1, (2, 6)).split([4, 2], -1)
    compressed, turning_k = m.kv_a(x).split([5, 2], -1)
    k, v = m.kv_b(compressed).unflatten(-1, (2, 7)).split([4, 3], -1)
    turning_k = placed(turning_k[..., None, :]).expand_as(turning_q)
    y = attend(torch.cat([q, placed(turning_q)], -1), torch.cat([k, turning_k], -1), v)
    return m.head(torch.tanh(m.o(y)))  # type: ignore[no-any-return]


def bottlenecks(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x) + m.skip(x))
    return m.o(torch.relu(x + m.b(x)).mean((-2, -1)))  # type: ignore[no-any-return]


def narrow(m: Any, x: Tensor) -> Tensor:
    """Bottlenecks of three maps through one unit. What is left of the last map's gradient is rounding, of any size."""
    x = torch.relu(m.norm(m.stem(x)))
    for b, skip in ((m.a, m.skip_a), (m.b, m.skip_b)):
        x = torch.relu(b(x) + skip(x))
    return m.o(x.mean((-2, -1)))  # type: ignore[no-any-return]


def narrow_block(n: int, out: int) -> nn.Sequential:
    middle = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU())
    first, last = list(block(n, 1, out)), list(block(n, 1, out))
    return nn.Sequential(*first[:3], *middle, *last[3:])


def shortcut(n: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n, out, 1, bias=False), nn.BatchNorm2d(out))


def dense(m: Any, x: Tensor) -> Tensor:
    """Each block reads all earlier ones, through a normalisation of its own (DenseNet)."""
    x = torch.relu(m.n0(m.c0(x)))
    for c, n in ((m.c1, m.n1), (m.c2, m.n2)):
        x = torch.cat([x, c(torch.relu(n(x)))], 1)
    return m.o(torch.relu(m.n(x)).mean((-2, -1)))  # type: ignore[no-any-return]


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], Draw, list[str]]] = {
    "recurrent gates": (
        lambda: Lambda(lambda m, x: m.o(m.r(x)[0]), r=nn.GRU(4, 5, batch_first=True), o=nn.Linear(5, 3)),
        draws(6, 4),
        [
            "translation r.bias_ih_l0:0[:5] − r.bias_hh_l0:0[:5]",
            "translation r.bias_ih_l0:0[5:10] − r.bias_hh_l0:0[5:10]",
        ],
    ),
    "GLU": (
        lambda: Lambda(lambda m, x: m.o(F.glu(m.a(x))), a=nn.Linear(6, 10), o=nn.Linear(5, 4)),
        draws(6),
        ["rescale a.weight:0[:5] a.bias:0[:5] > o.weight:1"],
    ),
    "multi-query": (
        lambda: Lambda(multi_query, qkv=linear(9, 24), o=linear(16, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        ["balance qkv.weight:0[:16]/4~4 > qkv.weight:0[16:20]", "balance qkv.weight:0[20:] > o.weight:1/4~4"],
    ),
    "grouped queries in one map": (
        lambda: Lambda(grouped_queries, qkv=linear(9, 32), o=linear(16, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        [
            "balance/4 qkv.weight:0[:8]%16/2~4 > qkv.weight:0[8:12]%16",
            "balance/4 qkv.weight:0[12:]%16 > o.weight:1/2~4",
        ],
    ),
    "one key for the queries of every head": (
        lambda: Lambda(shared_key, qv=linear(9, 24), k=linear(9, 4), o=linear(12, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        ["balance qv.weight:0[:4]%8/3~4 > k.weight:0", "balance/4 qv.weight:0[4:]%8 > o.weight:1"],
    ),
    "one key for the queries of more heads": (
        lambda: Lambda(shared_key, qv=linear(9, 56), k=linear(9, 4), o=linear(28, 5), head=nn.Linear(5, 3)),
        draws(5, 9),
        ["balance qv.weight:0[:4]%8/7~4 > k.weight:0", "balance/4 qv.weight:0[4:]%8 > o.weight:1"],
    ),
    "partial rotary": (
        lambda: Lambda(partial_rotary, q=linear(9, 16), k=linear(9, 16), v=linear(9, 16), o=nn.Linear(16, 3)),
        draws(5, 9),
        [
            "balance/4 q.weight:0[4:]%8 > k.weight:0[4:]%8",
            "rescale q.weight:0[:4]%8/2~2 > k.weight:0[:4]%8/2~2",
            "balance/8 v.weight:0 > o.weight:1",
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
    "channel shuffle by a view": (
        lambda: Lambda(shuffled_by_view, a=nn.Linear(4, 8), b=nn.Linear(4, 4), c=nn.Linear(8, 7), o=nn.Linear(7, 3)),
        draws(4),
        [
            "rescale a.weight:0[:4] a.bias:0[:4] > c.weight:1[:1]%2",
            "rescale b.weight:0 b.bias:0 > c.weight:1[1:]%2",
        ],
    ),
    "a gate in each head": (
        lambda: Lambda(
            gated_heads,
            x=linear(5, 12),
            gate=nn.Parameter(torch.randn(3, 4, 4)),
            o=nn.Linear(12, 7),
            head=nn.Linear(7, 4),
        ),
        draws(5),
        ["rescale o.weight:1/4 gate:0 > x.weight:0/4"],
    ),
    "bottlenecks of one unit and of two": (
        lambda: Lambda(
            bottlenecks,
            a=block(3, 1, 4),
            skip=shortcut(3, 4),
            b=block(4, 2, 4),
            o=nn.Linear(4, 5),
        ),
        draws(3, 5, 5),
        ["translation a.4.bias:0 − skip.1.bias:0", "translation a.3.weight:0", "scale a.0.weight:whole"],
    ),
    "bottlenecks of three maps through one unit": (
        lambda: Lambda(
            narrow,
            stem=nn.Conv2d(3, 6, 3, 2, 1, bias=False),
            norm=nn.BatchNorm2d(6),
            a=narrow_block(6, 4),
            skip_a=shortcut(6, 4),
            b=narrow_block(4, 5),
            skip_b=shortcut(4, 5),
            o=nn.Linear(5, 4),
        ),
        draws(3, 16, 16),
        ["scale a.1.weight:whole a.1.bias:whole", "scale a.4.weight:whole a.4.bias:whole"],
    ),
    "dense blocks": (
        lambda: Lambda(
            dense,
            c0=nn.Conv2d(3, 4, 3, bias=False),
            n0=nn.BatchNorm2d(4),
            n1=nn.BatchNorm2d(4),
            c1=nn.Conv2d(4, 2, 3, padding=1, bias=False),
            n2=nn.BatchNorm2d(6),
            c2=nn.Conv2d(6, 2, 3, padding=1, bias=False),
            n=nn.BatchNorm2d(8),
            o=nn.Linear(8, 5),
        ),
        draws(3, 6, 6),
        ["scale n0.weight:0 n0.bias:0", "scale c0.weight:0", "scale c1.weight:0", "scale c2.weight:0"],
    ),
    "heads last": (
        lambda: Lambda(
            heads_last, q=linear(9, 12), k=linear(9, 12), v=linear(9, 12), o=linear(12, 7), head=linear(7, 3)
        ),
        draws(5, 9),
        [f"balance {a}.weight:0[3:]%4 > {b}" for a, b in (("q", "k.weight:0[3:]%4"), ("v", "o.weight:1[3:]%4"))],
    ),
    "towers of different width": (
        lambda: Lambda(towers, a=nn.Linear(5, 12), o=linear(12, 7), head=linear(7, 3)),
        draws(5),
        [
            "balance a.weight:0[:8] a.bias:0[:8] > o.weight:1[:8]",
            "balance a.weight:0[8:] a.bias:0[8:] > o.weight:1[8:]",
        ],
    ),
    "latent attention": (
        lambda: Lambda(
            latent,
            q_a=linear(9, 4),
            q_b=linear(4, 12),
            kv_a=linear(9, 7),
            kv_b=linear(5, 14),
            o=linear(6, 8),
            head=linear(8, 3),
        ),
        draws(5, 9),
        [
            "balance q_a.weight:0 > q_b.weight:1",
            "balance kv_a.weight:0[:5] > kv_b.weight:1",
            "balance/4 q_b.weight:0[:4]%6 > kv_b.weight:0[:4]%7",
            "balance/3 kv_b.weight:0[4:]%7 > o.weight:1",
        ],
    ),
    "a shift of all logits": (
        lambda: Lambda(lambda m, x: m.o(x) + m.t, t=nn.Parameter(torch.zeros(1)), o=nn.Linear(5, 3)),
        draws(5),
        ["translation t:whole"],
    ),
}


SEEDS = {"bottlenecks of three maps through one unit": 1}  # where rounding takes the place of a gradient


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_complete(name: str) -> None:
    build, draw, expected = STRUCTURES[name]
    torch.manual_seed(SEEDS.get(name, 0))
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


def test_laws_of_matrices_are_told() -> None:
    """Two heads of four units mix inside each; units between linear maps mix all; behind a ReLU none does."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (m.q, m.k, m.v))
        return m.d(torch.relu(m.c(m.b(torch.tanh(m.o(attend(q, k, v)))))))  # type: ignore[no-any-return]

    shapes = {"q": (6, 8), "k": (6, 8), "v": (6, 8), "o": (8, 5), "b": (5, 7), "c": (7, 9), "d": (9, 3)}
    model = Lambda(forward, **{name: nn.Linear(*shape) for name, shape in shapes.items()})
    sizes = {"q<->k": 4, "v<->o": 4, "b<->c": 7}
    diagonals = {name.replace("<", ""): n for name, n in sizes.items()}

    def told(how: str, **options: Any) -> dict[str, int]:
        """Name -> the units that mix, of laws that are claimed in such a way."""
        found = find_symmetries(model, torch.randn(4, 5, 6), **options)
        assert "c->d" in found.meanings
        assert bool(found.costs) == any(isinstance(symmetry, Balance) for symmetry in found)
        of_matrices = {
            name: text for name, text in found.meanings.items() if f"a law of matrices, claimed {how}" in text
        }
        assert all(isinstance(found[name], Balance if how == "whole" else Rescale) for name in of_matrices)
        return {name: int(text.partition("any mix of ")[2].split()[0]) for name, text in of_matrices.items()}

    assert told("whole") == told("whole", matrix="both") == told("whole", verify=False) == sizes
    assert told("unit by unit") == {}
    assert told("unit by unit", matrix=False) == told("unit by unit", matrix="both") == diagonals
    assert told("whole", largest_matrix=4) == {"q<->k": 4, "v<->o": 4}
    assert told("unit by unit (more than largest_matrix=4)", largest_matrix=4) == {"b->c": 7}


# ---- losses and outputs ---------------------------------------------------------------------------------------------


def cross_entropy_as_a_function(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


def test_a_loss_as_a_function_gives_the_same_laws() -> None:
    """One scalar has one independent gradient a batch, so there are more batches."""
    for name in ("mlp", "vgg_bn"):
        family = FAMILIES[name]
        plain = find_symmetries(family.make(), *family.example())
        given = find_symmetries(family.make(), *family.example(), loss=cross_entropy_as_a_function)
        assert laws(given) == laws(plain)
        assert given.outputs == {}
        assert not any("integers" in reason for reason in given.unmatched.values())


def test_a_function_may_read_any_output() -> None:
    def forward(m: Any, x: Tensor) -> list[dict[str, Tensor]]:
        hidden = torch.relu(m.a(x))
        return [{"scores": s, "boxes": b} for s, b in zip(m.b(hidden), m.c(hidden), strict=True)]

    def loss(out: list[dict[str, Tensor]]) -> Tensor:
        losses = [F.cross_entropy(o["scores"][None], torch.tensor([1])) + o["boxes"].square().mean() for o in out]
        return torch.stack(losses).sum()

    model = Lambda(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 3))
    found = laws(find_symmetries(model, torch.randn(4, 5), loss=loss))
    assert found == {
        law(line)
        for line in (
            "rescale a.weight:0 a.bias:0 > b.weight:1 c.weight:1",
            "translation b.weight:1",
            "translation b.bias:whole",
        )
    }
    with pytest.raises(TypeError, match=r"one number as a tensor, got shape \(4, 4\)"):
        find_symmetries(nn.Linear(3, 4), torch.randn(4, 3), loss=lambda z: z)


Outputs = collections.namedtuple("Outputs", ["logits", "aux_logits"])


@pytest.mark.parametrize("wrap", [Outputs, lambda z, y: {"out": z, "aux": y}], ids=["namedtuple", "dict"])
def test_auxiliary_heads_count(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        hidden = torch.relu(m.a(x))
        return wrap(m.b(hidden), m.c(hidden))

    model = Lambda(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 4))
    symmetries = find_symmetries(model, torch.randn(4, 5))
    assert law("rescale a.weight:0 a.bias:0 > b.weight:1 c.weight:1") in laws(symmetries)
    assert set(symmetries.outputs.values()) == {"read"}


def test_outputs_that_are_not_read_are_told() -> None:
    model = Lambda(lambda m, x: {"logits": m.a(x), "boxes": m.b(x)}, a=nn.Linear(3, 4), b=nn.Linear(3, 2))
    symmetries = find_symmetries(model, torch.randn(4, 3))
    assert symmetries.outputs["logits"] == "read"
    assert "may break these laws" in symmetries.outputs["boxes"]
    assert "boxes: not read" in str(symmetries)
    assert set(symmetries.unmatched) == {"b.weight", "b.bias"}


def test_the_axis_of_classes_is_where_parameters_write_them() -> None:
    convolution = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1))
    for model, example, axis in (
        (convolution, torch.randn(4, 3, 9), "axis 1"),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(4, 9, 3), "the last axis"),
    ):
        symmetries = find_symmetries(model, example)
        assert {law("translation 2.weight:1"), law("translation 2.bias:whole")} <= laws(symmetries)
        assert axis in symmetries.outputs["output"]


# ---- inputs and operations ------------------------------------------------------------------------------------------


def test_a_mask_of_minus_infinity() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), attn_mask=mask))  # type: ignore[no-any-return]

    model = Lambda(forward, q=linear(6, 4), k=linear(6, 4), v=linear(6, 4), o=linear(4, 3))
    found = laws(find_symmetries(model, torch.randn(2, 5, 6), torch.full((5, 5), -torch.inf).triu(1)))
    assert {law("balance q.weight:0 > k.weight:0"), law("balance v.weight:0 > o.weight:1")} <= found


def test_sorted_lengths_stay() -> None:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return m.o(m.r(packed)[1][0])  # type: ignore[no-any-return]

    model = Lambda(forward, r=nn.GRU(4, 5, batch_first=True), o=nn.Linear(5, 3))
    found = laws(find_symmetries(model, torch.randn(3, 6, 4), torch.tensor([6, 4, 2])))
    assert law("translation o.weight:1") in found


def test_one_tensor_of_ids_for_two_vocabularies() -> None:
    model = Lambda(
        lambda m, ids: m.o(m.a(ids) + m.b(ids)).mean(1), a=nn.Embedding(30, 6), b=nn.Embedding(7, 6), o=linear(6, 3)
    )
    found = laws(find_symmetries(model, torch.randint(7, (2, 5))))
    assert law("balance a.weight:1 b.weight:1 > o.weight:1") in found


class Average(nn.Module):
    """A moving average that the forward pass updates and reads."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = linear(5, 6), linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        self.mean.mul_(0.9).add_(0.1 * hidden.mean(0).detach())
        return self.o(hidden - self.mean)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_changes_in_forward() -> None:
    assert laws(find_symmetries(Average(), torch.randn(4, 5))) == {law("translation o.weight:1")}
    legacy = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))
    assert law("rescale 0.bias:0 0.weight_g:0 > 2.weight:1") in laws(find_symmetries(legacy, torch.randn(4, 5)))


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has no grouped product of matrices")
def test_experts_in_one_product() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x, ends = m.i(x), torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
        hidden = torch.relu(torch._grouped_mm(x.bfloat16(), m.a.bfloat16(), offs=ends))
        return m.o(torch._grouped_mm(hidden, m.b.bfloat16(), offs=ends).to(m.o.weight.dtype))  # type: ignore[no-any-return]

    a, b = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.randn(2, 16, 8))
    found = laws(find_symmetries(Lambda(forward, i=linear(5, 8), a=a, b=b, o=linear(8, 3)), torch.randn(16, 5)))
    assert {law("balance i.weight:0 > a:1"), law("rescale a:2 > b:1")} <= {*found, *map(flipped, found)}


def normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)  # type: ignore[no-any-return]


#: x, w -> a normalisation's output, and the offset of w.
GAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "1 + w": (lambda x, w: (1 + w) * normalised(x), 1.0),
    "of a cast": (lambda x, w: normalised(x) * (1.0 + w.float()), 1.0),
    "w - 2": (lambda x, w: normalised(x) * (w[None, None] - 2), -2.0),
    "2 - w": (lambda x, w: normalised(x) * (2 - w), -2.0),
    "x + w x": (lambda x, w: normalised(x) + w * normalised(x), 1.0),
    "LayerNorm1p": (lambda x, w: F.layer_norm(x, (6,), w + 1.0), 1.0),
}


@pytest.mark.parametrize("name", GAINS)
def test_gains_that_count_from_an_offset(name: str) -> None:
    gain, offset = GAINS[name]
    model = Lambda(
        lambda m, x: m.o(torch.tanh(m.a(gain(x, m.w)))),
        w=nn.Parameter(torch.zeros(6)),
        a=nn.Linear(6, 5),
        o=nn.Linear(5, 4),
    )
    found = find_symmetries(model, torch.randn(4, 3, 6))
    (rescale,) = [s for s in found if s.kind == "rescale"]
    assert set(rescale.parts) == {Part("w", 0, offset=offset), Part("a.weight", 1, weight=-1.0)}
    report = completeness(model, draws(3, 6), "cross_entropy", found)
    assert report.missed == []
    assert report.false == []


def test_a_parameter_that_is_read_in_two_ways_has_no_such_law() -> None:
    model = Lambda(
        lambda m, x: m.o(torch.tanh(m.a((1 + m.w) * normalised(x)) + m.b(m.w * x))),
        w=nn.Parameter(torch.zeros(6)),
        a=nn.Linear(6, 5),
        b=linear(6, 5),
        o=nn.Linear(5, 4),
    )
    found = find_symmetries(model, torch.randn(4, 6))
    assert [s.kind for s in found] == ["translation", "translation"]
    assert not found.rejected


class Gemma(nn.Module):
    """Gains 1 + w around each branch and inside the heads; the stream is read through them alone."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"before": 8, "after": 8, "of_q": 4, "of_k": 4, "last": 8}
        self.gains = nn.ParameterDict({name: nn.Parameter(torch.zeros(n)) for name, n in sizes.items()})
        self.embed = nn.Embedding(11, 8)
        self.q, self.k, self.v, self.o, self.head = (linear(8, 8) for _ in range(5))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return normalised(x) * (1.0 + self.gains[name].float())  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x, "before")
        q, k, v = (f(y).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
        x = x + self.norm(self.o(attend(self.norm(q, "of_q"), self.norm(k, "of_k"), v)), "after")
        return self.head(self.norm(x, "last"))  # type: ignore[no-any-return]


def test_gemma_is_complete() -> None:
    """Pairs of gains, a stream of gains, and gains against columns: all in laws, and nothing missed."""
    torch.manual_seed(0)
    model = Gemma()
    found = find_symmetries(model, torch.randint(11, (2, 5)))
    offsets = {part.parameter for s in found for part in s.parts if part.offset}
    assert offsets == {f"gains.{name}" for name in model.gains}
    assert not any("gains" in name for name in found.unmatched)

    def inputs(n: int, generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randint(11, (n, 5), generator=generator),)

    report = completeness(model, inputs, "cross_entropy", found)
    assert report.missed == []
    assert report.false == []


@pytest.mark.parametrize("zero", [True, False])
def test_a_scalar_without_effect(zero: bool) -> None:
    """It takes no law from the others; where a loss cancels it, it has one of its own."""
    scale = 0.0 if zero else 1.0
    model = Lambda(
        lambda m, x: m.o(torch.relu(m.a(x))) + scale * m.t,
        a=nn.Linear(5, 6),
        t=nn.Parameter(torch.ones(1)),
        o=nn.Linear(6, 3),
    )
    found = find_symmetries(model, torch.randn(4, 5))
    assert law(unit("a", "o")) in laws(found)
    assert (law("translation t:whole") in laws(found)) is not zero


def test_complex_parameters_are_left_out() -> None:
    """Laws of the others hold whatever they are, and they say why they have none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o((torch.relu(m.b(torch.relu(m.a(x)))).to(m.w.dtype) @ m.w).abs())  # type: ignore[no-any-return]

    w = nn.Parameter(torch.zeros(7, 6, dtype=torch.complex64))
    model = Lambda(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 7), w=w, o=nn.Linear(6, 4))
    symmetries = find_symmetries(model, torch.randn(4, 5))
    assert {law(unit("a", "b")), law("translation o.weight:1")} <= laws(symmetries)
    assert "complex" in symmetries.unmatched["w"]
    assert not bool(w.any())
    report = completeness(model, draws(5), "cross_entropy", symmetries)
    assert report.false == []


def test_what_inference_mode_and_compilation_change_is_nothing() -> None:
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    expected = {law(unit("0", "2")), law("translation 2.weight:1"), law("translation 2.bias:whole")}
    with torch.inference_mode():
        assert laws(find_symmetries(plain, torch.randn(4, 5))) == expected
        made_inside = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
        assert laws(find_symmetries(made_inside, torch.randn(4, 5))) == expected


class _ScaledGain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(x) * (1 + 2 * self.w))  # type: ignore[no-any-return]


def test_a_gain_of_a_multiple_counts_once() -> None:
    """1 + 2w is twice 1/2 + w, whose squared norm is that of the columns of b."""
    torch.manual_seed(0)
    found = find_symmetries(_ScaledGain(), torch.randn(8, 6))
    (gain,) = [symmetry for symmetry in found if any(part.offset for part in symmetry.parts)]
    assert {(part.parameter, part.weight, part.offset) for part in gain.parts} == {
        ("w", 1.0, 0.5),
        ("b.weight", -1.0, 0.0),
    }


def gained(h: Tensor, w: Tensor) -> Tensor:
    return h + w * h


#: x, u, w -> what a pair of gains gives; the sizes and offsets of u and w.
PAIRS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, int], tuple[float, float]]] = {
    "u x + u w x": (lambda x, u, w: gained(u * x, w), (6, 6), (0.0, 1.0)),
    "two from offsets": (lambda x, u, w: gained(gained(x, u), w), (6, 6), (1.0, 1.0)),
    "scalars": (lambda x, u, w: gained(gained(x, u), w), (1, 1), (1.0, 1.0)),
    "a vector and a scalar": (lambda x, u, w: gained(u * x, w), (1, 6), (0.0, 1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_gains_of_one_stream(name: str) -> None:
    """Nothing tells where they count from but the gradients."""
    gains, (n, m), (of_u, of_w) = PAIRS[name]
    torch.manual_seed(0)
    model = Lambda(
        lambda module, x: module.a(torch.tanh(gains(torch.tanh(x), module.u, module.w))),
        u=nn.Parameter(torch.randn(n)),
        w=nn.Parameter(torch.randn(m)),
        a=linear(6, 5),
    )
    found = find_symmetries(model, torch.randn(8, 6))
    (rescale,) = [symmetry for symmetry in found if symmetry.kind == "rescale"]
    assert {(part.parameter, part.offset) for part in rescale.parts} == {("u", of_u), ("w", of_w)}
    assert not found.unmatched
    report = completeness(model, draws(6), "cross_entropy", found)
    assert report.missed == []
    assert report.false == []


def test_an_empty_batch_is_refused() -> None:
    for model, inputs in (
        (nn.Linear(3, 4), [torch.randn(0, 3)]),
        (Lambda(lambda m, x, mask: m.a(x) * mask, a=nn.Linear(3, 4)), [torch.randn(0, 3), torch.ones(1, 4)]),
    ):
        with pytest.raises(ValueError, match=r"no elements, as of an empty batch.*give an example that has some"):
            find_symmetries(model, *inputs)


def test_softmax_is_said_of_what_it_reads() -> None:
    """Of the heads, wherever they are registered; not of what a normalisation takes the mean out of."""
    model = Lambda(
        lambda m, x: (m.head(torch.tanh(m.n(m.a(x)))), m.aux(torch.tanh(x))),
        head=nn.Linear(7, 4),
        aux=nn.Linear(6, 4),
        n=nn.LayerNorm(7),
        a=nn.Linear(6, 7),
    )
    meanings = find_symmetries(model, torch.randn(5, 6)).meanings
    of_softmax = {name for name, meaning in meanings.items() if meaning.startswith("softmax")}
    assert of_softmax == {"head", "head.bias", "aux", "aux.bias"}
    assert {"a (translation)", "a.bias"} == {
        name for name, meaning in meanings.items() if meaning.startswith("mean removed")
    }


def test_units_that_do_not_mix_among_others() -> None:
    """Those behind a ReLU are rescaled; their neighbours mix. Of units in two stretches, each has a matrix."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second, third = m.a(x).split([3, 5, 4], -1)
        return m.head(torch.tanh(m.o(torch.cat([first, torch.relu(second), third], -1))))  # type: ignore[no-any-return]

    model = Lambda(forward, a=nn.Linear(5, 12), o=linear(12, 7), head=linear(7, 3))
    found = find_symmetries(model, torch.randn(4, 5))
    stretches = {"[:3]": "balance", "[3:8]": "rescale", "[8:]": "balance"}
    expected = {law(f"{of} a.weight:0{at} a.bias:0{at} > o.weight:1{at}") for at, of in stretches.items()}
    assert laws(found) == expected | {law("translation head.weight:1")}
    assert found.rejected == {}
