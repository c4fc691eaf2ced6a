"""Torch's own cases for its SGD, Adam and AdamW, and what its tests ask of every optimizer, asked of ours.

The cases are those of torch.testing._internal.common_optimizers: inputs, inputs that must fail, schedulers. The truth
is torch's optimizer itself, and what is measured meanwhile must stay an identity.
"""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import (
    ADAMW,
    BACKENDS,
    KINDS,
    SGD,
    SYMMETRIES,
    Kind,
    assert_identities,
    assert_same,
    assert_same_readout,
    buffers,
    device_of,
    each,
    loss_of,
    make_net,
    ours,
    theirs,
    train,
)

import noetherperf as nperf
from noetherperf import Norm, Part, layers, neurons

pytest.importorskip("expecttest")
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

INFO: dict[str, OptimizerInfo] = {info.name: info for info in optim_db}


def info_of(kind: Kind) -> OptimizerInfo:
    return INFO[kind.ours.__name__]


def inputs_of(kind: Kind) -> list[OptimizerInput]:
    return list(info_of(kind).optim_inputs_func(device="cpu"))


#: Torch tries them all with SGD, and some with others.
SCHEDULERS = max((info_of(kind).scheduler_inputs for kind in KINDS), key=len)
#: Each kind, on each of its backends, with each of torch's inputs.
each_input = pytest.mark.parametrize(
    ("kind", "backend", "options"),
    [
        pytest.param(kind, backend, sample, id=f"{kind.ours.__name__}-{backend}-{sample.desc}")
        for kind in KINDS
        for backend in kind.backends
        for sample in inputs_of(kind)
    ],
    indirect=["options"],
)
LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape, dtype=torch.float64),
    "not contiguous": lambda *shape: torch.randn(*shape, 2, dtype=torch.float64)[..., 0],
    "transposed": lambda *shape: torch.randn(*shape[::-1], dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1)),
}


@pytest.fixture(params=inputs_of(SGD), ids=lambda sample: sample.desc)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keyword arguments of one of torch's inputs; a tensor among them is the test's own."""
    return copy.deepcopy(dict(request.param.kwargs))


def least_squares(
    layout: str, device: str, make: Callable[..., torch.optim.Optimizer], **options: Any
) -> "LeastSquares":
    return LeastSquares(LAYOUTS[layout], device, make, options)


class LeastSquares:
    """|W x + b|², one weight and one bias, and an optimizer of them."""

    def __init__(
        self,
        tensor: Callable[..., Tensor],
        device: str,
        make: Callable[..., torch.optim.Optimizer],
        options: dict[str, Any],
    ) -> None:
        torch.manual_seed(0)
        self.weight, self.bias = (nn.Parameter(tensor(*shape).to(device)) for shape in ((10, 5), (10,)))
        self.input = torch.randn(5, dtype=torch.float64).to(device)
        self.optimizer = make([("weight", self.weight), ("bias", self.bias)], **copy.deepcopy(options))

    def closure(self) -> float:
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss.item()

    def run(self, schedulers: Callable[[torch.optim.Optimizer], list[Any]], n_steps: int) -> list[float]:
        """The losses of some steps, with every scheduler stepped after each."""
        losses = []
        made = schedulers(self.optimizer)
        for _ in range(n_steps):
            losses.append(self.optimizer.step(self.closure))
            for scheduler in made:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(losses[-1])
                else:
                    scheduler.step()
        return losses


def no_schedulers(optimizer: torch.optim.Optimizer) -> list[Any]:
    return []


NORMS = (Norm("weight", [Part("weight", 0)]), Norm("bias", [Part("bias", None)]))


def both(kind: Kind, layout: str, backend: str, **options: Any) -> tuple[LeastSquares, LeastSquares]:
    """The same least squares under our optimizer and under torch's."""
    device = device_of(backend)
    mine = least_squares(layout, device, kind.ours, symmetries=NORMS, backend=backend, **options)
    return mine, least_squares(layout, device, kind.theirs, foreach=False, **options)


def assert_same_least_squares(mine: LeastSquares, torchs: LeastSquares) -> None:
    for p, q in ((mine.weight, torchs.weight), (mine.bias, torchs.bias)):
        assert p.isfinite().all()
        assert (p - q).abs().max() <= 1e-12 * q.abs().max()
    assert isinstance(mine.optimizer, nperf.MeasuredOptimizer)
    assert_identities(mine.optimizer)


class TestInputs:
    """Every input that torch tries its optimizer with, and every one that it must refuse."""

    @each_input
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_goes_torchs_way(self, kind: Kind, backend: str, options: dict[str, Any], layout: str) -> None:
        mine, torchs = both(kind, layout, backend, **options)
        losses, expected = mine.run(no_schedulers, 20), torchs.run(no_schedulers, 20)
        assert losses == pytest.approx(expected, rel=1e-11)
        assert (losses[-1] > losses[0]) == bool(options.get("maximize"))
        assert_same_least_squares(mine, torchs)

    @each_input
    @pytest.mark.parametrize("number", range(len(SCHEDULERS)))
    def test_goes_torchs_way_with_schedulers(
        self, kind: Kind, backend: str, options: dict[str, Any], number: int
    ) -> None:
        mine, torchs = both(kind, "contiguous", backend, **options)

        def schedulers(optimizer: torch.optim.Optimizer) -> list[Any]:
            return [make(optimizer) for make in SCHEDULERS[number]]

        assert mine.run(schedulers, 20) == pytest.approx(torchs.run(schedulers, 20), rel=1e-11)
        lrs = [float(sgd.param_groups[0]["lr"]) for sgd in (mine.optimizer, torchs.optimizer)]
        assert lrs[0] == lrs[1]
        assert_same_least_squares(mine, torchs)

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.ours.__name__)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_errors(self, kind: Kind, dtype: torch.dtype) -> None:
        inputs = info_of(kind).optim_error_inputs_func(device="cpu", dtype=dtype)
        assert len(inputs) > 5
        for sample in inputs:
            bad = sample.optimizer_error_input
            params = bad.params if bad.params is not None else [nn.Parameter(torch.randn(2, 3, dtype=dtype))]
            assert sample.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            with pytest.raises(sample.error_type, match=sample.error_regex):  # warnings are errors here
                kind.ours(params, **bad.kwargs)

    @each_input
    @pytest.mark.parametrize(
        "flag", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str
    )
    def test_flags_change_nothing(
        self, kind: Kind, backend: str, options: dict[str, Any], flag: dict[str, bool]
    ) -> None:
        """Torch checks that its several implementations agree; here there is one."""
        plain, flagged = (
            least_squares("contiguous", device_of(backend), kind.ours, backend=backend, **options, **more)
            for more in ({}, flag)
        )
        plain.run(no_schedulers, 5)
        flagged.run(no_schedulers, 5)
        assert torch.equal(plain.weight, flagged.weight)

    @each_input
    @pytest.mark.parametrize("n_dims", [0, 1])
    @pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
    def test_a_tensor_is_as_good_as_a_number(
        self, kind: Kind, backend: str, options: dict[str, Any], n_dims: int, lr_dtype: torch.dtype
    ) -> None:
        number = float(torch.tensor(float(options.pop("lr", 1e-3)), dtype=lr_dtype))
        tensor = torch.full((1,) * n_dims, number, dtype=lr_dtype)
        by_number, by_tensor = (
            least_squares("contiguous", device_of(backend), partial(kind.ours, lr=lr, backend=backend), **options)
            for lr in (number, tensor)
        )
        by_number.run(no_schedulers, 10)
        by_tensor.run(no_schedulers, 10)
        assert torch.equal(by_number.weight, by_tensor.weight)
        assert float(tensor) == number
        assert isinstance(by_tensor.optimizer.param_groups[0]["lr"], Tensor)

    def test_a_tensor_that_is_filled_counts_at_once(self, backend: str) -> None:
        lr = torch.tensor(0.0)
        net = make_net(backend)
        optimizer = ours(net, backend, lr=lr)
        start = copy.deepcopy(net)
        train(net, optimizer, range(2))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        lr.fill_(0.5)
        train(net, optimizer, range(2, 3))
        assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        assert optimizer.readout().time == 0.5

    @each_input
    @pytest.mark.parametrize("what", ["complex weight", "complex gradient"])
    def test_complex_is_refused(self, kind: Kind, backend: str, options: dict[str, Any], what: str) -> None:
        """Torch steps complex parameters as pairs of real ones; here the charges of both would be mixed up."""
        weight = torch.ones(3, dtype=torch.complex64 if what == "complex weight" else torch.float32)
        weight = weight.to(device_of(backend)).requires_grad_()

        def run() -> None:
            optimizer = kind.ours([("w", weight)], backend=backend, **options)
            weight.grad = torch.ones_like(weight)
            if what == "complex gradient":  # which torch refuses to assign, too
                weight.grad = torch.ones(3, dtype=torch.complex64, device=weight.device)
            optimizer.step()

        with pytest.raises((TypeError, RuntimeError), match=r"[Cc]omplex"):
            run()
        assert (weight == 1).all()

    @each_input
    def test_pairs_of_real_numbers_instead_of_complex_ones(
        self, kind: Kind, backend: str, options: dict[str, Any]
    ) -> None:
        """What the error recommends makes the step that torch makes."""
        torch.manual_seed(0)
        values = torch.randn(2, 4, dtype=torch.complex128).to(device_of(backend))
        p, q = torch.view_as_real(values.clone()).requires_grad_(), values.clone().requires_grad_()
        mine = kind.ours([p], backend=backend, **options)
        torchs = kind.theirs([q], foreach=False, **copy.deepcopy(options))
        for _ in range(3):
            q.grad = torch.randn_like(q)
            p.grad = torch.view_as_real(q.grad).clone()
            mine.step()
            torchs.step()
        assert (torch.view_as_complex(p.detach()) - q).abs().max() <= 1e-14 * q.abs().max()

    @each_input
    @pytest.mark.parametrize("gradient", ["none", "zero"])
    def test_nothing_to_follow(self, kind: Kind, backend: str, options: dict[str, Any], gradient: str) -> None:
        """Without gradients a step does nothing at all; with zeros only weight decay moves."""
        mine, torchs = both(kind, "contiguous", backend, **options)
        start = mine.weight.detach().clone()
        for made in (mine, torchs):
            for p in (made.weight, made.bias):
                p.grad = None if gradient == "none" else torch.zeros_like(p)
            made.optimizer.step()
        moves = gradient == "zero" and mine.optimizer.param_groups[0]["weight_decay"] != 0
        assert torch.equal(mine.weight, start) != moves
        assert [v is None for v in buffers(mine.optimizer)] == [v is None for v in buffers(torchs.optimizer)]
        assert_same_least_squares(mine, torchs)

    @each_input
    @pytest.mark.parametrize("field", [{"lr": 1e-2}, {"weight_decay": 1e-2}], ids=str)
    def test_one_option_for_one_group(
        self, kind: Kind, backend: str, options: dict[str, Any], field: dict[str, float]
    ) -> None:
        def groups(made: list[tuple[str, Tensor]], cls: Any = None, **more: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = cls([{"params": made[:1], **field}, {"params": made[1:]}], **more)
            return optimizer

        mine = least_squares(
            "contiguous",
            device_of(backend),
            partial(groups, cls=kind.ours),
            symmetries=NORMS,
            backend=backend,
            **options,
        )
        torchs = least_squares(
            "contiguous", device_of(backend), partial(groups, cls=kind.theirs), foreach=False, **options
        )
        mine.run(no_schedulers, 10)
        torchs.run(no_schedulers, 10)
        assert_same_least_squares(mine, torchs)

    @each_input
    def test_dtypes_in_one_group(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        dtypes = (torch.float32, torch.float64)
        p, q = (
            [
                (str(i), nn.Parameter(torch.linspace(1, 2, 6, dtype=d).to(device_of(backend))))
                for i, d in enumerate(dtypes)
            ]
            for _ in "pq"
        )
        norms = [Norm(name, [Part(name, 0)]) for name, _ in p]
        mine = kind.ours(p, symmetries=norms, backend=backend, **options)
        torchs = kind.theirs(q, foreach=False, **copy.deepcopy(options))
        for _ in range(5):
            for (_, a), (_, b) in zip(p, q, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            mine.step()
            torchs.step()
        for (_, a), (_, b) in zip(p, q, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=0)
        assert_identities(mine, tolerance=1e-6)

    @each_input
    def test_the_default_dtype_does_not_matter(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        results = []
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            mine, _ = both(kind, "contiguous", backend, **options)
            mine.run(no_schedulers, 5)
            assert isinstance(mine.optimizer, nperf.MeasuredOptimizer)
            results.append((mine.weight, mine.optimizer.readout()))
        assert torch.equal(results[0][0], results[1][0])
        assert_same_readout(results[0][1], results[1][1])

    @pytest.mark.gpu
    def test_devices_in_one_group(self, options: dict[str, Any]) -> None:
        p, q = ([nn.Parameter(torch.linspace(1, 2, 6, device=d)) for d in ("cpu", "cuda")] for _ in "pq")
        mine, torchs = nperf.SGD(p, **options), torch.optim.SGD(q, foreach=False, **copy.deepcopy(options))
        for _ in range(3):
            for a, b in zip(p, q, strict=True):
                a.grad = torch.ones_like(a)
                b.grad = a.grad.clone()
            mine.step()
            torchs.step()
        for a, b in zip(p, q, strict=True):
            torch.testing.assert_close(a, b)


class TestState:
    """Checkpoints, copies and what they carry."""

    @each_input
    def test_can_be_printed(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        optimizer = kind.mine(make_net(backend), backend, **options)
        text = repr(optimizer)
        assert text.startswith(f"{kind.ours.__name__} (")
        for key in set(optimizer.param_groups[0]) - {"params", "param_names"}:
            assert f"{key}: {optimizer.param_groups[0][key]}" in text

    @each_input
    def test_a_loaded_state_goes_on_the_same(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, **options)
        train(net, optimizer, range(5))
        again = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = kind.mine(again, backend)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for sgd, model in ((optimizer, net), (loaded, again)):
            train(model, sgd, range(5, 10))
        assert_same(again, loaded, net, optimizer, tolerance=0.0)
        assert_same_readout(loaded.readout(), optimizer.readout())

    @each_input
    def test_a_checkpoint_of_before_some_options(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **options), kind.torchs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(3))
            old = copy.deepcopy(sgd.state_dict())
            for group in old["param_groups"]:
                for flag in (*info_of(kind).not_og_supported_flags, "nesterov"):
                    group.pop(flag, None)
            sgd.load_state_dict(old)
            train(model, sgd, range(3, 6))
        assert_same(net, optimizer, other, peer)

    @each_input
    @pytest.mark.parametrize("from_named", [False, True])
    @pytest.mark.parametrize("to_named", [False, True])
    def test_checkpoints_with_and_without_names(
        self, kind: Kind, backend: str, options: dict[str, Any], from_named: bool, to_named: bool
    ) -> None:
        def make(net: nn.Module, named: bool) -> Any:
            return kind.ours(net.named_parameters() if named else net.parameters(), backend=backend, **options)

        net, other = make_net(backend), make_net(backend)
        first, peer = make(net, from_named), kind.torchs(other, **options)
        train(net, first, range(3))
        second = make(net, to_named)
        second.load_state_dict(first.state_dict())
        assert ("param_names" in second.param_groups[0]) == (from_named or to_named)
        train(net, second, range(3, 6))
        train(other, peer, range(6))
        assert_same(net, second, other, peer)

    @pytest.mark.parametrize("start", BACKENDS)
    @pytest.mark.parametrize("end", BACKENDS)
    def test_checkpoints_between_backends(self, start: str, end: str, options: dict[str, Any]) -> None:
        """A run that changes the backend halfway measures on, and ends where it would have without."""
        straight = make_net(end)
        unbroken = ours(straight, end, **options)
        train(straight, unbroken, range(10))
        net = make_net(start)
        first = ours(net, start, **options)
        train(net, first, range(5))
        net.to(device_of(end))
        second = ours(net, end)
        second.load_state_dict(first.state_dict())
        train(net, second, range(5, 10))
        assert second.step_count == 10
        assert_same(net, second, straight, unbroken)
        for name, law in second.readout().items():
            expected = unbroken.readout()[name]
            for mine, other in ((law.charge, expected.charge), (law.discrete.total, expected.discrete.total)):
                assert (mine - other).abs().max() <= 1e-12 * expected.initial.abs().max() + 1e-15, name

    def test_buffers_take_the_parameters_dtype(self, backend: str) -> None:
        """As torch has it: a checkpoint of a float32 model may be loaded for its bfloat16 copy."""
        net = make_net(backend, torch.float32)
        optimizer = ours(net, backend, lr=0.1, momentum=0.9, symmetries=())
        train(net, optimizer, range(2))
        half = copy.deepcopy(net).to(torch.bfloat16)
        loaded = ours(half, backend, lr=0.1, momentum=0.9, symmetries=())
        loaded.load_state_dict(optimizer.state_dict())
        assert {v.dtype for v in buffers(loaded) if v is not None} == {torch.bfloat16}
        train(half, loaded, range(2, 4))

    def test_another_number_of_groups_is_refused(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        train(net, optimizer, range(2))
        named = list(net.named_parameters())
        groups = [{"params": named[:1]}, {"params": named[1:]}]
        other = nperf.SGD(groups, lr=0.1, symmetries=SYMMETRIES, backend=backend)
        with pytest.raises(ValueError, match="groups"):
            other.load_state_dict(optimizer.state_dict())

    def test_an_old_measurement_is_refused_with_the_way_out(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        train(net, optimizer, range(2))
        state = copy.deepcopy(optimizer.state_dict())
        state["measurement"]["version"] = 1
        with pytest.raises(ValueError, match=r'version 1.*del state_dict\["measurement"\]'):
            optimizer.load_state_dict(state)
        assert optimizer.step_count == 2
        del state["measurement"]
        optimizer.load_state_dict(state)
        assert optimizer.step_count == 0

    @pytest.mark.parametrize(
        "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_has_all_public_attributes(self, backend: str, way: Callable[[Any], Any]) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        train(net, optimizer, range(2))
        _, twin = way((net, optimizer))

        def public(sgd: nperf.SGD) -> set[str]:
            return {name for name, _ in inspect.getmembers(sgd) if not name.startswith("_")}

        assert public(twin) == public(optimizer)
        assert "measurement" in twin.state_dict()

    @each_input
    def test_state_is_only_there_when_there_is_some(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, **options), kind.torchs(other, **options)
        for model, sgd in ((net, optimizer), (other, peer)):
            train(model, sgd, range(1))
        mine = {key: set(entry) for key, entry in optimizer.state_dict()["state"].items()}
        torchs = {
            key: {name for name, value in entry.items() if value is not None}
            for key, entry in peer.state_dict()["state"].items()
        }
        assert mine == {key: names for key, names in torchs.items() if names}


class TestHooks:
    @each(KINDS)
    def test_all_of_them_in_torchs_order(self, kind: Kind, backend: str) -> None:
        def calls_of(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[str]:
            calls: list[str] = []

            def note(what: str) -> Callable[..., None]:
                return lambda *_: calls.append(what)

            net = make_net(backend)
            sgd = make(net)
            handles = [
                register_optimizer_step_pre_hook(note("every optimizer, before")),
                register_optimizer_step_post_hook(note("every optimizer, after")),
                sgd.register_step_pre_hook(note("before")),
                sgd.register_step_post_hook(note("after")),
                sgd.register_state_dict_pre_hook(note("before saving")),
                sgd.register_state_dict_post_hook(note("after saving")),
                sgd.register_load_state_dict_pre_hook(note("before loading")),
                sgd.register_load_state_dict_post_hook(note("after loading")),
                sgd.register_state_dict_post_hook(note("first after saving"), prepend=True),
            ]
            try:
                train(net, sgd, range(2))
                sgd.load_state_dict(sgd.state_dict())
            finally:
                for handle in handles:
                    handle.remove()
            train(net, sgd, range(2, 3))
            sgd.load_state_dict(sgd.state_dict())
            return calls

        calls = calls_of(lambda net: kind.mine(net, backend, lr=0.1))
        assert calls == calls_of(lambda net: kind.torchs(net, lr=0.1))
        assert len(calls) == 2 * 4 + 5

    def test_a_step_hook_may_change_the_arguments(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        optimizer.register_step_pre_hook(lambda sgd, args, kwargs: ((sgd, lambda: 42.0), {}))
        assert optimizer.step() == 42.0

    def test_a_state_hook_sees_and_may_replace_what_was_measured(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        seen = []

        def hook(sgd: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            seen.append("measurement" in state)
            return {**state, "mine": 1}

        optimizer.register_state_dict_post_hook(hook)
        state = optimizer.state_dict()
        assert seen == [True]
        assert {"measurement", "mine", "state", "param_groups"} == state.keys()

    def test_a_load_hook_may_replace_the_state(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1, momentum=0.9)
        train(net, optimizer, range(2))
        optimizer.register_load_state_dict_pre_hook(
            lambda sgd, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.25}]}
        )
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.step_count == 2

    def test_those_of_some_steps(self, backend: str) -> None:
        """Steps before and after have none."""
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        calls: list[object] = []
        train(net, optimizer, range(1))
        for register in (
            register_optimizer_step_pre_hook,
            register_optimizer_step_post_hook,
            optimizer.register_step_pre_hook,
            optimizer.register_step_post_hook,
        ):
            handle = register(lambda *_: calls.append(register))  # noqa: B023
            train(net, optimizer, range(2))
            handle.remove()
            train(net, optimizer, range(1))
            assert calls == [register] * 2
            calls.clear()

    def test_the_profiler_sees_a_step(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                train(net, optimizer, range(1))
        assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}

    def test_one_optimizer_a_parameter_stepping_during_backward(self, backend: str) -> None:
        """Gradients are used and freed as they come."""
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        net, other = make_net(backend), make_net(backend)
        optimizers = {
            p: nperf.SGD([(name, p)], symmetries=[Norm("n", [Part(name, None)])], backend=backend, **options)
            for name, p in net.named_parameters()
        }

        def step(p: Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            optimizers[p].zero_grad()  # type: ignore[index]

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        peer = theirs(other, **options)
        for i in range(3):
            loss_of(net, i).backward()
        train(other, peer, range(3))
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-13
        for optimizer in optimizers.values():
            assert_identities(optimizer)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda sgd: lr_scheduler.LambdaLR(sgd, lambda step: 0.9**step),
    "MultiplicativeLR": lambda sgd: lr_scheduler.MultiplicativeLR(sgd, lambda _: 0.9),
    "StepLR": lambda sgd: lr_scheduler.StepLR(sgd, 3, 0.5),
    "MultiStepLR": lambda sgd: lr_scheduler.MultiStepLR(sgd, [2, 5], 0.5),
    "ConstantLR": lambda sgd: lr_scheduler.ConstantLR(sgd, 0.5, 4),
    "LinearLR": lambda sgd: lr_scheduler.LinearLR(sgd, 0.1, total_iters=5),
    "ExponentialLR": lambda sgd: lr_scheduler.ExponentialLR(sgd, 0.9),
    "PolynomialLR": lambda sgd: lr_scheduler.PolynomialLR(sgd, 8, 2.0),  # ends at zero
    "CosineAnnealingLR": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, 6),
    "CosineAnnealingWarmRestarts": lambda sgd: lr_scheduler.CosineAnnealingWarmRestarts(sgd, 3),
    "CyclicLR": lambda sgd: lr_scheduler.CyclicLR(sgd, 0.01, 0.2, step_size_up=3),  # and the momentum
    "OneCycleLR": lambda sgd: lr_scheduler.OneCycleLR(sgd, 0.2, total_steps=13),  # and the momentum
    "ReduceLROnPlateau": lambda sgd: lr_scheduler.ReduceLROnPlateau(sgd, patience=1, threshold=10.0),
    "SequentialLR": lambda sgd: lr_scheduler.SequentialLR(
        sgd, [lr_scheduler.LinearLR(sgd, total_iters=3), lr_scheduler.ExponentialLR(sgd, 0.8)], [3]
    ),
    "ChainedScheduler": lambda sgd: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(sgd, 0.5, 3), lr_scheduler.ExponentialLR(sgd, 0.9)]
    ),
    "SWALR": lambda sgd: swa_utils.SWALR(sgd, 0.01, anneal_epochs=5),
}


class TestSchedulers:
    def test_all_of_torchs_are_here(self) -> None:
        there = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
        assert there <= SCHEDULES.keys()

    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
    @pytest.mark.parametrize("name", SCHEDULES)
    @each((SGD, ADAMW))
    def test_schedule(self, kind: Kind, backend: str, name: str, lr: float | Tensor) -> None:
        """Torch's trajectory, through a checkpoint of optimizer and scheduler; the laws stay identities."""
        options = {"weight_decay": 0.05, **({"momentum": 0.9} if kind is SGD else {})}
        make = SCHEDULES[name]

        def run(
            net: nn.Module, optimize: Callable[[float | Tensor], torch.optim.Optimizer]
        ) -> tuple[torch.optim.Optimizer, list[float]]:
            lrs = []
            sgd = optimize(copy.deepcopy(lr))
            scheduler = make(sgd)
            for step in range(12):
                if step == 6:  # as from a file: a new optimizer, a new scheduler
                    saved = copy.deepcopy((sgd.state_dict(), scheduler.state_dict()))
                    sgd = optimize(copy.deepcopy(lr))
                    scheduler = make(sgd)
                    sgd.load_state_dict(saved[0])
                    scheduler.load_state_dict(saved[1])
                train(net, sgd, range(step, step + 1))
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                lrs.append(float(sgd.param_groups[0]["lr"]))
            return sgd, lrs

        net, other = make_net(backend), make_net(backend)
        optimizer, lrs = run(net, lambda lr: kind.mine(net, backend, lr=lr, **options))
        peer, expected = run(other, lambda lr: kind.torchs(other, lr=lr, **options))
        assert lrs == expected
        assert len(set(lrs)) > 1
        assert_same(net, optimizer, other, peer)
        assert isinstance(optimizer, nperf.MeasuredOptimizer)
        assert optimizer.step_count == 12
        assert_identities(optimizer)

    def test_time_is_the_sum_of_learning_rates(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.5)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(net, optimizer, range(4), after_step=scheduler.step)
        assert optimizer.readout().time == 0.5 + 0.25 + 0.125 + 0.0625

    def test_averaged_models(self, backend: str) -> None:
        """Averaging reads the parameters between steps and writes none of them."""
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1, momentum=0.9)
        average = swa_utils.AveragedModel(net)
        train(net, optimizer, range(6), after_step=lambda: average.update_parameters(net))
        assert_identities(optimizer)
        assert int(average.n_averaged) == 6


class TestCompile:
    """torch.compile around the step: graph breaks are fine, wrong numbers are not."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("what", ["model", "loss and backward", "step", "whole"])
    def test_the_same_run(self, backend: str, what: str) -> None:
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05}
        batches = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(4)]

        def run(compiled: bool) -> tuple[nn.Module, nperf.SGD]:
            wrap = partial(torch.compile, backend="eager") if compiled else (lambda f: f)
            net = make_net(backend, torch.float32)
            optimizer = ours(net, backend, **options)
            model = wrap(net) if what == "model" else net

            def forward_backward(x: Tensor, y: Tensor) -> None:
                nn.functional.cross_entropy(model(x), y).backward()

            def whole(x: Tensor, y: Tensor) -> None:
                optimizer.zero_grad()
                forward_backward(x, y)
                optimizer.step()

            inner = wrap(forward_backward) if what == "loss and backward" else forward_backward
            step = wrap(optimizer.step) if what == "step" else optimizer.step
            for x, y in batches:
                x, y = x.to(device_of(backend)), y.to(device_of(backend))
                if what == "whole":
                    wrap(whole)(x, y)
                else:
                    optimizer.zero_grad()
                    inner(x, y)
                    step()
            return net, optimizer

        net, optimizer = run(compiled=True)
        other, peer = run(compiled=False)
        assert optimizer.step_count == 4
        assert_same(net, optimizer, other, peer, tolerance=0.0)
        assert_same_readout(optimizer.readout(), peer.readout())

    @pytest.mark.slow
    def test_compiled_to_machine_code(self, backend: str) -> None:
        """The compiler's default, which rounds forward and backward passes as it likes."""
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = ours(net, backend, **options), ours(other, backend, **options)

        @torch.compile
        def whole(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

        for _ in range(4):
            x, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
            x, y = x.to(device_of(backend)), y.to(device_of(backend))
            whole(x, y)
            peer.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            peer.step()
        assert torch._dynamo.utils.counters["inductor"], "nothing was compiled"
        assert optimizer.step_count == 4
        assert_same(net, optimizer, other, peer)
        assert_identities(optimizer)

    def test_schedules_are_not_baked_in(self, backend: str) -> None:
        """A compiled step reads the learning rate anew each time."""
        net, other = make_net(backend), make_net(backend)
        results = []
        for model, compiled in ((net, True), (other, False)):
            optimizer = ours(model, backend, lr=0.1, momentum=0.9)
            step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
            for i in range(4):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                step()
                scheduler.step()
            results.append(optimizer)
        assert_same(net, results[0], other, results[1], tolerance=0.0)
        assert_same_readout(results[0].readout(), results[1].readout())


class TestGroups:
    def test_groups_that_come_one_by_one(self, backend: str) -> None:
        """A group may come before the first step, between steps, without names; what was measured goes on."""
        net, other = make_net(backend), make_net(backend)
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
        results = []
        for model, cls in (
            (net, partial(nperf.SGD, backend=backend)),
            (other, partial(torch.optim.SGD, foreach=False)),
        ):
            p = list(model.parameters())
            sgd = cls(p[:1], **options)
            sgd.add_param_group({"params": p[1], "lr": 0.2})
            train(model, sgd, range(2))
            sgd.add_param_group({"params": iter(p[2:]), "weight_decay": 0.1, "momentum": 0.0})
            train(model, sgd, range(2, 5))
            results.append(sgd)
        mine, torchs = results
        assert_same(net, mine, other, torchs)
        assert isinstance(mine, nperf.MeasuredOptimizer)
        assert mine.readout().time == pytest.approx(5 * 0.05)

    def test_a_group_on_new_names_measures_on(self, backend: str) -> None:
        net = make_net(backend)
        named = list(net.named_parameters())
        optimizer = nperf.SGD(named[:2], lr=0.1, symmetries=[Norm("n", [Part("fc1.weight", 0)])], backend=backend)
        train(net, optimizer, range(2))
        optimizer.add_param_group({"params": named[2:], "lr": 0.5})
        train(net, optimizer, range(2, 4))
        readout = optimizer.readout()
        assert readout.step == 4
        assert readout.time == pytest.approx(0.4)
        assert_identities(optimizer)

    @pytest.mark.parametrize("params", ["generator", "named generator", "groups of generators", "one by one"])
    def test_ways_to_hand_over_parameters(self, backend: str, params: str) -> None:
        net = make_net(backend)
        given = {
            "generator": net.parameters(),
            "named generator": net.named_parameters(),
            "groups of generators": [{"params": layer.parameters()} for layer in net if list(layer.parameters())],
            "one by one": [{"params": p} for p in net.parameters()],
        }[params]
        optimizer = nperf.SGD(given, lr=0.1, backend=backend)
        start = copy.deepcopy(net)
        train(net, optimizer, range(1))
        assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))

    @each_input
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad(self, kind: Kind, backend: str, options: dict[str, Any], set_to_none: bool) -> None:
        mine, torchs = both(kind, "contiguous", backend, **options)
        for made in (mine, torchs):
            made.closure()
            made.optimizer.zero_grad(set_to_none=set_to_none)
            made.optimizer.step()
            assert (made.weight.grad is None) == set_to_none
        assert_same_least_squares(mine, torchs)

    @each_input
    def test_norms_of_all_units_and_layers(self, kind: Kind, backend: str, options: dict[str, Any]) -> None:
        net = make_net(backend)
        optimizer = kind.mine(net, backend, symmetries=[*neurons(net), *layers(net)], **options)
        train(net, optimizer, range(10))
        assert_identities(optimizer)
