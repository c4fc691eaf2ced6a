"""The relative defect and its floor."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import noetherperf as nperf
from noetherperf import Norm, Part, Translation, check_constraints
from noetherperf.detect.verify import defects_of
from noetherperf.measure.defect import FLOOR, floored, mean_square, quotient, relative_defect

MODEL_LAWS = [Translation("weight", [Part("weight", 1)]), Norm("bias", [Part("bias", 0)])]


def test_it_is_the_cosine() -> None:
    g, psi = np.random.default_rng(0).normal(size=(2, 5, 7))
    cosine = [abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(g, psi, strict=True)]
    relative = relative_defect((g * psi).sum(1), (g * g).sum(1), (psi * psi).sum(1))
    np.testing.assert_allclose(relative, cosine, rtol=1e-14)
    np.testing.assert_allclose(relative_defect(-g[:, 0], g[:, 0] ** 2, np.ones(5)), 1.0, rtol=1e-14)


def test_the_floor_is_of_the_average_element() -> None:
    sq_norms, n_elements = np.array([8.0, 24.0, 0.0]), np.array([2.0, 4.0, 2.0])
    usual = mean_square(sq_norms, n_elements)
    assert usual == 4.0
    assert floored(sq_norms, n_elements, usual).tolist() == [8.0, 24.0, FLOOR**2 * 4.0 * 2.0]


def test_what_is_not_finite_is_left_out_of_the_average_and_stays() -> None:
    sq_norms, n_elements = np.array([8.0, np.nan, np.inf]), np.array([2.0, 1.0, 1.0])
    usual = mean_square(sq_norms, n_elements)
    assert usual == 4.0
    np.testing.assert_array_equal(floored(sq_norms, n_elements, usual), sq_norms)
    assert mean_square(sq_norms[1:], n_elements[1:]) == mean_square(np.zeros(0), np.zeros(0)) == 0.0


def test_zero_and_nan() -> None:
    defect, largest = np.array([0.0, 0.0, -1.0, np.nan, 1.0]), np.array([0.0, 2.0, 2.0, 1.0, np.nan])
    np.testing.assert_array_equal(quotient(defect, largest), [0.0, 0.0, 0.5, np.nan, np.nan])


@pytest.mark.parametrize("tiny", [False, True])
def test_readout_constraints_and_search_have_one_definition(tiny: bool) -> None:
    """Of all groups of a layer; where they are tiny against the bias, the floor decides."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(8, 4, dtype=torch.float64) * (1e-6 if tiny else 1.0)

    def closure() -> torch.Tensor:
        return F.mse_loss(model(x), torch.ones(8, 3, dtype=torch.float64))

    checked = check_constraints(model, closure, MODEL_LAWS, hessian=False, progress=False)["weight"]
    optimizer = nperf.SGD(model.named_parameters(), lr=1e-300, symmetries=MODEL_LAWS)
    closure().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    read = optimizer.readout()["weight"].relative_defect.numpy()
    np.testing.assert_allclose(checked.gradient_relative.sel(stage="as_is"), read, rtol=1e-12)
    probe: Any = SimpleNamespace(
        parameters=dict(model.named_parameters()), redraw=lambda: None, gradients=lambda n: [gradients]
    )
    assert defects_of(MODEL_LAWS, probe, 1)["weight"] == pytest.approx(read.max(), rel=1e-12)
    assert (read.max() < 0.1) == tiny


def test_a_defect_that_is_no_number_is_not_forgotten() -> None:
    model = nn.Linear(4, 3).double()
    finite = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    probe: Any = SimpleNamespace(
        parameters=dict(model.named_parameters()),
        redraw=lambda: None,
        gradients=lambda n: [finite, finite | {"weight": torch.full((3, 4), torch.nan).double()}, finite],
    )
    defects = defects_of(MODEL_LAWS, probe, 1)
    assert np.isnan(defects["weight"])
    assert np.isfinite(defects["bias"])


class Broken(nn.Module):
    """The gradient of one of its two parameters is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = (nn.Parameter(torch.randn(3, 4).double()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ self.good.T, torch.zeros(len(x), dtype=torch.long)) + (0.0 * self.bad).sum().sqrt()


def test_a_gradient_that_is_not_finite_spoils_its_own_groups_only() -> None:
    torch.manual_seed(0)
    model, x = Broken(), torch.randn(8, 4).double()
    symmetries = [Translation(name, [Part(name, 1)]) for name in ("good", "bad")]
    result = check_constraints(model, lambda: model(x), symmetries, progress=False)
    assert np.isnan(result["bad"].gradient_relative).all()
    assert np.isfinite(result["good"].gradient_relative).all()
    assert result.failed == ("bad",)
