"""Names of symmetries: made of their parts, in ASCII; earlier names are found; records and checkpoints outlive them."""

import copy
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Scale, Symmetry, Translation
from noetherperf.detect import Symmetries


def rows(*names: str) -> list[Part]:
    return [Part(name, axis=0) for name in names]


def columns(*names: str) -> list[Part]:
    return [Part(name, axis=1) for name in names]


def digits_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:4]


WRITERS = [f"h.{i}.mlp.{own}" for i in range(12) for own in ("weight", "bias")]
ALL = " + ".join(["wte", *(f"h.{i}.mlp" for i in range(12))])

#: A symmetry without a name, the name of its parts, and the name that the search gave it earlier.
NAMED: list[tuple[Symmetry, str, str]] = [
    (Scale(None, rows("conv1.weight")), "conv1", "conv1"),
    (Scale(None, rows("conv1.weight", "conv1.bias")), "conv1", "conv1"),
    (Scale(None, [Part("tok.weight", None), Part("pos.weight", None)]), "tok + pos", "tok + pos"),
    (Scale(None, rows("q.weight", "k.weight", "v.weight")), "q + k + v", "q + 1 more + v"),
    (Norm(None, [Part("weight", None)]), "weight", "weight"),
    (Norm(None, [Part("cls_token", None)]), "cls_token", "cls_token"),
    (Rescale(None, rows("fc1.weight", "fc1.bias"), columns("fc2.weight")), "fc1->fc2", "fc1 → fc2"),
    (Rescale(None, rows("0.weight"), columns("2.weight")), "0->2", "0 → 2"),
    (Rescale(None, rows("b.0.v.weight"), columns("b.0.o.weight")), "b.0.v->o", "b.0.v → o"),
    (Rescale(None, rows("b.0.weight"), columns("b.2.weight")), "b.0->b.2", "b.0 → b.2"),
    (Rescale(None, rows("n.weight"), columns("n.up.weight", "n.gate.weight")), "n->n.up + n.gate", "n → n.up + n.gate"),
    (
        Rescale(None, [Part("qkv.weight", 0, stop=12)], [Part("qkv.weight", 0, start=12, stop=24)]),
        "qkv[0:12]->qkv[12:24]",
        "qkv[0:12] → qkv[12:24]",
    ),
    (
        Rescale(None, [Part("a.weight", 0, stop=2, period=6)], [Part("a.weight", 0, start=2, period=6)]),
        "a[0:2 of 6]->a[2: of 6]",
        "a[0:2 of 6] → a[2: of 6]",
    ),
    (Translation(None, columns("fc2.weight")), "fc2", "fc2.weight"),
    (Translation(None, [Part("fc2.bias", None)]), "fc2.bias", "fc2.bias"),
    (
        Translation(None, [Part("bn.bias", 0), Part("skip.1.bias", 0, weight=-1.0)]),
        "bn.bias - skip.1.bias",
        "bn.bias − skip.1.bias",
    ),
    (
        Scale(None, [Part(name, None) for name in ("wte.weight", *WRITERS)]),
        f"wte + 12 more ~{digits_of(ALL)}",
        "wte + 11 more + h.11.mlp",
    ),
    (
        Rescale(None, rows("wte.weight", *WRITERS), columns("head.weight")),
        f"wte + 12 more->head ~{digits_of(f'{ALL}->head')}",
        "wte + 11 more + h.11.mlp → head",
    ),
]


@pytest.mark.parametrize(("symmetry", "name", "earlier"), NAMED, ids=[name for _, name, _ in NAMED])
def test_a_name_is_made_of_the_parts(symmetry: Symmetry, name: str, earlier: str) -> None:
    assert symmetry.name == name
    assert name.isascii()
    assert symmetry.named("x").name == "x"
    assert symmetry.named("x").named(None) == symmetry
    found = Symmetries([Norm("other", [Part("w", None)]), symmetry.named("mine")])
    for key in {name, earlier}:
        for alias in (key, f"{key} ({symmetry.kind})"):
            with pytest.warns(FutureWarning, match="is named 'mine' here; use that name"):
                assert found[alias].content == symmetry.content


def test_other_sums_have_other_digits() -> None:
    names = {Scale(None, [Part(name, None) for name in ("wte.weight", *WRITERS, last)]).name for last in "abc"}
    assert len(names) == 3
    assert len({name.partition(" ~")[0] for name in names}) == 1


def test_two_symmetries_of_one_earlier_name_are_both_told() -> None:
    parts = rows("a.weight")
    both = Symmetries([Scale("one", parts), Norm("two", parts), Translation("three", parts)])
    with pytest.raises(KeyError, match="it may be each of: one, two"):
        both["a"]
    with pytest.warns(FutureWarning, match="'a \\(norm\\)' is named 'two'"):
        assert both["a (norm)"] is both[1]
    with pytest.warns(FutureWarning, match="'a.weight' is named 'three'"):  # a translation's earlier name
        assert both["a.weight"] is both[2]


# ---- where names are looked up --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.fc1(x).relu())
        return out


def today() -> list[Symmetry]:
    return [
        Rescale("fc1->fc2", rows("fc1.weight", "fc1.bias"), columns("fc2.weight")),
        Translation("fc2", columns("fc2.weight")),
        Scale("fc1", rows("fc1.weight")),
    ]


EARLIER = {"fc1->fc2": "fc1 → fc2", "fc2": "fc2.weight", "fc1": "fc1"}


def before() -> list[Symmetry]:
    """As they were named when the search wrote arrows and weights."""
    return [symmetry.named(EARLIER[symmetry.name]) for symmetry in today()]


def optimizer_of(symmetries: list[Symmetry]) -> nperf.SGD:
    torch.manual_seed(0)
    return nperf.SGD(Net().named_parameters(), lr=0.1, momentum=0.9, symmetries=symmetries, backend="reference")


def train(optimizer: nperf.SGD, n_steps: int = 3) -> None:
    for step in range(n_steps):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = torch.arange(p.numel(), dtype=p.dtype).view_as(p).add(i + step).sin() + 0.1 * p.detach()
        optimizer.step()


@pytest.fixture
def trained() -> nperf.SGD:
    optimizer = optimizer_of(today())
    train(optimizer)
    return optimizer


@pytest.fixture
def looked_up(trained: nperf.SGD, tmp_path: Path) -> list[Mapping[str, Any]]:
    """Everything that takes the name of a symmetry: a readout, a record, a search's result, a check's."""
    nperf.Recorder(trained, tmp_path / "record").close()
    net, x = Net(), torch.randn(5, 3)
    checked = nperf.check_constraints(net, lambda: net(x).square().mean(), today(), hessian=False, float64=False)
    return [trained.readout(), nperf.open_record(tmp_path / "record"), Symmetries(today()), checked]  # type: ignore[list-item]


def test_earlier_names_are_found_everywhere(looked_up: list[Mapping[str, Any]]) -> None:
    for place in looked_up:
        for name, earlier in EARLIER.items():
            if name == earlier:
                assert place[name] is not None
                continue
            with pytest.warns(FutureWarning, match=f"the symmetry '{earlier}' is named '{name}' here") as told:
                found = place[earlier]
            assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]  # where it is asked
            assert type(found) is type(place[name])


def test_a_name_that_is_none_is_answered_with_names(looked_up: list[Mapping[str, Any]]) -> None:
    for place in looked_up:
        with pytest.raises(KeyError, match=r"'fc9'.*; there are: fc1->fc2, fc2, fc1"):
            place["fc9"]
        with pytest.raises(KeyError, match=r"'fc1\.bias'.*; but the parameter of that name is in: fc1->fc2"):
            place["fc1.bias"]


def test_among_many_the_nearest_are_told() -> None:
    many = Symmetries([Scale(f"features.{i}", rows(f"{i}.weight")) for i in range(30)])
    with pytest.raises(KeyError, match=r"no symmetry is named 'feature.7'; did you mean 'features.7' or"):
        many["feature.7"]
    with pytest.raises(KeyError, match=r"; there are: features\.0, .*features\.11, and others"):
        many["XYZ"]


def test_a_readout_by_parameter(trained: nperf.SGD) -> None:
    readout = trained.readout()
    found = readout.by_parameter("fc2.weight")
    assert list(found) == ["fc1->fc2", "fc2"]
    for name, law in found.items():
        assert law.name == name
        assert torch.equal(law.charge, readout[name].charge)
    assert list(readout.by_parameter("fc1.bias")) == ["fc1->fc2"]
    with pytest.raises(KeyError, match=r"no measured symmetry has the parameter 'fc2\.bias'; there are: fc1\.weight, "):
        readout.by_parameter("fc2.bias")
    with pytest.raises(KeyError, match=r"'fc1'; there are: none"):
        optimizer_of([]).readout().by_parameter("fc1")


# ---- what was written before ----------------------------------------------------------------------------------------


def laws_of(optimizer: nperf.SGD) -> list[torch.Tensor]:
    laws = optimizer.readout().values()
    return [x for law in laws for x in (law.charge, law.initial, law.discrete.budget, law.flow.total)]


@torch.no_grad()
def copy_parameters(source: nperf.SGD, target: nperf.SGD) -> None:
    for one, other in zip(source.param_groups, target.param_groups, strict=True):
        for p, q in zip(one["params"], other["params"], strict=True):
            q.copy_(p)


@pytest.mark.parametrize("whole", [True, False], ids=["state_dict", "measurement"])
def test_a_checkpoint_with_earlier_names_goes_on(whole: bool) -> None:
    old, new = optimizer_of(before()), optimizer_of(today())
    train(old, 2)
    copy_parameters(old, new)
    if whole:
        new.load_state_dict(copy.deepcopy(old.state_dict()))  # torch would share its buffers
        train(old, 2)
        train(new, 2)
    else:
        new.load_measurement(old.state_dict()["measurement"])
    assert (new.step_count, new.measurement_id) == (old.step_count, old.measurement_id)
    assert [*new.readout()] == [*EARLIER]
    for a, b in zip(laws_of(old), laws_of(new), strict=True):
        assert torch.equal(a, b)


def test_the_reason_of_an_open_law_goes_with_its_new_name() -> None:
    def in_two_groups(symmetries: list[Symmetry]) -> nperf.SGD:
        torch.manual_seed(0)
        first, second = ([*Net().get_submodule(name).named_parameters(name)] for name in ("fc1", "fc2"))
        groups: list[dict[str, Any]] = [{"params": first}, {"params": second, "lr": 0.2}]
        return nperf.SGD(groups, lr=0.1, symmetries=symmetries, backend="reference")

    old, new = in_two_groups(before()), in_two_groups(today())
    train(old)
    reason = old.readout()["fc1 → fc2"].reason
    assert "lr" in reason
    new.load_state_dict(old.state_dict())
    assert new.readout()["fc1->fc2"].reason == reason


def test_a_record_with_earlier_names_goes_on_with_todays(tmp_path: Path) -> None:
    old = optimizer_of(before())
    with nperf.Recorder(old, tmp_path / "record"):
        train(old, 2)
    written = nperf.open_record(tmp_path / "record")
    assert [*written] == [*EARLIER.values()]
    with pytest.warns(FutureWarning, match="'fc1->fc2' is named 'fc1 → fc2' here"):
        assert written["fc1->fc2"].attrs["name"] == "fc1 → fc2"
    new = optimizer_of(today())
    new.load_state_dict(old.state_dict())
    with nperf.Recorder(new, tmp_path / "record", exists="resume"):
        train(new, 2)
    record = nperf.open_record(tmp_path / "record")
    assert [*record] == [*EARLIER]
    assert record.steps.tolist() == [0, 1, 2, 3, 4]


def test_a_scheduler_takes_earlier_names_and_an_earlier_state() -> None:
    def of(symmetry: Symmetry) -> nperf.SGD:
        torch.manual_seed(0)
        net = Net()
        return nperf.SGD(nperf.control.groups(net, [symmetry]), lr=0.1, symmetries=[symmetry], backend="reference")

    scale = Scale("q + k + v", [Part(name, 0) for name in ("fc1.weight", "fc1.bias")])
    old_name, new_name = scale.named("by hand"), scale.named(None)
    old = nperf.control.EffectiveLearningRate(of(old_name), ["by hand"])
    with pytest.warns(FutureWarning, match="'fc1' is named 'by hand'"):
        same = nperf.control.EffectiveLearningRate(of(old_name), {"fc1": 0.3})
    assert same.targets == {"by hand": 0.3}
    earlier = Scale("fc1 (scale)", new_name.parts)
    state = nperf.control.EffectiveLearningRate(of(earlier), {"fc1 (scale)": 0.3}).state_dict()
    new = nperf.control.EffectiveLearningRate(of(new_name), ["fc1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(state)
    assert new.targets == {"fc1": 0.3}
    with pytest.raises(ValueError, match="it holds by hand in group 0, and this scheduler fc1 in group 0"):
        new.load_state_dict(old.state_dict())
