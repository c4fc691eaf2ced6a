"""Unusual tensors: stepped as torch.optim.SGD would step them, or refused by name before anything changes."""

import copy
import io
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import BACKENDS, assert_identities, assert_same_readout, device_of, loss_of, make_net, ours, theirs, train

import noetherperf as nperf
from noetherperf import Norm, Part
from noetherperf.measure.terms import _groups

two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}


def ones(backend: str, *shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, device=device_of(backend), **options)


def wrapper(*shape: int) -> nn.Parameter:
    """A parameter of a subclass that wraps two plain tensors, and has no memory of its own."""
    return nn.Parameter(two_tensor.TwoTensor(torch.ones(shape), 2 * torch.ones(shape)))


class TestLazyGradients:
    """What torch does only when an operation of its own reads a tensor."""

    def test_a_negated_view_that_autograd_makes(self, backend: str) -> None:
        """.imag of a conjugate is a negated view, and a parameter of one element keeps it as its gradient."""
        results = []
        for make in (torch.optim.SGD, nperf.SGD):
            imaginary = nn.Parameter(ones(backend, 1) / 2)
            more: dict[str, Any] = (
                {} if make is torch.optim.SGD else {"backend": backend, "symmetries": [Norm("n", [Part("p", 0)])]}
            )
            optimizer = make([("p", imaginary)], **OPTIONS, **more)
            for _ in range(3):
                optimizer.zero_grad()
                z = torch.complex(ones(backend, 1), imaginary)
                (z.conj() * torch.tensor([2.0 + 3.0j], device=z.device)).real.sum().backward()
                assert imaginary.grad is not None
                assert imaginary.grad.is_neg()
                optimizer.step()
            results.append(imaginary.detach())
        torch.testing.assert_close(results[0], results[1])
        assert isinstance(optimizer, nperf.SGD)
        assert_identities(optimizer, 1e-6)
        assert optimizer.readout()["n"].moments["sum_g"].numel() == 1

    @pytest.mark.parametrize("scale", [None, 4.0])
    @pytest.mark.parametrize("n_dims", [0, 2, 6])
    @pytest.mark.parametrize("kind", ["negated", "zeros"])
    def test_among_others(self, backend: str, kind: str, n_dims: int, scale: float | None) -> None:
        """And with a scaler they are left divided, as others are."""
        p, q, other = (nn.Parameter(ones(backend, *[2] * n_dims)) for _ in "pqo")
        symmetries = [Norm(name, [Part(name, None)]) for name in "po"]
        mine = nperf.SGD([("p", p), ("o", other)], fused=True, symmetries=symmetries, backend=backend, **OPTIONS)
        torchs = torch.optim.SGD([q], foreach=False, **OPTIONS)
        for _ in range(3):
            lazy = torch._neg_view(3 * torch.ones_like(q)) if kind == "negated" else None
            p.grad = torch._efficientzerotensor(p.shape, device=p.device) if lazy is None else lazy
            other.grad = 5 * torch.ones_like(other)
            q.grad = (torch.zeros_like(q) if lazy is None else lazy.resolve_neg()) / (scale or 1.0)
            if scale is not None:
                mine.grad_scale = torch.tensor(scale, device=p.device)  # type: ignore[attr-defined]
                mine.found_inf = torch.tensor(0.0, device=p.device)  # type: ignore[attr-defined]
            mine.step()
            torchs.step()
            assert torch.equal(p.grad.clone().resolve_neg(), q.grad)
            assert torch.equal(other.grad, torch.full_like(other, 5 / (scale or 1.0)))
        torch.testing.assert_close(p, q)
        expected = -3.0 * 2**n_dims / (scale or 1.0) if kind == "negated" else 0.0
        assert mine.readout()["p"].moments["sum_g"].item() == pytest.approx(expected)
        assert_identities(mine, 1e-6)

    def test_negated_parameters_are_refused(self, backend: str) -> None:
        p = nn.Parameter((ones(backend, 3) + 2j).conj().imag)
        with pytest.raises(ValueError, match=r"phase .*negates.*resolve_neg"):
            nperf.SGD([("phase", p)], backend=backend)
        nperf.SGD([("phase", nn.Parameter(p.detach().resolve_neg()))], backend=backend)

    def test_a_parameter_that_becomes_one(self, backend: str) -> None:
        """Refused, or stepped by torch's own operations: never the wrong way."""
        p = nn.Parameter(ones(backend, 3))
        optimizer = nperf.SGD([("p", p)], lr=0.5, backend=backend)
        p.data = torch._neg_view(p.data)  # is −1
        p.grad = torch.ones_like(p)
        if backend == "reference":
            optimizer.step()
            assert (p == -1.5).all()
        else:
            with pytest.raises(RuntimeError, match=r"p .*negates.*memory of its own"):
                optimizer.step()
            assert (p == -1).all()

    def test_a_buffer_that_is_one(self, backend: str) -> None:
        p = nn.Parameter(ones(backend, 3))
        optimizer = nperf.SGD([("p", p)], lr=0.5, momentum=0.5, backend=backend)
        optimizer.state[p]["momentum_buffer"] = torch._neg_view(torch.ones_like(p))
        p.grad = torch.zeros_like(p)
        if backend == "reference":
            optimizer.step()
            assert (p == 1.25).all()
        else:
            with pytest.raises(RuntimeError, match=r"p: its momentum_buffer .*negates"):
                optimizer.step()
            assert (p == 1).all()

    @pytest.mark.parametrize("what", ["parameter", "gradient"])
    def test_emptied_storages(self, what: str) -> None:
        if "cpu" not in BACKENDS:
            pytest.skip("needs the compiled CPU engine")
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = nperf.SGD([("q", q), ("p", p)], backend="cpu")
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        (p if what == "parameter" else p.grad).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"^p\b.*storage was emptied"):
            optimizer.step()
        assert (q == 1).all()


class TestSubclasses:
    """Tensor subclasses that answer torch's operations themselves."""

    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=str)
    def test_are_stepped_beside_others(self, options: dict[str, Any]) -> None:
        p, q, r = wrapper(4, 4), wrapper(4, 4), nn.Parameter(torch.ones(4, dtype=torch.float64))
        mine = nperf.SGD([("r", r), ("p", p)], lr=0.1, symmetries=[Norm("r", [Part("r", 0)])], **options)
        torchs = torch.optim.SGD([q], lr=0.1, foreach=False, **options)
        compiled = "cpu" if "cpu" in BACKENDS else "reference"
        assert mine.backend == "+".join(dict.fromkeys([compiled, "reference"]))
        for step in range(4):
            for x in (p, q, r):
                x.grad = None
                (x * x).sum().backward()
            mine.step()
            torchs.step()
            if step == 2:
                mine.load_state_dict(copy.deepcopy(mine.state_dict()))
        for name in "ab":
            torch.testing.assert_close(getattr(p, name), getattr(q, name))
        assert mine.step_count == 4
        assert_identities(mine)

    def test_a_compiled_backend_refuses_them(self, backend: str) -> None:
        def make() -> nperf.SGD:
            return nperf.SGD([("quantized", wrapper(2, 2))], backend=backend)

        if backend == "reference":
            assert make().backend == "reference"
        elif device_of(backend) == "cpu":
            with pytest.raises(TypeError, match=r"quantized is a TwoTensor.*backend=\"auto\""):
                make()

    def test_cannot_be_measured(self) -> None:
        named = [("p", wrapper(2, 2)), ("q", nn.Parameter(torch.ones(2)))]
        with pytest.raises(TypeError, match=r"symmetry 'norm': p is a TwoTensor"):
            nperf.SGD(named, symmetries=[Norm("norm", [Part("q", 0), Part("p", 0)])])

    def test_as_the_gradient_of_a_plain_parameter(self, backend: str) -> None:
        p = nn.Parameter(ones(backend, 2))
        optimizer = nperf.SGD([("p", p)], backend=backend)
        p.grad = two_tensor.TwoTensor(torch.ones_like(p), torch.ones_like(p))
        if backend != "reference":
            with pytest.raises(TypeError, match=r"p: the gradient is a TwoTensor"):
                optimizer.step()
            assert (p == 1).all()

    def test_subclasses_with_memory_are_compiled(self, backend: str) -> None:
        class Named(nn.Parameter):
            pass

        p = Named(ones(backend, 3))
        optimizer = nperf.SGD([("p", p)], lr=0.5, symmetries=[Norm("p", [Part("p", 0)])], backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.backend == backend
        assert (p == 0.5).all()

    @pytest.mark.parametrize("inside", [True, False])
    def test_fake_tensors_step(self, inside: bool) -> None:
        """To see what training takes, without taking it."""
        mode = FakeTensorMode()
        with mode:
            net = nn.Linear(4, 4)
            optimizer = nperf.SGD(net.named_parameters(), **OPTIONS)
            net(torch.ones(2, 4)).sum().backward()
            if inside:
                optimizer.step()
            with pytest.raises(TypeError, match="weight is a FakeTensor"):
                nperf.SGD(net.named_parameters(), symmetries=nperf.layers(net))
        if not inside:
            optimizer.step()
        assert optimizer.step_count == 1
        assert optimizer.state[net.weight]["momentum_buffer"].shape == (4, 4)

    def test_meta_tensors_step_and_are_not_measured(self) -> None:
        net = nn.Linear(4, 4, device="meta")
        for symmetries in ((), nperf.layers(net)):
            optimizer = nperf.SGD(net.named_parameters(), symmetries=symmetries)
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            if symmetries:
                for call in (optimizer.step, optimizer.readout):
                    with pytest.raises(RuntimeError, match=r"weight is on the meta device.*to_empty"):
                        call()
            else:
                optimizer.step()


class TestGradientsOfAnotherDtype:
    """Parameter.grad_dtype: gradients in float32 of parameters in 16 bits."""

    @staticmethod
    def make(make: Callable[..., Any], dtype: torch.dtype, declared: Any) -> tuple[Any, Any]:
        p = nn.Parameter(torch.linspace(1, 2, 8).to(dtype))
        p.grad_dtype = declared
        optimizer = make([("p", p), ("q", nn.Parameter(torch.ones(3)))])
        return p, optimizer

    @pytest.mark.parametrize("decay", [0.0, 0.05])
    @pytest.mark.parametrize("resumed", [None, "theirs", "ours"])
    @pytest.mark.parametrize("declared", ["itself", None])
    @pytest.mark.parametrize(
        ("dtype", "grad"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float64),
            (torch.float32, torch.bfloat16),
        ],
        ids=str,
    )
    def test_goes_torchs_way(
        self, dtype: torch.dtype, grad: torch.dtype, declared: str | None, resumed: str | None, decay: float
    ) -> None:
        allowed, options = grad if declared else None, {**OPTIONS, "weight_decay": decay}
        p, mine = self.make(
            lambda named: nperf.SGD(named, symmetries=[Norm("p", [Part("p", 0)])], **options), dtype, allowed
        )
        q, torchs = self.make(lambda named: torch.optim.SGD(named, foreach=False, **options), dtype, allowed)
        assert "reference" in mine.backend
        for step in range(6):
            if step == 3 and resumed:
                state = copy.deepcopy((torchs if resumed == "theirs" else mine).state_dict())
                for optimizer in (mine, torchs):
                    optimizer.load_state_dict(copy.deepcopy(state))
            for x in (p, q):
                x.grad = torch.linspace(-1, 1 + step, 8).to(grad)
            mine.step()
            torchs.step()
        assert mine.state[p]["momentum_buffer"].dtype == torchs.state[q]["momentum_buffer"].dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(grad).eps)
        torch.testing.assert_close(p, q, rtol=6 * eps, atol=6 * eps)
        law = mine.readout()["p"]
        assert law.charge == pytest.approx(p.detach().double().square().numpy(), abs=1e-12)
        assert (law.rounding.abs() <= 12 * eps * law.charge.abs().clamp(min=1)).all()

    def test_may_be_declared_until_the_first_step(self) -> None:
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = nperf.SGD([("p", p)], lr=0.5)
        p.grad_dtype = torch.float32
        p.grad = torch.ones(4)
        optimizer.step()
        assert (p == 0.5).all()

    @pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled CPU engine")
    def test_later_or_for_a_compiled_backend_it_is_refused(self) -> None:
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = nperf.SGD([("p", p)], lr=0.5)
        p.grad = torch.zeros(4, dtype=torch.bfloat16)
        optimizer.step()
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = torch.ones(4)
        with pytest.raises(TypeError, match=r"p: the gradient .*grad_dtype before the first step"):
            optimizer.step()
        assert (p == 1).all()
        with pytest.raises(TypeError, match=r"p is torch.bfloat16 and its grad_dtype.*torch.float32"):
            nperf.SGD([("p", p)], backend="cpu")


SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same": lambda x: (x, x),
    "transposed": lambda x: (x, x.t()),
    "a row": lambda x: (x, x[5]),
    "row and column": lambda x: (x[3], x[:, 6]),
    "every second and every third": lambda x: (x.view(-1)[::2], x.view(-1)[3::3]),
    "bits of another dtype": lambda x: (x[2], x[2].view(torch.float16)[6:8]),
    "two storages": lambda x: (x, torch.from_numpy(x.numpy())) if x.device.type == "cpu" else (x, x),
}
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda x: (x[:4], x[4:]),
    "columns": lambda x: (x[:, :3], x[:, 3:]),
    "interleaved": lambda x: (x.view(-1)[::2], x.view(-1)[1::2]),
    "interleaved blocks": lambda x: (x.view(4, 2, 8)[:, 0], x.view(4, 2, 8)[:, 1].t()),
    "another dtype": lambda x: (x[2], x[3].view(torch.float16)[::2]),
    "empty": lambda x: (x, x[4:4]),
}


class TestSharedMemory:
    @pytest.mark.parametrize("kind", SHARED)
    def test_of_two_parameters_is_refused(self, backend: str, kind: str) -> None:
        one, two = map(nn.Parameter, SHARED[kind](ones(backend, 8, 8)))
        with pytest.raises(ValueError, match=r"(one|two) and (one|two) share memory"):
            nperf.SGD([("before", nn.Parameter(ones(backend, 3))), ("one", one), ("two", two)], backend=backend)

    @pytest.mark.parametrize("kind", APART)
    def test_views_that_share_nothing_are_stepped(self, backend: str, kind: str) -> None:
        one, two = map(nn.Parameter, APART[kind](ones(backend, 8, 8)))
        optimizer = nperf.SGD([("one", one), ("two", two)], lr=0.5, backend=backend)
        one.grad, two.grad = torch.ones_like(one), -torch.ones_like(two)
        optimizer.step()
        assert (one == 0.5).all()
        assert (two == 1.5).all() or two.dtype != torch.float32

    @pytest.mark.parametrize(
        ("shape", "strides"), [((4, 3), (1, 0)), ((5, 3), (1, 1)), ((4, 4), (2, 1)), ((3, 3, 2), (4, 2, 4))], ids=str
    )
    def test_of_a_parameter_with_itself_is_refused(
        self, backend: str, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        p = nn.Parameter(ones(backend, 64).as_strided(shape, strides))
        with pytest.raises(ValueError, match="window: its elements share memory"):
            nperf.SGD([("window", p)], backend=backend)

    @pytest.mark.parametrize(
        ("shape", "strides"), [((2, 3), (3, 2)), ((1, 3), (0, 1)), ((2, 2, 2), (8, 1, 3))], ids=str
    )
    def test_odd_strides_that_share_nothing_are_stepped(
        self, backend: str, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        p = nn.Parameter(ones(backend, 64).as_strided(shape, strides))
        optimizer = nperf.SGD([("p", p)], lr=0.5, backend=backend)
        p.grad = torch.ones(shape, device=p.device)
        optimizer.step()
        assert (p == 0.5).all()

    def test_random_views(self) -> None:
        """Refused are those that hold an element of one number twice."""
        generator = np.random.default_rng(0)
        seen = set()
        for _ in range(300):
            base = torch.arange(120.0)
            views = []
            for _ in range(2):
                rows, columns, start = (int(x) for x in generator.integers(1, (4, 4, 12)))
                strides = [int(x) for x in generator.integers(1, 12, 2)]
                views.append(base[start:].as_strided((rows, columns), strides))
            places = [set(v.flatten().tolist()) for v in views]
            shares = (
                any(len(place) < v.numel() for place, v in zip(places, views, strict=True)) or places[0] & places[1]
            )
            seen.add(bool(shares))
            if shares:
                with pytest.raises(ValueError, match="share memory"):
                    nperf.SGD([(str(i), nn.Parameter(v)) for i, v in enumerate(views)], backend="reference")
            else:
                nperf.SGD([(str(i), nn.Parameter(v)) for i, v in enumerate(views)], backend="reference")
        assert seen == {True, False}

    def test_of_an_added_parameter_is_refused_and_nothing_changes(self, backend: str) -> None:
        p = nn.Parameter(ones(backend, 4, 4, dtype=torch.float64))
        optimizer = nperf.SGD([("p", p)], lr=0.1, symmetries=[Norm("p", [Part("p", 0)])], backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(ValueError, match="p and q share memory"):
            optimizer.add_param_group({"params": [("q", nn.Parameter(p.detach().t()))]})
        optimizer.step()
        assert (len(optimizer.param_groups), optimizer.step_count) == (1, 2)
        assert_identities(optimizer)

    def test_of_a_parameter_that_replaces_one_is_refused(self, backend: str) -> None:
        p, q = (nn.Parameter(ones(backend, 4)) for _ in "pq")
        optimizer = nperf.SGD([("p", p), ("q", q)], lr=0.1, backend=backend)
        optimizer.param_groups[0]["params"][1] = nn.Parameter(p.detach())
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="p and q share memory"):
            optimizer.step()
        assert (p == 1).all()

    @pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled CPU engine")
    def test_tied_after_the_optimizer_was_made(self) -> None:
        p, q = (nn.Parameter(torch.ones(4, 4)) for _ in "pq")
        optimizer = nperf.SGD([("p", p), ("q", q)], lr=0.1, backend="cpu")
        p.grad = torch.ones(4, 4)
        optimizer.step()
        q.data = p.data.t()
        before = p.detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match="p and q share memory"):
                optimizer.step()
        assert torch.equal(p, before)
        q.data = p.data.clone()
        optimizer.step()


def saved(optimizer: nperf.SGD) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file)
    return state


class TestInferenceMode:
    """Evaluation runs in it; what is made there must be written in later steps."""

    CALLS: ClassVar[dict[str, Callable[[nperf.SGD], object]]] = {
        "readout": lambda optimizer: optimizer.readout(),
        "reset": lambda optimizer: optimizer.reset_measurement(),
        "state_dict": lambda optimizer: optimizer.state_dict(),
        "load": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        "load what was saved": lambda optimizer: optimizer.load_state_dict(saved(optimizer)),
        "load the measurement": lambda optimizer: optimizer.load_measurement(optimizer.state_dict()["measurement"]),
        "begin": lambda optimizer: optimizer.load_measurement(None),
        "copy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    }

    @pytest.mark.parametrize("call", CALLS)
    def test_calls_are_as_outside(self, backend: str, call: str) -> None:
        readouts, nets = [], []
        for inside in (True, False):
            net = make_net(backend)
            optimizer = ours(net, backend, **OPTIONS)
            train(net, optimizer, range(2))
            with torch.inference_mode(inside):
                self.CALLS[call](optimizer)
                optimizer.readout()
            train(net, optimizer, range(2, 4))
            optimizer.load_state_dict(optimizer.state_dict())
            train(net, optimizer, range(4, 6))
            readouts.append(optimizer.readout())
            nets.append(net)
        assert_same_readout(*readouts)
        assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))

    def test_an_optimizer_made_and_stepped_there(self, backend: str) -> None:
        net, other = make_net(backend), make_net(backend)
        with torch.inference_mode():
            optimizer = ours(net, backend, **OPTIONS)
        peer = theirs(other, **OPTIONS)
        for step in range(4):
            for model in (net, other):
                model.zero_grad()
                loss_of(model, step).backward()
            with torch.inference_mode(step == 0):
                optimizer.step()
            peer.step()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert_identities(optimizer)

    def test_parameters_made_there(self, backend: str) -> None:
        """They are stepped, which torch's own operations refuse outside."""
        with torch.inference_mode():
            q = nn.Parameter(ones(backend, 3))
        optimizer = nperf.SGD([("p", nn.Parameter(ones(backend, 3))), ("q", q)], lr=0.5, backend=backend)
        for x in optimizer.param_groups[0]["params"]:
            x.grad = ones(backend, 3)
        optimizer.step()
        assert (q == 0.5).all()


class TestDefaults:
    """torch's default device and dtype are for the user's tensors."""

    @staticmethod
    def run(backend: str, path: Any) -> list[Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6, device="cpu"), nn.ReLU(), nn.Linear(6, 3, device="cpu")).float()
        for p in net.parameters():
            p.data = torch.linspace(-1, 1, p.numel(), dtype=torch.float32, device="cpu").view(p.shape)
        x = torch.linspace(-1, 2, 8, dtype=torch.float32, device="cpu").view(2, 4)
        labels = torch.tensor([0, 1], device="cpu")

        def loss() -> Tensor:
            return nn.functional.cross_entropy(net(x), labels)

        symmetries = nperf.find_symmetries(net, x)
        optimizer = nperf.SGD(net.named_parameters(), symmetries=symmetries, backend=backend, **OPTIONS)
        optimizer.load_state_dict(optimizer.state_dict())
        _groups.cache_clear()  # what a run before this one knows of parts may not help
        with nperf.Recorder(optimizer, path):
            for _ in range(3):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        reports = [str(nperf.check_constraints(net, loss, some)) for some in (symmetries, nperf.neurons(net))]
        charges = {name: law.charge.tolist() for name, law in optimizer.readout().items()}
        recorded = [nperf.open_record(path)[name].charge.to_numpy().tolist() for name in charges]
        return [list(symmetries), charges, recorded, reports, [p.tolist() for p in net.parameters()]]

    @pytest.mark.parametrize("default", ["meta", torch.float64, torch.float16], ids=str)
    def test_change_nothing(self, default: Any, tmp_path: Any) -> None:
        for backend in sorted({"reference", "cpu"} & set(BACKENDS)):
            expected = self.run(backend, tmp_path / f"{backend} plain")
            try:
                if isinstance(default, str):
                    torch.set_default_device(default)
                else:
                    torch.set_default_dtype(default)
                found = self.run(backend, tmp_path / backend)
            finally:
                torch.set_default_device(None)
                torch.set_default_dtype(torch.float32)
            assert found == expected
