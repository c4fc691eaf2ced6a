"""Why a parameter is in no symmetry, what is told where the search fails, and the sums that the search invents."""

from typing import Any

import numpy as np
import pytest
import torch
from test_detect import Lambda, law, laws, linear, unit
from torch import Tensor, nn
from torch.nn import functional as F

from noetherperf import Part, find_symmetries
from noetherperf.detect import search
from noetherperf.detect.claims import Claims
from noetherperf.rules.law import Law

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, x: Tensor = X, **options: Any) -> dict[str, str]:
    return find_symmetries(model, x, **options).unmatched


def test_the_operation_that_stops_a_law_is_named() -> None:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x)

    model = nn.Sequential(nn.Linear(5, 6), Act(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
    assert reasons(model) == dict.fromkeys(["0.weight", "0.bias"], "gelu (1) is not homogeneous")


def test_all_that_reads_a_unit_is_named() -> None:
    model = Lambda(
        lambda m, x: m.b(torch.relu(h := m.a(x))) + m.skip(h),
        a=linear(5, 6),
        b=linear(6, 4),
        skip=nn.Sequential(nn.Tanh(), linear(6, 4)),
    )
    assert reasons(model)["a.weight"] == "tanh (skip.0) is not homogeneous; the loss sees its scale"


def test_a_shared_parameter_names_its_readers() -> None:
    model = Lambda(lambda m, x: m.second(torch.sigmoid(m.first(x))), first=linear(5, 5), second=linear(5, 5))
    model.get_submodule("second").weight = model.get_parameter("first.weight")
    told = reasons(model, loss="mse")["first.weight"]
    assert told == "sigmoid is not homogeneous; the loss sees its scale; it is read by first and second"


def test_what_the_loss_does_not_see() -> None:
    model = Lambda(lambda m, x: m.a(x) + 0.0 * m.b(x) + m.c(x).detach(), a=linear(5, 4), b=linear(5, 4), c=linear(5, 4))
    told = reasons(model)
    assert told["b.weight"] == "the loss does not see it: its gradient is zero"
    assert told["c.weight"] == "the loss does not see it: no gradient reaches it from the output"


def test_scales_follow_degrees_and_normalisations_written_by_hand() -> None:
    """A square root of a square passes a scale; what is divided by its own norm has none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).square().sqrt() + 1.0
        y = m.b(h)
        return m.o(torch.tanh(m.c(y / y.pow(2).mean(-1, keepdim=True).sqrt())))  # type: ignore[no-any-return]

    model = Lambda(forward, a=linear(5, 6), b=linear(6, 7), c=nn.Linear(7, 3), o=nn.Linear(3, 4))
    told = reasons(model)
    assert set(told) == {"a.weight", "c.weight", "c.bias"}
    assert told["a.weight"] == "no sum over its rows, columns, slices or whole vanishes"
    assert told["c.bias"] == "tanh is not homogeneous"


def test_a_gradient_that_is_not_finite_leaves_the_rest() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.nan

    model = Lambda(
        lambda m, x: m.c(torch.relu(m.b(Broken.apply(m.a(x))))), a=linear(5, 6), b=nn.Linear(6, 7), c=nn.Linear(7, 4)
    )
    symmetries = find_symmetries(model, X)
    assert symmetries.unmatched == {"a.weight": "its gradient is not finite"}
    assert law(unit("b", "c")) in laws(symmetries)


def test_linear_algebra_that_fails_is_told_and_the_rest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(columns: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(search, "null_space", failing)
    symmetries = find_symmetries(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)), X)
    assert law(unit("0", "2")) not in laws(symmetries)
    assert law("translation 2.bias:whole") in laws(symmetries)
    assert symmetries.rejected == {}
    told = symmetries.undecided["norms of 8 groups"]
    assert told == "its linear algebra failed, so that laws may be missing: SVD did not converge"
    assert "SVD did not converge" in str(symmetries)


def test_invented_sums_satisfy_what_is_known_and_nothing_else() -> None:
    """Relations claimed one after the other, of which the later change what is connected with the earlier."""
    shapes = {"a": (6, 4), "b": (3, 6), "c": (6, 3), "d": (5, 6)}
    alive = {(name, axis): torch.ones(n, dtype=torch.bool) for name, s in shapes.items() for axis, n in enumerate(s)}
    claims = Claims(shapes, alive)
    relations = [
        [Part("a", 0), Part("b", 1, weight=-1.0)],
        [Part("b", 0), Part("c", 0, fold=2, weight=-2.0)],
        [Part("c", 1), Part("d", 1, start=1, stop=4)],
    ]

    def sums(part: Part, vector: Tensor) -> list[float]:
        values = vector[claims.layout.own((part.parameter, part.axis))].tolist()
        first, n = part.start or 0, part.n_groups(shapes[part.parameter])
        return [sum(values[first + i * part.fold : first + (i + 1) * part.fold]) for i in range(n)]

    for n, relation in enumerate(relations, 1):
        claims.claim(Law.NORM, relation)
        for vector in claims.invented(Law.NORM, 3 + n):
            for name, shape in shapes.items():
                totals = [sum(sums(Part(name, axis), vector)) for axis in range(len(shape))]
                assert totals[0] == pytest.approx(totals[1], abs=1e-12)
            for parts in relations:
                terms = [[part.weight * x for x in sums(part, vector)] for part in parts]
                left = max(abs(sum(group)) for group in zip(*terms, strict=True))
                assert left < 1e-12 if parts in relations[:n] else left > 1e-3
