"""The continuous models: what they conserve, how fast they leave the steps they model, and the closed forms."""

import math
import re
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf import theory
from noetherperf.rules.law import Law
from noetherperf.rules.oscillator import free_norm, norm_response
from noetherperf.rules.sgd import Hyper, discrete_law

N_IN, N_HIDDEN, N_OUT = 3, 4, 3
TIME = 0.4


def parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A network's weights out of one vector: in, hidden, out."""
    first, second, third = theta.split([N_IN * N_HIDDEN, N_HIDDEN * N_HIDDEN, N_HIDDEN * N_OUT])
    return first.view(N_HIDDEN, N_IN), second.view(N_HIDDEN, N_HIDDEN), third.view(N_OUT, N_HIDDEN)


def losses(theta: Tensor) -> Tensor:
    """Cross-entropy of 12 examples in a network with all three symmetries: normalised rows, a linear unit, softmax.

    A linear unit, for the flow of a ReLU can get stuck on its kink.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, N_IN, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % N_OUT
    first, second, third = parts(theta)
    hidden = torch.tanh(images @ (first / first.norm(dim=1, keepdim=True)).T)
    logits = hidden @ second.T @ third.T
    each: Tensor = nn.functional.cross_entropy(logits, labels, reduction="none")
    return each


def loss(theta: Tensor) -> Tensor:
    return losses(theta).mean()


def charges(theta: Tensor) -> dict[str, Tensor]:
    first, second, third = parts(theta)
    return {
        "translation": third.sum(0),
        "scale": first.square().sum(1),
        "rescale": second.square().sum(1) - third.square().sum(0),
    }


def start() -> Tensor:
    n = N_IN * N_HIDDEN + N_HIDDEN * N_HIDDEN + N_HIDDEN * N_OUT
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def smooth(theta: Tensor) -> Tensor:
    """A loss in two dimensions with curvatures of about 0.5 to 2 and all higher derivatives."""
    x, y = theta[0], theta[1]
    return 0.5 * x * x + torch.log(torch.cosh(y)) + 0.25 * torch.sin(x + y) + 0.1 * x * x * y * y


START = torch.tensor([1.2, -0.9], dtype=torch.float64)


def test_gradient_flow_conserves_every_charge() -> None:
    theta = theory.gradient_flow(loss, start(), [0.0, 1.0, 3.0])
    assert (theta[-1] - theta[0]).norm() > 0.5  # something moved
    for name, before in charges(theta[0]).items():
        drift = (charges(theta[-1])[name] - before).abs().max()
        assert drift < 1e-9, name


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.1), (0.9, 0.1)])
def test_decay_shrinks_charges_exponentially(momentum: float, decay: float) -> None:
    h = Hyper(lr=0.1, momentum=momentum, weight_decay=decay)
    theta = theory.gradient_flow(loss, start(), [0.0, 0.3], h)
    rate = decay / (1.0 - momentum)
    for (name, before), after in zip(charges(theta[0]).items(), charges(theta[1]).values(), strict=True):
        kappa = 1.0 if name == "translation" else 2.0
        torch.testing.assert_close(after, before * math.exp(-kappa * rate * 0.3), rtol=1e-8, atol=1e-10)


def test_gradient_flow_of_a_quadratic() -> None:
    h = torch.tensor([[1.5, 0.4], [0.4, 0.7]], dtype=torch.float64)
    theta = theory.gradient_flow(lambda p: 0.5 * p @ h @ p, START, [0.5, 2.0], Hyper(lr=0.1, weight_decay=0.2))
    generator = h.numpy() + 0.2 * np.eye(2)
    for row, t in zip(theta, (0.5, 2.0), strict=True):
        np.testing.assert_allclose(row, expm(-t * generator) @ START.numpy(), rtol=1e-9)


def test_descent_is_torchs() -> None:
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True},
                    {"momentum": 0.8, "dampening": 0.3, "maximize": True}):  # fmt: skip
        p = torch.nn.Parameter(START.clone())
        optimizer = torch.optim.SGD([p], lr=0.1, **options)  # type: ignore[arg-type]
        path = theory.descent(smooth, START, 7, Hyper(lr=0.1, **options))  # type: ignore[arg-type]
        for k in range(7):
            torch.testing.assert_close(p.data, path[k], rtol=0, atol=1e-14)
            optimizer.zero_grad()
            smooth(p).backward()
            optimizer.step()
        torch.testing.assert_close(p.data, path[7], rtol=0, atol=1e-14)


def errors(model: Callable[..., Tensor], options: dict[str, Any], lrs: list[float]) -> list[float]:
    """Largest distance between model and steps in the second half of a fixed time."""
    found = []
    for lr in lrs:
        h = Hyper(lr=lr, **options)
        n = round(TIME / h.duration)
        times = h.duration * np.arange(n + 1)
        distance = (model(smooth, START, times, h) - theory.descent(smooth, START, n, h)).norm(dim=1)
        found.append(float(distance[n // 2 :].max()))
    return found


PLAIN: dict[str, Any] = {"weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"momentum": 0.5, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("model", "options", "order"),
    [
        (theory.gradient_flow, PLAIN, 1),
        (theory.gradient_flow, MOMENTUM, 1),
        (theory.modified_loss, PLAIN, 2),
        (theory.modified_flow, PLAIN, 2),
        (theory.modified_flow, MOMENTUM, 2),
        (theory.modified_flow, {**MOMENTUM, "nesterov": True}, 2),
        (theory.modified_flow, {**MOMENTUM, "dampening": 0.5}, 2),
        (theory.modified_loss, MOMENTUM, 1),  # for the buffer starts cold
    ],
)
def test_order_of_the_models(model: Callable[..., Tensor], options: dict[str, Any], order: int) -> None:
    coarse, fine = errors(model, options, [0.01, 0.0025])
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.15)


def normalised(theta: Tensor) -> Tensor:
    """A loss of the direction alone."""
    x, y, z = theta / theta.norm()
    value: Tensor = x * x + 0.5 * x * y - z * y + 0.3 * torch.sin(x + 2.0 * z)
    return value


#: Options, and whether the buffer is warm.
STARTS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "momentum": ({"momentum": 0.5}, False),
    "dampened": ({"momentum": 0.5, "dampening": 0.5}, False),
    "nesterov": ({"momentum": 0.5, "nesterov": True}, False),
    "maximize": ({"momentum": 0.5, "nesterov": True, "maximize": True}, False),
    "warm": ({"momentum": 0.5}, True),
    "warm, dampened": ({"momentum": 0.5, "dampening": 0.4}, True),
    "warm, nesterov": ({"momentum": 0.5, "nesterov": True}, True),
}


@pytest.mark.parametrize("name", STARTS)
def test_flow_laws_err_by_their_order(name: str) -> None:
    """The norm of a normalised weight, and a sum without gradient, against the steps: from rest O(η), else O(η²)."""
    options, warm = STARTS[name]
    theta_0 = torch.tensor([0.9, -0.6, 0.4], dtype=torch.float64)
    buffer_0 = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) if warm else None
    norm_0, sum_0 = theta_0.square().sum()[None], theta_0.sum()[None]
    found: dict[str, list[float]] = {}
    for n in (200, 800):
        h = Hyper(lr=2.0 / n / (1.0 - options.get("dampening", 0.0)), weight_decay=0.4, **options)
        path = theory.descent(normalised, theta_0, n, h, buffer_0=buffer_0)
        u = -path.diff(dim=0) / h.lr
        g = torch.func.vmap(torch.func.grad(normalised))(path[:-1])
        sq_u, dot_gu = u.square().sum(1, keepdim=True), (g * u).sum(1, keepdim=True)
        sq = sq_u if options else g.square().sum(1, keepdim=True)
        sums = theory.descent(lambda p: 0.0 * p.sum(), theta_0, n, h, buffer_0=buffer_0).sum(1)
        by_norm = None if buffer_0 is None else (theta_0 @ buffer_0)[None]
        by_sum = None if buffer_0 is None else buffer_0.sum()[None]
        laws = {
            "norm, paper": theory.driven(norm_0, sq, h, dot_gu=dot_gu),
            "norm, modified": theory.driven(norm_0, sq_u, h, flow="modified", carried=by_norm, dot_gu=dot_gu),
            "sum, paper": theory.free("translation", sum_0, [2.0], h),
            "sum, modified": theory.free("translation", sum_0, [2.0], h, flow="modified", carried=by_sum),
        }
        for key, law in laws.items():
            exact = path[-1].square().sum() if key.startswith("norm") else sums[-1]
            found.setdefault(key, []).append(abs(float(law[-1, 0] - exact)))
    for key, (coarse, fine) in found.items():
        order = 1 if key.endswith("paper") else 2
        assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.15), key


@pytest.mark.parametrize("nesterov", [False, True])
def test_modified_flow_follows_the_steps_from_a_warm_buffer(nesterov: bool) -> None:
    found = []
    buffer_0 = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for lr in (0.004, 0.002):
        h = Hyper(lr=lr, nesterov=nesterov, **MOMENTUM)
        n = round(0.2 / lr)
        flow = theory.modified_flow(smooth, START, [0.2], h, buffer_0=buffer_0)[-1]
        found.append(float((flow - theory.descent(smooth, START, n, h, buffer_0=buffer_0)[-1]).norm()))
    assert math.log2(found[0] / found[1]) == pytest.approx(2, abs=0.15)


def test_norms_that_nothing_drives_keep_their_digits_near_critical_damping() -> None:
    """Against 50 digits, at distances of 1e-12 to 1e-2 from ω = γ, where the roots' difference cancels."""
    lr, momentum = 0.1, 0.9
    critical = theory.critical_decay("norm", Hyper(lr=lr, momentum=momentum))
    for distance in (0.0, 1e-12, -1e-9, 1e-6, -1e-4, 1e-2):
        h = Hyper(lr=lr, momentum=momentum, weight_decay=critical * (1.0 + distance))
        for t in (0.1, 3.0, 30.0):
            with mpmath.workdps(50):
                mass = mpmath.mpf(lr) * (1 + mpmath.mpf(momentum)) / 2
                gamma = (1 - mpmath.mpf(momentum)) / (2 * mass)
                root = mpmath.sqrt(mpmath.mpc(gamma**2 - 2 * mpmath.mpf(h.weight_decay) / mass))
                response = mpmath.exp(-gamma * t) * (mpmath.sinh(root * t) / root).real
                free = mpmath.exp(-gamma * t) * mpmath.cosh(root * t).real + gamma * response
            assert norm_response(t, h) == pytest.approx(float(response), rel=1e-12)
            assert float(theory.free("norm", torch.ones(1), [t], h)) == pytest.approx(float(free), rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_modified_loss_has_the_rate_of_the_slow_mode(nesterov: bool) -> None:
    """On a quadratic, with a warm buffer: the rate at which the steps' slow eigenvector decays, to O(η²)."""
    found = []
    for lr in (0.004, 0.002):
        h = Hyper(lr=lr, momentum=0.6, nesterov=nesterov)
        ahead = h.momentum if nesterov else 0.0
        matrix = [[1.0 - lr * (1.0 + ahead), -lr * h.momentum * (ahead if nesterov else 1.0)], [1.0, h.momentum]]
        slow = np.abs(np.linalg.eigvals(matrix)).max()
        path = theory.modified_loss(lambda p: 0.5 * p.square().sum(), torch.ones(1), [1.0], h)
        found.append(abs(math.log(path[0, 0].item()) - math.log(slow) / lr))
    assert math.log2(found[0] / found[1]) == pytest.approx(2.0, abs=0.15)


def test_modified_flow_of_a_quadratic_is_an_oscillator() -> None:
    h = Hyper(lr=0.1, momentum=0.9, weight_decay=0.7)
    times = np.linspace(0.0, 3.0, 7)
    path = theory.modified_flow(lambda p: 0.0 * p.sum(), torch.ones(1), times, h)
    motion = theory.oscillator("translation", h)
    assert motion.regime == "underdamped"
    phase = motion.frequency * times
    velocity = -0.7 / 1.9
    exact = np.cos(phase) + (motion.gamma + velocity) / motion.frequency * np.sin(phase)
    np.testing.assert_allclose(path[:, 0], np.exp(-motion.gamma * times) * exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: theory.gradient_flow(smooth, START, [1.0, 0.5]), "times"),
        (lambda: theory.gradient_flow(smooth, START, [-1.0, 0.5]), "times"),
        (lambda: theory.gradient_flow(smooth, START[None], [1.0]), "theta_0"),
        (lambda: theory.modified_flow(smooth, START, [1.0], Hyper(lr=0.0)), "lr"),
        (lambda: theory.oscillator("norm", Hyper(lr=0.1)), "momentum"),
        (lambda: theory.oscillator("sum", Hyper(lr=0.1, momentum=0.9)), "quantity"),  # type: ignore[arg-type]
        (lambda: theory.critical_decay("norm", Hyper(lr=0.1, momentum=0.9, nesterov=True)), "Nesterov"),
        (lambda: theory.critical_decay("norm", Hyper(lr=0.1)), "momentum"),
        (lambda: theory.driven(START, START[None], Hyper(lr=0.1, momentum=0.9, nesterov=True)), "Nesterov"),
        (lambda: theory.free("norm", START, [1.0], Hyper(lr=0.1), flow="flow"), "flow"),  # type: ignore[arg-type]
        (lambda: theory.free("norm", START, [1.0], Hyper(lr=0.1, momentum=0.9), carried=START), "carried"),
        (lambda: theory.free("norm", START, [1.0], Hyper(lr=0.0), flow="modified"), "no time"),
        (lambda: theory.modified_flow(smooth, START, [1.0], Hyper(lr=0.1), buffer_0=START[:1]), "buffer_0"),
        (lambda: theory.equilibrium(Hyper(lr=0.1, momentum=0.9, nesterov=True)), "Nesterov"),
        (lambda: theory.stochastic_flow(losses, start(), 1, Hyper(lr=0.1), 0), "batch_size"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()


def test_a_flow_that_explodes_is_told() -> None:
    with pytest.raises(ArithmeticError, match="could not be followed to time 10"), np.errstate(all="ignore"):
        theory.gradient_flow(lambda p: -p.pow(4).sum(), torch.ones(1), [10.0])


def test_a_flow_that_slides_along_a_kink_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory.flows, "MAX_EVALUATIONS", 2000)
    with pytest.raises(ArithmeticError, match="kink"):
        theory.gradient_flow(lambda p: p.abs().sum(), START, [3.0])


def test_noise_is_the_covariance_of_the_gradients() -> None:
    theta = start()
    each = torch.stack([torch.func.grad(lambda p, i=i: losses(p)[i])(theta) for i in range(12)])
    g, factor = theory.noise(losses, theta)
    torch.testing.assert_close(g, each.mean(0))
    torch.testing.assert_close(factor @ factor.T, torch.cov(each.T, correction=0))


def test_noise_obeys_the_gradient_constraints() -> None:
    theta = start()
    _, factor = theory.noise(losses, theta)
    assert factor.norm() > 0.1
    first, second, third = parts(theta)
    for column in factor.T:
        of_first, of_second, of_third = parts(column)
        assert of_third.sum(0).abs().max() < 1e-15
        assert (of_first * first).sum(1).abs().max() < 1e-15
        assert ((of_second * second).sum(1) - (of_third * third).sum(0)).abs().max() < 1e-15


def test_noise_moves_norms_and_not_sums() -> None:
    h = Hyper(lr=0.05)
    path = theory.stochastic_flow(losses, start(), 40, h, 2, generator=torch.Generator().manual_seed(3))
    before, after = charges(path[0]), charges(path[-1])
    assert (after["translation"] - before["translation"]).abs().max() < 1e-14
    assert (after["scale"] - before["scale"]).min() > 1e-3


def test_the_norm_grows_as_ito_says() -> None:
    """A scale-symmetric norm gains (η/S) tr G Gᵀ dt, and η|g|² dt for the step's own size; the drift adds nothing."""
    h = Hyper(lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    theta, grown, expected = start(), 0.0, 0.0
    for _ in range(500):
        g, factor = theory.noise(losses, theta)
        expected += h.lr**2 * float(parts(factor.square().sum(1) / 2 + g.square())[0].sum())
        after = theory.stochastic_flow(losses, theta, 1, h, 2, generator=generator)[-1]
        grown += float(charges(after)["scale"].sum() - charges(theta)["scale"].sum())
        theta = after
    assert grown == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.8, 0.5)])
def test_momentum_amplifies_the_noise_of_steps_and_equation_alike(momentum: float, dampening: float) -> None:
    """Steps with noise tangent to a sphere and no mean: |θ|² gains (T/S) tr G Gᵀ/(1−β)² a unit of time."""
    h, size, n = Hyper(lr=1e-3, momentum=momentum, dampening=dampening), 2, 400
    examples = torch.randn(64, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    examples -= examples.mean(0)

    def each(p: Tensor) -> Tensor:
        losses: Tensor = examples @ p / p.norm()
        return losses

    generator = torch.Generator().manual_seed(1)
    first = torch.ones(60, dtype=torch.float64)
    _, factor = theory.noise(each, first)
    expected = n * h.duration**2 / size * float(factor.square().sum()) / (1.0 - momentum) ** 2
    by_steps = torch.nn.Parameter(first.clone())
    optimizer = torch.optim.SGD([by_steps], lr=h.lr, momentum=momentum, dampening=dampening)
    for _ in range(n):
        optimizer.zero_grad()
        rows = torch.randint(64, (size,), generator=generator)
        (examples[rows] @ by_steps / by_steps.norm()).mean().backward()
        optimizer.step()
    by_equation = theory.stochastic_flow(each, first, n, h, size, generator=generator)[-1]
    for grown in (by_steps.detach(), by_equation):
        assert float(grown.square().sum()) - 60.0 == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("options", [{"dampening": 0.5}, {"nesterov": True}, {}])
def test_the_stochastic_equation_goes_as_far_as_the_steps(options: dict[str, Any]) -> None:
    """A constant gradient, no noise: all but the filling of the buffer, η(1−τ)/(1−β) a step."""
    h = Hyper(lr=0.01, momentum=0.5, **options)
    steps = theory.descent(lambda p: p.sum(), torch.zeros(1), 200, h)
    path = theory.stochastic_flow(lambda p: p.sum()[None], torch.zeros(1), 200, h, 1)
    torch.testing.assert_close(path[-1] - path[100], steps[-1] - steps[100], rtol=1e-12, atol=0)


def test_stationary_noise_in_a_valley() -> None:
    """An Ornstein–Uhlenbeck process: variance ηΣ/(2hS) about the minimum, whatever the substeps."""
    targets = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    h, batch = Hyper(lr=0.1), 4
    path = theory.stochastic_flow(
        lambda p: 0.5 * (p - targets).square(),
        torch.zeros(1),
        3000,
        h,
        batch,
        substeps=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(path.var()) == pytest.approx(0.1 / (2 * batch), rel=0.1)


def test_the_stochastic_equation_without_noise_is_gradient_flow() -> None:
    h = Hyper(lr=0.01, momentum=0.5, weight_decay=0.1)
    one = theory.stochastic_flow(lambda p: smooth(p)[None], START, 100, h, 1, substeps=20)
    flow = theory.gradient_flow(smooth, START, [1.0], h)
    torch.testing.assert_close(one[-1], flow[-1], rtol=0, atol=1e-3)


OSCILLATORS = {
    "underdamped": Hyper(lr=0.1, momentum=0.99, weight_decay=0.05),
    "overdamped": Hyper(lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": Hyper(lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
    "dampened": Hyper(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.3),
}
QUANTITIES: tuple[theory.charges.Quantity, ...] = ("translation", "norm")


@pytest.mark.parametrize("name", OSCILLATORS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_free_charges_solve_their_equation(quantity: theory.charges.Quantity, name: str) -> None:
    h = OSCILLATORS[name]
    motion = theory.oscillator(quantity, h)

    def rate(_: float, state: NDArray[np.float64]) -> list[float]:
        return [state[1], -2.0 * motion.gamma * state[1] - motion.omega**2 * state[0]]

    times = np.linspace(0.0, 20.0, 9)
    numeric = solve_ivp(rate, (0.0, 20.0), [2.0, 0.0], "DOP853", t_eval=times, rtol=1e-11, atol=1e-12).y[0]
    exact = theory.free(quantity, torch.tensor([2.0]), torch.from_numpy(times), h)
    np.testing.assert_allclose(exact[:, 0], numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_critical_decay_parts_the_regimes(quantity: theory.charges.Quantity) -> None:
    critical = theory.critical_decay(quantity, Hyper(lr=0.1, momentum=0.9, dampening=0.2))
    regimes = [
        theory.oscillator(quantity, Hyper(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=factor * critical))
        for factor in (0.5, 1.0, 2.0)
    ]
    assert [motion.regime for motion in regimes] == ["overdamped", "critical", "underdamped"]
    assert regimes[2].frequency == pytest.approx(regimes[2].gamma)  # ω² = 2γ²
    assert regimes[0].frequency == regimes[1].frequency == 0.0


@pytest.mark.parametrize("name", OSCILLATORS)
def test_sums_swing_at_the_discrete_laws_frequency(name: str) -> None:
    """Steps without a gradient: x_k = r^k (A cos φk + B sin φk), r of no interest; or no swing, and no sign changes."""
    h = OSCILLATORS[name]
    phi = theory.discrete_frequency("translation", h)
    x = theory.descent(lambda p: 0.0 * p.sum(), torch.ones(1), 300, h)[:, 0].numpy()
    if theory.oscillator("translation", h).regime != "underdamped":
        assert phi == 0.0
        assert (x > 0).all()
        return
    # of three rows in one recursion x'' = t x' − d x, the trace t and determinant d
    trace, negative = np.linalg.solve([[x[11], x[10]], [x[12], x[11]]], [x[12], x[13]])
    assert phi == pytest.approx(math.acos(trace / (2.0 * math.sqrt(-negative))), rel=1e-9)
    assert phi == pytest.approx(theory.oscillator("translation", h).frequency * h.duration, rel=0.1)


def test_the_frequencies_of_both_laws_meet_as_steps_get_small() -> None:
    ratios = []
    for scale in (1.0, 0.5):  # β and λ so that the motion is the same in time
        h = Hyper(lr=0.02 * scale, momentum=1.0 - 0.02 * scale, weight_decay=0.05)
        for quantity in QUANTITIES:
            continuous = theory.oscillator(quantity, h).frequency * h.duration
            ratios.append(theory.discrete_frequency(quantity, h) / continuous - 1.0)
    assert max(map(abs, ratios[2:])) < 0.5 * max(map(abs, ratios[:2]))
    assert theory.discrete_frequency("norm", Hyper(lr=0.1, weight_decay=0.1)) == 0.0


@pytest.mark.parametrize(
    "h",
    [
        Hyper(lr=0.5, weight_decay=3.0),
        Hyper(lr=0.5, momentum=0.3, weight_decay=5.5),
        Hyper(lr=0.5, momentum=0.3, weight_decay=2.5, nesterov=True),
    ],
    ids=["plain", "momentum", "nesterov"],
)
def test_sums_under_very_strong_decay_change_sign_at_every_step(h: Hyper) -> None:
    assert theory.discrete_frequency("translation", h) == math.pi
    x = theory.descent(lambda p: 0.0 * p.sum(), torch.ones(1), 40, h)[20:, 0]
    assert (x[1:] * x[:-1] < 0).all()


@pytest.mark.parametrize("name", theory.__all__)
def test_every_docstring_tells_formula_validity_units_and_source(name: str) -> None:
    text = getattr(theory, name).__doc__
    assert re.search(r"[=θφωγ]", text)
    assert re.search(r"[Vv]alid|[Ee]xact|Raises", text)
    assert re.search(r"Attributes:|Returns:", text)
    assert "Source: " in text
    assert re.search(r"docs/theory\.md, section \d", text)


@pytest.mark.parametrize(
    "h",
    [Hyper(lr=0.1, weight_decay=0.2), Hyper(lr=0.1, momentum=0.9, weight_decay=0.2)],
    ids=["plain", "momentum"],
)
def test_driven_norms_are_the_convolution(h: Hyper) -> None:
    sq = torch.rand(30, 2, dtype=torch.float64)
    start = torch.tensor([1.0, -0.5], dtype=torch.float64)
    found = theory.driven(start, sq, h)
    kick = h.lr**2 * sq if h.momentum == 0.0 else 2.0 * h.lr * sq
    for k in (0, 1, 7, 30):
        response = torch.tensor([norm_response((k - j) * h.lr, h) for j in range(k)], dtype=torch.float64)
        expected = free_norm(start, k * h.lr, h) + response @ kick[:k]
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_driven_norms_are_the_optimizers_flow_law(momentum: float) -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = nperf.SGD(
        model.named_parameters(), lr=0.1, momentum=momentum, weight_decay=0.1, symmetries=nperf.neurons(model)
    )
    (initial,) = optimizer.readout().values()
    sq = []
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        law = optimizer.readout()[initial.name]
        gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)  # type: ignore[list-item, index]
        sq.append(law.moments["sq_u"] if momentum else gradient.square().sum(1))
    h = Hyper(lr=0.1, momentum=momentum, weight_decay=0.1)
    torch.testing.assert_close(
        theory.driven(initial.charge, torch.stack(sq), h)[-1], law.flow.total, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    "h",
    [
        Hyper(lr=0.3, weight_decay=0.4),
        Hyper(lr=0.1, momentum=0.9, weight_decay=0.02),
        Hyper(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.02),
    ],
    ids=["plain", "momentum", "dampened"],
)
def test_equilibrium_is_the_discrete_laws_fixed_point(h: Hyper) -> None:
    matrix, recursions = discrete_law(Law.NORM, h.coefficients())
    (_, x_sq_u, _), (_, y_sq_u, _) = recursions["budget"].b
    if h.momentum == 0.0:  # no buffer, no second number; u = d leaves x' = (1 − 2ηλ) x + η²|u|², u with its decay
        norm = x_sq_u / (1.0 - matrix[0][0])
    else:
        norm = np.linalg.solve(np.eye(2) - np.array(matrix), [float(x_sq_u), float(y_sq_u)])[0]
    assert theory.equilibrium(h) == pytest.approx(h.lr / math.sqrt(norm), rel=1e-12)  # |u| = 1


def test_a_normalised_weight_reaches_equilibrium() -> None:
    """Noise on a sphere: update and norm settle at the predicted ratio, from far above it."""
    h = Hyper(lr=0.1, momentum=0.9, weight_decay=0.1)
    p = torch.nn.Parameter(3.0 * torch.ones(50, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=h.lr, momentum=h.momentum, weight_decay=h.weight_decay)
    ratios = []
    for _ in range(1200):
        before = p.detach().clone()
        optimizer.zero_grad()
        (p / p.norm() @ torch.randn(50, dtype=torch.float64)).backward()
        optimizer.step()
        ratios.append(float((p.detach() - before).norm() / before.norm()))
    assert np.sqrt(np.mean(np.square(ratios[600:]))) == pytest.approx(theory.equilibrium(h), rel=0.05)
