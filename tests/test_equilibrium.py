"""Rotational equilibrium: random walks by the rules themselves have the predicted norms, angles and times."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from noetherperf import theory
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.rule import Buffers
from noetherperf.rules.sgd import SGD
from noetherperf.theory import Hyper, RotationalEquilibrium

N = 10_000  # elements: |θ|² of a single walk fluctuates by a few times 1/√N
Walk = Iterator[tuple[Tensor, Tensor]]  # θ after each step, and its update without decoupled decay


def zeros(n: int) -> Buffers:
    return tuple(torch.zeros(N, dtype=torch.float64) for _ in range(n))


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(N, generator=generator, dtype=torch.float64)


def tangent(theta: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient of a scale-invariant loss: orthogonal to θ, |g| = 1/|θ| on average."""
    g = normal(generator) / math.sqrt(N)
    tangential: Tensor = g - (g @ theta) / (theta @ theta) * theta
    tangential /= theta.norm()
    return tangential


def sgd(hyper: Hyper, start: Tensor, generator: torch.Generator) -> Walk:
    theta, buffers = start, zeros(1)
    for k in itertools.count():
        theta, buffers, u = SGD.update(theta, tangent(theta, generator), buffers, hyper.coefficients(age=min(k, 1)))
        yield theta, u


def sgd_decoupled(hyper: Hyper, start: Tensor, generator: torch.Generator) -> Walk:
    theta, v = start, torch.zeros(N, dtype=torch.float64)
    while True:
        v = hyper.momentum * v + (1.0 - hyper.dampening) * tangent(theta, generator)
        theta = (1.0 - hyper.lr * hyper.weight_decay) * theta - hyper.lr * v
        yield theta, v


def adamw(options: AdamOptions, start: Tensor, generator: torch.Generator) -> Walk:
    theta, buffers = start, (*zeros(2), None)
    sizes = torch.linspace(0.1, 10.0, N, dtype=torch.float64)  # Adam divides them out
    for k in itertools.count():
        theta, buffers, u = ADAM.update(theta, sizes * normal(generator), buffers, ADAM.coefficients_of(options, k))
        yield theta, u


def lion(lr: float, decay: float, beta1: float, beta2: float, start: Tensor, generator: torch.Generator) -> Walk:
    theta, m = start, torch.zeros(N, dtype=torch.float64)
    while True:
        g = normal(generator)
        u = torch.sign(beta1 * m + (1.0 - beta1) * g)
        m = beta2 * m + (1.0 - beta2) * g
        theta = (1.0 - lr * decay) * theta - lr * u
        yield theta, u


Make = Callable[[Tensor, torch.Generator], Walk]


def cases(small: bool) -> dict[str, tuple[RotationalEquilibrium, Make]]:
    """Predictions and walks of every rule, with steps so small that times hold, or larger ones."""
    found: dict[str, tuple[RotationalEquilibrium, Make]] = {}
    share = 0.05 if small else 1.0
    for hyper in (
        Hyper(lr=0.5, weight_decay=0.2 * share),
        Hyper(lr=0.1, momentum=0.9, weight_decay=0.05 * share),
        Hyper(lr=0.2, momentum=0.5, dampening=0.3, weight_decay=share),
    ):
        coupled, decoupled = (theory.sgd_equilibrium(hyper, 1.0, decoupled=choice) for choice in (False, True))
        found[f"sgd, {hyper.momentum:g}"] = coupled, partial(sgd, hyper)
        found[f"sgd, decoupled, {hyper.momentum:g}"] = decoupled, partial(sgd_decoupled, hyper)
    for lr, decay, beta1 in ((0.01, 1.0, 0.9), (0.2, 0.5 * share, 0.5), (0.02, 0.5, 0.0)):
        options = AdamOptions(lr, beta1, weight_decay=decay, decoupled=True)
        found[f"adamw, {beta1:g}"] = theory.adamw_equilibrium(N, lr, decay, beta1), partial(adamw, options)
    for beta1, beta2 in ((0.9, 0.99), (0.95, 0.9), (0.9, 0.9), (0.0, 0.0)):
        predicted = theory.sign_equilibrium(N, 0.01, 1.0, beta1, beta2)
        found[f"sign, {beta1:g}, {beta2:g}"] = predicted, partial(lion, 0.01, 1.0, beta1, beta2)
    return found


LARGE, SMALL = cases(small=False), cases(small=True)
FILLED = 30  # steps in which buffers forget, Lion's but in part


@pytest.mark.parametrize("name", LARGE)
def test_a_random_walk_has_the_predicted_equilibrium(name: str) -> None:
    """Norm, update and angle, each a mean over steps after the start is forgotten."""
    predicted, make = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    start = normal(generator)
    walk = make(start * math.sqrt(predicted.sq_norm) / start.norm(), generator)
    lag = max(1, round(predicted.decorrelation))
    for _ in range(4 * lag + 200):
        before, _ = next(walk)
    norms, updates, cosines = [], [], []
    for _ in range(max(400, 6 * lag)):
        theta, u = next(walk)
        norms.append(float(theta @ theta))
        updates.append(float(u @ u))
        cosines.append(float(torch.cosine_similarity(theta, before, dim=0)))
        before = theta
    n = len(norms)
    assert sum(norms) / n == pytest.approx(predicted.sq_norm, rel=0.02)
    assert sum(updates) / n == pytest.approx(predicted.sq_update, rel=0.01)
    turned = math.acos(sum(cosines) / n)
    assert turned == pytest.approx(predicted.angle, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_a_random_walk_forgets_its_direction_and_its_norm_in_the_predicted_times(name: str) -> None:
    """Two walks of the same noise, one from a norm 5 % larger: their difference is the memory of the start."""
    predicted, make = SMALL[name]
    generator = torch.Generator().manual_seed(1)
    start = normal(generator)
    start *= math.sqrt(predicted.sq_norm) / start.norm()
    walks = [make(scale * start, torch.Generator().manual_seed(2)) for scale in (math.sqrt(1.05), 1.0)]
    lag = round(predicted.relaxation)
    differences, cosines = [], []
    for _ in range(FILLED + lag + 1):
        (larger, _), (theta, _) = map(next, walks)
        differences.append(float(larger @ larger - theta @ theta))
        cosines.append(float(torch.cosine_similarity(theta, start, dim=0)))
    assert differences[FILLED] / differences[-1] == pytest.approx(math.exp(lag / predicted.relaxation), rel=0.1)
    assert cosines[FILLED] / cosines[-1] == pytest.approx(math.exp(lag / predicted.decorrelation), rel=0.1)


def test_small_steps_have_the_known_first_order() -> None:
    lr, decay, beta, n = 1e-5, 0.1, 0.9, 50
    adamw = theory.adamw_equilibrium(n, lr, decay, beta)
    assert adamw.sq_norm == pytest.approx(n * lr / (2.0 * decay), rel=1e-4)
    assert adamw.angle == pytest.approx(math.sqrt(2.0 * lr * decay * (1.0 - beta) / (1.0 + beta)), rel=1e-4)
    assert adamw.relaxation == pytest.approx(1.0 / (2.0 * lr * decay), rel=1e-4)
    hyper = Hyper(lr=lr, momentum=beta, weight_decay=decay)
    for decoupled, turn in ((False, 2.0 / (1.0 + beta)), (True, 2.0 * (1.0 - beta) / (1.0 + beta))):
        sgd = theory.sgd_equilibrium(hyper, 3.0, decoupled=decoupled)
        assert sgd.angle == pytest.approx(math.sqrt(turn * lr * decay), rel=1e-4)
    coupled = theory.sgd_equilibrium(hyper, 3.0)
    assert coupled.sq_norm == pytest.approx(math.sqrt(lr * 3.0 / (2.0 * decay * (1.0 - beta))), rel=1e-4)
    assert coupled.relaxation == pytest.approx((1.0 - beta) / (4.0 * lr * decay), rel=1e-4)


def test_large_steps_turn_by_the_exact_angle() -> None:
    assert theory.adamw_equilibrium(10, 0.2, 1.0, 0.5).angle == pytest.approx(math.acos(1.3 / 1.4), rel=1e-12)
    assert theory.sign_equilibrium(10, 0.2, 1.0, 0.0, 0.0).angle == pytest.approx(math.acos(0.8), rel=1e-12)


def test_without_momentum_the_rules_agree() -> None:
    """Coupled and decoupled decay are one; the sign's norm is AdamW's."""
    plain = Hyper(lr=0.3, weight_decay=0.2)
    coupled, decoupled = (theory.sgd_equilibrium(plain, 2.0, decoupled=choice) for choice in (False, True))
    assert coupled.sq_norm == pytest.approx(decoupled.sq_norm, rel=1e-12)
    assert coupled.decorrelation == pytest.approx(decoupled.decorrelation, rel=1e-12)
    sign, adamw = theory.sign_equilibrium(7, 0.1, 0.5, 0.0, 0.0), theory.adamw_equilibrium(7, 0.1, 0.5, 0.0)
    assert sign == adamw


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.sgd_equilibrium(Hyper(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), 1.0), "Nesterov"),
        (
            lambda: theory.sgd_equilibrium(
                Hyper(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), 1.0, decoupled=True
            ),
            "Nesterov",
        ),
        (lambda: theory.sgd_equilibrium(Hyper(lr=0.1), 1.0), "no equilibrium"),
        (lambda: theory.sgd_equilibrium(Hyper(lr=1.0, weight_decay=2.5), 1.0), "no equilibrium"),
        (lambda: theory.sgd_equilibrium(Hyper(lr=0.1, weight_decay=0.1), math.nan), "sq_gradient"),
        (lambda: theory.adamw_equilibrium(0, 0.1, 0.1), "n_elements"),
        (lambda: theory.adamw_equilibrium(1, 0.1, 0.0), "weight_decay"),
        (lambda: theory.adamw_equilibrium(1, 0.1, 0.1, 1.0), "beta1"),
        (lambda: theory.sign_equilibrium(1, 0.1, 0.1, 0.9, -0.1), "beta2"),
        (lambda: theory.sign_equilibrium(1, 2.0, 0.5), "weight_decay"),
    ],
)
def test_what_has_no_equilibrium_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
