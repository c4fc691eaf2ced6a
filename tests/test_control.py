"""The effective learning rate is held: on target, through checkpoints, and not where it has no meaning."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, SequentialLR

import noetherperf as nperf
from noetherperf.optim.adam import AdamW
from noetherperf.optim.control import EffectiveLearningRate, groups

NAMES = ("fc1", "fc2")
SCALES = [nperf.Scale(name, [nperf.Part(f"{name}.weight", axis=0)]) for name in NAMES]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(
        fc1=nn.Linear(6, 9, bias=False),
        norm1=nn.BatchNorm1d(9),
        relu1=nn.ReLU(),
        fc2=nn.Linear(9, 7, bias=False),
        norm2=nn.BatchNorm1d(7),
        relu2=nn.ReLU(),
        fc3=nn.Linear(7, 3),
    )
    return nn.Sequential(layers)


def make_optimizer(model: nn.Module, **options: Any) -> nperf.SGD:
    settings = {"lr": 0.3, "momentum": 0.9, "symmetries": SCALES, **options}
    return nperf.SGD(groups(model, SCALES), **settings)


def train(model: nn.Module, optimizer: nperf.SGD, scheduler: LRScheduler, steps: range) -> list[dict[str, float]]:
    """Held quantities of each step, as its η was to |θ|² in the parameters that it found."""
    return [held for held, _ in train_and_weigh(model, optimizer, scheduler, steps)]


def train_and_weigh(
    model: nn.Module, optimizer: nperf.SGD, scheduler: LRScheduler, steps: range
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """η/|θ|² and |θ|² of each step, of the parameters that it found."""
    rows = []
    for step in steps:
        batch = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(16, 6, generator=batch), torch.randint(3, (16,), generator=batch)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            weights = {name: model.get_parameter(f"{name}.weight").double() for name in NAMES}
            norms = {name: float(weight.square().sum(1).mean()) for name, weight in weights.items()}
        lrs = {name: float(group["lr"]) for name, group in zip(NAMES, optimizer.param_groups, strict=False)}
        rows.append(({name: lrs[name] / norms[name] for name in NAMES}, norms))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return rows


def test_every_step_is_on_target() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    targets = {"fc1": 0.02, "fc2": 0.2}
    scheduler = EffectiveLearningRate(optimizer, targets)
    charges = [float(optimizer.readout()[name].charge.mean()) for name in NAMES]
    for held in train(model, optimizer, scheduler, range(30)):
        assert held == pytest.approx(targets, rel=1e-12)
    assert scheduler.measured() == pytest.approx(targets, rel=1e-12)
    moved = [float(optimizer.readout()[name].charge.mean()) / q for name, q in zip(NAMES, charges, strict=True)]
    assert max(moved) > 1.02  # there was something to follow
    assert optimizer.param_groups[2]["lr"] == 0.3


def test_an_ordinary_learning_rate_is_not_held() -> None:
    """Without the control the same training leaves the band that the test above asserts."""
    model = make_model()
    optimizer = make_optimizer(model)
    idle = EffectiveLearningRate(optimizer, NAMES, every=10**9)
    held = train(model, optimizer, idle, range(30))
    assert held[-1]["fc1"] / held[0]["fc1"] < 0.98


def test_between_reads_it_is_late_by_what_the_charge_grew() -> None:
    model = make_model()
    optimizer = make_optimizer(model, lr=0.05)
    scheduler = EffectiveLearningRate(optimizer, NAMES, every=5)
    targets = dict(scheduler.targets)
    rows = train_and_weigh(model, optimizer, scheduler, range(30))
    for step, (held, norms) in enumerate(rows):
        when_read = rows[step // 5 * 5][1]
        late = {name: targets[name] * when_read[name] / norms[name] for name in NAMES}
        assert held == pytest.approx(late, rel=1e-12), step
        assert held == pytest.approx(targets, rel=1e-12 if step % 5 == 0 else 0.03), step
    assert any(held != pytest.approx(targets, rel=1e-3) for held, _ in rows)  # it was late indeed


def test_names_alone_hold_what_there_is_and_leave_the_first_step() -> None:
    optimizer = make_optimizer(make_model(), lr=0.07)
    charges = {name: float(optimizer.readout()[name].charge.mean()) for name in NAMES}
    scheduler = EffectiveLearningRate(optimizer, NAMES)
    assert scheduler.targets == {name: 0.07 / charge for name, charge in charges.items()}
    assert scheduler.get_last_lr() == pytest.approx([0.07] * 3, rel=1e-15)


def test_a_factor_scales_targets_and_all_other_groups() -> None:
    def factor(step: int) -> float:
        return 1.0 / (1 + step)

    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = EffectiveLearningRate(optimizer, {"fc1": 0.02}, factor=factor)
    train(model, optimizer, scheduler, range(4))
    assert scheduler.measured()["fc1"] == pytest.approx(0.02 / 5, rel=1e-12)
    assert [group["lr"] for group in optimizer.param_groups[1:]] == pytest.approx([0.3 / 5] * 2, rel=1e-15)


def test_a_tensor_learning_rate_is_filled_and_not_replaced() -> None:
    model = make_model()
    optimizer = make_optimizer(model, lr=torch.tensor(0.3, dtype=torch.float64))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].clone()
    tensor = optimizer.param_groups[0]["lr"]
    scheduler = EffectiveLearningRate(optimizer, NAMES)
    train(model, optimizer, scheduler, range(5))
    assert optimizer.param_groups[0]["lr"] is tensor
    assert scheduler.measured() == pytest.approx(scheduler.targets, rel=1e-12)


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_resumed_training_is_the_same_training(optimizer_first: bool) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = EffectiveLearningRate(optimizer, NAMES, every=3)
    train(model, optimizer, scheduler, range(10))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, scheduler, range(10, 20))

    again = make_model()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.7)
    resumed = make_optimizer(again)
    if optimizer_first:
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        scheduler = EffectiveLearningRate(resumed, NAMES)
    else:
        scheduler = EffectiveLearningRate(resumed, NAMES)
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(again, resumed, scheduler, range(10, 20))
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]


WARMUP = (0.1, 0.4, 0.7)  # of LinearLR(optimizer, 0.1, total_iters=3), and then 1


def warmed_up(optimizer: nperf.SGD, **options: Any) -> tuple[SequentialLR, EffectiveLearningRate]:
    warmup = LinearLR(optimizer, 0.1, total_iters=3)
    then = EffectiveLearningRate(optimizer, **{"targets": NAMES, **options})
    return SequentialLR(optimizer, [warmup, then], [3]), then


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("every", [1, 10])
def test_behind_a_warmup_it_is_on_target_at_once(every: int, as_tensor: bool) -> None:
    model = make_model()
    optimizer = make_optimizer(model, lr=torch.tensor(0.3, dtype=torch.float64) if as_tensor else 0.3)
    for group in optimizer.param_groups if as_tensor else ():
        group["lr"] = group["lr"].clone()
    charges = {name: float(optimizer.readout()[name].charge.mean()) for name in NAMES}
    scheduler, held = warmed_up(optimizer, every=every)
    assert held.targets == {name: 0.3 / charge for name, charge in charges.items()}
    rows = train_and_weigh(model, optimizer, scheduler, range(3 + every))
    for scale, (row, norms) in zip(WARMUP, rows, strict=False):
        assert row == pytest.approx({name: 0.3 * scale / norms[name] for name in NAMES}, rel=1e-12)
    for step in range(3, 4 if every > 1 else len(rows)):
        assert rows[step][0] == pytest.approx(held.targets, rel=1e-12), step
    assert held.measured() == pytest.approx(held.targets, rel=1e-12)
    assert float(optimizer.param_groups[2]["lr"]) == 0.3  # that nobody holds, and that the warmup left at 0.7 of it
    assert rows[3][1]["fc1"] > 1.001 * charges["fc1"]  # the charge has moved since the scheduler was made


def test_a_given_target_behind_a_warmup_is_the_target() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler, held = warmed_up(optimizer, targets={"fc1": 0.02}, factor=lambda step: 0.5**step)
    train(model, optimizer, scheduler, range(3))
    assert held.measured() == pytest.approx({"fc1": 0.02}, rel=1e-12)
    train(model, optimizer, scheduler, range(3, 5))
    assert held.measured() == pytest.approx({"fc1": 0.02 / 4}, rel=1e-12)
    assert [group["lr"] for group in optimizer.param_groups[1:]] == pytest.approx([0.3 / 4] * 2, rel=1e-12)


@pytest.mark.parametrize("last", [False, True])
def test_chained_with_a_warmup_it_is_scaled_and_then_on_target(last: bool) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    warmup = LinearLR(optimizer, 0.1, total_iters=3)
    held = EffectiveLearningRate(optimizer, NAMES)
    scheduler = ChainedScheduler([warmup, held] if last else [held, warmup], optimizer)
    rows = train(model, optimizer, scheduler, range(8))
    for step, row in enumerate(rows):
        scale = WARMUP[step] if step < len(WARMUP) else 1.0
        assert row == pytest.approx({name: scale * held.targets[name] for name in NAMES}, rel=1e-12), step


def test_chained_with_a_warmup_a_given_target_is_held() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    warmup = LinearLR(optimizer, 0.1, total_iters=3)
    scheduler = ChainedScheduler([warmup, EffectiveLearningRate(optimizer, {"fc1": 0.02, "fc2": 0.2})], optimizer)
    for row in train(model, optimizer, scheduler, range(8)):
        assert row == pytest.approx({"fc1": 0.02, "fc2": 0.2}, rel=1e-12)


@pytest.mark.parametrize("stopped", [2, 6])
@pytest.mark.parametrize("way", ["sequential", "chained", "chained, first"])
def test_a_warmup_is_resumed_before_its_end_and_after(way: str, stopped: int) -> None:
    def make(optimizer: nperf.SGD) -> LRScheduler:
        if way == "sequential":
            return warmed_up(optimizer)[0]
        chained: list[LRScheduler] = [LinearLR(optimizer, 0.1, total_iters=3), EffectiveLearningRate(optimizer, NAMES)]
        return ChainedScheduler(chained if way == "chained" else chained[::-1], optimizer)

    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = make(optimizer)
    train(model, optimizer, scheduler, range(stopped))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, scheduler, range(stopped, 9))
    again = make_model()
    resumed = make_optimizer(again)
    scheduler = make(resumed)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(again, resumed, scheduler, range(stopped, 9))
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_without_a_state_it_goes_on_from_last_epoch() -> None:
    def factor(step: int) -> float:
        return 1.0 / (1 + step)

    model = make_model()
    optimizer = make_optimizer(model)
    with pytest.raises(KeyError, match="'initial_lr' is not specified"):
        EffectiveLearningRate(optimizer, {"fc1": 0.02}, last_epoch=3)
    scheduler = EffectiveLearningRate(optimizer, {"fc1": 0.02}, factor=factor)
    train(model, optimizer, scheduler, range(5))
    loaded = make_optimizer(model)
    loaded.load_state_dict(optimizer.state_dict())
    again = EffectiveLearningRate(loaded, {"fc1": 0.02}, factor=factor, last_epoch=4)
    assert again.measured() == pytest.approx({"fc1": 0.02 / 6}, rel=1e-12)
    assert [group["lr"] for group in loaded.param_groups] == [group["lr"] for group in optimizer.param_groups]
    names_alone = EffectiveLearningRate(loaded, ["fc1"], last_epoch=4)
    charge = float(loaded.readout()["fc1"].charge.mean())
    assert names_alone.targets == {"fc1": 0.3 / charge}
    assert names_alone.measured() == pytest.approx(names_alone.targets, rel=1e-12)


def test_two_of_them_leave_each_other_alone() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    one = EffectiveLearningRate(optimizer, {"fc1": 0.02}, factor=lambda step: 0.9**step)
    two = EffectiveLearningRate(optimizer, {"fc2": 0.2}, factor=lambda step: 0.8**step)
    rows = train(model, optimizer, ChainedScheduler([one, two], optimizer), range(5))
    for step, row in enumerate(rows):
        assert row == pytest.approx({"fc1": 0.02 * 0.9**step, "fc2": 0.2 * 0.8**step}, rel=1e-12), step
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.3 * 0.8**5, rel=1e-12)


def test_the_state_is_plain_data(tmp_path: Any) -> None:
    scheduler = EffectiveLearningRate(make_optimizer(make_model()), NAMES, factor=lambda step: 1.0)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


def test_a_state_of_other_symmetries_is_refused_before_anything_changes() -> None:
    optimizer = make_optimizer(make_model())
    state = EffectiveLearningRate(optimizer, ["fc1"]).state_dict()
    scheduler = EffectiveLearningRate(optimizer, NAMES)
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(ValueError, match=r"fc1 in group 0, and this scheduler fc1 in group 0, fc2 in group 1"):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


def test_diverging_is_told() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = EffectiveLearningRate(optimizer, NAMES)
    optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(FloatingPointError, match=r"charge of 'fc1' is (inf|nan) at step 1"):
        train(model, optimizer, scheduler, range(1))


def several_groups() -> nperf.SGD:
    model = make_model()
    both = nperf.Scale("both", [nperf.Part("fc1.weight", axis=None), nperf.Part("fc2.weight", axis=None)])
    return nperf.SGD(groups(model, SCALES), symmetries=[both])


def one_group() -> nperf.SGD:
    return nperf.SGD(make_model().named_parameters(), symmetries=SCALES)


def shared_tensor() -> nperf.SGD:
    return make_optimizer(make_model(), lr=torch.tensor(0.3))


def translation() -> nperf.SGD:
    fc3 = nperf.Translation("fc3", [nperf.Part("fc3.weight", axis=1)])
    return nperf.SGD(make_model().named_parameters(), symmetries=[fc3])


def adamw() -> AdamW:
    model = make_model()
    return AdamW(groups(model, SCALES), symmetries=SCALES)


def empty() -> nperf.SGD:
    model = make_model()
    nn.init.zeros_(model.get_parameter("fc1.weight"))
    return make_optimizer(model)


@pytest.mark.parametrize(
    ("make", "targets", "options", "error", "message"),
    [
        (translation, ["fc3"], {}, ValueError, r"'fc3' is a translation"),
        (
            several_groups,
            ["both"],
            {},
            ValueError,
            r"several parameter groups \(fc1.weight in group 0, fc2.weight in g",
        ),
        (one_group, NAMES, {}, ValueError, r"'fc1' and 'fc2' are both in parameter group 0"),
        (shared_tensor, ["fc2"], {}, ValueError, r"groups 1, which 'fc2' is in, and 0 have one tensor .*clone\(\)"),
        (one_group, ["fc9"], {}, KeyError, r"no symmetry 'fc9' is measured; there are: fc1, fc2"),
        (one_group, [], {}, ValueError, r"at least one"),
        (one_group, "fc1", {}, ValueError, r"\['fc1'\]"),
        (one_group, {"fc1": 0.0}, {}, ValueError, r"that of 'fc1' must be positive and finite, got 0.0"),
        (one_group, {"fc1": math.nan}, {}, ValueError, r"got nan"),
        (one_group, ["fc1"], {"every": 0}, ValueError, r"every: .* got 0"),
        (empty, ["fc1"], {}, ValueError, r"charge of 'fc1' is 0.0"),
        (lambda: torch.optim.SGD(make_model().parameters()), ["fc1"], {}, TypeError, r"SGD measures no charges"),
        (adamw, ["fc1"], {}, TypeError, r"of noetherperf.SGD alone. That of AdamW is another"),
    ],
)
def test_what_cannot_be_held_is_named(
    make: Callable[[], Any], targets: Sequence[str], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EffectiveLearningRate(make(), targets, **options)


def test_groups_share_no_parameter() -> None:
    model = make_model()
    made = groups(model, SCALES)
    names = [[name for name, _ in group["params"]] for group in made]
    assert names == [
        ["fc1.weight"],
        ["fc2.weight"],
        ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "fc3.weight", "fc3.bias"],
    ]
    with pytest.raises(ValueError, match=r"'again': parameter 'fc1.weight' is not in the model, or in a group already"):
        groups(model, [*SCALES, nperf.Scale("again", [nperf.Part("fc1.weight", axis=None)])])
