"""Mixed precision: gradient scalers, autocast, 16-bit parameters, and `.rounding`, which shows what they lose."""

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    KINDS,
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
    theirs,
    train,
)
from training import ours as make_ours

import noetherperf as nperf
import noetherperf.optim.meters
import noetherperf.optim.options
import noetherperf.rules.numbers
from bench.bounds import sum_eps
from noetherperf import Norm, Part
from noetherperf.engines import Call, OnDevice

# The step that unscales by itself; what leaves it to the scaler is as torch's, and needs few tests.
ours = partial(make_ours, fused=True)
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.05}
SCALE = 2.0**10


def scaler_for(backend: str, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device_of(backend), **{"init_scale": SCALE, **options})


def train_scaled(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    n_steps: int,
    overflows: set[int] = frozenset(),  # type: ignore[assignment]
    *,
    unscale: bool = False,
    clip: float | None = None,
) -> None:
    for step in range(n_steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        if step in overflows:
            next(net.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


class TestGradScaler:
    @each(KINDS)
    @pytest.mark.parametrize("unscale", [False, True], ids=["unscaled inside", "unscaled before"])
    @pytest.mark.parametrize("overflows", [set(), {0}, {0, 1}, {3, 4}, set(range(8))], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_goes_torchs_way(
        self, kind: Kind, backend: str, dtype: torch.dtype, overflows: set[int], unscale: bool
    ) -> None:
        """Torch's has its gradients unscaled before and its step left out; here both are the step's own affair."""
        net, other = make_net(backend, dtype), make_net(backend, dtype)
        optimizer, peer = kind.mine(net, backend, fused=True, **kind.options), kind.torchs(other, **kind.options)
        scaler, expected = scaler_for(backend), scaler_for(backend)
        train_scaled(net, optimizer, scaler, 8, overflows, unscale=unscale, clip=0.5 if unscale else None)
        train_scaled(other, peer, expected, 8, overflows, unscale=unscale, clip=0.5 if unscale else None)
        optimizer.state_dict()  # asks a GPU, which alone knows, for buffers that no step has written, and unmakes them
        assert_same(net, optimizer, other, peer, tolerance=64 * torch.finfo(dtype).eps)
        assert scaler.state_dict() == expected.state_dict()
        readout = optimizer.readout()
        assert optimizer.step_count == readout.step == 8 - len(overflows)
        time = kind.options["lr"] * (1.0 - kind.options.get("dampening", 0.0))
        assert readout.time == pytest.approx(time * readout.step)
        assert_identities(optimizer, 1e-5 if dtype == torch.float32 else 1e-12)
        assert all(law.closed for name, law in readout.items() if not isinstance(law.symmetry, Norm))

    @each(KINDS)
    @pytest.mark.parametrize("fused", [None, False])
    @pytest.mark.parametrize("way", [lambda both: both, copy.deepcopy], ids=["itself", "copy"])
    def test_not_fused_leaves_it_to_the_scaler(
        self, kind: Kind, backend: str, way: Callable[[Any], Any], fused: bool | None
    ) -> None:
        """As in torch, whose scaler does not call a step that overflows."""
        net, other = make_net(backend), make_net(backend)
        peer = kind.torchs(other, **kind.options)
        net, optimizer = way((net, kind.mine(net, backend, fused=fused, **kind.options)))
        steps = []
        optimizer.register_step_pre_hook(lambda *_: steps.append(optimizer.step_count))
        for model, sgd in ((net, optimizer), (other, peer)):
            train_scaled(model, sgd, scaler_for(backend), 8, {0, 3, 4})
        assert steps == [0, 1, 2, 3, 4]
        assert_same(net, optimizer, other, peer)
        assert_identities(optimizer, 1e-12)

    @each(KINDS)
    def test_measures_what_it_would_without_a_scaler(self, kind: Kind, backend: str) -> None:
        """A power of two changes no digit, so that not even the last one differs; nor does a step that is skipped."""
        net, other = make_net(backend), make_net(backend)
        scaled, plain = (
            kind.mine(net, backend, fused=True, **kind.options),
            kind.mine(other, backend, fused=True, **kind.options),
        )
        for step in range(6):
            for model, sgd in ((net, scaled), (other, plain)):
                sgd.zero_grad()
                (loss_of(model, step) * (SCALE if sgd is scaled else 1.0)).backward()
            scaled.grad_scale = torch.tensor(SCALE, device=device_of(backend))
            scaled.found_inf = torch.tensor(float(step in (0, 3)), device=device_of(backend))
            scaled.step()
            if step not in (0, 3):
                plain.step()
                for p, q in zip(net.parameters(), other.parameters(), strict=True):
                    assert p.grad is not None
                    assert q.grad is not None
                    assert torch.equal(p.grad, q.grad)  # left unscaled, as torch's fused step leaves them
        assert_same(net, scaled, other, plain, tolerance=0.0)
        assert_same_readout(scaled.readout(), plain.readout())

    @each(KINDS)
    @pytest.mark.parametrize("flag", [1.0, 2.0, torch.nan])
    def test_a_skipped_step_leaves_no_trace(self, kind: Kind, backend: str, flag: float) -> None:
        """The flags of several devices come as their sum."""
        net = make_net(backend)
        optimizer = kind.mine(net, backend, fused=True, **kind.options)
        loss_of(net, 0).backward()
        for p in net.parameters():
            assert p.grad is not None
            p.grad.fill_(torch.inf)
        start = copy.deepcopy(net)
        optimizer.grad_scale = None
        optimizer.found_inf = torch.tensor(flag, device=device_of(backend))
        for _ in range(2):
            versions = [p._version for p in net.parameters()]
            optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
            if device_of(backend) == "cpu":  # a GPU says later that there was nothing to do
                assert all(v is None for v in buffers(optimizer))
                assert versions == [p._version for p in net.parameters()]
                assert optimizer.step_count == 0
        readout = optimizer.readout()
        assert (readout.step, readout.time, optimizer.step_count) == (0, 0.0, 0)
        for law in readout.values():
            assert torch.equal(law.charge, law.initial)
            assert law.rounding.abs().max() == 0.0

    def test_a_closure_is_called_even_if_its_step_is_skipped(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, lr=0.1)
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        assert optimizer.step(lambda: 7.0) == 7.0

    def test_the_users_own_scale_is_a_factor(self, backend: str) -> None:
        """Torch's scaler multiplies its scale with a grad_scale that it finds."""
        net, other = make_net(backend), make_net(backend)
        optimizer, plain = ours(net, backend, **OPTIONS), ours(other, backend, **OPTIONS)
        optimizer.grad_scale = torch.tensor(4.0, device=device_of(backend))  # type: ignore[attr-defined]
        scaler = scaler_for(backend)
        scaler.scale(4.0 * loss_of(net, 0)).backward()
        scaler.step(optimizer)
        loss_of(other, 0).backward()
        plain.step()
        assert_same(net, optimizer, other, plain, tolerance=0.0)
        assert not hasattr(optimizer, "grad_scale")

    def test_a_scaler_that_is_switched_off(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, plain = ours(net, backend, **OPTIONS), ours(other, backend, **OPTIONS)
        train_scaled(net, optimizer, scaler_for(backend, enabled=False), 3)
        train_scaled(other, plain, scaler_for(backend, enabled=False), 3)
        assert_same(net, optimizer, other, plain, tolerance=0.0)

    def test_no_gradient_at_all(self, backend: str) -> None:
        net = make_net(backend)
        optimizer = ours(net, backend, **OPTIONS)
        scaler = scaler_for(backend)
        scaler.scale(loss_of(net, 0))
        scaler.step(optimizer)
        assert all(law.rounding.abs().max() == 0.0 for law in optimizer.readout().values())

    @each(KINDS)
    def test_two_optimizers_one_scaler(self, kind: Kind, backend: str) -> None:
        """Either may overflow by itself."""
        nets = [make_net(backend) for _ in range(2)]
        optimizers = [kind.mine(net, backend, fused=True, **kind.options) for net in nets]
        scaler = scaler_for(backend)
        for step in range(4):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                scaler.scale(loss_of(net, step)).backward()
            if step == 2:
                next(nets[1].parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert [optimizer.readout().step for optimizer in optimizers] == [4, 3]
        for optimizer in optimizers:
            assert_identities(optimizer, 1e-12)

    @each(KINDS)
    def test_a_checkpoint_between_a_skipped_step_and_the_first(self, kind: Kind, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        optimizer, peer = kind.mine(net, backend, fused=True, **kind.options), kind.torchs(other, **kind.options)
        train_scaled(net, optimizer, scaler_for(backend), 1, {0})
        loaded = kind.mine(net, backend, fused=True, **kind.options)
        loaded.load_state_dict(optimizer.state_dict())
        train_scaled(net, loaded, scaler_for(backend), 3)
        train_scaled(other, peer, scaler_for(backend), 3)
        assert_same(net, loaded, other, peer)

    def test_a_scale_that_is_no_power_of_two(self, backend: str) -> None:
        net, other = make_net(backend, torch.float32), make_net(backend, torch.float32)
        optimizer, peer = ours(net, backend, **OPTIONS), theirs(other, **OPTIONS)
        train_scaled(net, optimizer, scaler_for(backend, init_scale=1000.0), 5)
        train_scaled(other, peer, scaler_for(backend, init_scale=1000.0), 5)
        assert_same(net, optimizer, other, peer, tolerance=1e-5)
        assert_identities(optimizer, 1e-5)


class TestOnDevice:
    """The step on a GPU, whose flags and learning rates the host does not read, with CPU tensors in its place."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def device_lr(group: Mapping[str, Any]) -> Tensor | None:
            return group["lr"] if isinstance(group["lr"], Tensor) else None

        monkeypatch.setattr(noetherperf.optim.meters.Meter, "is_host", False)
        monkeypatch.setattr(noetherperf.optim.options, "device_lr", device_lr)
        monkeypatch.setattr(noetherperf.rules.numbers, "device_lr", device_lr)

    @pytest.fixture
    def net(self) -> nn.Module:
        return make_net("reference")

    def make(self, net: nn.Module, **options: Any) -> nperf.SGD:
        return ours(net, "reference", **{**OPTIONS, **options})

    @pytest.mark.parametrize("unscale", [False, True], ids=["unscaled inside", "unscaled before"])
    @pytest.mark.parametrize("overflows", [set(), {0}, {0, 1}, {3, 4}], ids=str)
    def test_goes_torchs_way(self, net: nn.Module, overflows: set[int], unscale: bool) -> None:
        """And counts its steps where they are made: the host learns of those that were none when it reads."""
        optimizer, other = self.make(net), make_net("reference")
        peer = theirs(other, **OPTIONS)
        for model, sgd in ((net, optimizer), (other, peer)):
            train_scaled(model, sgd, scaler_for("reference"), 8, overflows, unscale=unscale)
        assert optimizer.step_count == 8
        readout = optimizer.readout()
        assert optimizer.step_count == readout.step == 8 - len(overflows)
        assert readout.time == pytest.approx(0.05 * readout.step)
        assert_identities(optimizer, 1e-12)
        assert_same(net, optimizer, other, peer)

    def test_nothing_but_overflows(self, net: nn.Module) -> None:
        """Buffers are made, for the host does not know better, and stay empty."""
        start = copy.deepcopy(net)
        optimizer = self.make(net)
        train_scaled(net, optimizer, scaler_for("reference"), 3, {0, 1, 2})
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        assert all(v is not None and not v.any() for v in buffers(optimizer))
        assert optimizer.readout().step == 0

    @pytest.mark.parametrize("event", ["state_dict", "deepcopy", "new group", "to torch"])
    def test_an_overflow_before_anything_else(self, net: nn.Module, event: str) -> None:
        """The first step stays the first, whatever happens after one that was skipped."""
        optimizer, other = self.make(net), make_net("reference")
        peer = theirs(other, **OPTIONS)
        train_scaled(net, optimizer, scaler_for("reference"), 1, {0})
        going_on: torch.optim.Optimizer = optimizer
        if event == "deepcopy":
            net, going_on = copy.deepcopy((net, optimizer))
        elif event == "new group":
            optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
        else:
            going_on = self.make(net) if event == "state_dict" else theirs(net, **OPTIONS)
            going_on.load_state_dict(optimizer.state_dict())
        for model, sgd in ((net, going_on), (other, peer)):
            train_scaled(model, sgd, scaler_for("reference"), 3)
        assert all((p - q).abs().max() <= 1e-13 for p, q in zip(net.parameters(), other.parameters(), strict=True))
        if isinstance(going_on, nperf.SGD):
            assert_identities(going_on, 1e-12)
            assert not any("outside" in law.reason for law in going_on.readout().values())

    def test_a_learning_rate_is_not_read(self, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        lr = torch.tensor(0.1, dtype=torch.float64)
        other = make_net("reference")
        optimizer, plain = self.make(net, lr=lr), self.make(other, lr=0.1)
        seen = []
        engine = optimizer._prepare()[0].engine
        prepare = engine.prepare

        def watched(grads: Any, buffers: Any, options: Any, ages: Any, on_device: OnDevice) -> list[Call]:
            seen.append((options[0].lr, on_device.lrs[0]))
            return prepare(grads, buffers, options, ages, on_device)

        monkeypatch.setattr(engine, "prepare", watched)
        train(net, optimizer, range(3))
        train(other, plain, range(3))
        assert len(seen) == 3
        assert all(isnan(on_host) and on_device is lr for on_host, on_device in seen)
        assert_same(net, optimizer, other, plain, tolerance=0.0)
        assert_same_readout(optimizer.readout(), plain.readout())

    def test_groups_are_alike_if_they_share_their_tensor(self, net: nn.Module) -> None:
        named = list(net.named_parameters())
        shared, own = torch.tensor(0.1), torch.tensor(0.1)
        for lr, closed in ((shared, True), (own, False)):
            groups = [{"params": named[:1], "lr": shared}, {"params": named[1:], "lr": lr}]
            optimizer = nperf.SGD(groups, symmetries=SYMMETRIES, backend="reference")
            train(net, optimizer, range(2))
            law = optimizer.readout()["fc1->fc2"]
            assert law.closed == closed
            words = r"in step 1 .* had different lr \(the tensor 0x\w+ on cpu and the tensor 0x\w+ on cpu\)"
            assert closed or re.fullmatch(words, law.reason)
            assert_identities(optimizer, 1e-6)

    def test_a_recorder_writes_true_steps(self, net: nn.Module, tmp_path: Path) -> None:
        optimizer = self.make(net)
        with nperf.Recorder(optimizer, tmp_path / "a.zarr", every=2):
            train_scaled(net, optimizer, scaler_for("reference"), 12, {0, 1, 5, 8})
        record = nperf.open_record(tmp_path / "a.zarr")
        assert record.steps.tolist() == [0, 2, 4, 6, 8]
        assert record.times.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_goes_torchs_way(self, backend: str, dtype: torch.dtype) -> None:
        """Forward passes in 16 bits, parameters and gradients in 32: the laws see no difference."""
        net, other = make_net(backend, torch.float32), make_net(backend, torch.float32)
        optimizer, peer = ours(net, backend, **OPTIONS), theirs(other, **OPTIONS)
        for model, sgd in ((net, optimizer), (other, peer)):
            scaler = scaler_for(backend)
            for step in range(6):
                sgd.zero_grad()
                with torch.autocast(device_of(backend), dtype):
                    loss = loss_of(model, step)
                scaler.scale(loss).backward()
                scaler.step(sgd)
                scaler.update()
        # rounding decides some bits of a forward pass in 16 bits otherwise where parameters differ in their last one
        assert_same(net, optimizer, other, peer, tolerance=1e-2)
        assert optimizer.readout().step == 6
        assert_identities(optimizer, 1e-5)


def one_parameter(
    backend: str, values: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, nperf.SGD, Callable[[], nperf.ChargeReadout]]:
    p = values.to(device_of(backend), dtype).requires_grad_()
    optimizer = nperf.SGD([("p", p)], symmetries=[Norm("p", [Part("p", None)])], backend=backend, fused=True, **options)
    return p, optimizer, lambda: optimizer.readout()["p"]


class TestSixteenBits:
    DTYPES = (torch.bfloat16, torch.float16)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_charges_are_of_the_stored_values(self, backend: str, dtype: torch.dtype) -> None:
        p, optimizer, law = one_parameter(backend, torch.randn(1000), dtype, lr=0.01, momentum=0.9)
        for _ in range(3):
            p.grad = torch.randn(1000).to(p)
            optimizer.step()
        off = max(1e-12, sum_eps(backend, dtype))
        assert law().charge.item() == pytest.approx(p.detach().double().square().sum().item(), rel=off)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rounding_is_what_storing_lost(self, backend: str, dtype: torch.dtype) -> None:
        """After one step without momentum: |θ as stored|² − |θ as computed|², in float64."""
        p, optimizer, law = one_parameter(backend, torch.randn(1000), dtype, lr=0.01)
        before = p.detach().double()
        p.grad = torch.randn(1000).to(p)
        optimizer.step()
        exact = before - 0.01 * p.grad.double()
        lost = (p.detach().double().square() - exact.square()).sum().item()
        assert abs(lost) > 1e-3
        off = 1e-4 + sum_eps(backend, dtype) * law().charge.item()  # the arithmetic of the step is in float32
        assert law().rounding.item() == pytest.approx(lost, abs=off)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_updates_too_small_to_store_are_lost_entirely(self, backend: str, dtype: torch.dtype) -> None:
        """What is stored never moves, and the law says where it would have gone."""
        p, optimizer, law = one_parameter(backend, torch.ones(100), dtype, lr=2.0**-14)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert (p == 1).all()
        # Each step starts from the stored 1 and moves it to (1 − η); the budget adds up the 64 moves.
        eta = 2.0**-14
        assert law().discrete.budget.item() == pytest.approx(100 * (1 - 64 * (2 * eta - eta * eta)), rel=1e-12)
        assert law().rounding.item() == pytest.approx(100 * 64 * (2 * eta - eta * eta), rel=1e-9)

    def test_float32_loses_a_thousand_times_less(self, backend: str) -> None:
        lost = {}
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            torch.manual_seed(0)
            p, optimizer, law = one_parameter(backend, torch.randn(1000), dtype, lr=0.01, momentum=0.9)
            for _ in range(20):
                p.grad = torch.randn(1000).to(p)
                optimizer.step()
            lost[dtype] = (law().rounding.abs() / law().charge).item()
        assert min(lost[torch.bfloat16], lost[torch.float16]) > 1e-4
        assert lost[torch.float32] < 1e-3 * min(lost[torch.bfloat16], lost[torch.float16])
        assert lost[torch.float64] < 1e-13

    def test_small_gradients_survive_a_scaler(self, backend: str) -> None:
        """1e-8 is zero in float16; scaled it is not, and the step divides in float32."""
        p, optimizer, law = one_parameter(backend, torch.ones(8), torch.float16, lr=2.0**20)
        scale = 2.0**16
        p.grad = torch.full_like(p, 1e-8 * scale)
        optimizer.grad_scale = torch.tensor(scale, device=p.device)  # type: ignore[attr-defined]
        gradient = float(p.grad[0]) / scale
        assert torch.tensor(gradient, dtype=torch.float64).half() == 0
        optimizer.step()
        assert p[0].item() == pytest.approx(1 - 2.0**20 * gradient, rel=1e-3)
        assert law().defect.item() == pytest.approx(8 * gradient, rel=1e-6)
        assert law().moments["sq_g"].item() == pytest.approx(8 * gradient**2, rel=1e-6)
        assert (p.grad == 0).all()  # as torch's fused step leaves it: divided, in its own dtype

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_net_of_sixteen_bits_with_a_scaler(self, backend: str, dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16 and device_of(backend) == "cuda":
            pytest.skip("torch's scaler takes no bfloat16 gradients on CUDA")
        net = make_net(backend, dtype)
        optimizer = ours(net, backend, **OPTIONS)
        train_scaled(net, optimizer, scaler_for(backend, init_scale=64.0), 8, {0, 5})
        readout = optimizer.readout()
        assert readout.step == 6
        for p in net.parameters():
            assert p.dtype == dtype
            assert p.isfinite().all()
        assert_identities(optimizer, 0.05)
        assert max(law.rounding.abs().max().item() for law in readout.values()) > 1e-6


@pytest.mark.slow
def test_the_document_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs docs/precision.md; other machines round other bits, so numbers may differ by a factor of two."""
    text = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
    code, printed = (re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0] for language in ("python", "text"))
    exec(code, {})
    ours = capsys.readouterr().out
    number = re.compile(r"[+-]?\d\.?\d*e[+-]\d+")
    assert number.sub("", ours) == number.sub("", printed)
    for mine, told in zip(*(map(float, number.findall(table)) for table in (ours, printed)), strict=True):
        noise = max(abs(mine), abs(told)) < 1e-11  # rounding of float64
        assert noise or 0.5 <= mine / told <= 2.0, (mine, told)


@torch.inference_mode()
def made_in_inference_mode(x: Tensor) -> Tensor:
    return x.clone()


@each(KINDS)
@pytest.mark.parametrize(
    ("odd", "error"),
    [(lambda x: x[0, 0].expand(x.shape), "share memory"), (made_in_inference_mode, "made in inference mode")],
    ids=["expanded", "inference"],
)
def test_gradients_that_cannot_be_divided_are_refused(
    kind: Kind, backend: str, odd: Callable[[Tensor], Tensor], error: str
) -> None:
    net = make_net(backend)
    optimizer = kind.mine(net, backend, fused=True)
    train(net, optimizer, range(3))
    weight = dict(net.named_parameters())["fc1.weight"]
    assert weight.grad is not None
    weight.grad = odd(weight.grad)
    before = copy.deepcopy((list(net.parameters()), [x for x in buffers(optimizer) if x is not None]))
    gradient = weight.grad.clone()
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device_of(backend)) for x in (8.0, 0.0))
    with pytest.raises(RuntimeError, match=rf"fc1\.weight: .*{error}.*clone it before step"):
        optimizer.step()
    after = list(net.parameters()), [x for x in buffers(optimizer) if x is not None]
    for x, y in zip([*before[0], *before[1]], [*after[0], *after[1]], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(weight.grad, gradient)
    assert optimizer.step_count == 3
