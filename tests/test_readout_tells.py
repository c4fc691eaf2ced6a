"""What a readout tells beside the laws: growth and transport, and how far the last step turned a group; plain loops."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf.optim.adam import Adam, AdamW
from noetherperf.symmetry import Part, Symmetry

SYMMETRIES: tuple[Symmetry, ...] = (
    nperf.Scale("one part", [Part("0.weight", 0)]),
    nperf.Scale("two parts", [Part("0.weight", 0), Part("0.bias", 0)]),
    nperf.Rescale("rescale", [Part("1.weight", 0), Part("1.bias", 0)], [Part("2.weight", 1, weight=2.0)]),
    nperf.Scale("weighted", [Part("2.weight", 0), Part("2.bias", 0, weight=3.0)]),
    nperf.Translation("columns", [Part("2.weight", 1)]),
)
RULES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "plain": (nperf.SGD, torch.optim.SGD, {"lr": 0.2, "weight_decay": 0.1}),
    "maximize": (nperf.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "momentum": (nperf.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
    "nesterov": (nperf.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "AdamW": (AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 3.0}),
    "Adam": (Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
}
DEGREE = {nperf.SGD: 2, AdamW: 1, Adam: 1}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()


def draw_gradients(model: nn.Module, step: int, missing: Sequence[str] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if name in missing:
            p.grad = None


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def vectors(symmetry: Symmetry, tensors: dict[str, Tensor]) -> Tensor:
    """The numbers of each group, all parts side by side, no coefficient; [n groups, n numbers]."""
    parts = []
    for part in symmetry.parts:
        x = tensors[part.parameter]
        parts.append(x.movedim(part.axis or 0, 0).reshape(x.shape[part.axis or 0], -1))
    return torch.cat(parts, 1)


def angles(a: Tensor, b: Tensor) -> Tensor:
    """By the half-angle formula of Kahan: 2 atan2(|â − b̂|, |â + b̂|)."""
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return 2.0 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def assert_turned(
    readout: nperf.Readout, before: dict[str, Tensor], after: dict[str, Tensor], rtol: float = 1e-9
) -> None:
    for symmetry in SYMMETRIES:
        law = readout[symmetry.name]
        if isinstance(symmetry, nperf.Translation):
            assert law.angular_update.isnan().all()
            assert law.relative_update.isnan().all()
            assert law.effective_lr.isnan().all()
        else:
            expected = angles(vectors(symmetry, before), vectors(symmetry, after))
            assert (expected > 1e-4).any()
            torch.testing.assert_close(law.angular_update, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rule", RULES)
def test_turning_is_that_of_torchs_steps(rule: str, backend: str) -> None:
    """Two parameter groups, with other learning rates, and a schedule that has moved on when the readout is taken."""
    ours, theirs, options = RULES[rule]
    if ours is not nperf.SGD and backend != "reference":
        pytest.skip("there are no kernels of this rule")
    (mine, other), late = (net(), net()), ["2.weight"]

    def make(model: nn.Module, kind: type, **more: Any) -> tuple[Any, Any]:
        named = list(model.named_parameters())
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.7 * options["lr"], "weight_decay": 0.0}]
        optimizer = kind(groups, **options, **more)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    optimizer, schedule = make(mine, ours, symmetries=SYMMETRIES, backend=backend)
    torchs, its_schedule = make(other, theirs)
    assert all(law.angular_update.isnan().all() for law in optimizer.readout().values())
    for step in range(8):
        lrs = [group["lr"] for group in optimizer.param_groups]
        before = values(other)
        for model, stepper, scheduler in ((mine, optimizer, schedule), (other, torchs, its_schedule)):
            draw_gradients(model, step, late if step < 3 else ["1.bias"] if step == 6 else ())
            stepper.step()
            scheduler.step()
        after, readout = values(other), optimizer.readout()
        assert_turned(readout, before, after)
        if rule != "AdamW":  # η u is the displacement
            for symmetry in SYMMETRIES[:4]:
                a, b = vectors(symmetry, before), vectors(symmetry, after)
                expected = (b - a).norm(dim=1) / b.norm(dim=1)
                torch.testing.assert_close(readout[symmetry.name].relative_update, expected, rtol=1e-9, atol=1e-14)
        degree = DEGREE[ours]
        for name, lr in (("one part", lrs[0]), ("two parts", lrs[0]), ("weighted", lrs[1] if step >= 3 else math.nan)):
            law = readout[name]
            torch.testing.assert_close(law.effective_lr, lr / law.charge ** (degree / 2), equal_nan=True)
        assert readout["rescale"].effective_lr.isnan().all()


def test_the_relative_update_of_adamw_has_no_decay_in_it() -> None:
    model = net()
    optimizer = AdamW(model.named_parameters(), lr=0.01, weight_decay=3.0, symmetries=SYMMETRIES)
    for step in range(4):
        draw_gradients(model, step)
        before = values(model)
        optimizer.step()
    after, readout = values(model), optimizer.readout()
    for symmetry in SYMMETRIES[:4]:
        a, b = vectors(symmetry, before), vectors(symmetry, after)
        expected = (b - 0.97 * a).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(readout[symmetry.name].relative_update, expected, rtol=1e-9, atol=1e-14)


def test_parts_with_other_learning_rates_have_no_effective_one() -> None:
    model = net()
    groups = [{"params": [(name, p)], "lr": 0.01 * (1 + k)} for k, (name, p) in enumerate(model.named_parameters())]
    optimizer = nperf.SGD(groups, momentum=0.9, symmetries=SYMMETRIES)
    draw_gradients(model, 0)
    optimizer.step()
    readout = optimizer.readout()
    assert readout["two parts"].effective_lr.isnan().all()
    torch.testing.assert_close(readout["one part"].effective_lr, 0.01 / readout["one part"].charge)


def test_tiny_angles_keep_their_digits() -> None:
    model = net()
    optimizer = AdamW(model.named_parameters(), lr=1e-9, weight_decay=0.1, symmetries=SYMMETRIES)
    draw_gradients(model, 0)
    before = values(model)
    optimizer.step()
    after = values(model)
    symmetry = SYMMETRIES[0]
    a, b = vectors(symmetry, before), vectors(symmetry, after)
    update = (a - b) - (a * (a - b)).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a
    expected = update.norm(dim=1) / a.norm(dim=1)
    assert expected.max() < 1e-8
    torch.testing.assert_close(optimizer.readout()["one part"].angular_update, expected, rtol=1e-6, atol=0.0)


def test_a_group_that_starts_at_zero_has_no_angle() -> None:
    model = net()
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][2] = 0.0
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=SYMMETRIES)
    for step in range(2):
        draw_gradients(model, step)
        optimizer.step()
        is_nan = optimizer.readout()["one part"].angular_update.isnan()
        assert is_nan.tolist() == [False, False, step == 0, False, False]


def test_what_is_changed_after_the_step_hides_it() -> None:
    model = net()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=SYMMETRIES)
    for step in range(3):
        draw_gradients(model, step)
        optimizer.step()
    with torch.no_grad():
        dict(model.named_parameters())["0.bias"].mul_(2.0)
    readout = optimizer.readout()
    assert readout["two parts"].angular_update.isnan().all()
    assert readout["one part"].angular_update.isfinite().all()
    draw_gradients(model, 3)
    before = values(model)
    optimizer.step()
    assert_turned(optimizer.readout(), before, values(model))


def test_copies_know_the_last_step_and_checkpoints_the_next() -> None:
    model = net()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, symmetries=SYMMETRIES)
    draw_gradients(model, 0)
    optimizer.step()
    _, other = copy.deepcopy((model, optimizer))
    turned = optimizer.readout()["one part"].angular_update
    assert torch.equal(other.readout()["one part"].angular_update, turned)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.readout()["one part"].angular_update.isnan().all()
    draw_gradients(model, 1)
    before = values(model)
    optimizer.step()
    assert_turned(optimizer.readout(), before, values(model))
    optimizer.reset_measurement()
    assert optimizer.readout()["one part"].relative_update.isnan().all()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads neither learning rates that are tensors nor a scaler's flag, and a device would."""

    def device_lr(group: Mapping[str, Any]) -> Tensor | None:
        return group["lr"] if isinstance(group["lr"], Tensor) else None

    monkeypatch.setattr("noetherperf.optim.meters.Meter.is_host", False)
    monkeypatch.setattr("noetherperf.optim.options.device_lr", device_lr)
    monkeypatch.setattr("noetherperf.rules.numbers.device_lr", device_lr)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_learning_rate_on_a_device_is_the_last_steps() -> None:
    """A schedule writes it in place after the step."""
    model, lr = net(), torch.tensor(0.1, dtype=torch.float64)
    optimizer = nperf.SGD(model.named_parameters(), lr=lr, momentum=0.9, symmetries=SYMMETRIES, backend="reference")
    for step in range(3):
        draw_gradients(model, step)
        before = values(model)
        optimizer.step()
        lr.mul_(0.5)
        assert_turned(optimizer.readout(), before, values(model))
        law = optimizer.readout()["one part"]
        torch.testing.assert_close(law.effective_lr, 0.1 * 0.5**step / law.charge)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
def test_where_a_device_has_skipped_the_last_step(schedule: bool) -> None:
    """With the same options as before, the last step made is known; with others it is not, until the next one."""
    model = net()
    optimizer = nperf.SGD(
        model.named_parameters(), lr=0.1, momentum=0.9, fused=True, symmetries=SYMMETRIES, backend="reference"
    )
    scaler: Any = optimizer  # torch.amp.GradScaler sets these
    scaler.grad_scale, turned = None, torch.empty(0)
    for step, skipped in enumerate((False, False, True, True, False)):
        draw_gradients(model, step)
        before = values(model)
        scaler.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        readout, known = optimizer.readout(), turned
        turned = readout["one part"].angular_update
        if not skipped:
            assert_turned(readout, before, values(model))
        elif schedule:
            assert turned.isnan().all()
        else:
            assert torch.equal(turned, known)
        optimizer.param_groups[0]["lr"] *= 0.5 if schedule else 1.0
    assert optimizer.step_count == 3


def test_scalars_are_medians_and_leave_out_what_is_not_known() -> None:
    model = net()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=SYMMETRIES)
    assert not any("update" in name or "effective" in name for name in optimizer.readout().scalars())
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][:2] = 0.0
    draw_gradients(model, 0)
    optimizer.step()
    readout = optimizer.readout()
    scalars = readout.scalars()
    for name, law in readout.items():
        for quantity in ("angular_update", "effective_lr"):
            known = [x for x in getattr(law, quantity).tolist() if not math.isnan(x)]
            assert (f"{name}/{quantity}" in scalars) == bool(known)
            if known:
                assert scalars[f"{name}/{quantity}"] == pytest.approx(statistics.median(known), rel=1e-14)
    assert len([x for x in readout["one part"].angular_update if not math.isnan(x)]) == 3
    assert {"weighted/effective_lr", "rescale/angular_update"} <= scalars.keys()
    assert not {"rescale/effective_lr", "columns/angular_update"} & scalars.keys()


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_growth_and_transport_are_those_of_plain_loops(kind: Any) -> None:
    """Two groups with other η and λ, a schedule, and a part without gradient in some steps; every charge."""
    model = net()
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.02, "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.01, weight_decay=1.0, symmetries=SYMMETRIES)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    of = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    start, kept = values(model), dict.fromkeys(values(model), 1.0)
    growth = {name: torch.zeros_like(x) for name, x in start.items()}
    overlap = {name: torch.zeros_like(x) for name, x in start.items()}
    transport_sum, kept_sum = torch.zeros_like(start["2.weight"]), 1.0
    for step in range(30):
        missing = ["2.weight"] if step % 3 == 0 else []
        draw_gradients(model, step, missing)
        before = values(model)
        optimizer.step()
        for name, p in values(model).items():
            if name in missing:
                continue
            lr = of[name]["lr"]
            r = 1.0 - lr * of[name]["weight_decay"] if kind is AdamW else 1.0
            scaled = r * before[name] - p  # η u
            growth[name] = r * r * growth[name] + scaled.square()
            overlap[name] = r * r * overlap[name] - 2.0 * r * before[name] * scaled
            kept[name] *= r * r
            if name == "2.weight":
                transport_sum, kept_sum = r * transport_sum - scaled, kept_sum * r
        schedule.step()
    readout = optimizer.readout()
    for symmetry in SYMMETRIES:
        law = readout[symmetry.name]
        is_sum = isinstance(symmetry, nperf.Translation)
        expected = [torch.zeros_like(law.charge) for _ in range(3)]
        for part in symmetry.parts:

            def total(x: Tensor, part: Part = part) -> Tensor:
                return part.weight * x.movedim(part.axis or 0, 0).reshape(x.shape[part.axis or 0], -1).sum(1)

            name = part.parameter
            terms = (start[name].square() * kept[name], growth[name], overlap[name])
            if is_sum:
                terms = (start[name] * kept_sum, torch.zeros_like(start[name]), transport_sum)
            expected = [x + total(y) for x, y in zip(expected, terms, strict=True)]
        free, grown, carried = expected
        size = sum(x.abs() for x in expected) + law.charge.abs()
        assert law.growth is not None
        assert law.transport is not None
        assert ((law.growth - grown).abs() <= 1e-12 * size).all(), symmetry.name
        assert ((law.transport - carried).abs() <= 1e-12 * size).all(), symmetry.name
        assert ((law.charge - free - law.growth - law.transport - law.rounding).abs() <= 1e-12 * size).all()
        assert is_sum or grown.abs().min() > 1e-4


def test_sgd_has_no_growth() -> None:
    law = nperf.SGD(net().named_parameters(), symmetries=SYMMETRIES).readout()["rescale"]
    assert law.growth is None
    assert law.transport is None
