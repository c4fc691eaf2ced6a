"""Evaluation in float64 with eps near 0, which the constraints and the search for symmetries share."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noetherperf import Part, Rescale, Scale, check_constraints, find_symmetries
from noetherperf.checks.exact import epsilons, evaluation, is_eps, random_state, set_random_state

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["eps", "_eps", "epsilon", "layer_norm_eps", "variance_epsilon", "rms_norm_eps", "eps_inside", "a_eps_b"]
)
def test_an_eps(name: str) -> None:
    assert is_eps(name)


@pytest.mark.parametrize("name", ["steps", "n_steps", "reps", "epsilons", "weeps", "epoch", "deps_", "e_ps", ""])
def test_no_eps(name: str) -> None:
    assert not is_eps(name)


def test_only_small_positive_floats_count() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, eps=1e-3), nn.Identity())
    for name, value in {"eps": 0.0, "norm_eps": -1e-5, "eps_in": 1, "eps_on": True, "label_eps": 0.1}.items():
        setattr(model[2], name, value)
    assert {epsilon.place: epsilon.value for epsilon in epsilons(model)} == {"0.eps": 1e-5, "1.eps": 1e-3}


class ByHand(nn.Module):
    """Normalises by hand, so that only its attribute tells the eps."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8, bias=False)
        self.b = nn.Linear(8, 5)
        self.attribute = attribute
        setattr(self, attribute, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        eps = getattr(self, self.attribute)
        return self.b(torch.tanh(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("attribute", "replaced"), [("variance_epsilon", True), ("eps_inside", True), ("steps", False)]
)
def test_constraints_and_search_replace_the_same(attribute: str, replaced: bool) -> None:
    model = ByHand(attribute)
    symmetry = Scale("a", [Part("a.weight", None)])
    result = check_constraints(
        model, lambda: F.cross_entropy(model(X), torch.arange(6) % 5), [symmetry], progress=False
    )
    assert (result.failed == ()) == replaced
    assert any(isinstance(found, Scale) for found in find_symmetries(model, X)) == replaced
    assert getattr(model, attribute) == 1e-3


class Quadratic(nn.Module):
    """Homogeneous only where its steps are taken for an eps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.steps = 0.05

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        return self.b(hidden + self.steps * hidden.square())  # type: ignore[no-any-return]


def test_steps_stay_what_they_are() -> None:
    assert not any(isinstance(symmetry, Rescale) for symmetry in find_symmetries(Quadratic(), X))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3))
    found = epsilons(model)
    try:
        with evaluation("no_eps", found, 1e-12):
            assert [module.eps for module in model] == [1e-12, 1e-12]
            assert torch.zeros(1).dtype == torch.float64
            assert torch.zeros(1, dtype=torch.float32).float().dtype == torch.float64
            assert X.sum().dtype == torch.float64
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [module.eps for module in model] == [1e-5, 1e-5]
    assert torch.zeros(1).dtype == X.sum().dtype == torch.float32


@pytest.mark.parametrize(("stage", "dtype", "eps"), [("as_is", torch.float32, 1), ("float64", torch.float64, 1)])
def test_other_stages_keep_eps(stage: Any, dtype: torch.dtype, eps: float) -> None:
    model = nn.LayerNorm(3, eps=eps)
    with evaluation(stage, epsilons(model)):
        y = F.layer_norm(X, (6,), eps=eps)
        assert model.eps == eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.layer_norm(X, (6,), eps=eps))


def test_a_normalisation_called_as_a_function_takes_the_eps() -> None:
    with evaluation("no_eps", eps=1e-14):
        y = F.layer_norm(1e-3 * X, (6,), None, None, 1e-5)
    torch.testing.assert_close(y, F.layer_norm(1e-3 * X.double(), (6,), eps=1e-14), rtol=1e-12, atol=0.0)


def test_random_states_come_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    state = random_state()
    first = drawn()
    assert drawn() != first
    set_random_state(state)
    assert drawn() == first
