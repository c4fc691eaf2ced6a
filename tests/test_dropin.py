"""SGD, Adam and AdamW are torch's: the same trajectory, states, errors and manners, whatever runs or is measured."""

import copy
import inspect
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training import (
    ADAMW,
    BACKENDS,
    KINDS,
    SYMMETRIES,
    Kind,
    assert_same,
    assert_same_readout,
    device_of,
    each,
    loss_of,
    make_net,
    ours,
    theirs,
    train,
)

import noetherperf as nperf
from noetherperf import Norm, Part, Scale, layers, neurons

# The hyperparameters of one group, by what is special about them.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "lr 0": {"lr": 0.0, "momentum": 0.9},
    "weight decay": {"lr": 0.1, "weight_decay": 0.05},
    "maximize": {"lr": 0.01, "maximize": True},
    "maximize, weight decay": {"lr": 0.01, "maximize": True, "weight_decay": 0.05},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "momentum above 1": {"lr": 0.001, "momentum": 1.1},
    "momentum, weight decay": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    "momentum, maximize": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, "maximize": True},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    "dampening 1": {"lr": 0.1, "momentum": 0.9, "dampening": 1.0, "weight_decay": 0.05},
    "dampening without momentum": {"lr": 0.1, "dampening": 0.5},
    "negative dampening": {"lr": 0.05, "momentum": 0.5, "dampening": -0.5},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "nesterov, weight decay": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "nesterov, maximize": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


class TestTrajectory:
    def test_one_group(self, backend: str, case: dict[str, Any]) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = ours(net, backend, **case), theirs(other, **case)
        start = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, range(30))
        train(other, peer, range(30))
        assert_same(net, optimizer, other, peer)
        if case.get("lr") != 0 and case.get("dampening") != 1:
            assert all((p != p0).any() for p, p0 in zip(net.parameters(), start, strict=True))

    def test_measuring_changes_nothing(self, backend: str, case: dict[str, Any]) -> None:
        """Bit for bit the same parameters with symmetries, with norms of all units and layers, and with none."""
        net = make_net(backend)
        train(net, ours(net, backend, symmetries=(), **case), range(10))
        for symmetries in (SYMMETRIES, [*neurons(net), *layers(net)]):
            other = make_net(backend)
            train(other, ours(other, backend, symmetries=symmetries, **case), range(10))
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))

    def test_several_groups(self, backend: str) -> None:
        def groups(net: nn.Module) -> list[dict[str, Any]]:
            p = dict(net.named_parameters())
            return [
                {"params": [("fc1.weight", p["fc1.weight"])], "weight_decay": 0.05, "momentum": 0.9, "nesterov": True},
                {"params": [("fc1.bias", p["fc1.bias"])], "lr": 0.01, "maximize": True},
                {
                    "params": [("fc2.weight", p["fc2.weight"]), ("fc2.bias", p["fc2.bias"])],
                    "momentum": 0.5,
                    "dampening": 0.1,
                },
            ]

        net, other = make_net(backend), make_net(backend)
        optimizer = nperf.SGD(groups(net), lr=0.1, symmetries=SYMMETRIES, backend=backend)
        peer = torch.optim.SGD(groups(other), lr=0.1, foreach=False)
        train(net, optimizer, range(30))
        train(other, peer, range(30))
        assert_same(net, optimizer, other, peer)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda optimizer: lr_scheduler.StepLR(optimizer, 5, 0.5),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=31),  # cycles the momentum too
            lambda optimizer: lr_scheduler.SequentialLR(
                optimizer,
                [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
                [5],
            ),
        ],
        ids=["step", "cosine", "one cycle", "sequential"],
    )
    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
    def test_schedulers(
        self, backend: str, lr: float | Tensor, schedule: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
    ) -> None:
        net, other = make_net(backend), make_net(backend)
        options = {"momentum": 0.9, "weight_decay": 0.05}
        optimizer, peer = (
            ours(net, backend, lr=copy.deepcopy(lr), **options),
            theirs(other, lr=copy.deepcopy(lr), **options),
        )
        train(net, optimizer, range(30), after_step=schedule(optimizer).step)
        train(other, peer, range(30), after_step=schedule(peer).step)
        assert float(peer.param_groups[0]["lr"]) != 0.1
        assert float(optimizer.param_groups[0]["lr"]) == float(peer.param_groups[0]["lr"])
        assert_same(net, optimizer, other, peer)

    def test_hyperparameters_that_change_at_any_step(self, backend: str) -> None:
        changes: dict[int, dict[str, Any]] = {
            3: {"momentum": 0.9},
            6: {"weight_decay": 0.1, "dampening": 0.3},
            9: {"momentum": 0.0},
            12: {"momentum": 0.5, "dampening": 0.0, "nesterov": True},
            15: {"momentum": 0.0},  # with nesterov still on
            17: {"momentum": 0.9, "maximize": True, "lr": 0.01},
        }
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = ours(net, backend, lr=0.1), theirs(other, lr=0.1)
        for model, sgd in ((net, optimizer), (other, peer)):
            for step in range(20):
                sgd.param_groups[0].update(changes.get(step, {}))
                train(model, sgd, range(step, step + 1))
        assert_same(net, optimizer, other, peer)

    def test_weight_decay_as_tensor(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer = ours(net, backend, lr=0.1, weight_decay=torch.tensor(0.25))
        peer = theirs(other, lr=0.1, weight_decay=0.25)
        train(net, optimizer, range(5))
        train(other, peer, range(5))
        assert_same(net, optimizer, other, peer)

    @each(KINDS)
    @pytest.mark.parametrize("lr", [0.0, 0.1])
    def test_late_and_missing_gradients(self, kind: Kind, backend: str, lr: float) -> None:
        """A parameter without a gradient stays as it is; its first gradient, whenever it comes, is not dampened."""

        def drop(step: int, net: nn.Module) -> None:
            for i, parameter in enumerate(net.parameters()):
                if step < 4 * i or step % (5 + i) == 0:
                    parameter.grad = None

        options = {**kind.options, "lr": lr}
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **options), kind.torchs(other, **options)
        for steps in (range(4), range(4, 30)):  # compare once while some have no buffer yet
            train(net, optimizer, steps, before_step=drop)
            train(other, peer, steps, before_step=drop)
            assert_same(net, optimizer, other, peer)

    @each(KINDS)
    def test_frozen_parameters(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        for model in (net, other):
            model[0].requires_grad_(False)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        train(net, optimizer, range(5))
        for model in (net, other):
            model[0].requires_grad_(True)
        train(net, optimizer, range(5, 10))
        other[0].requires_grad_(False)
        train(other, peer, range(5))
        other[0].requires_grad_(True)
        train(other, peer, range(5, 10))
        assert_same(net, optimizer, other, peer)

    @each(KINDS)
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad(self, kind: Kind, backend: str, set_to_none: bool) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        train(net, optimizer, range(10), set_to_none=set_to_none)
        train(other, peer, range(10), set_to_none=set_to_none)
        assert_same(net, optimizer, other, peer)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in net.parameters())

    def test_gradients_come_out_as_they_went_in(self, backend: str, case: dict[str, Any]) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **case)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
            assert all(
                torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True) if p.grad is not None
            )

    def test_parameters_that_are_views(self, backend: str) -> None:
        """Memory between a parameter's elements is left alone, and a gradient may lie otherwise than its parameter."""
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}

        def run(make: Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer]) -> Tensor:
            generator = torch.Generator().manual_seed(0)

            def random(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device_of(backend))

            storage = random(2, 9, 11)
            transposed, strided = storage[0].T[1:8, 2:7].requires_grad_(), storage[1, ::2, ::3].requires_grad_()
            optimizer = make([("transposed", transposed), ("strided", strided)])
            for _ in range(5):
                transposed.grad, strided.grad = random(7, 5), random(4, 5).T
                optimizer.step()
            return storage

        symmetries = [Norm("rows", [Part("transposed", 0)]), Norm("columns", [Part("strided", 1)])]
        storage = run(lambda named: nperf.SGD(named, symmetries=symmetries, backend=backend, **options))
        other = run(lambda named: torch.optim.SGD(named, foreach=False, **options))
        assert (storage - other).abs().max() <= 1e-12

    @each(KINDS)
    def test_channels_last(self, kind: Kind, backend: str) -> None:
        options = kind.options

        def run(make: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
            torch.manual_seed(0)
            conv = nn.Conv2d(3, 4, 3).to(device_of(backend), torch.float64)
            conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
            assert not conv.weight.is_contiguous()
            optimizer = make(conv)
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(device_of(backend))
            for _ in range(5):
                optimizer.zero_grad()
                (0.01 * conv(x).square().sum()).backward()
                optimizer.step()
            return conv

        net, other = (
            run(lambda conv: kind.mine(conv, backend, symmetries=neurons(conv), **options)),
            run(lambda conv: kind.torchs(conv, **options)),
        )
        assert all((p - q).abs().max() <= 1e-12 for p, q in zip(net.parameters(), other.parameters(), strict=True))

    @each(KINDS)
    def test_gradients_that_are_expanded(self, kind: Kind, backend: str) -> None:
        """All elements of such a gradient share one number in memory."""
        p, q = (
            torch.arange(6.0, dtype=torch.float64, device=device_of(backend)).view(2, 3).requires_grad_() for _ in "pq"
        )
        norms = [Norm("p", [Part("p", 1)])]
        optimizer = kind.ours([("p", p)], **kind.options, symmetries=norms, backend=backend)
        peer = kind.theirs([q], **kind.options, foreach=False)
        for step in range(3):
            p.grad = q.grad = torch.full((), 1.0 + step, dtype=torch.float64, device=p.device).expand(2, 3)
            optimizer.step()
            peer.step()
        assert (p - q).abs().max() <= 1e-13
        assert optimizer.readout()["p"].rounding.abs().max() <= 1e-12

    @each(KINDS)
    def test_storage_that_is_replaced(self, kind: Kind, backend: str) -> None:
        """A parameter may be given other memory, laid out otherwise, between two steps; so may its buffer."""
        options = kind.options
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **options), kind.torchs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(3))
            for p in model.parameters():
                p.data = p.data.clone()
            train(model, sgd, range(3, 6))
            for p in model.parameters():
                p.data = p.data.T.contiguous().T if p.ndim == 2 else p.data.clone()
                sgd.state[p].update({key: x.clone() for key, x in sgd.state[p].items()})
            train(model, sgd, range(6, 9))
        assert_same(net, optimizer, other, peer)
        assert all(law.rounding.abs().max() <= 1e-12 for law in optimizer.readout().values())

    @each(KINDS)
    def test_parameters_that_are_replaced(self, kind: Kind, backend: str) -> None:
        """Pruned, grown, or sharded by a library that writes to param_groups: the step goes to what is there."""

        def replace(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            params, new = optimizer.param_groups[0]["params"], make_net(backend).get_parameter("fc1.bias")
            del optimizer.state[params[1]], optimizer.state[params[-1]]
            params[1] = net.get_submodule("fc1").bias = nn.Parameter(new.detach() + 1)
            optimizer.param_groups[0]["params"] = params[:-1]  # the last one stays as it is

        net, other = make_net(backend), make_net(backend)
        options = kind.options
        optimizer, peer = kind.mine(net, backend, symmetries=(), **options), kind.torchs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(5))
            replace(model, sgd)
            train(model, sgd, range(5, 10))
        assert_same(net, optimizer, other, peer)
        assert copy.deepcopy(optimizer).state_dict()["state"].keys() == peer.state_dict()["state"].keys()

    @pytest.mark.parametrize("reads", [False, True], ids=["unread", "read"])
    def test_a_model_that_is_converted_before_the_first_step(self, backend: str, reads: bool) -> None:
        net, other = make_net(backend), make_net(backend, torch.float32)
        optimizer = ours(net, backend, lr=0.1)
        if reads:
            optimizer.readout()
        net.float()
        peer = ours(other, backend, lr=0.1)
        train(net, optimizer, range(3))
        train(other, peer, range(3))
        assert_same_readout(optimizer.readout(), peer.readout())
        net.double()
        if backend != "reference":  # which has no tables, and steps whatever there is
            with pytest.raises(RuntimeError, match=r"float32.*float64.*make the optimizer after"):
                train(net, optimizer, range(3, 4))

    @each(KINDS)
    def test_scalars_and_empty_tensors(self, kind: Kind, backend: str) -> None:
        options = kind.options

        def run(
            make: Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer],
        ) -> tuple[Tensor, torch.optim.Optimizer]:
            scalar = torch.tensor(2.0, dtype=torch.float64, device=device_of(backend), requires_grad=True)
            empty = torch.zeros(0, 3, dtype=torch.float64, device=device_of(backend), requires_grad=True)
            optimizer = make([("scalar", scalar), ("empty", empty)])
            for step in range(3):
                scalar.grad, empty.grad = torch.full_like(scalar, 1.0 + step), torch.zeros_like(empty)
                optimizer.step()
            return scalar, optimizer

        norms = [Norm("scalar", [Part("scalar", None)]), Norm("empty", [Part("empty", None)])]
        p, optimizer = run(lambda named: kind.ours(named, symmetries=norms, backend=backend, **options))
        q, _ = run(lambda named: kind.theirs(named, foreach=False, **options))
        assert isinstance(optimizer, nperf.MeasuredOptimizer)
        assert p.item() == pytest.approx(q.item(), rel=1e-13)
        readout = optimizer.readout()
        assert readout["scalar"].charge.tolist() == pytest.approx([p.item() ** 2], rel=1e-13)
        assert readout["scalar"].rounding.abs().max() <= 1e-13
        assert readout["empty"].charge.tolist() == [0.0]

    @each(KINDS)
    def test_dtypes_side_by_side(self, kind: Kind, backend: str) -> None:
        """16-bit parameters are stepped in float32 and rounded once; torch rounds after every operation."""
        tolerances = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
        options = kind.options

        def run(make: Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer]) -> dict[torch.dtype, Tensor]:
            generator = torch.Generator().manual_seed(0)
            parameters = {
                dtype: torch.randn(5, 9, generator=generator).to(device_of(backend), dtype).requires_grad_()
                for dtype in tolerances
            }
            optimizer = make([(str(dtype), p) for dtype, p in parameters.items()])
            for _ in range(4):
                for p in parameters.values():
                    p.grad = torch.randn(5, 9, generator=generator).to(p.device, p.dtype)
                optimizer.step()
            for p in parameters.values():
                assert all(x.dtype == p.dtype for key, x in optimizer.state[p].items() if key != "step")
            return parameters

        norms = [Norm(str(dtype), [Part(str(dtype), 0)]) for dtype in tolerances]
        mine = run(lambda named: kind.ours(named, symmetries=norms, backend=backend, **options))
        peers = run(lambda named: kind.theirs(named, foreach=False, **options))
        for dtype, tolerance in tolerances.items():
            error = (mine[dtype].double() - peers[dtype].double()).abs().max()
            n_roundings = 1.5 if kind is ADAMW else 1.0  # of both together, whose decay torch rounds by itself
            assert error <= n_roundings * tolerance * peers[dtype].double().abs().max(), dtype

    @each(KINDS)
    def test_no_gradient_at_all(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        start = copy.deepcopy(net)
        optimizer = kind.mine(net, backend, **kind.options)
        before = optimizer.readout()
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        for name, law in optimizer.readout().items():
            assert torch.equal(law.charge, before[name].charge)
            assert law.residual.abs().max() <= 1e-14


class TestManners:
    """What torch.optim.Optimizer promises beside the update."""

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.ours.__name__)
    def test_is_an_optimizer_with_the_same_signature(self, kind: Kind) -> None:
        assert issubclass(kind.ours, torch.optim.Optimizer)
        parameters, expected = (inspect.signature(cls).parameters for cls in (kind.ours, kind.theirs))
        for name, parameter in expected.items():
            assert parameters[name].default == parameter.default, name
            assert parameters[name].kind == parameter.kind, name
        assert [*parameters][: len(expected)] == [*expected]

    @each(KINDS)
    def test_param_groups_have_the_same_keys_and_values(self, kind: Kind, backend: str) -> None:
        group = kind.mine(make_net(backend), backend, **kind.options).param_groups[0]
        peer = kind.torchs(make_net(backend), **kind.options).param_groups[0]
        assert group.keys() == peer.keys()
        assert {k: v for k, v in group.items() if k not in ("params", "foreach")} == {
            k: v for k, v in peer.items() if k not in ("params", "foreach")
        }

    @each(KINDS)
    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
    def test_ways_to_run_are_accepted(self, kind: Kind, backend: str, options: dict[str, bool]) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, lr=0.1, **options), kind.torchs(other, lr=0.1)
        train(net, optimizer, range(3))
        train(other, peer, range(3))
        assert_same(net, optimizer, other, peer)

    @pytest.mark.parametrize(
        ("params", "options"),
        [
            ([], {}),
            ("one tensor", {}),
            ([3], {}),
            ([("a", 3)], {}),
            ("not a leaf", {}),
            ("duplicate", {}),
            ("in two groups", {}),
            ("named and not", {}),
            ("model", {"lr": -0.1}),
            ("model", {"momentum": -0.1}),
            ("model", {"weight_decay": -0.1}),
            ("model", {"nesterov": True}),
            ("model", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
            ("model", {"lr": torch.tensor([0.1, 0.2])}),
            ("model", {"foreach": True, "fused": True}),
            ("model", {"differentiable": True, "fused": True}),
            ("model", {"momentum_decay": 0.1}),
        ],
        ids=str,
    )
    def test_constructor_errors_are_torchs(self, params: Any, options: dict[str, Any]) -> None:
        net = make_net("cpu")
        weight, bias = net.get_parameter("fc1.weight"), net.get_parameter("fc1.bias")
        chosen = {
            "one tensor": weight,
            "not a leaf": [weight * 2],
            "duplicate": [{"params": [weight, weight]}],
            "in two groups": [{"params": [weight]}, {"params": [weight]}],
            "named and not": [("weight", weight), bias],
            "model": list(net.parameters()),
        }
        params = chosen.get(params, params) if isinstance(params, str) else params
        with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever torch raises is right)
            torch.optim.SGD(params, **options)
        with pytest.raises(type(expected.value)):
            nperf.SGD(params, **options)

    @each(KINDS)
    def test_closure(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        losses = []
        for model, sgd in (
            (net, kind.mine(net, backend, **kind.options)),
            (other, kind.torchs(other, **kind.options)),
        ):

            def closure(model: nn.Module = model, sgd: torch.optim.Optimizer = sgd) -> Tensor:
                assert torch.is_grad_enabled()
                sgd.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append([float(sgd.step(closure)) for _ in range(5)])
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert losses[0][-1] < losses[0][0]

    def test_step_without_closure_returns_nothing(self, backend: str) -> None:
        net = make_net(backend)
        loss_of(net, 0).backward()
        assert ours(net, backend, lr=0.1).step() is None

    def test_hooks(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        calls: list[tuple[str, int]] = []

        def note(what: str) -> Callable[..., None]:
            return lambda *args: calls.append((what, optimizer.step_count))

        optimizer.register_step_pre_hook(note("before"))
        handle = optimizer.register_step_post_hook(note("after"))
        optimizer.register_state_dict_pre_hook(note("save"))
        optimizer.register_load_state_dict_post_hook(note("load"))
        train(net, optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        handle.remove()
        train(net, optimizer, range(2, 3))
        assert calls == [
            *[("before", 0), ("after", 1), ("before", 1), ("after", 2)],
            *[("save", 2), ("load", 2)],
            ("before", 2),
        ]

    @each(KINDS)
    def test_the_parameters_are_seen_to_change(self, kind: Kind, backend: str) -> None:
        """Autograd refuses a backward pass through values that a step has overwritten."""
        net = make_net(backend)
        optimizer = kind.mine(net, backend, lr=0.1)
        loss = loss_of(net, 0)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @each(KINDS)
    @pytest.mark.parametrize("overflows", [set(), {0}, {3, 4}])
    def test_grad_scaler(self, kind: Kind, backend: str, overflows: set[int]) -> None:
        """A step that overflows is no step: not for the parameters, not for the first step, not for the laws."""
        options = kind.options
        net, other = make_net(backend, torch.float32), make_net(backend, torch.float32)
        optimizer, peer = kind.mine(net, backend, **options), kind.torchs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            scaler = torch.amp.GradScaler(device_of(backend), init_scale=2.0**10)
            for step in range(8):
                sgd.zero_grad()
                scaler.scale(loss_of(model, step) * (torch.inf if step in overflows else 1.0)).backward()
                scaler.step(sgd)
                scaler.update()
        assert_same(net, optimizer, other, peer, tolerance=1e-5)
        assert optimizer.step_count == 8 - len(overflows)
        for law in optimizer.readout().values():
            assert law.rounding.abs().max() <= 1e-5 * law.initial.abs().max() + 1e-6

    @each(KINDS)
    def test_added_group(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        results = []
        for model, make in (
            (net, lambda named: kind.ours(named, lr=0.1, backend=backend)),
            (other, lambda named: kind.theirs(named, lr=0.1, foreach=False)),
        ):
            named = list(model.named_parameters())
            sgd = make(named[:2])
            train(model, sgd, range(3))
            sgd.add_param_group({"params": named[2:], **kind.options})
            with pytest.raises(ValueError, match="more than one parameter group"):
                sgd.add_param_group({"params": named[:1]})
            train(model, sgd, range(3, 10))
            results.append(sgd)
        assert_same(net, results[0], other, results[1])
        assert results[0].param_groups[1]["param_names"] == ["fc2.weight", "fc2.bias"]

    @each(KINDS)
    def test_added_group_keeps_what_was_measured(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        named = list(net.named_parameters())
        symmetries = [SYMMETRIES[3]]
        optimizer = kind.ours(named[:2], **kind.options, symmetries=symmetries, backend=backend)
        train(net, optimizer, range(5))
        before = optimizer.readout()
        optimizer.add_param_group({"params": named[2:]})
        assert_same_readout(optimizer.readout(), before)
        train(net, optimizer, range(5, 10))
        after = optimizer.readout()
        assert after.step == 10
        assert torch.equal(after["half of fc1"].initial, before["half of fc1"].initial)
        assert after["half of fc1"].rounding.abs().max() <= 1e-13

    def test_parameters_replaced_before_the_first_step_are_measured(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = ours(make_net(backend), backend, lr=0.1), ours(other, backend, lr=0.1)
        optimizer.readout()
        optimizer.param_groups[0]["params"] = list(net.parameters())
        train(net, optimizer, range(3))
        train(other, peer, range(3))
        assert_same_readout(optimizer.readout(), peer.readout())

    @pytest.mark.parametrize(
        "use",
        [
            lambda optimizer: optimizer.step(),
            lambda optimizer: optimizer.readout(),
            lambda optimizer: optimizer.state_dict(),
            lambda optimizer: copy.deepcopy(optimizer),
        ],
        ids=["step", "readout", "state_dict", "copy"],
    )
    def test_laws_do_not_go_on_with_other_parameters(self, backend: str, use: Callable[[nperf.SGD], object]) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1, momentum=0.9)
        train(net, optimizer, range(3))
        start = net.get_parameter("fc2.weight").detach() + 1
        net.get_submodule("fc2").weight = optimizer.param_groups[0]["params"][2] = nn.Parameter(start.clone())
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"other parameters than the 3 steps .* call optimizer\.reset_measure"
            ):
                use(optimizer)
        optimizer.reset_measurement()
        train(net, optimizer, range(3, 6))
        readout = optimizer.readout()
        assert readout.step == 3
        for law in readout.values():
            assert law.rounding.abs().max() < 1e-13
        torch.testing.assert_close(readout["fc2"].initial, start.cpu().sum(0), rtol=1e-14, atol=0.0)

    def test_replaced_parameters_must_fit_the_symmetries(self, backend: str) -> None:
        optimizer = ours(make_net(backend), backend, lr=0.1)
        optimizer.param_groups[0]["params"][0] = torch.ones(4, 5, dtype=torch.float64, device=device_of(backend))
        with pytest.raises(ValueError, match=r"fc1->fc2"):
            optimizer.readout()
        optimizer = ours(make_net(backend), backend, lr=0.1)
        del optimizer.param_groups[0]["params"][0]
        with pytest.raises(ValueError, match=r"change its group\['param_names'\] too"):
            optimizer.readout()

    def test_repr_shows_the_groups(self, backend: str) -> None:
        text = repr(ours(make_net(backend), backend, lr=0.125, momentum=0.75))
        assert "lr: 0.125" in text
        assert "momentum: 0.75" in text


class TestState:
    OPTIONS = MappingProxyType({"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05})

    @each(KINDS)
    @pytest.mark.parametrize("direction", ["from torch", "to torch"])
    @pytest.mark.parametrize("n_steps", [0, 7])
    def test_torchs_checkpoint(self, kind: Kind, backend: str, direction: str, n_steps: int) -> None:
        """A run that changes the optimizer halfway goes on as if it had not."""
        plain = make_net(backend)
        train(plain, peer := kind.torchs(plain, **kind.options), range(n_steps + 7))

        net = make_net(backend)
        start: torch.optim.Optimizer
        end: torch.optim.Optimizer
        if direction == "from torch":
            start, end = kind.torchs(net, **kind.options), kind.mine(net, backend, lr=1.0)
        else:
            start, end = kind.mine(net, backend, **kind.options), kind.torchs(net, lr=1.0)
        train(net, start, range(n_steps))
        end.load_state_dict(start.state_dict())
        train(net, end, range(n_steps, n_steps + 7))
        assert_same(net, end, plain, peer)

    def test_loading_starts_measuring_anew(self, backend: str) -> None:
        net = make_net(backend)
        peer = theirs(net, **self.OPTIONS)
        train(net, peer, range(3))
        optimizer = ours(net, backend, **self.OPTIONS)
        train(net, optimizer, range(3))
        optimizer.load_state_dict(peer.state_dict())
        assert optimizer.step_count == 0
        train(net, optimizer, range(3, 6))
        assert optimizer.readout().step == 3
        assert all(law.rounding.abs().max() <= 1e-13 for law in optimizer.readout().values())

    @each(KINDS)
    def test_state_has_torchs_buffers(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **kind.options), kind.torchs(other, **kind.options)
        train(net, optimizer, range(3))
        train(other, peer, range(3))
        state, expected = optimizer.state_dict(), peer.state_dict()
        for i, entry in expected["state"].items():
            assert list(state["state"][i]) == list(entry)
            for key, x in entry.items():
                torch.testing.assert_close(state["state"][i][key], x)

    @each(KINDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_resume_is_exact(self, kind: Kind, backend: str, dtype: torch.dtype) -> None:
        """Saved to a file and loaded into a new process' objects, a run goes on bit for bit, laws included."""
        net = make_net(backend, dtype)
        optimizer = kind.mine(net, backend, **kind.options)
        train(net, optimizer, range(7))
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "sgd": optimizer.state_dict()}, file)
        train(net, optimizer, range(7, 14))

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = make_net(backend, dtype)
        resumed = kind.mine(again, backend, lr=1.0)
        again.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["sgd"])
        assert resumed.step_count == 7
        train(again, resumed, range(7, 14))
        assert_same(again, resumed, net, optimizer, tolerance=0.0)
        assert_same_readout(resumed.readout(), optimizer.readout())

    @each(KINDS)
    def test_readout_right_after_loading(self, kind: Kind, backend: str) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **kind.options)
        train(net, optimizer, range(7))
        again = copy.deepcopy(net)
        resumed = kind.mine(again, backend, lr=1.0)
        resumed.load_state_dict(optimizer.state_dict())
        assert_same_readout(resumed.readout(), optimizer.readout())

    @each(KINDS)
    def test_a_state_dict_is_a_snapshot_when_copied(self, kind: Kind, backend: str) -> None:
        """What was loaded belongs to the loader: two optimizers loaded from one state_dict do not share memory."""
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **kind.options)
        train(net, optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        before = optimizer.readout()
        train(net, optimizer, range(3, 6))
        again = make_net(backend)
        train(again, kind.mine(again, backend, **kind.options), range(3))
        resumed = kind.mine(again, backend, lr=1.0)
        resumed.load_state_dict(saved)
        assert_same_readout(resumed.readout(), before)
        train(again, resumed, range(3, 6))
        assert_same(again, resumed, net, optimizer, tolerance=0.0)
        assert_same_readout(resumed.readout(), optimizer.readout())

    @pytest.mark.parametrize(
        "others",
        [
            SYMMETRIES[:2],
            [*SYMMETRIES, Norm("more", [Part("fc1.bias", None)])],
            [*SYMMETRIES[:3], Norm("half of fc1", [Part("fc1.weight", 1, start=1, stop=5, fold=4)])],
        ],
        ids=["fewer", "more", "other parts"],
    )
    def test_other_symmetries_are_refused(self, backend: str, others: list[nperf.Symmetry]) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **self.OPTIONS)
        train(net, optimizer, range(3))
        other = make_net(backend)
        resumed = ours(other, backend, lr=0.25, symmetries=others)
        train(other, resumed, range(1))
        before = resumed.readout()
        with pytest.raises(ValueError, match="symmetr"):
            resumed.load_state_dict(optimizer.state_dict())
        assert resumed.param_groups[0]["lr"] == 0.25
        assert_same_readout(resumed.readout(), before)

    @each(KINDS)
    @pytest.mark.parametrize(
        "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize("n_steps", [0, 5])
    def test_copies_go_their_own_way(self, kind: Kind, backend: str, way: Callable[[Any], Any], n_steps: int) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **kind.options)
        train(net, optimizer, range(n_steps))
        other, twin = way((net, optimizer))
        assert twin.backend == optimizer.backend
        assert list(twin.symmetries) == list(optimizer.symmetries)
        before = optimizer.readout()
        assert_same_readout(twin.readout(), before)
        train(other, twin, range(n_steps, n_steps + 5))
        assert_same_readout(optimizer.readout(), before)
        train(net, optimizer, range(n_steps, n_steps + 5))
        assert_same(other, twin, net, optimizer, tolerance=0.0)
        assert_same_readout(twin.readout(), optimizer.readout())


class TestNamesInCheckpoints:
    """torch loads by position. Names stay the optimizer's own, and say whether positions mean the same parameters."""

    OPTIONS: MappingProxyType[str, Any] = MappingProxyType({"lr": 0.1, "momentum": 0.9})
    NORM = Norm("fc1", [Part("fc1.weight", 0)])
    REORDERED = ("fc1.bias", "fc1.weight", "fc2.weight", "fc2.bias")
    NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    @staticmethod
    def named(net: nn.Module, names: Sequence[str], rename: str = "{}") -> list[tuple[str, Tensor]]:
        return [(rename.format(name), net.get_parameter(name)) for name in names]

    @pytest.mark.parametrize("source", ["torch", "ours", "ours without a measurement"])
    @pytest.mark.parametrize("rename", ["{}", "module.{}"])
    @pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3)], ids=str)
    def test_another_order_is_refused(self, backend: str, source: str, rename: str, sizes: tuple[int, ...]) -> None:
        """Within a parameter group and across them; before anything is changed."""

        def groups(net: nn.Module, names: Sequence[str], rename: str = "{}") -> list[dict[str, Any]]:
            named = iter(self.named(net, names, rename))
            return [{"params": list(itertools.islice(named, n))} for n in sizes]

        saver = make_net(backend)
        first: torch.optim.Optimizer
        if source == "torch":
            first = torch.optim.SGD(groups(saver, self.REORDERED, rename), **self.OPTIONS)
        else:
            norm = Norm("fc1", [Part(rename.format("fc1.weight"), 0)])
            watched = [norm] if source == "ours" else []
            first = nperf.SGD(
                groups(saver, self.REORDERED, rename), symmetries=watched, backend=backend, **self.OPTIONS
            )
        train(saver, first, range(2))

        net = make_net(backend)
        own = groups(net, self.NAMES)
        optimizer = nperf.SGD(own, lr=0.25, momentum=0.9, symmetries=[self.NORM], backend=backend)
        train(net, optimizer, range(3))
        state, readout = copy.deepcopy(optimizer.state_dict()), optimizer.readout()
        with pytest.raises(ValueError, match=r"'fc1.weight' is parameter 0 of this optimizer and 1 of the"):
            optimizer.load_state_dict(first.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert all(
            torch.equal(old["momentum_buffer"], new["momentum_buffer"])
            for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
        )
        assert_same_readout(optimizer.readout(), readout)

    def test_another_order_across_groups_of_one_size(self, backend: str) -> None:
        net = make_net(backend)
        a, b = self.named(net, self.NAMES[:2]), self.named(net, self.NAMES[2:])
        swapped = torch.optim.SGD([{"params": b}, {"params": a}], lr=0.1)
        optimizer = nperf.SGD([{"params": a}, {"params": b}], lr=0.1, symmetries=[self.NORM], backend=backend)
        with pytest.raises(ValueError, match=r"'fc1.weight' is parameter 0 of this optimizer and 2 of"):
            optimizer.load_state_dict(swapped.state_dict())

    @pytest.mark.parametrize(
        ("theirs_as", "ours_as"),
        [
            ("module.{}", "{}"),
            ("_orig_mod.{}", "{}"),
            ("_orig_mod.module.{}", "{}"),
            ("{}", "module.{}"),
            ("_fsdp_wrapped_module.net._orig_mod.{}", "net.{}"),
            ("wholly.different.{}", "{}"),
        ],
    )
    @pytest.mark.parametrize("measures", [False, True], ids=["torch", "ours"])
    def test_wrapped_names_and_others_load(self, backend: str, theirs_as: str, ours_as: str, measures: bool) -> None:
        net, other = make_net(backend), make_net(backend)
        first: torch.optim.Optimizer
        if measures:
            watched = [Norm("fc1", [Part(theirs_as.format("fc1.weight"), 0)])]
            named = self.named(other, self.NAMES, theirs_as)
            first = nperf.SGD(named, symmetries=watched, backend=backend, **self.OPTIONS)
        else:
            first = torch.optim.SGD(self.named(other, self.NAMES, theirs_as), **self.OPTIONS)
        train(other, first, range(3))
        mine = [Norm("fc1", [Part(ours_as.format("fc1.weight"), 0)])]
        named = self.named(net, self.NAMES, ours_as)
        optimizer = nperf.SGD(named, lr=1.0, symmetries=mine, backend=backend)
        state = copy.deepcopy(first.state_dict())
        if measures and "different" in theirs_as:
            with pytest.raises(ValueError, match="other symmetries"):
                optimizer.load_state_dict(state)
            del state["measurement"]
        net.load_state_dict(other.state_dict())
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["param_names"] == [ours_as.format(name) for name in self.NAMES]
        train(net, optimizer, range(3, 6))
        train(other, first, range(3, 6))
        assert_same(net, optimizer, other, first)
        law = optimizer.readout()["fc1"]
        assert optimizer.step_count == (6 if "measurement" in state else 3)
        torch.testing.assert_close(law.charge, net.get_parameter("fc1.weight").detach().cpu().square().sum(1))
        assert law.rounding.abs().max() <= 1e-13
        assert optimizer.state_dict()["measurement"]["names"] == [ours_as.format(name) for name in self.NAMES]

    def test_reasons_go_to_the_same_symmetry_under_its_own_name(self, backend: str) -> None:
        net = make_net(backend)
        rows = [Part("module.fc1.weight", 0), Part("module.fc1.bias", 0)]
        first = nperf.SGD(
            self.named(net, self.NAMES, "module.{}"), symmetries=[Scale("module.fc1", rows)], backend=backend
        )
        train(net, first, range(1))
        net.get_parameter("fc1.bias").requires_grad_(False)
        net.get_parameter("fc1.bias").grad = None
        train(net, first, range(1, 2))
        mine = [Scale("fc1", [Part("fc1.weight", 0), Part("fc1.bias", 0)])]
        optimizer = nperf.SGD(net.named_parameters(), symmetries=mine, backend=backend)
        optimizer.load_state_dict(first.state_dict())
        assert "had no gradient" in optimizer.readout()["fc1"].reason

    def test_loading_only_the_measurement_looks_at_names_too(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        first = nperf.SGD(self.named(other, self.REORDERED), lr=0.1, symmetries=[self.NORM], backend=backend)
        train(other, first, range(2))
        optimizer = nperf.SGD(net.named_parameters(), lr=0.1, symmetries=[self.NORM], backend=backend)
        train(net, optimizer, range(2))
        before = optimizer.readout()
        with pytest.raises(ValueError, match="in another order"):
            optimizer.load_measurement(first.state_dict()["measurement"])
        assert_same_readout(optimizer.readout(), before)

    def test_an_added_group_and_copies_keep_the_names(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        first = torch.optim.SGD(self.named(other, self.NAMES[:2], "module.{}"), lr=0.1)
        first.add_param_group({"params": self.named(other, self.NAMES[2:], "module.{}")})
        optimizer = nperf.SGD(self.named(net, self.NAMES[:2]), lr=0.1, symmetries=[self.NORM], backend=backend)
        optimizer.add_param_group({"params": self.named(net, self.NAMES[2:])})
        optimizer.load_state_dict(first.state_dict())
        net, optimizer = copy.deepcopy((net, optimizer))
        assert [group["param_names"] for group in optimizer.param_groups] == [[*self.NAMES[:2]], [*self.NAMES[2:]]]
        train(net, optimizer, range(2))
        assert optimizer.readout()["fc1"].rounding.abs().max() <= 1e-13

    def test_a_hook_may_sort_a_checkpoint(self, backend: str) -> None:
        """As torch's documentation of register_load_state_dict_pre_hook has it."""
        net, other = make_net(backend), make_net(backend)
        first = torch.optim.SGD(self.named(other, self.REORDERED), **self.OPTIONS)
        train(other, first, range(3))

        def by_name(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            (own,), (group,) = optimizer.param_groups, state_dict["param_groups"]
            place = [group["param_names"].index(name) for name in own["param_names"]]
            state = {i: state_dict["state"][j] for i, j in enumerate(place)}
            return {"state": state, "param_groups": [{**group, "param_names": own["param_names"]}]}

        optimizer = nperf.SGD(net.named_parameters(), lr=1.0, symmetries=[self.NORM], backend=backend)
        optimizer.register_load_state_dict_pre_hook(by_name)
        net.load_state_dict(other.state_dict())
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        train(net, optimizer, range(3, 6))
        train(other, first, range(3, 6))
        for name in self.NAMES:
            torch.testing.assert_close(net.get_parameter(name), other.get_parameter(name))
        assert optimizer.readout()["fc1"].rounding.abs().max() <= 1e-13


class TestRefusals:
    """Bad input gets an error that says what and why, before anything is changed."""

    def test_symmetries_need_names(self, backend: str) -> None:
        net = make_net(backend)
        with pytest.raises(ValueError, match="named_parameters"):
            nperf.SGD(net.parameters(), lr=0.1, symmetries=SYMMETRIES, backend=backend)
        nperf.SGD(net.parameters(), lr=0.1, backend=backend)

    @pytest.mark.parametrize(
        ("symmetry", "words"),
        [
            (Norm("n", [Part("fc1.wieght", 0)]), "did you mean 'fc1.weight'"),
            (Norm("n", [Part("fc1.weight", 2)]), "axis 2"),
            (Norm("n", [Part("fc1.weight", 0, fold=2)]), "fold 2"),
            (Norm("n", [Part("fc1.weight", 0), Part("fc2.weight", 0)]), "number of groups"),
            (Norm("n", [Part("fc1.weight", 0), Part("fc1.weight", 0)]), "twice"),
        ],
    )
    def test_misfits(self, backend: str, symmetry: nperf.Symmetry, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            ours(make_net(backend), backend, symmetries=[symmetry])

    def test_names_that_mean_two_parameters(self, backend: str) -> None:
        """Which of the two a symmetry means cannot be told."""
        p, q = (torch.ones(2, device=device_of(backend), requires_grad=True) for _ in "pq")
        with pytest.raises(ValueError, match=r"'?w'?"):
            nperf.SGD([("w", p), ("w", q)], lr=0.1, symmetries=[Norm("n", [Part("w", 0)])], backend=backend)

    @each(KINDS)
    def test_differentiable(self, kind: Kind, backend: str) -> None:
        with pytest.raises((RuntimeError, ValueError), match="differentiable"):
            kind.mine(make_net(backend), backend, differentiable=True)

    @pytest.mark.parametrize("symmetries", [SYMMETRIES[0], "fc1", [3], [Part("fc1.weight", 0)]], ids=repr)
    def test_what_is_no_symmetry(self, backend: str, symmetries: Any) -> None:
        with pytest.raises(TypeError, match="symmetries must"):
            ours(make_net(backend), backend, symmetries=symmetries)

    def test_a_checkpoint_of_another_model_changes_nothing(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.25, momentum=0.9)
        train(net, optimizer, range(3))
        before = optimizer.readout()
        other = nn.Linear(2, 2).to(device_of(backend))
        state = torch.optim.SGD(other.parameters(), lr=0.5).state_dict()
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert_same_readout(optimizer.readout(), before)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=r"'abacus'.*reference"):
            ours(make_net("cpu"), "abacus")

    def test_unavailable_backends_say_why(self) -> None:
        for name, reason in nperf.backends().items():
            if reason != "available":
                assert reason
                with pytest.raises((ValueError, RuntimeError, ImportError)) as caught:
                    ours(make_net("cpu"), name)
                assert name in str(caught.value)

    def test_auto_says_what_it_chose(self) -> None:
        net = make_net("cpu")
        optimizer = ours(net, "auto", lr=0.1)
        train(net, optimizer, range(1))
        assert optimizer.backend in BACKENDS

    @each(KINDS)
    def test_sparse_gradients(self, kind: Kind, backend: str) -> None:
        torch.manual_seed(0)
        net = nn.ModuleDict({"fc": nn.Linear(2, 2), "embed": nn.Embedding(4, 2, sparse=True)}).to(device_of(backend))
        start = copy.deepcopy(net)
        optimizer = kind.mine(net, backend, lr=0.1, symmetries=layers(net))
        before = optimizer.readout()
        net["fc"](net["embed"](torch.tensor([1, 2], device=device_of(backend)))).sum().backward()
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"embed\.weight.*sparse|sparse.*embed\.weight"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        assert_same_readout(optimizer.readout(), before)

    @each(KINDS)
    def test_complex_parameters(self, kind: Kind, backend: str) -> None:
        p = torch.ones(3, dtype=torch.complex64, device=device_of(backend), requires_grad=True)

        def run() -> None:
            optimizer = kind.ours([("p", p)], lr=0.1, backend=backend)
            p.grad = torch.ones_like(p)
            optimizer.step()

        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"\bp\b.*complex"):
            run()
        assert (p == 1).all()

    @each(KINDS)
    def test_integer_parameters(self, kind: Kind, backend: str) -> None:
        p = torch.ones(3, dtype=torch.int32, device=device_of(backend))
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"\bp\b.*int32"):
            kind.ours([("p", p)], lr=0.1, symmetries=[Norm("n", [Part("p", 0)])], backend=backend).step()


def test_a_learning_rate_that_is_changed_in_place(backend: str) -> None:
    """An array, or a tensor on the CPU, is read in every step, as in torch."""
    for lr in (np.array(0.1), torch.tensor(0.1)):
        mine, other = (nn.Parameter(torch.ones(3, device=device_of(backend))) for _ in range(2))
        steps = nperf.SGD([mine], lr=copy.deepcopy(lr), backend=backend), torch.optim.SGD([other], lr=copy.deepcopy(lr))  # type: ignore[arg-type]
        for _ in range(3):
            for p, optimizer in zip((mine, other), steps, strict=True):
                p.grad = torch.ones_like(p)
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.5
        torch.testing.assert_close(mine, other)
        assert mine[0].item() == pytest.approx(0.825)


@pytest.fixture
def flushing() -> Iterator[None]:
    """One thread that replaces subnormal numbers by zero: the switch is the calling thread's own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if device_of(backend) == "cpu"])
@pytest.mark.parametrize(
    ("mine", "its"),
    [
        (partial(nperf.SGD, lr=0.5, momentum=0.9), partial(torch.optim.SGD, lr=0.5, momentum=0.9)),
        (partial(nperf.AdamW, lr=1e-3, weight_decay=0.0), partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)),
    ],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize(
    ("dtype", "bits", "exponent", "kept"),
    [
        (torch.float64, torch.int64, -1050, False),
        (torch.float32, torch.int32, -130, False),
        (torch.bfloat16, torch.int16, -130, False),
        (torch.float16, torch.int16, -20, True),
    ],
    ids=str,
)
def test_subnormal_numbers_are_flushed_where_torch_flushes_them(
    dtype: torch.dtype, bits: torch.dtype, exponent: int, kept: bool, mine: Any, its: Any, backend: str
) -> None:
    """The table of docs/precision.md. A zero gradient leaves a parameter as it is, but for what is flushed."""
    smallest = round(sum(map(math.log2, (torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps))))  # bits: 0…01
    for optimizer, options in ((mine, {"backend": backend}), (its, {})):
        p = torch.full((64,), 1 << (exponent - smallest), dtype=bits).view(dtype).requires_grad_()
        p.grad = torch.zeros_like(p)
        optimizer([p], **options).step()
        assert ((p.detach().view(bits) != 0) == kept).all()
