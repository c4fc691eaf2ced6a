"""Shards: engines that see pieces of the tensors measure, together, what one sees in the whole."""

import itertools
from collections.abc import Iterator, Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from test_engines import ENGINES, HOST

from noetherperf import Norm, Part, Symmetry, Translation
from noetherperf.engines import Engine
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.measure.shards import Cut, Indices, Shards
from noetherperf.rules.sgd import Hyper

NAMES = ["conv", "matrix", "bias", "scalar"]
SHAPES = [(6, 4, 3), (10, 7), (11,), ()]
SYMMETRIES: list[Symmetry] = [
    Norm("filters", [Part("conv", 0)]),
    Norm("channels", [Part("conv", 1)]),
    Norm("positions", [Part("conv", 2, offset=0.5)]),
    Translation("pairs of filters", [Part("conv", 0, fold=2)]),
    Norm("conv", [Part("conv", None)]),
    Translation("rows", [Part("matrix", 0, start=1, stop=10, fold=3)]),
    Norm("half of the columns", [Part("matrix", 1, start=3)]),
    Norm("bias", [Part("bias", None)]),
    Translation("scalar", [Part("scalar", None)]),
]
HYPER = Hyper(0.1, 0.9, 0.3, 0.05)
RANKS: Cut = ((0, 1),)


def chunks(n: int, at: list[int]) -> list[torch.Tensor]:
    """The indices 0 to n, cut at some places; pieces may be empty."""
    ends = [0, *sorted(min(place, n) for place in at), n]
    return [torch.arange(begin, end) for begin, end in itertools.pairwise(ends)]


def blocks(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Indices]:
    """A tensor cut along every axis: the product of the pieces of each."""
    return list(itertools.product(*(chunks(n, at) for n, at in zip(shape or (1,), cuts, strict=False))))


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def piece(x: torch.Tensor, indices: Indices) -> torch.Tensor:
    """A tensor's elements at some indices along each axis, in memory of their own."""
    for axis, index in enumerate(indices[: x.dim()]):
        x = x.index_select(axis, index)
    return x.clone()


class Rank:
    """One rank's shards, with the engine that steps them; from the start, or going on from a whole measurement."""

    def __init__(self, shards: Shards, indices: list[Indices], engine: str, whole: Measurement | None = None) -> None:
        self.shards, self.indices = shards, indices
        self.p, self.v = ([piece(x, i) for x, i in zip(tensors(seed), indices, strict=True)] for seed in (0, 1))
        self.measurement = Measurement.empty(shards.local)
        self.engine: Engine = ENGINES[engine](shards.local, self.p, NAMES, [0] * len(NAMES), self.measurement)
        self.engine.measure([self.v])
        self.measurement.start(shards.local, [True] * len(NAMES))
        if whole is not None:
            for mine, carried in zip(self.measurement.tensors(), shards.scatter(whole).tensors(), strict=True):
                mine.copy_(carried)

    def step(self, seed: int) -> None:
        grads = [piece(x, i) for x, i in zip(tensors(seed), self.indices, strict=True)]
        self.engine.admit(grads)
        self.engine.step(grads, [self.v], [HYPER], [1] * len(NAMES), HOST)


def world(per_tensor: Sequence[Sequence[Indices]]) -> Iterator[tuple[Shards, list[Indices]]]:
    """Ranks that share tensors: as many as the most cut tensor has pieces; others have none of the rest."""
    plan = make_plan(SYMMETRIES, NAMES, SHAPES)
    n_ranks = max(map(len, per_tensor))
    for rank in range(n_ranks):
        nothing = [[torch.arange(0) for _ in pieces[0]] for pieces in per_tensor]
        indices = [p[rank] if rank < len(p) else none for p, none in zip(per_tensor, nothing, strict=True)]
        yield Shards(plan, indices, [RANKS] * len(NAMES)), indices


def total(ranks: list[Rank]) -> list[torch.Tensor]:
    partial = [rank.shards.partial(rank.measurement, RANKS) for rank in ranks]
    sums = [torch.stack(column).sum(0) for column in zip(*(x.tensors() for x in partial), strict=True)]
    return [*sums[:-1], ranks[0].measurement.clock]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.lists(st.lists(st.lists(st.integers(0, 11), max_size=2), min_size=3, max_size=3), min_size=2, max_size=2)
)
def test_pieces_add_up_to_the_whole(engine: str, cuts: list[list[list[int]]]) -> None:
    """Under one cut, and from the middle on under another: the sums are those of one engine that sees all."""
    (alone,) = (Rank(shards, i, engine) for shards, i in world([blocks(shape, [[], [], []]) for shape in SHAPES]))
    before, after = ([blocks(shape, cut if shape else [[]]) for shape in SHAPES] for cut in cuts)
    ranks = [Rank(shards, indices, engine) for shards, indices in world(before)]
    assert_same(total(ranks), alone.measurement.tensors())
    for seed in (2, 3):
        for rank in (alone, *ranks):
            rank.step(seed)
    summed = total(ranks)
    assert_same(summed, alone.measurement.tensors())

    whole = Measurement.of(summed)
    others = [Rank(shards, indices, engine, whole) for shards, indices in world(after)]
    for one, two in zip(total(others), summed, strict=True):
        assert torch.equal(one, two)
    for other in others:  # these began with the tensors as they were at first
        for values, now in ((other.p, alone.p), (other.v, alone.v)):
            for x, indices, y in zip(values, other.indices, now, strict=True):
                x.copy_(piece(y, indices))
    for rank in (alone, *others):
        rank.step(4)
    assert_same(total(others), alone.measurement.tensors())


def test_indices_need_not_be_neighbours() -> None:
    """Shards of shards may hold every so many rows; each run of a segment's indices is summed alone."""
    (alone,) = (Rank(shards, i, "reference") for shards, i in world([blocks(s, [[], [], []]) for s in SHAPES]))
    strided = [
        [(torch.arange(start, shape[0] if shape else 1, 2), *map(torch.arange, shape[1:])) for start in (0, 1)]
        for shape in SHAPES
    ]
    ranks = [Rank(shards, indices, "reference") for shards, indices in world(strided)]
    for rank in (alone, *ranks):
        rank.step(2)
    assert_same(total(ranks), alone.measurement.tensors())


def test_a_shard_has_as_few_segments_as_its_cut_allows() -> None:
    plan = make_plan(
        [Norm("rows", [Part("w", 0, fold=4)]), Norm("whole", [Part("b", None)])], ["w", "b"], [(12, 2), (9,)]
    )
    cases = {(0, 4): 1, (4, 12): 2, (0, 6): 3, (2, 4): 1, (3, 9): 6, (5, 5): 0}
    for (begin, end), n_segments in cases.items():
        indices = [[torch.arange(begin, end), torch.arange(2)], [torch.arange(begin, min(end, 9))]]
        local = Shards(plan, indices, [RANKS, RANKS]).local
        assert [view.n_segments for view in local.views] == ([n_segments, 1] if n_segments else [])


def test_tensors_that_are_cut_otherwise_are_added_up_apart() -> None:
    plan = make_plan(SYMMETRIES, NAMES, SHAPES)
    indices: list[Indices] = [[torch.arange(n) for n in shape or (1,)] for shape in SHAPES]
    shards = Shards(plan, indices, [RANKS, (), RANKS, ()])
    assert shards.cuts == [RANKS, ()]
    measurement = Measurement.empty(shards.local)
    for x in measurement.tensors():
        x.fill_(1.0)
    cut, replicated = (shards.partial(measurement, name) for name in shards.cuts)
    for one, two in zip(cut.tensors()[:-1], replicated.tensors()[:-1], strict=True):
        assert ((one + two) == 1.0).all()
    assert cut.propagators[:, 0, 0, 0, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
