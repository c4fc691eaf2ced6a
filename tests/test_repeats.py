"""Repeated steps: recognised by one compiled call, and the same, bit for bit, as steps that look at everything anew.

Each event happens between two steps of a training, and to a second training in which no step is repeated.
"""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import Interrupt
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from training import ADAMW, SGD, SYMMETRIES, Kind, assert_same, assert_same_readout, buffers, loss_of, make_net

from noetherperf import _cpu
from noetherperf.optim.repeats import Repeats
from noetherperf.rules.adam import ADAM

KINDS = pytest.mark.parametrize("kind", [SGD, ADAMW], ids=["SGD", "AdamW"])
MEASURED = pytest.mark.parametrize("symmetries", [SYMMETRIES, []], ids=["measured", "plain"])


class Training:
    """A network with its optimizer; `general` counts the steps that were not repeats."""

    def __init__(self, kind: Kind, symmetries: Any = SYMMETRIES, *, repeats: bool = True) -> None:
        self.net, self.step_number = make_net("cpu"), 0
        self.follow(kind.mine(self.net, "cpu", symmetries=symmetries, **kind.options), repeats=repeats)

    def follow(self, optimizer: Any, *, repeats: bool) -> None:
        self.optimizer, self.general, self.repeats = optimizer, 0, repeats
        in_general = optimizer._step_in_general

        def counted(*scaler: Any) -> None:
            self.general += 1
            in_general(*scaler)
            if not repeats:
                optimizer._measuring.repeats.forget()

        optimizer._step_in_general = counted

    def backward(self, *, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(self.net, self.step_number).backward()
        self.step_number += 1

    def steps(self, n: int) -> int:
        """Make n steps; how many were not repeats."""
        before = self.general
        for _ in range(n):
            self.backward()
            self.optimizer.step()
        return self.general - before

    @property
    def weight(self) -> nn.Parameter:
        return dict(self.net.named_parameters())["fc1.weight"]

    @property
    def slot(self) -> dict[str, Any]:
        return self.optimizer.state[self.weight]  # type: ignore[no-any-return]

    @property
    def buffer(self) -> str:
        return "momentum_buffer" if "momentum_buffer" in self.slot else "exp_avg"


def set_option(**options: Any) -> Callable[[Training], None]:
    return lambda training: training.optimizer.param_groups[0].update(options)


@torch.no_grad()
def write_parameter(training: Training) -> None:
    training.weight.mul_(1.5)


@torch.no_grad()
def write_buffer(training: Training) -> None:
    training.slot[training.buffer].mul_(0.5)


def replace_buffer(training: Training) -> None:
    training.slot[training.buffer] = training.slot[training.buffer].clone() * 0.5


def move_buffer(training: Training) -> None:
    training.slot[training.buffer].data = training.slot[training.buffer].clone()


def drop_buffers(training: Training) -> None:
    del training.optimizer.state[training.weight]


def move(training: Training) -> None:
    training.weight.data = training.weight.data.clone()


def lay_out_otherwise(training: Training) -> None:
    training.weight.data = training.weight.data.t().contiguous().t()


def reload(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def add_group(training: Training) -> None:
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    extra.grad = torch.ones_like(extra)
    training.optimizer.add_param_group({"params": [("extra", extra)]})


def exchange_groups(training: Training) -> None:
    """The same parameters, one of them in a group of another learning rate: another optimizer in all but name."""
    group = training.optimizer.param_groups[0]
    training.optimizer.param_groups.append({**group, "params": group["params"][3:], "param_names": ["fc2.bias"]})
    group["params"], group["param_names"] = group["params"][:3], group["param_names"][:3]


#: Per event: what happens, and how many of the next four steps are general for it.
EVENTS: dict[str, tuple[Callable[[Training], object], int]] = {
    "nothing": (lambda training: None, 0),
    "readout": (lambda training: training.optimizer.readout(), 0),
    "state_dict": (lambda training: training.optimizer.state_dict(), 0),
    "lr": (set_option(lr=0.02), 0),
    "the same lr": (lambda t: t.optimizer.param_groups[0].update(lr=float(str(t.optimizer.param_groups[0]["lr"]))), 0),
    "lr as a tensor": (set_option(lr=torch.tensor(0.02)), 0),
    "weight decay": (set_option(weight_decay=0.2), 0),
    "maximize": (set_option(maximize=True), 0),
    "threads": (lambda training: torch.set_num_threads(torch.get_num_threads()), 0),
    "parameter moved": (move, 1),
    "parameter laid out otherwise": (lay_out_otherwise, 1),
    "buffer moved": (move_buffer, 0),
    "buffers dropped": (drop_buffers, 2),
    "reloaded": (reload, 1),
    "restarted": (lambda training: training.optimizer.reset_measurement(), 1),
}


@KINDS
@MEASURED
@pytest.mark.parametrize("event", EVENTS)
def test_a_repeated_step_is_like_any_other(kind: Kind, symmetries: Any, event: str) -> None:
    do, n_general = EVENTS[event]
    one, other = Training(kind, symmetries), Training(kind, symmetries, repeats=False)
    for training in (one, other):
        training.steps(4)
        do(training)
    assert (one.general, other.general) == (2, 4)
    assert (one.steps(4), other.steps(4)) == (n_general, 4)
    assert_same(one.net, one.optimizer, other.net, other.optimizer, tolerance=0.0)
    assert_same_readout(one.optimizer.readout(), other.optimizer.readout())
    versions = [[p._version for p in training.net.parameters()] for training in (one, other)]
    assert versions[0] == versions[1]
    for x, y in zip(buffers(one.optimizer), buffers(other.optimizer), strict=True):
        assert x is None or y is None or x._version == y._version


@KINDS
@pytest.mark.parametrize("event", [write_parameter, write_buffer, replace_buffer])
def test_what_others_write_is_noticed(kind: Kind, event: Callable[[Training], None]) -> None:
    training = Training(kind)
    training.steps(4)
    event(training)
    assert training.steps(4) == 1
    laws = training.optimizer.readout()
    assert "outside step() after step 4" in laws["fc1->fc2"].reason
    assert laws["fc2"].closed
    plain = Training(kind, [])  # does not care
    plain.steps(4)
    event(plain)
    assert plain.steps(4) == 0


def test_a_count_that_others_write_is_read() -> None:
    training = Training(ADAMW)
    training.steps(4)
    training.slot["step"].fill_(10.0)
    assert training.steps(2) == 1
    assert training.slot["step"].item() == 12.0
    training.slot["step"] = torch.tensor(20.0)
    assert training.steps(2) == 1
    assert training.slot["step"].item() == 22.0


@KINDS
def test_gradients_come_and_go(kind: Kind) -> None:
    one, other = Training(kind), Training(kind, repeats=False)
    for training in (one, other):
        training.steps(4)
        made = []
        for without in (True, True, False, False):
            training.backward()
            if without:
                training.weight.grad = None
            training.optimizer.step()
            made.append(training.general)
        if training.repeats:
            assert made == [3, 3, 4, 4]
    assert_same(one.net, one.optimizer, other.net, other.optimizer, tolerance=0.0)
    assert_same_readout(one.optimizer.readout(), other.optimizer.readout())


@KINDS
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_anywhere(kind: Kind, set_to_none: bool) -> None:
    one, other = Training(kind), Training(kind, repeats=False)
    kept = []
    for training in (one, other):
        training.steps(3)
        for _ in range(3):
            training.backward(set_to_none=set_to_none)
            for p in training.net.parameters():
                assert p.grad is not None
                kept.append(p.grad)
                p.grad = p.grad.clone()
            training.optimizer.step()
    assert one.general == 2
    assert_same(one.net, one.optimizer, other.net, other.optimizer, tolerance=0.0)


@KINDS
@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (lambda g: g.to_sparse(), "sparse"),
        (lambda g: TwoTensor(g, g), "subclass"),
        (lambda g: g[:, :1].clone(), "must match its parameter"),
    ],
    ids=["sparse", "subclass", "shape"],
)
def test_gradients_that_cannot_be_stepped_with_are_refused(kind: Kind, odd: Any, error: str) -> None:
    training = Training(kind)
    training.steps(4)
    training.backward()
    before, good = training.weight.detach().clone(), training.weight.grad
    assert good is not None
    bad = odd(good)
    if bad.shape == good.shape:
        training.weight.grad = bad
    else:  # torch lets nobody assign this one
        good.data = bad
    with pytest.raises((RuntimeError, TypeError), match=error):
        training.optimizer.step()
    assert torch.equal(training.weight, before)
    assert training.steps(2) == 1


@KINDS
def test_a_lazy_gradient_is_read_as_torch_reads_it(kind: Kind) -> None:
    one, other = Training(kind), Training(kind)
    for training in (one, other):
        training.steps(4)
        training.backward()
    assert one.weight.grad is not None
    one.weight.grad = torch._neg_view(-one.weight.grad)
    for training in (one, other):
        training.optimizer.step()
    assert (one.general, other.general) == (3, 2)
    assert_same(one.net, one.optimizer, other.net, other.optimizer, tolerance=0.0)


@KINDS
def test_added_and_exchanged_groups(kind: Kind) -> None:
    training = Training(kind, [])
    training.steps(4)
    add_group(training)
    assert training.steps(1) == 1
    training = Training(kind)
    training.steps(4)
    exchange_groups(training)
    with pytest.raises(RuntimeError, match="param_groups hold other parameters"):
        training.steps(1)


def test_momentum_switched_on_makes_buffers() -> None:
    training, twin = Training(SGD, []), Training(SGD, [], repeats=False)
    for each in (training, twin):
        each.optimizer.param_groups[0]["momentum"] = 0.0
        each.steps(3)
        each.optimizer.param_groups[0]["momentum"] = 0.9
        each.steps(3)
    assert_same(training.net, training.optimizer, twin.net, twin.optimizer, tolerance=0.0)
    assert training.general == 1 + 2  # the first one, one that makes the buffers, and one that finds them made


@KINDS
def test_a_gradient_scaler_goes_the_general_way(kind: Kind) -> None:
    training = Training(kind)
    training.steps(4)
    training.backward()
    before = training.weight.detach().clone()
    training.optimizer.grad_scale, training.optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    training.optimizer.step()
    assert torch.equal(training.weight, before)
    del training.optimizer.grad_scale, training.optimizer.found_inf
    assert training.steps(3) == 1


@KINDS
def test_copies_repeat_for_themselves(kind: Kind) -> None:
    training = Training(kind)
    training.steps(4)
    net, optimizer = copy.deepcopy((training.net, training.optimizer))
    twin = Training(kind)
    twin.net = net
    twin.follow(optimizer, repeats=True)
    twin.step_number = training.step_number
    assert (training.steps(3), twin.steps(3)) == (0, 1)
    assert_same(net, optimizer, training.net, training.optimizer, tolerance=0.0)
    assert_same_readout(optimizer.readout(), training.optimizer.readout())


@KINDS
def test_hooks_closures_and_inference_mode(kind: Kind) -> None:
    training = Training(kind)
    training.steps(4)
    seen: list[str] = []
    before = training.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    after = training.optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Any:
        training.backward()
        seen.append("closure")
        return 3.0

    assert training.optimizer.step(closure) == 3.0
    before.remove()
    after.remove()
    training.backward()
    with torch.inference_mode():
        training.optimizer.step()
    assert seen == ["before", "closure", "after"]
    assert training.general == 2


# ---- interrupts and errors


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where Python drops the interrupt
@KINDS
@pytest.mark.parametrize("event", ["nothing", "lr"])
def test_an_interrupted_repeat_is_made_or_not(kind: Kind, event: str) -> None:
    def ready() -> Training:
        training = Training(kind)
        training.steps(4)
        EVENTS[event][0](training)
        training.backward()
        return training

    counter, counted = Interrupt(0), ready()
    counter.during(counted.optimizer.step)
    assert counted.general == 2
    unmade = ready()
    outcomes = set()
    for at in [*range(1, counter.count, counter.count // 25), *range(counter.count - 12, counter.count)]:
        training = ready()
        Interrupt(at).during(training.optimizer.step)
        made = training.optimizer.step_count == 5
        like = counted if made else unmade
        assert_same(training.net, training.optimizer, like.net, like.optimizer, tolerance=0.0)
        assert_same_readout(training.optimizer.readout(), like.optimizer.readout())
        if not made:
            training.optimizer.step()
        assert_same(training.net, training.optimizer, counted.net, counted.optimizer, tolerance=0.0)
        assert_same_readout(training.optimizer.readout(), counted.optimizer.readout())
        outcomes.add(made)
    assert outcomes == {True, False}


def test_after_an_error_the_next_step_looks_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    training, twin = Training(ADAMW), Training(ADAMW)
    for each in (training, twin):
        each.steps(4)
        each.backward()
    with monkeypatch.context() as patch:
        patch.setattr(ADAM, "row_of_age", lambda *_: lambda age: 1 / 0)
        training.optimizer.param_groups[0]["eps"] = 1e-9
        with pytest.raises(ZeroDivisionError):
            training.optimizer.step()
    training.optimizer.param_groups[0]["eps"] = 1e-8
    for each in (training, twin):
        each.optimizer.step()
    assert (training.general, twin.general) == (3, 2)
    assert_same(training.net, training.optimizer, twin.net, twin.optimizer, tolerance=0.0)
    assert_same_readout(training.optimizer.readout(), twin.optimizer.readout())


# ---- the glance itself


def test_it_keeps_alive_while_a_step_is_made_and_not_after() -> None:
    training = Training(SGD)
    training.steps(4)
    training.backward()
    optimizer, grad = training.optimizer, training.weight.grad
    assert grad is not None
    repeats: Repeats = optimizer._measuring.repeats
    assert repeats._seen is not None
    kept = repeats._seen[1].look(optimizer.param_groups, optimizer.state)
    assert kept is not None
    assert any(x is grad for x in kept)
    assert any(x is training.slot["momentum_buffer"] for x in kept)
    del kept
    optimizer.step()
    dead = weakref.ref(grad)
    del grad
    training.weight.grad = None
    gc.collect()
    assert dead() is None
    assert training.general == 2


def test_an_attribute_that_raises_is_heard() -> None:
    descriptor: Any = vars(torch._C.TensorBase)["grad"]

    class Odd(nn.Parameter):
        fails = False

        @property
        def grad(self) -> Any:
            if self.fails:
                raise ZeroDivisionError
            return descriptor.__get__(self)

        @grad.setter
        def grad(self, value: Any) -> None:
            descriptor.__set__(self, value)

    p = Odd(torch.ones(2, 3))
    optimizer = SGD.ours([p], lr=0.1)
    for _ in range(4):
        p.grad = torch.ones(2, 3)
        optimizer.step()
    p.fails = True
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    p.fails = False
    optimizer.step()
    assert torch.allclose(p, torch.full((2, 3), 0.5))


def test_parts_that_do_not_fit_are_refused() -> None:
    training = Training(SGD)
    training.steps(4)
    parameters, engine = training.optimizer._measuring.parameters, training.optimizer._measuring.meters[0].engine
    args: list[Any] = [
        parameters.all,
        parameters.sizes,
        parameters.gatherer,
        engine.readers,
        [None] * 3,
        ["momentum_buffer"],
        None,
        None,
        engine.addresses,
    ]
    make: Any = _cpu.Glance
    make(*args)
    for place, wrong in ((1, [1]), (3, engine.readers[:2]), (4, [None]), (5, []), (8, engine.addresses[:2].copy())):
        with pytest.raises(ValueError, match="expected 4 parameters in the groups"):
            make(*[wrong if i == place else x for i, x in enumerate(args)])
    with pytest.raises(ValueError, match="another number of tensors"):
        make(*[[*engine.readers[:2], _reader(2)] if i == 3 else x for i, x in enumerate(args)])


def _reader(n: int) -> Any:
    from noetherperf.engines.reader import make_reader

    return make_reader(n)
