"""Checkpoints: older versions, damaged ones, and those that only look damaged."""

import copy
import functools
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import version_2
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf import Norm, Part, Translation, distributed
from noetherperf.symmetry import from_json, to_json

Edit = Callable[[dict[str, Any]], object]


def trained(n_steps: int = version_2.N_STEPS) -> tuple[nn.Module, nperf.SGD]:
    net, optimizer = version_2.make()
    version_2.train(net, optimizer, range(n_steps))
    return net, optimizer


def numbers(optimizer: nperf.SGD) -> dict[str, Tensor]:
    """All numbers of a readout, and which laws are closed."""
    readout = optimizer.readout()
    found = {"step": torch.tensor(float(readout.step)), "time": torch.tensor(readout.time)}
    for name, law in readout.items():
        for field in ("charge", "initial", "defect", "rounding"):
            found[f"{name}: {field}"] = getattr(law, field)
        for kind in ("discrete", "flow"):
            for field in ("free", "forced", "defect"):
                found[f"{name}: {kind}.{field}"] = getattr(getattr(law, kind), field)
        found |= {f"{name}: {field}": moment for field, moment in law.moments.items()}
        found[f"{name}: closed"] = torch.tensor(law.closed)
    return found


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close({name: x}, {name: b[name]}, rtol=0.0, atol=tolerance, equal_nan=True)


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are the same, bit for bit, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[key]) for key, x in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@functools.cache
def numbers_after(n_steps: int) -> dict[str, Tensor]:
    return numbers(trained(n_steps)[1])


def snapshot(net: nn.Module, optimizer: nperf.SGD) -> Any:
    """All that loading may change; the tensors of the state also by being the same ones."""
    places = [(id(p), {key: id(x) for key, x in optimizer.state[p].items()}) for p in net.parameters()]
    return copy.deepcopy((places, optimizer.state_dict(), net.state_dict(), optimizer.step_count))


def refuses(load: Callable[[nperf.SGD], object], words: str) -> None:
    """Loading raises a ValueError with these words, and all is as it was; training goes on."""
    net, optimizer = trained(3)
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match=words):
        load(optimizer)
    assert same(before, snapshot(net, optimizer))
    version_2.train(net, optimizer, range(3, 5))
    assert same(numbers(optimizer), numbers_after(5))


def old_measurement() -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(version_2.PATH.read_text())
    shapes = [(-1, len(measured["tensors"][0][0][0])), (4, -1), (8, -1), (3, 2, 2, 2, 2), (-1,)]
    measured["tensors"] = [
        [torch.tensor(x, dtype=torch.float64).view(shape) for x, shape in zip(tensors, shapes, strict=True)]
        for tensors in measured["tensors"]
    ]
    return measured


class TestVersions:
    @pytest.mark.parametrize("extra", [{}, {"id": "abc", "names": ["fc1.weight", "fc1.bias", "fc2.weight"]}])
    def test_version_2_goes_on(self, extra: dict[str, Any]) -> None:
        """Its laws kept forced and defect; now they keep the budget. The readout is the one of that run."""
        net, optimizer = trained()
        expected = numbers(optimizer)
        measured = old_measurement() | extra
        if extra:
            measured["openness"]["changes"] = {}
        optimizer.reset_measurement()
        optimizer.load_measurement(measured)
        assert optimizer.step_count == version_2.N_STEPS
        assert_close(numbers(optimizer), expected, 1e-14)
        assert not extra or optimizer.measurement_id == "abc"
        other, unbroken = trained()
        for sgd, model in ((optimizer, net), (unbroken, other)):
            version_2.train(model, sgd, range(version_2.N_STEPS, 9))
        assert_close(numbers(optimizer), numbers(unbroken), 1e-14)

    def test_version_2_in_a_state_dict(self) -> None:
        _, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        state["measurement"] = old_measurement()
        loading = version_2.make()[1]
        loading.load_state_dict(state)
        assert_close(numbers(loading), numbers(optimizer), 1e-14)
        assert loading.state_dict()["measurement"]["version"] == 3

    def test_version_2_between_ranks(self) -> None:
        _, optimizer = trained()
        expected = numbers(optimizer)
        measured = old_measurement()
        packed = {"tensors": measured.pop("tensors"), "about": json.dumps(measured)}
        optimizer.reset_measurement()
        distributed.set_measurement_state_dict(optimizer, packed)
        assert_close(numbers(optimizer), expected, 1e-14)

    @pytest.mark.parametrize("version", [1, 0, -3, 4, pytest.param(10**5000, id="huge")])
    def test_others_are_refused_with_the_way_out(self, version: int) -> None:
        def load(optimizer: nperf.SGD) -> None:
            state = optimizer.state_dict()
            state["measurement"]["version"] = version
            optimizer.load_state_dict(state)

        refuses(load, r'has version .*del state_dict\["measurement"\]')

    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (lambda old: old["tensors"][0].pop(), r'measurement\["tensors"\]\[0\] must be a list of 5'),
            (lambda old: old["tensors"][0].reverse(), r'\[0\]\["moments"\] must have shape'),
            (lambda old: old["tensors"][0].__setitem__(2, old["tensors"][0][2][:7]), r'\["norm"\] must have shape'),
            (lambda old: old["tensors"].pop(), r'\["tensors"\] is of 0 device'),
            (lambda old: old["tensors"].__setitem__(0, {}), r'measurement\["tensors"\]\[0\] must be a list of 5'),
            (lambda old: old["tensors"][0][3].fill_(math.nan), r'\["propagators"\] is NaN for the'),
            (lambda old: old.update(names=["fc1.weight"]), r'\["names"\] has 1 names'),
            (lambda old: old.update(names=["fc1.bias", "fc1.weight", "fc2.weight"]), "in another order"),
        ],
    )
    def test_a_damaged_version_2_is_refused(self, edit: Edit, words: str) -> None:
        measured = old_measurement()
        edit(measured)
        refuses(lambda optimizer: optimizer.load_measurement(measured), words)

    def test_an_optimizer_pickled_by_another_version_is_refused(self) -> None:
        _, optimizer = trained()
        state = optimizer.__getstate__()
        assert numbers(pickle.loads(pickle.dumps(optimizer))).keys() == numbers(optimizer).keys()
        del state["_measured"]["version"]
        with pytest.raises(ValueError, match="another version pickled it"):
            nperf.SGD.__new__(nperf.SGD).__setstate__(state)


class TestNamedTensors:
    def test_names_and_shapes(self) -> None:
        """Five tensors a device, all float64, whose shapes do not change from step to step."""
        shapes = []
        for n_steps in (0, 3):
            (tensors,) = trained(n_steps)[1].state_dict()["measurement"]["tensors"]
            assert list(tensors) == ["moments", "translation", "norm", "propagators", "clock"]
            assert all(x.dtype == torch.float64 for x in tensors.values())
            shapes.append({name: tuple(x.shape) for name, x in tensors.items()})
        assert shapes[0] == shapes[1]
        assert tensors["clock"][0] == 3

    def test_what_is_loaded_is_copied(self) -> None:
        _, optimizer = trained()
        state = optimizer.state_dict()
        expected = numbers(optimizer)
        loading = version_2.make()[1]
        loading.load_state_dict(state)
        for x in state["measurement"]["tensors"][0].values():
            x.fill_(math.nan)
        assert same(numbers(loading), expected)

    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (lambda packed: packed.pop("about"), "'about' is missing"),
            (lambda packed: packed.pop("tensors"), "'tensors' is missing"),
            (lambda packed: packed.update(about=b"{}"), "'about' must be JSON text"),
            (lambda packed: packed.update(about="[]"), "'about' must be a JSON object"),
            (lambda packed: packed.update(about=packed["about"][:-1]), r"Expecting|delimiter"),
            (lambda packed: packed.update(about="[" * 100_000), "nested too deeply"),
            (lambda packed: packed.update(about='{"began": true, "began": false}'), "'began' is there twice"),
            (lambda packed: packed.update(tensors={}), r'\["tensors"\] must be of type list'),
        ],
    )
    def test_damaged_between_ranks(self, edit: Edit, words: str) -> None:
        packed = distributed.get_measurement_state_dict(trained()[1])
        edit(packed)
        refuses(lambda optimizer: distributed.MeasurementState(optimizer).load_state_dict(packed), words)


def values(*those: Any) -> tuple[Any, ...]:
    return those


def digests(measured: dict[str, Any], last: Any) -> list[list[Any]]:
    """Those of a sharded model, with a last number."""
    n_tensors, n_groups = len(measured["names"]), len(measured["tensors"][0]["clock"]) - 1
    return [[2], [7] * n_groups, [0] * n_tensors, [*[0] * (n_tensors - 1), last]]


def put(*path_and_value: Any) -> Edit:
    """Put a value at a path of keys."""
    *path, last, value = path_and_value

    def edit(data: Any) -> None:
        for key in path:
            data = data[key]
        data[last] = value

    return edit


def tensor(name: str, value: Any) -> Edit:
    """Put something else in a tensor's place; a function is given the tensor."""

    def edit(measured: dict[str, Any]) -> None:
        tensors = measured["tensors"][0]
        tensors[name] = value(tensors[name]) if callable(value) else value

    return edit


def fill(name: str, index: Any, value: float) -> Edit:
    return lambda measured: measured["tensors"][0][name].__setitem__(index, value)


MEASUREMENTS: list[tuple[Edit, str]] = [
    *((lambda m, f=f: m.pop(f), rf'\["{f}"\] is missing') for f in ("version", "id", "names", "symmetries", "began")),
    *((lambda m, f=f: m.pop(f), rf'\["{f}"\] is missing') for f in ("openness", "tensors")),
    *((put("version", v), r'\["version"\] must be of type int') for v in values("3", 3.0, True, None, [3])),
    *((put("id", v), r'\["id"\] must be of type str') for v in values(7, None, b"x")),
    *((put("began", v), r'\["began"\] must be of type bool') for v in values(1, "yes", None)),
    (lambda m: m.update(began=False), r'\["began"\] is False, but its clock'),
    *((put("symmetries", v), r'\["symmetries"\] must be of type str') for v in values(None, [], {}, b"[]")),
    *(
        (put("symmetries", v), r'\["symmetries"\] cannot be read')
        for v in values("", "{", "[]", "{}", "null", "[" * 100_000, '{"version": 1, "symmetries": [[]]}')
    ),
    (lambda m: m.update(symmetries=m["symmetries"].replace('"scale"', '"warp"').replace("rescale", "w")), "cannot be"),
    (lambda m: m.update(symmetries=m["symmetries"].replace('"axis": 1', '"axis": 0')), "with other symmetries"),
    *((put("names", v), r'\["names"\] must be') for v in values(None, "abc", {}, [1, 2, 3], [["a"]] * 3)),
    *((put("names", v), r'\["names"\] has \d names') for v in values([], ["a"], [None] * 4)),
    *((put("openness", v), r'\["openness"\] must be of type dict') for v in values(None, [], "x")),
    *(
        (lambda m, f=f: m["openness"].pop(f), rf'\["openness"\] has no \'{f}\'')
        for f in ("classes", "reasons", "changes")
    ),
    *(
        (put("openness", f, v), rf'\["openness"\] has \'{f}\' of type')
        for f in ("classes", "reasons", "changes")
        for v in values(None, 3, "x", (0, 0, 1))
    ),
    *(
        (put("openness", "digests", v), r"has 'digests' that are not lists of 1, \d, \d, \d numbers")
        for v in values(3, [], [[0], [], [], []], [0, 0, 0, 0])
    ),
    (lambda m: m["openness"].update(digests=digests(m, 2**32)), "has 'digests' that are not all integers of 32 bits"),
    (lambda m: m["openness"].update(digests=digests(m, 0.0)), "has 'digests' that are not all integers of 32 bits"),
    *((put("openness", "classes", v), r'\["openness"\] has \d \'classes\'') for v in values([], [0, 0], [0, 0, 0, 1])),
    *(
        (put("openness", "classes", v), r"has 'classes' that are not numbered")
        for v in values([0, 0, -1], [1, 1, 1], [0, 0, 2], ["0", 0, 1], [0.0, 0, 1], [False, 0, 1], [None] * 3)
    ),
    (lambda m: m["openness"].update(classes=[0, 0, 0]), "in which the law of 'fc1->fc2' is closed, and a reason"),
    (lambda m: m["openness"].update(classes=[0, 1, 2], reasons={}), "is open, and no reason"),
    (lambda m: m["openness"]["reasons"].pop("fc1->fc2"), "the law of 'fc1->fc2' is open, and no reason"),
    (lambda m: m["openness"]["reasons"].pop("fc1"), "the law of 'fc1' is open, and no reason"),
    *((put("openness", "reasons", "fc1", v), "that are no text") for v in values(3, "", None)),
    (lambda m: m["openness"]["reasons"].update({"fc9": "because"}), "which is none of the symmetries"),
    (lambda m: m["openness"]["changes"].update({3: "because"}), "which is none of the symmetries"),
    (lambda m: m["openness"]["changes"].update({"fc1": None}), "that are no text"),
    *((put("tensors", v), r'\["tensors"\] must be of type list') for v in values(None, {}, torch.ones(5))),
    (lambda m: m["tensors"].clear(), r"is of 0 device\(s\)"),
    (lambda m: m["tensors"].append(m["tensors"][0]), r"is of 2 device\(s\)"),
    *((put("tensors", [v]), r'\["tensors"\]\[0\] must be a dict') for v in values(None, [], torch.ones(5))),
    *(
        (lambda m, n=n: m["tensors"][0].pop(n), rf'\["tensors"\]\[0\]\["{n}"\] is missing')
        for n in ("moments", "translation", "norm", "propagators", "clock")
    ),
    *((tensor("norm", v), r'\["norm"\] must be a tensor') for v in values(None, [1.0], "x", 3)),
    *(
        (tensor("moments", f), r'\["moments"\] must be a dense float64 tensor')
        for f in (
            lambda x: x.to("meta"),
            lambda x: x.to_sparse(),
            lambda x: x.long(),
            lambda x: x.bool(),
            lambda x: x.to(torch.complex128),
            lambda x: x.float(),
            lambda x: x.half(),
        )
    ),
    *(
        (tensor(n, f), rf'\["{n}"\] must have shape')
        for n in ("moments", "translation", "norm", "propagators", "clock")
        for f in (
            lambda x: x[:-1],
            lambda x: x[None],
            lambda x: x.flatten()[:0],
            lambda x: torch.cat([x, x]),
            lambda x: x.new_zeros(()),
        )
    ),
    *(
        (fill("clock", 0, v), r'\["clock"\] must count whole steps')
        for v in values(math.nan, math.inf, -math.inf, -1.0, 2.5)
    ),
    *((fill("clock", 1, v), r'\["clock"\] has the time') for v in values(math.nan, math.inf, -math.inf, -0.5)),
    (fill("clock", 0, 0.0), r'\["clock"\] has no step, but the time'),
    (fill("clock", slice(None), 0.0), r'\["propagators"\] must be the identity'),
    (fill("propagators", slice(None), math.nan), r'\["propagators"\] is NaN for the'),
    (fill("propagators", (0, 1, 1, 0, 0), math.nan), r'\["propagators"\] is NaN for the norm law'),
]


@pytest.mark.parametrize("way", ["load_state_dict", "load_measurement"])
@pytest.mark.parametrize("case", range(len(MEASUREMENTS)))
def test_a_damaged_measurement_is_refused(case: int, way: str) -> None:
    edit, words = MEASUREMENTS[case]
    state = copy.deepcopy(trained()[1].state_dict())
    edit(state["measurement"])
    if way == "load_state_dict":
        refuses(lambda optimizer: optimizer.load_state_dict(state), words)
    else:
        refuses(lambda optimizer: optimizer.load_measurement(state["measurement"]), words)


@pytest.mark.parametrize("measured", [[], "x", 3, torch.ones(3)], ids=str)
def test_a_measurement_that_is_none_is_refused(measured: Any) -> None:
    refuses(lambda optimizer: optimizer.load_measurement(measured), "measurement must be a dict")
    state = {**trained()[1].state_dict(), "measurement": measured}
    refuses(lambda optimizer: optimizer.load_state_dict(state), "measurement must be a dict")


def buffer(value: Any) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        slot = state["state"][0]
        slot["momentum_buffer"] = value(slot["momentum_buffer"]) if callable(value) else value

    return edit


def option(name: str, value: Any) -> Edit:
    return lambda state: state["param_groups"][1].update({name: value})


STATES: list[tuple[Edit, str]] = [
    *((buffer(v), "momentum_buffer must be a tensor") for v in values(3, [0.0] * 6, "x")),
    *((buffer(f), "momentum_buffer has shape") for f in (lambda v: v[:1], lambda v: v.mT, lambda v: v.new_zeros(()))),
    *(
        (buffer(f), "momentum_buffer must be a dense tensor of floats")
        for f in (lambda v: v.to_sparse(), lambda v: v.long(), lambda v: v.to(torch.complex128), lambda v: v.bool())
    ),
    (buffer(lambda v: v.to("meta")), "'momentum_buffer' is on meta"),
    (lambda s: s["state"][1].update(other=torch.ones(2, device="meta")), "'other' is on meta"),
    *((put("state", 1, v), r"state\[1\] of 'fc1.bias' must be a dict") for v in values(None, [], 3)),
    (lambda s: s["state"].update({3: {}}), r"state\[3\] is of no parameter"),
    (lambda s: s["state"].update({-1: {}}), r"state\[-1\] is of no parameter"),
    (lambda s: s["state"].update({None: {}}), r"state\[None\] is of no parameter"),
    (lambda s: s.update(state={str(key): slot for key, slot in s["state"].items()}), r"state\['0'\] is of no param"),
    *((lambda s, f=f: s.pop(f), f"'{f}' is missing") for f in ("state", "param_groups")),
    *((put("state", v), "'state' must be a dict") for v in values(None, [], "x")),
    *((put("param_groups", v), "'param_groups' must be a list") for v in values(None, {}, "ab", 2)),
    (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    (lambda s: s["param_groups"].__setitem__(0, None), r"param_groups\[0\] must be a dict"),
    (lambda s: s["param_groups"][0].pop("params"), r"\['params'\] must be a list"),
    *((put("param_groups", 0, "params", v), r"\['params'\] must be") for v in values(None, "ab", [[0], [1]])),
    (lambda s: s["param_groups"][0].update(params=[0, 0]), "name a parameter twice"),
    (lambda s: s["param_groups"][0].update(params=[1, 2]), "name a parameter twice"),
    *((put("param_groups", 0, "param_names", v), r"\['param_names'\] must") for v in values(None, "ab", [1, 2])),
    (lambda s: s["param_groups"][0]["param_names"].reverse(), "in another order"),
    *(
        (lambda s, n=n: s["param_groups"][1].pop(n), rf"param_groups\[1\]\['{n}'\] is missing")
        for n in ("lr", "momentum", "dampening", "weight_decay")
    ),
    *((option("lr", v), r"\['lr'\] must be a number") for v in values(None, "0.1", [0.1], 1j, torch.ones(2))),
    *((option("momentum", v), r"\['momentum'\] must be a number") for v in values(None, torch.ones(1, device="meta"))),
    (option("weight_decay", 10**400), r"\['weight_decay'\] is out of range"),
]


@pytest.mark.parametrize("case", range(len(STATES)))
def test_a_damaged_state_is_refused(case: int) -> None:
    edit, words = STATES[case]
    state = copy.deepcopy(trained()[1].state_dict())
    edit(state)
    refuses(lambda optimizer: optimizer.load_state_dict(state), words)


@pytest.mark.parametrize("state", [None, [], "x", 3])
def test_what_is_no_state_dict_is_a_type_error(state: Any) -> None:
    _, optimizer = trained()
    expected = numbers(optimizer)
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict(state)
    assert same(numbers(optimizer), expected)


class TestWhatOnlyLooksDamaged:
    """torch writes it, or a training that went wrong: it loads, and goes on as if nothing had been."""

    @staticmethod
    def goes_on(net: nn.Module, optimizer: nperf.SGD) -> None:
        state, expected = copy.deepcopy(optimizer.state_dict()), numbers(optimizer)
        other, loading = version_2.make()
        other.load_state_dict(net.state_dict())
        loading.load_state_dict(state)
        assert same(numbers(loading), expected)
        for model, sgd in ((net, optimizer), (other, loading)):
            version_2.train(model, sgd, range(5, 7))
        assert same(numbers(loading), numbers(optimizer))
        assert same(net.state_dict(), other.state_dict())

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_gradient_that_spoiled_all(self, value: float) -> None:
        net, optimizer = trained(3)
        net.get_parameter("fc2.weight").grad.fill_(value)  # type: ignore[union-attr]
        optimizer.step()
        self.goes_on(net, optimizer)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("option", ["lr", "weight_decay", "momentum", "dampening"])
    def test_a_hyperparameter_that_spoiled_all(self, option: str, value: float) -> None:
        net, optimizer = trained(3)
        group = optimizer.param_groups[1]
        before, group[option] = group[option], value
        optimizer.step()
        group[option] = before
        assert not numbers(optimizer)["columns: charge"].isfinite().any()
        self.goes_on(net, optimizer)

    @pytest.mark.parametrize(
        ("option", "value"),
        [("momentum", -1.0), ("lr", 1e308), ("weight_decay", -1e9), ("momentum", -1.0 - 1e-9)],
    )
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_steps_whose_flow_does_not_exist(self, option: str, value: float, momentum: float) -> None:
        """Outside of what torch's constructor takes, but a parameter group may hold it, and torch makes the step."""
        net, optimizer = version_2.make()
        for group in optimizer.param_groups:
            group |= {"momentum": momentum, option: value}
        version_2.train(net, optimizer, range(1))
        for group in optimizer.param_groups:
            group |= {"momentum": momentum, "lr": 0.1, "weight_decay": 0.0}
        assert numbers(optimizer)["fc1: flow.free"].shape == (3,)
        self.goes_on(net, optimizer)

    def test_time_that_runs_back(self) -> None:
        net, optimizer = trained(2)
        for group in optimizer.param_groups:
            group["dampening"] = 4.0
        version_2.train(net, optimizer, range(2, 4))
        assert optimizer.readout().time < 0
        self.goes_on(net, optimizer)

    @pytest.mark.parametrize("n_steps", [0, 1])
    @pytest.mark.parametrize("reads", [False, True])
    def test_before_the_first_step(self, n_steps: int, reads: bool) -> None:
        net, optimizer = trained(n_steps)
        if reads:
            optimizer.readout()
        self.goes_on(net, optimizer)

    def test_buffers_that_are_none(self) -> None:
        """As torch.optim.SGD without momentum has written them."""
        net, optimizer = version_2.make()
        state = optimizer.state_dict()
        state["state"] = {i: {"momentum_buffer": None} for i in range(3)}
        optimizer.load_state_dict(state)
        version_2.train(net, optimizer, range(5))
        assert same(numbers(optimizer), numbers_after(5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_buffers_of_another_float_are_converted(self, dtype: torch.dtype) -> None:
        state = copy.deepcopy(trained()[1].state_dict())
        for slot in state["state"].values():
            slot["momentum_buffer"] = slot["momentum_buffer"].to(dtype)
        net, optimizer = trained()
        optimizer.load_state_dict(state)
        for p, slot in zip(net.parameters(), state["state"].values(), strict=True):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], slot["momentum_buffer"].double())

    def test_state_that_is_somebodys_own(self) -> None:
        _, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        state["state"]["mine"] = {"note": 1}
        state["state"][0]["also mine"] = torch.arange(3)
        optimizer.load_state_dict(state)
        assert optimizer.state["mine"] == {"note": 1}  # type: ignore[index]

    def test_a_hook_may_mend(self) -> None:
        """What is checked is what the hooks have made of it; and the check is not one of the hooks afterwards."""
        _, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        good = state["state"][0]["momentum_buffer"]
        state["state"][0]["momentum_buffer"] = good.long()

        def mend(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            loaded["state"] = {**loaded["state"], 0: {"momentum_buffer": good}}

        handle = optimizer.register_load_state_dict_pre_hook(mend)
        optimizer.load_state_dict(state)
        handle.remove()
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        with pytest.raises(ValueError, match="dense tensor of floats"):
            optimizer.load_state_dict(state)
        assert not optimizer._optimizer_load_state_dict_pre_hooks


# ---- at random ------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3.5,
    math.nan,
    math.inf,
    10**400,
    "",
    "x",
    b"x",
    [],
    {},
    (),
    1j,
    object,
]
ODD_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x.long(),
    lambda x: x.to(torch.complex128),
    lambda x: x.flatten()[:-1],
    lambda x: x[None],
    lambda x: x.tolist(),
    lambda x: x.double().numpy(),
    lambda x: torch.zeros(0),
    lambda x: None,
]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside, with every key of it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        yield data, key
        yield from places(value)


def spoil(data: Any, rng: random.Random) -> str:
    """Change one nested field, and say how."""
    container, key = rng.choice(list(places(data)))
    value = container[key]
    ways = ["retype", "retype", "delete", "rename", "swap", "cut"]
    way = rng.choice(ways)
    if way == "delete":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        new = rng.choice([f"{key}x", 7, -1, None, "", str(key)])
        container[new] = container.pop(key)
    elif way == "swap":
        other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        container[key], container[other] = container[other], container[key]
    elif way == "cut" and isinstance(value, str | list) and value:
        container[key] = value[: rng.randrange(len(value))]
    elif isinstance(value, Tensor):
        container[key] = rng.choice(ODD_TENSORS)(value)
    else:
        container[key] = rng.choice(ODD)
    return f"{way} {key!r}, was {value!r:.60}"


def flip(text: str, rng: random.Random) -> str:
    """Change, cut or double some characters."""
    i = rng.randrange(len(text))
    j = i + rng.randrange(1, 4)
    piece = rng.choice(["", "0", "1", '"', "{", "]", ",", "NaN", "1e999", "-", "null", text[i:j] * 2, "\ud800"])
    return text[:i] + piece + text[j:]


def assert_goes_torchs_way(optimizer: nperf.SGD, state: dict[str, Any], how: str) -> None:
    """What was loaded is what torch.optim.SGD loads from it, and makes the same steps where torch can."""
    twin = copy.deepcopy(optimizer)  # so that its laws stay where they are
    mine = [p for group in twin.param_groups for p in group["params"]]
    net, _ = version_2.make()
    for p, q in zip(net.parameters(), mine, strict=True):
        p.data, q.grad = q.detach().clone(), torch.ones_like(q)
        p.grad = torch.ones_like(p)
    named = list(net.named_parameters())
    peer = torch.optim.SGD([{"params": named[:2]}, {"params": named[2:]}], lr=0.1)
    peer.load_state_dict(state)
    try:
        peer.step()
    except Exception:  # an option of the wrong kind, which ours reads as true or false
        return
    twin.step()
    for p, q in zip(net.parameters(), mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, equal_nan=True, msg=how)


def load_spoilt(optimizer: nperf.SGD, seed: int) -> str:
    """Load a checkpoint with something spoilt in it, in one of the ways to load."""
    rng = random.Random(seed)
    source = trained()[1]
    state = copy.deepcopy(source.state_dict())
    if rng.random() < 0.2:
        state["measurement"] = old_measurement()
    way = rng.choice(["load_state_dict", "load_state_dict", "load_measurement", "between ranks"])
    n = 1 + (rng.random() < 0.2)
    if way == "load_state_dict":
        how = "; ".join(spoil(state, rng) for _ in range(n))
        if "measurement" not in state or state["measurement"] is None:
            return "measures anew"
        given = copy.deepcopy(state)
        optimizer.load_state_dict(state)
        assert_goes_torchs_way(optimizer, given, how)
    elif way == "load_measurement":
        how = "; ".join(spoil(state["measurement"], rng) for _ in range(n))
        optimizer.load_measurement(state["measurement"])
    else:
        packed = distributed.get_measurement_state_dict(source)
        for _ in range(n):
            packed["about"] = flip(packed["about"], rng)
        how = packed["about"]
        distributed.set_measurement_state_dict(optimizer, packed)
    return how


def check_a_spoilt_checkpoint(seed: int) -> bool:
    """Refused with all as it was, or loaded: then the readout has the right numbers. Whether it was refused."""
    net, optimizer = trained(3)
    before = snapshot(net, optimizer)
    try:
        how = load_spoilt(optimizer, seed)
    except (ValueError, TypeError):
        assert same(before, snapshot(net, optimizer)), seed
        version_2.train(net, optimizer, range(3, 4))
        assert same(numbers(optimizer), numbers_after(4)), seed
        return True
    if how != "measures anew":
        assert_close(numbers(optimizer), numbers_after(version_2.N_STEPS), 1e-13)
    return False


@functools.cache
def symmetries_text() -> str:
    return to_json(version_2.make()[1].symmetries)


def check_spoilt_json(seed: int) -> bool:
    """Refused, or read as symmetries that are written and read back equal. Whether it was refused."""
    rng = random.Random(seed)
    text = symmetries_text()
    if rng.random() < 0.5:
        data = json.loads(text)
        spoil(data, rng)
        text = json.dumps(data, default=lambda x: str(x))
    else:
        text = flip(text, rng)
    try:
        symmetries = from_json(text)
    except ValueError:
        return True
    assert from_json(to_json(symmetries)) == symmetries
    return False


class TestAtRandom:
    def test_spoilt_checkpoints(self) -> None:
        refused = [check_a_spoilt_checkpoint(seed) for seed in range(150)]
        assert 0.5 < sum(refused) / len(refused) < 1

    def test_spoilt_symmetries(self) -> None:
        refused = [check_spoilt_json(seed) for seed in range(300)]
        assert 0.5 < sum(refused) / len(refused) < 1

    @pytest.mark.slow
    def test_at_length(self) -> None:
        refused = [check_a_spoilt_checkpoint(seed) for seed in range(1000, 4000)]
        assert 0.5 < sum(refused) / len(refused) < 1
        refused = [check_spoilt_json(seed) for seed in range(1000, 21000)]
        assert 0.5 < sum(refused) / len(refused) < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"version": 1, "symmetries": ' + "[" * 900 + "]" * 900 + "}", "must be an object"),
        ('{"version": 1, "symmetries": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}", "must be a list"),
        ('{"version": 1, "version": 1, "symmetries": []}', "'version' is there twice"),
        ('{"version": true, "symmetries": []}', "version True"),
        ('{"version": 1.0, "symmetries": []}', "version 1.0"),
        ('{"version": ' + "9" * 5000 + ', "symmetries": []}', "digits"),
        ('{"version": 1, "symmetries": "' + "x" * 100_000 + '"}', r"got 'x{50,150}\.\.\.x"),
        ('{"version": NaN, "symmetries": []}', "NaN is not finite"),
    ],
    ids=range(9),
)
def test_hostile_json(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_json(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("weight", ["NaN", "-Infinity", "1e999", "0", "true", '"1"', "[1]", "9" * 400])
def test_weights_that_are_none(weight: str) -> None:
    text = to_json([Norm("a", [Part("w", 0, weight=0.25)]), Translation("b", [Part("w", 0)])])
    with pytest.raises(ValueError, match=r"weight|finite"):
        from_json(text.replace("0.25", weight))
