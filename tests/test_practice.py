"""What people do between two steps: accumulate, clip, freeze, stop the learning rate, decay some groups and not others.

The budget charge = free + forced + defect stays an identity through all of it. Where the parts of a law are not treated
alike, the law is open and says why; where it is closed, free + forced alone predicts the charge of a true symmetry.
"""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from training import (
    ADAMW,
    BACKENDS,
    KINDS,
    SGD,
    SYMMETRIES,
    Kind,
    assert_same,
    device_of,
    each,
    loss_of,
    make_net,
    ours,
    theirs,
    train,
)

import noetherperf as nperf

TRUE = ("fc1->fc2", "fc2", "fc2.bias")  # symmetries of the network and its loss; "half of fc1" claims none
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
EXACT = 1e-12


def terms(law: nperf.ChargeReadout) -> torch.Tensor:
    """What the charge is made of, before anything cancels; never less than the parts' own norms."""
    prediction = law.discrete
    return law.moments["sq_p"].abs() + prediction.free.abs() + prediction.forced.abs() + prediction.defect.abs() + 1.0


def assert_identities(optimizer: nperf.MeasuredOptimizer) -> None:
    """The budget is an identity always, and for SGD free + forced a prediction if a true symmetry's law is closed."""
    for name, law in optimizer.readout().items():
        assert (law.rounding.abs() <= EXACT * terms(law)).all(), name
        if name in TRUE and law.closed and isinstance(optimizer, nperf.SGD):
            assert (law.residual.abs() <= EXACT * terms(law)).all(), name


def reasons(optimizer: nperf.MeasuredOptimizer) -> dict[str, str]:
    """The open laws among the true symmetries'."""
    return {name: law.reason for name, law in optimizer.readout().items() if name in TRUE and not law.closed}


class TestAccumulation:
    @each(KINDS)
    def test_micro_batches_are_one_step(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        for step in range(6):
            for model, sgd in ((net, optimizer), (other, peer)):
                sgd.zero_grad()
                for micro in range(4):
                    (loss_of(model, 4 * step + micro) / 4).backward()
                sgd.step()
        assert_same(net, optimizer, other, peer)
        assert optimizer.step_count == 6
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    def test_gradients_that_are_never_cleared(self, backend: str) -> None:
        """Past gradients break the constraint at the present parameters: the defect says so, the budget holds."""
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.05)
        for step in range(6):
            loss_of(net, step).backward()
            optimizer.step()
        readout = optimizer.readout()
        assert readout["fc1->fc2"].relative_defect.max() > 1e-3
        assert readout["fc1->fc2"].residual.abs().max() > 1e-4
        assert (readout["fc1->fc2"].rounding.abs() <= EXACT * terms(readout["fc1->fc2"])).all()
        # ⟨g, 1⟩ is zero wherever g is from
        assert (readout["fc2"].residual.abs() <= EXACT * terms(readout["fc2"])).all()


class TestClipping:
    def test_by_norm_keeps_every_symmetry(self, backend: str) -> None:
        """All gradients are scaled alike, so what is zero stays zero."""
        net = make_net(backend)
        optimizer = ours(net, backend, **OPTIONS)
        train(net, optimizer, range(20), before_step=lambda _, net: nn.utils.clip_grad_norm_(net.parameters(), 0.1))
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    def test_of_one_layer_breaks_what_reaches_beyond_it(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **OPTIONS)
        train(
            net,
            optimizer,
            range(20),
            before_step=lambda _, net: nn.utils.clip_grad_norm_(net.get_submodule("fc1").parameters(), 0.01),
        )
        readout = optimizer.readout()
        assert readout["fc1->fc2"].residual.abs().max() > 1e-4
        for name in ("fc2", "fc2.bias"):
            assert (readout[name].residual.abs() <= EXACT * terms(readout[name])).all()
        for law in readout.values():
            assert (law.rounding.abs() <= EXACT * terms(law)).all()

    def test_by_value_is_a_defect(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **OPTIONS)
        train(net, optimizer, range(20), before_step=lambda _, net: nn.utils.clip_grad_value_(net.parameters(), 0.01))
        readout = optimizer.readout()
        assert readout["fc2"].relative_defect.max() > 1e-3
        for law in readout.values():
            assert (law.rounding.abs() <= EXACT * terms(law)).all()
            torch.testing.assert_close(law.residual, law.discrete.defect, rtol=0, atol=1e-11)


class TestFreezing:
    @each(KINDS)
    def test_all_parts_of_a_law(self, kind: Kind, backend: str) -> None:
        """Their law waits with them, momentum and all, and goes on when they do."""
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(4))
            model.get_submodule("fc2").requires_grad_(False)
            before = optimizer.readout()["fc2"].charge
            train(model, sgd, range(4, 8))
            assert sgd is peer or torch.equal(optimizer.readout()["fc2"].charge, before)
            model.get_submodule("fc2").requires_grad_(True)
            train(model, sgd, range(8, 12))
        assert_same(net, optimizer, other, peer)
        assert_identities(optimizer)
        assert reasons(optimizer).keys() == {"fc1->fc2"}  # some of whose parts went on alone

    def test_some_parts_of_a_law_open_it_with_the_step(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **OPTIONS)
        train(net, optimizer, range(3))
        assert reasons(optimizer) == {}
        net.get_parameter("fc1.bias").requires_grad_(False)
        train(net, optimizer, range(3, 5))
        (reason,) = reasons(optimizer).values()
        assert "step 4" in reason
        assert "fc1.bias had no gradient" in reason
        net.get_parameter("fc1.bias").requires_grad_(True)
        train(net, optimizer, range(5, 9))
        assert reasons(optimizer).keys() == {"fc1->fc2"}  # once open, open
        assert_identities(optimizer)
        optimizer.reset_measurement()
        train(net, optimizer, range(9, 12))
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    @each(KINDS)
    def test_from_the_start_and_late(self, kind: Kind, backend: str) -> None:
        """The first step of the late ones is not dampened, which alone makes them differ from the others."""
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        for model, sgd in ((net, optimizer), (other, peer)):
            model.get_submodule("fc1").requires_grad_(False)
            train(model, sgd, range(3))
            model.get_submodule("fc1").requires_grad_(True)
            train(model, sgd, range(3, 8))
        assert_same(net, optimizer, other, peer)
        assert reasons(optimizer).keys() == {"fc1->fc2"}
        assert_identities(optimizer)


class TestLearningRate:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_zero_for_a_while(self, backend: str, momentum: float) -> None:
        """Nothing moves, but momentum gathers and leaves with the next step."""
        net, other = make_net(backend), make_net(backend)
        options = {**OPTIONS, "momentum": momentum}
        optimizer, peer = ours(net, backend, **options), theirs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(4))
            sgd.param_groups[0]["lr"] = 0.0
            before = copy.deepcopy(model)
            train(model, sgd, range(4, 8))
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
            sgd.param_groups[0]["lr"] = 0.05
            train(model, sgd, range(8, 12))
        assert_same(net, optimizer, other, peer)
        assert optimizer.readout().time == pytest.approx(4 * 0.1 + 4 * 0.05)
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    @each(KINDS)
    def test_down_to_zero(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **kind.options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10)
        train(net, optimizer, range(15), after_step=schedule.step)
        assert optimizer.param_groups[0]["lr"] == 0.0
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    @each(KINDS)
    def test_never_more_than_zero(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **{**kind.options, "lr": 0.0})
        train(net, optimizer, range(5))
        for law in optimizer.readout().values():
            assert torch.equal(law.charge, law.initial)
            assert law.rounding.abs().max() == 0.0


class TestDecayByGroup:
    def make(self, net: nn.Module, backend: str, kind: Kind = SGD, **of_biases: Any) -> Any:
        named = list(net.named_parameters())
        groups = [
            {"params": [(name, p) for name, p in named if p.ndim > 1]},
            {"params": [(name, p) for name, p in named if p.ndim == 1], **of_biases},
        ]
        return kind.ours(groups, symmetries=SYMMETRIES, backend=backend, **kind.options)

    @each(KINDS)
    def test_steps_of_one_group_and_then_of_the_other(self, kind: Kind, backend: str) -> None:
        """As many tensors in every step, of the same ages, and other options for each."""
        net, other = make_net(backend), make_net(backend)

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            params = [list(model.get_submodule(name).named_parameters(name)) for name in ("fc1", "fc2")]
            return [{"params": params[0]}, {"params": params[1], "lr": 0.3 * kind.options["lr"]}]

        optimizer = kind.ours(groups(net), symmetries=SYMMETRIES, backend=backend, **kind.options)
        peer = kind.theirs(groups(other), foreach=False, **kind.options)

        def without(step: int, model: nn.Module) -> None:
            for p in model.get_submodule("fc2" if step % 2 == 0 else "fc1").parameters():
                p.grad = None

        for model, stepper in ((net, optimizer), (other, peer)):
            train(model, stepper, range(8), before_step=without)
        assert_same(net, optimizer, other, peer)
        assert_identities(optimizer)

    @each((SGD, ADAMW))
    def test_biases_without_decay_open_what_they_are_part_of(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = self.make(net, backend, kind, weight_decay=0.0)
        train(net, optimizer, range(20))
        (reason,) = reasons(optimizer).values()
        assert reason == "in step 1 fc1.weight and fc1.bias had different weight_decay (0.05 and 0.0)"
        assert_identities(optimizer)

    @each(KINDS)
    def test_groups_that_are_alike_open_nothing(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = self.make(net, backend, kind)
        train(net, optimizer, range(20))
        assert reasons(optimizer) == {}
        assert_identities(optimizer)

    @each(KINDS)
    def test_a_change_in_one_group_opens_from_then_on(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = self.make(net, backend, kind)
        train(net, optimizer, range(5))
        optimizer.param_groups[1]["lr"] = 0.02
        train(net, optimizer, range(5, 6))
        optimizer.param_groups[1]["lr"] = kind.options["lr"]
        train(net, optimizer, range(6, 10))
        (reason,) = reasons(optimizer).values()
        assert "step 6" in reason
        assert f"lr ({kind.options['lr']} and 0.02)" in reason
        assert_identities(optimizer)


def scaled_step(flag: float) -> Callable[[nperf.SGD, nn.Module], None]:
    """The next step as a gradient scaler makes it."""

    def act(optimizer: nperf.SGD, net: nn.Module) -> None:
        for p in net.parameters():
            if p.grad is not None:
                p.grad *= 8.0
        optimizer.grad_scale = torch.tensor(8.0, device=device_of(optimizer.backend))  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(flag, device=device_of(optimizer.backend))  # type: ignore[attr-defined]

    return act


def set_options(**options: Any) -> Callable[[nperf.SGD, nn.Module], None]:
    def act(optimizer: nperf.SGD, net: nn.Module) -> None:
        for group in optimizer.param_groups:
            group.update(options)

    return act


def freeze(*names: str) -> Callable[[nperf.SGD, nn.Module], None]:
    def act(optimizer: nperf.SGD, net: nn.Module) -> None:
        for name in names:
            net.get_parameter(name).grad = None

    return act


def new_parameter(net: nn.Module) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, device=next(net.parameters()).device))


EVENTS: dict[str, Callable[[nperf.SGD, nn.Module], object]] = {
    "nothing": lambda optimizer, net: None,
    "clip": lambda optimizer, net: nn.utils.clip_grad_norm_(net.parameters(), 0.1),
    "accumulate": lambda optimizer, net: loss_of(net, 99).backward(),
    "lr 0": set_options(lr=0.0),
    "lr 0.2": set_options(lr=0.2),
    "momentum 0": set_options(momentum=0.0, nesterov=False),
    "momentum 0.9": set_options(momentum=0.9, nesterov=False),
    "nesterov": set_options(momentum=0.8, nesterov=True, dampening=0.0),
    "dampening": set_options(dampening=0.5, nesterov=False),
    "weight decay": set_options(weight_decay=0.1),
    "no weight decay": set_options(weight_decay=0.0),
    "lr of a group": lambda optimizer, net: optimizer.param_groups[1].update(lr=0.05),
    "decay of a group": lambda optimizer, net: optimizer.param_groups[1].update(weight_decay=0.2),
    "freeze a bias": freeze("fc1.bias"),
    "freeze fc2": freeze("fc2.weight", "fc2.bias"),
    "freeze all": freeze("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
    "scaled": scaled_step(0.0),
    "overflow": scaled_step(1.0),
    "reload": lambda optimizer, net: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "new group": lambda optimizer, net: optimizer.add_param_group({"params": [("more", new_parameter(net))]}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@given(events=st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=16))
def test_whatever_happens_between_steps(backend: str, events: list[str]) -> None:
    net = make_net(backend)
    optimizer = TestDecayByGroup().make(net, backend)
    for step, event in enumerate(events):
        if event == "new group" and len(optimizer.param_groups) > 2:
            continue
        optimizer.zero_grad()
        loss_of(net, step).backward()
        EVENTS[event](optimizer, net)
        optimizer.step()
        for attribute in ("grad_scale", "found_inf"):
            if hasattr(optimizer, attribute):
                delattr(optimizer, attribute)
        assert_identities(optimizer)
    assert optimizer.step_count == len(events) - events.count("overflow") - max(0, events.count("new group") - 1)
