"""Every formula of docs/theory.md against an evaluation of its own in 50 digits, and the code against both."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

import noetherperf as nperf
from noetherperf import Norm, Part, theory
from noetherperf.rules.law import Law
from noetherperf.rules.oscillator import damping, norm_response, oscillator, start_weights
from noetherperf.rules.sgd import Hyper

pytestmark = pytest.mark.slow

Vector = list[Any]  # of mpf
N, STEPS = 4, 9


@pytest.fixture(autouse=True)
def fifty_digits() -> Iterator[None]:
    with mpmath.workdps(50):
        yield


def exact(values: Tensor) -> Vector:
    return [mpf(x) for x in values.detach().flatten().tolist()]


def dot(a: Vector, b: Vector) -> Any:
    return mpmath.fsum(x * y for x, y in zip(a, b, strict=True))


def combined(*terms: tuple[Any, Vector]) -> Vector:
    return [mpmath.fsum(c * v[i] for c, v in terms) for i in range(len(terms[0][1]))]


def close(found: float | Tensor, expected: Any, size: Any, tolerance: float = 1e-13) -> None:
    """|found − expected| within the tolerance, relative to the sum of the terms' sizes."""
    assert abs(mpf(float(found)) - expected) <= tolerance * abs(size), (float(found), mpmath.nstr(expected, 17))


def angle(a: Vector, b: Vector) -> Any:
    return mpmath.acos(dot(a, b) / mpmath.sqrt(dot(a, a) * dot(b, b)))


# ---- sections 2, 3, 5 and 7: SGD with other options at every step ----------------------------------------------------

SGD_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "dampened": {"momentum": 0.8, "dampening": 0.4},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "maximize": {"momentum": 0.7, "nesterov": True, "maximize": True},
}


def scheduled(optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """Change every number in the parameter group, and return what the step will read."""
    (group,) = optimizer.param_groups
    wave = 1.0 + 0.5 * math.sin(1.7 * step)
    group["lr"], group["weight_decay"] = 0.1 * wave, 0.3 / wave
    if group.get("momentum"):
        group["momentum"] = 0.6 + 0.05 * (step % 7)
        if group["dampening"]:
            group["dampening"] = 0.2 + 0.1 * (step % 3)
    if "betas" in group:
        group["betas"] = (0.7 + 0.03 * (step % 6), 0.99 - 0.01 * (step % 2))
    return group


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("late", [0, 3], ids=["at once", "late"])
@pytest.mark.parametrize("case", SGD_CASES)
def test_laws_of_sgd_under_schedules(case: str, late: int, warm: bool) -> None:
    """Sum and norm of one tensor whose gradient obeys nothing; `late` steps pass before its first gradient."""
    torch.manual_seed(0)
    p, other = (torch.nn.Parameter(torch.randn(N, dtype=torch.float64)) for _ in range(2))
    symmetries = [nperf.Translation("sum", [Part("p", None)]), Norm("norm", [Part("p", None)])]
    named = [("p", p), ("other", other)]
    optimizer = nperf.SGD(named, lr=0.1, symmetries=symmetries, **SGD_CASES[case])
    fresh = True

    def step(number: int, has_gradient: bool) -> dict[str, Any]:
        group = scheduled(optimizer, number)
        p.grad = torch.randn_like(p) if has_gradient else None
        other.grad = torch.randn_like(other)
        optimizer.step()
        return group

    if warm:
        for number in range(3):
            step(number + 50, has_gradient=True)
        optimizer.reset_measurement()
        fresh = False
    theta = exact(p)
    v = exact(optimizer.state[p]["momentum_buffer"]) if warm and case != "plain" else [mpf(0)] * N
    one = [mpf(1)] * N
    start = {1: dot(theta, one), 2: dot(theta, theta)}
    carried = {1: dot(v, one), 2: dot(theta, v)}
    laws = {k: {"free": [start[k], carried[k]], "forced": [mpf(0)] * 2, "defect": [mpf(0)] * 2} for k in (1, 2)}
    flow = {k: mpmath.matrix([start[k], 0]) for k in (1, 2)}
    driven = mpmath.matrix([0, 0])
    sizes = {k: abs(start[k]) for k in (1, 2)}
    for number in range(STEPS):
        has_gradient = number >= late
        group = step(number, has_gradient)
        if not has_gradient:
            continue
        eta, lam, beta, tau = (mpf(group[key]) for key in ("lr", "weight_decay", "momentum", "dampening"))
        s, nesterov = (-1 if group["maximize"] else 1), group["nesterov"]
        assert p.grad is not None
        g = exact(p.grad)
        # section 2
        gain = (1 if fresh else 1 - tau) if beta else 0
        b, mix_d, mix_v = (beta, 1 if nesterov else 0, beta if nesterov else 1) if beta else (1, 1, 0)
        d = combined((s, g), (lam, theta))
        after = combined((b, v), (gain, d))
        u = combined((mix_d, d), (mix_v, after))
        sq_u, uv = dot(u, u), dot(u, after)
        # section 3
        for kappa, psi in ((1, one), (2, theta)):
            for source, pair in laws[kappa].items():
                x, y = pair
                delta = s * dot(g, psi) if source == "defect" else 0
                drive = 1 if kappa == 2 and source == "forced" else 0
                y_hat = b * y + gain * (lam * x + delta)
                pair[0] = x - kappa * eta * (mix_d * (lam * x + delta) + mix_v * y_hat) + drive * eta**2 * sq_u
                pair[1] = y_hat - drive * eta * uv
        # section 5
        duration = eta * (1 - tau) if beta else eta
        for kappa in (1, 2):
            if not beta:
                decay = mpmath.exp(-kappa * lam * eta)
                flow[kappa][0] *= decay
                driven[0] = decay * (driven[0] + eta**2 * dot(g, g)) if kappa == 2 else driven[0]
                continue
            mass = duration * (1 + beta) / 2
            gamma = (1 - beta + (beta * lam * eta if nesterov else 0)) / (2 * mass)
            matrix = mpmath.expm(mpmath.matrix([[0, 1], [-kappa * lam / mass, -2 * gamma]]) * duration)
            flow[kappa] = matrix * flow[kappa]
            if kappa == 2:
                f = 2 * sq_u / (1 - tau) ** 2
                if nesterov:
                    f += 4 * beta / (1 + beta) * s * dot(g, u) * -1
                driven = matrix * (driven + mpmath.matrix([0, duration * f]))
        before, theta, v, fresh = theta, combined((1, theta), (-eta, u)), after if beta else v, False
        # section 7: the angle
        law = optimizer.readout()["norm"]
        close(law.angular_update, angle(before, theta), 1, 1e-13)
        close(law.relative_update, eta * mpmath.sqrt(sq_u / dot(theta, theta)), 1, 1e-13)
        close(law.effective_lr, eta / dot(theta, theta), 1, 1e-12)
        for kappa, charge in ((1, dot(theta, one)), (2, dot(theta, theta))):
            assert abs(sum(pair[0] for pair in laws[kappa].values()) - charge) < 1e-40  # the identity
            sizes[kappa] = max(sizes[kappa], mpmath.fsum(abs(pair[0]) for pair in laws[kappa].values()))
    readout = optimizer.readout()
    for kappa, name in ((1, "sum"), (2, "norm")):
        law = readout[name]
        for source, pair in laws[kappa].items():
            close(getattr(law.discrete, source), pair[0], sizes[kappa])
        close(law.discrete.budget, mpmath.fsum(pair[0] for pair in laws[kappa].values()), sizes[kappa])
        close(law.flow.free, flow[kappa][0], sizes[kappa])
    close(readout["norm"].flow.forced, driven[0], sizes[2])


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("late", [0, 3], ids=["at once", "late"])
def test_laws_of_adamw_under_schedules(late: int, warm: bool) -> None:
    """Free, forced, growth and transport of one tensor, with b = β₁' c_k(β₁)/c_{k+1}(β₁'); the angle of every step."""
    torch.manual_seed(0)
    p, other = (torch.nn.Parameter(torch.randn(N, dtype=torch.float64)) for _ in range(2))
    symmetries = [nperf.Translation("sum", [Part("p", None)]), Norm("norm", [Part("p", None)])]
    optimizer = nperf.AdamW([("p", p), ("other", other)], lr=0.1, symmetries=symmetries)
    m, n, k = [mpf(0)] * N, [mpf(0)] * N, 0
    eps = mpf(optimizer.param_groups[0]["eps"])

    def step(number: int, has_gradient: bool) -> dict[str, Any]:
        group = scheduled(optimizer, number)
        p.grad = torch.randn_like(p) if has_gradient else None
        other.grad = torch.randn_like(other)
        optimizer.step()
        return group

    if warm:
        for number in range(3):
            group = step(number + 50, has_gradient=True)
        optimizer.param_groups[0]["betas"] = group["betas"]
        optimizer.reset_measurement()
        state = optimizer.state[p]
        m, n, k = exact(state["exp_avg"]), exact(state["exp_avg_sq"]), 3
    theta, one = exact(p), [mpf(1)] * N
    beta2 = mpf(optimizer.param_groups[0]["betas"][1])
    stored = [mpmath.sqrt(x / (1 - beta2**k)) + eps if k else mpf(1) for x in n]
    of_mean = [x / d for x, d in zip(m, stored, strict=True)]
    start = {1: dot(theta, one), 2: dot(theta, theta)}
    # What is carried before it is multiplied by β₁/c of the step to come: r w − ηq, times c of the step made.
    carried = {"free": {1: dot(of_mean, one), 2: dot(theta, of_mean)}, "forced": {1: mpf(0), 2: mpf(0)}}
    x = {"free": dict(start), "forced": {1: mpf(0), 2: mpf(0)}}
    growth, transport, product = mpf(0), {1: mpf(0), 2: mpf(0)}, {1: mpf(1), 2: mpf(1)}
    size = {1: abs(start[1]), 2: abs(start[2])}
    for number in range(STEPS):
        has_gradient = number >= late
        group = step(number, has_gradient)
        if not has_gradient:
            continue
        assert p.grad is not None
        eta, r = mpf(group["lr"]), 1 - mpf(group["lr"]) * mpf(group["weight_decay"])
        beta1, beta2 = map(mpf, group["betas"])
        g, k = exact(p.grad), k + 1
        m = combined((beta1, m), (1 - beta1, g))
        n = [beta2 * a + (1 - beta2) * b * b for a, b in zip(n, g, strict=True)]
        c = 1 - beta1**k
        u = [a / c / (mpmath.sqrt(b / (1 - beta2**k)) + eps) for a, b in zip(m, n, strict=True)]
        q = dot(u, u)
        for source in ("free", "forced"):
            drive = q if source == "forced" else 0
            for kappa in (1, 2):
                w = beta1 / c * carried[source][kappa]
                if kappa == 1:
                    x[source][1], carried[source][1] = r * x[source][1] - eta * w, c * w
                else:
                    x[source][2] = r**2 * x[source][2] - 2 * eta * r * w + eta**2 * drive
                    carried[source][2] = c * (r * w - eta * drive)
        growth = r**2 * growth + eta**2 * q
        transport = {1: r * transport[1] - eta * dot(u, one), 2: r**2 * transport[2] - 2 * eta * r * dot(theta, u)}
        product = {1: r * product[1], 2: r**2 * product[2]}
        before, theta = theta, combined((r, theta), (-eta, u))
        law = optimizer.readout()["norm"]
        close(law.angular_update, angle(before, theta), 1)
        close(law.effective_lr, eta / mpmath.sqrt(dot(theta, theta)), 1, 1e-12)
        for kappa, charge in ((1, dot(theta, one)), (2, dot(theta, theta))):
            terms = [product[kappa] * start[kappa], growth if kappa == 2 else mpf(0), transport[kappa]]
            assert abs(mpmath.fsum(terms) - charge) < 1e-40
            size[kappa] = max(size[kappa], mpmath.fsum(map(abs, terms)))
    readout = optimizer.readout()
    for kappa, name in ((1, "sum"), (2, "norm")):
        law = readout[name]
        assert law.growth is not None
        assert law.transport is not None
        close(law.discrete.free, x["free"][kappa], size[kappa], 1e-12)
        close(law.discrete.forced, x["forced"][kappa], size[kappa], 1e-12)
        close(law.transport, transport[kappa], size[kappa], 1e-12)
        close(law.growth, growth if kappa == 2 else mpf(0), size[kappa], 1e-12)


# ---- section 1 -------------------------------------------------------------------------------------------------------


def softmax(theta: Sequence[Any]) -> Any:
    return mpmath.log(mpmath.fsum(map(mpmath.exp, theta))) - theta[0]


def normalised(theta: Sequence[Any]) -> Any:
    length = mpmath.sqrt(mpmath.fsum(x * x for x in theta))
    return mpmath.sin(theta[0] / length) + (theta[1] / length) * (theta[2] / length) ** 2


def unit(degree: int) -> Callable[[Sequence[Any]], Any]:
    return lambda theta: (theta[2] * (mpf("0.7") * theta[0] + theta[1]) ** degree - 1) ** 2


@pytest.mark.parametrize(
    ("loss", "generator", "rate"),
    [
        (softmax, lambda theta: [mpf(1)] * 3, [0, 0, 0]),
        (normalised, list, [1, 1, 1]),
        (unit(1), lambda theta: [theta[0], theta[1], -theta[2]], [1, 1, -1]),
        (unit(2), lambda theta: [theta[0], theta[1], -2 * theta[2]], [1, 1, -2]),
    ],
    ids=["translation", "scale", "rescale", "degree 2"],
)
def test_gradient_and_hessian_constraints(
    loss: Callable[[Sequence[Any]], Any], generator: Callable[[Sequence[Any]], Vector], rate: list[int]
) -> None:
    """⟨g, ψ⟩ = 0 and Hψ + (∂ψ)ᵀg = 0, by numerical derivatives of the loss."""
    theta = [mpf("0.8"), mpf("0.5"), mpf("1.3")]
    units = [tuple(int(i == j) for j in range(3)) for i in range(3)]
    g = [mpmath.diff(lambda *at: loss(at), theta, order) for order in units]
    psi = generator(theta)
    assert abs(dot(g, psi)) < 1e-20
    assert max(map(abs, g)) > 0.01
    for i in range(3):
        orders = [tuple(a + b for a, b in zip(units[i], units[j], strict=True)) for j in range(3)]
        row = [mpmath.diff(lambda *at: loss(at), theta, order) for order in orders]
        assert abs(dot(row, psi) + rate[i] * g[i]) < 1e-15


# ---- section 4 -------------------------------------------------------------------------------------------------------

STARTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.5, "dampening": 0.5},
    {"momentum": 0.6, "nesterov": True},
]


def distance(h: Hyper, curvature: Any, buffer: Any, factor: Any) -> Any:
    """Between modified flow at time 1, started with `factor` times its own velocity, and the steps on ½hx²."""
    eta, beta, tau = mpf(h.lr), mpf(h.momentum), mpf(h.dampening if h.momentum else 0.0)
    duration = eta * (1 - tau)
    n = int(mpmath.nint(1 / duration))
    mix_d, mix_v = (1, beta) if h.nesterov else (0, 1)

    def matrix(gain: Any) -> Any:  # of (x, v), one step
        ahead = mix_d * curvature + mix_v * gain * curvature
        return mpmath.matrix([[1 - eta * ahead, -eta * mix_v * beta], [gain * curvature, beta]])

    first = matrix(1 if buffer is None else 1 - tau)
    x = (matrix(1 - tau) ** (n - 1) * first * mpmath.matrix([1, buffer or 0]))[0]
    w, w_v = map(mpf, start_weights(h, warm=buffer is not None))
    mass = duration * (1 + beta) / 2
    friction = 1 - beta + (beta * duration * curvature if h.nesterov else 0)
    a = mpmath.matrix([[0, 1], [-curvature / mass, -friction / mass]])
    velocity = -factor * (w * curvature + w_v * (buffer or 0))
    return abs((mpmath.expm(a * n * duration) * mpmath.matrix([1, velocity]))[0] - x)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("options", STARTS, ids=str)
def test_the_start_of_modified_flow_is_the_only_one_of_second_order(options: dict[str, Any], warm: bool) -> None:
    """Halving η divides the error by 4; with a start that is 1 % off by 2. In the limit, on a quadratic."""
    if warm and not options:
        return
    buffer = mpf("0.4") if warm else None
    undamped = 1.0 - options.get("dampening", 0.0)
    for factor, order in ((1, 2), (mpf("1.01"), 1)):
        hypers = [Hyper(lr=lr / undamped, **options) for lr in (2.0**-13, 2.0**-14)]
        if order == 1 and not options.get("momentum"):
            hypers = [Hyper(lr=lr) for lr in (2.0**-13, 2.0**-14)]
        errors = [distance(h, mpf("0.7"), buffer, factor) for h in hypers]
        tolerance = 0.02 if order == 2 else 0.15
        assert abs(mpmath.log(errors[0] / errors[1], 2) - order) < tolerance


@pytest.mark.parametrize("options", STARTS, ids=str)
def test_modified_loss_has_the_slow_rate_of_the_steps(options: dict[str, Any]) -> None:
    """c = (1+β)/(2(1−β)²), with Nesterov − β/(1−β): the rate of the slow root to O(T²)."""
    beta, nesterov, h = mpf(options.get("momentum", 0.0)), options.get("nesterov", False), mpf("0.7")
    c = (1 + beta) / (2 * (1 - beta) ** 2) - (beta / (1 - beta) if nesterov else 0)
    errors = []
    for duration in (mpf(2) ** -20, mpf(2) ** -21):
        ahead = duration * h * (1 + beta if nesterov else 1)
        trace, determinant = 1 + beta - ahead, beta * (1 - duration * h) if nesterov else beta
        slow = (trace + mpmath.sqrt(trace**2 - 4 * determinant)) / 2
        errors.append(abs(mpmath.log(slow) / duration + (h + c * duration * h * h) / (1 - beta)))
    assert abs(mpmath.log(errors[0] / errors[1], 2) - 2) < 1e-3


# ---- sections 3 and 5: oscillators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-6, 0.3, 0.9, 0.999])
def test_the_discrete_frequency_is_that_of_the_eigenvalues(beta: float) -> None:
    for kappa, quantity in ((1, "translation"), (2, "norm")):
        for decay in (0.0, 1e-3, 0.5, 3.0, 60.0):
            h = Hyper(lr=0.1, momentum=beta, dampening=0.25, weight_decay=decay)
            trace = 1 + mpf(beta) - kappa * mpf(0.1) * mpf(0.75) * mpf(decay)
            roots = mpmath.polyroots([1, -trace, mpf(beta)], maxsteps=200, extraprec=200)
            largest = max(roots, key=lambda z: (abs(z), mpmath.im(z)))
            close(theory.discrete_frequency(quantity, h), abs(mpmath.arg(largest)), 1, 1e-10)  # type: ignore[arg-type]


GRID = [
    (mu, w)
    for mu in (0.0, 1e-12, 1e-4, 0.1, 1.0, 30.0)
    for w in (0.0, 1e-300, 1e-9, mu * mu * (1 - 1e-9), mu * mu, mu * mu * (1 + 1e-7), mu * mu + 0.011, 4.0, 400.0)
]


@pytest.mark.parametrize(("mu", "w"), GRID)
def test_a_step_of_the_oscillator_is_the_matrix_exponential(mu: float, w: float) -> None:
    """e^{−μ}(C + μS) and e^{−μ}S, in all regimes, relative to the envelope; a conserved charge exactly."""
    exponential = mpmath.expm(mpmath.matrix([[0, 1], [-mpf(w), -2 * mpf(mu)]]))
    xx, s = oscillator(mu, w)
    slowest = mpmath.exp(-mpf(mu) + mpmath.re(mpmath.sqrt(mpmath.mpc(mpf(mu) ** 2 - mpf(w)))))
    close(float(xx), exponential[0, 0], slowest, 2e-14)
    close(float(s), exponential[0, 1], min(slowest, exponential[0, 1]) if w < mu * mu else slowest, 2e-14)
    if w == 0.0 and mu > 0.0:
        assert xx == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0 - 1e-6, 1.0])
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.05, 20.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_closed_forms_of_the_flow_laws(beta: float, decay: float, nesterov: bool) -> None:
    """Undriven motion from rest, from the steps' start, and the response to a kick; λ = 0 and β → 1 included."""
    dampening = 0.0 if nesterov else 0.25
    h = Hyper(lr=0.1, momentum=beta, dampening=dampening, weight_decay=decay, nesterov=nesterov)
    b, lam, eta = mpf(beta), mpf(decay), mpf(0.1)
    tau = mpf(dampening) if beta else mpf(0)
    ahead = b if nesterov else mpf(0)
    mass = eta * (1 - tau) * (1 + b) / 2
    w = (1 + 2 * ahead) / (1 + b) if nesterov else (2 / (1 - tau) - 1) / (1 + b)
    w_v = 2 * b * b / (1 + b) if nesterov else 2 * b / ((1 - tau) * (1 + b))
    charge, carried = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-0.3], dtype=torch.float64)
    for law, quantity in ((Law.TRANSLATION, "translation"), (Law.NORM, "norm")):
        kappa = law + 1
        gamma = (1 - b + (ahead * lam * eta if nesterov else 0)) / (2 * mass)
        omega_squared = kappa * lam / mass
        found = damping(law, h)
        close(found[0], gamma, gamma or 1, 1e-9 if beta > 0.99 else 1e-14)
        close(found[1], omega_squared, omega_squared or 1, 1e-14)
        for t in (0.05, 1.0, 20.0):
            matrix = mpmath.expm(mpmath.matrix([[0, 1], [-omega_squared, -2 * gamma]]) * mpf(t))
            rest = 2 * (mpmath.exp(-kappa * lam * mpf(t)) if beta == 0.0 else matrix[0, 0])
            close(theory.free(quantity, charge, [t], h), rest, 2, 1e-11)  # type: ignore[arg-type]
            fresh = 2 * matrix[0, 0] - matrix[0, 1] * kappa * w * lam * 2
            size = 2 + abs(matrix[0, 1] * kappa * w * lam * 2)
            close(theory.free(quantity, charge, [t], h, flow="modified"), fresh, size, 1e-11)  # type: ignore[arg-type]
            if beta:
                wet = (1 + 2 * ahead) / (1 + b)
                velocity = -kappa * (wet * lam * 2 + w_v * mpf(-0.3))
                warm = theory.free(quantity, charge, [t], h, flow="modified", carried=carried)  # type: ignore[arg-type]
                close(warm, 2 * matrix[0, 0] + matrix[0, 1] * velocity, size + abs(matrix[0, 1] * velocity), 1e-11)
            if law == Law.NORM:
                kick = mpmath.exp(-2 * lam * mpf(t)) if beta == 0.0 else matrix[0, 1]
                close(norm_response(t, h), kick, 1 + t, 1e-11)


def test_inertia_makes_the_rate_of_the_paper_s_law_good() -> None:
    """Without momentum: the root of ½ηr² + r + κλ is that of the steps to O(η²); a norm gets ηλ² back from |u|²."""
    lam, errors = mpf("0.3"), []
    for eta in (mpf(2) ** -20, mpf(2) ** -21):
        steps = mpmath.log(1 - eta * lam) / eta
        found = []
        for kappa in (1, 2):
            stiffness = kappa * lam - (eta * lam**2 if kappa == 2 else 0)
            root = (-1 + mpmath.sqrt(1 - 2 * eta * stiffness)) / eta
            assert abs(root + stiffness + eta * (kappa * lam) ** 2 / 2) < 10 * eta**2
            assert abs(-kappa * lam - kappa * steps - kappa * eta * lam**2 / 2) < eta**2  # the paper's
            found.append(abs(root - kappa * steps))
        errors.append(found)
    for coarse, fine in zip(*errors, strict=True):
        assert abs(mpmath.log(coarse / fine, 2) - 2) < 1e-3


@pytest.mark.parametrize("quantity", ["translation", "norm"])
@pytest.mark.parametrize("beta", [0.1, 0.9, 1.0 - 1e-5])
def test_critical_decay(quantity: theory.charges.Quantity, beta: float) -> None:
    kappa = 1 if quantity == "translation" else 2
    expected = (1 - mpf(beta)) ** 2 / (2 * kappa * mpf(0.1) * mpf(0.75) * (1 + mpf(beta)))
    h = Hyper(lr=0.1, momentum=beta, dampening=0.25)
    close(theory.critical_decay(quantity, h), expected, expected, 1e-9 if beta > 0.99 else 1e-14)


# ---- section 6 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STARTS[:4], ids=str)
def test_equilibrium_and_its_angle(options: dict[str, Any]) -> None:
    """The stated fixed point solves the discrete law of section 3, and its update is a chord of 2 arcsin(η|u|/2|θ|)."""
    h = Hyper(lr=0.2, weight_decay=0.3, **options)
    eta, lam, beta = mpf(h.lr), mpf(h.weight_decay), mpf(h.momentum)
    tau = mpf(h.dampening) if h.momentum else mpf(0)
    sq_u = mpf("1.7")
    x, y = eta * (1 + beta) * sq_u / (2 * (1 - tau) * lam), -eta * sq_u / 2
    y_hat = beta * y + (1 - tau) * lam * x
    assert abs(x - 2 * eta * y_hat + eta**2 * sq_u - x) < 1e-45
    assert abs(y_hat - eta * sq_u - y) < 1e-45
    relative = eta * mpmath.sqrt(sq_u / x)
    close(theory.equilibrium(h), relative, relative, 1e-14)
    turn = 2 * mpmath.asin(relative / 2)
    after = [mpmath.cos(turn), mpmath.sin(turn)]
    assert abs(mpmath.sqrt((1 - after[0]) ** 2 + after[1] ** 2) - relative) < 1e-45
    assert mp.dps == 50
