"""Symmetries as data: what they accept, what they refuse in which words, and that nothing is lost on any way out."""

import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noetherperf.symmetry import (
    Norm,
    Part,
    Rescale,
    Scale,
    Symmetry,
    Translation,
    from_json,
    layers,
    neurons,
    to_json,
    validate,
)

SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "conv.bias": (8,),
    "fc.weight": (10, 32),
    "fc.bias": (10,),
    "rnn.weight_hh": (8, 8),
    "gain": (),
}

TRANSLATION = Translation("softmax", [Part("fc.weight", axis=1)])
SCALE = Scale("conv", [Part("conv.weight", axis=0), Part("conv.bias", axis=0)])
RESCALE = Rescale(
    "conv->fc",
    inward=[Part("conv.weight", axis=0), Part("conv.bias", axis=0)],
    outward=[Part("fc.weight", axis=1, fold=4, weight=2)],
)
NORM = Norm("half of fc", [Part("fc.weight", axis=1, start=16, stop=32)])
WHOLE = Norm("all", [Part("gain", axis=None)])
EXAMPLES = [TRANSLATION, SCALE, RESCALE, NORM, WHOLE]
by_name = pytest.mark.parametrize("symmetry", EXAMPLES, ids=lambda symmetry: symmetry.name)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class TestPart:
    def test_defaults(self) -> None:
        part = Part("w", 0)
        assert (part.start, part.stop, part.fold, part.weight) == (None, None, 1, 1.0)

    @pytest.mark.parametrize(
        ("fields", "error", "words"),
        [
            ({"parameter": 3}, TypeError, "parameter must be a name"),
            ({"parameter": ""}, ValueError, "empty name"),
            ({"axis": -1}, ValueError, "axis must be at least 0"),
            ({"axis": 1.0}, TypeError, "axis must be an integer"),
            ({"axis": True}, TypeError, "axis must be an integer"),
            ({"axis": "0"}, TypeError, "axis must be an integer"),
            ({"start": -1}, ValueError, "start must be at least 0"),
            ({"start": 0.5}, TypeError, "start must be an integer"),
            ({"stop": 0}, ValueError, "stop must be at least 1"),
            ({"start": 4, "stop": 4}, ValueError, "start must be below stop"),
            ({"start": 5, "stop": 4}, ValueError, "start must be below stop"),
            ({"fold": 0}, ValueError, "fold must be at least 1"),
            ({"fold": None}, TypeError, "fold must be an integer"),
            ({"fold": 2.0}, TypeError, "fold must be an integer"),
            ({"weight": 0}, ValueError, "finite and not zero"),
            ({"weight": float("nan")}, ValueError, "finite and not zero"),
            ({"weight": float("-inf")}, ValueError, "finite and not zero"),
            ({"weight": 10**400}, ValueError, "finite and not zero"),
            ({"weight": "1"}, TypeError, "weight must be a number"),
            ({"weight": True}, TypeError, "weight must be a number"),
            ({"weight": None}, TypeError, "weight must be a number"),
            ({"axis": None, "start": 1}, ValueError, "none to slice"),
            ({"axis": None, "stop": 1}, ValueError, "none to slice"),
            ({"axis": None, "fold": 2}, ValueError, "none to slice"),
        ],
    )
    def test_refuses(self, fields: dict[str, Any], error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words) as caught:
            Part(**{"parameter": "w", "axis": 0, **fields})
        assert "parameter" in fields or "'w'" in str(caught.value)

    def test_is_immutable(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Part("w", 0).axis = 1  # type: ignore[misc]

    def test_integers_of_other_kinds_become_plain(self) -> None:
        part = Part("w", torch.tensor(1), fold=torch.tensor(2))  # type: ignore[arg-type]
        assert (type(part.axis), type(part.fold), type(part.weight)) == (int, int, float)
        assert part == Part("w", 1, fold=2, weight=1.0)

    @pytest.mark.parametrize(
        ("part", "shape", "n_groups"),
        [
            (Part("w", None), (4, 3), 1),
            (Part("w", None), (), 1),
            (Part("w", 0), (4, 3), 4),
            (Part("w", 1), (4, 3, 5, 5), 3),
            (Part("w", 3), (4, 3, 5, 7), 7),
            (Part("w", 1, fold=16), (10, 160), 10),
            (Part("w", 0, start=4, stop=10, fold=3), (12, 2), 2),
            (Part("w", 0, start=4), (12, 2), 8),
            (Part("w", 0, stop=12), (12, 2), 12),
            (Part("w", 0, fold=2, stride=3), (12, 2), 6),
            (Part("w", 0, start=2, stop=4, period=6), (12, 2), 4),
            (Part("w", 0, start=2, stop=6, fold=2, stride=2, period=6), (12, 2), 4),
            (Part("w", 0, stop=2, fold=3, stride=2, period=4), (12, 2), 2),
            (Part("w", 0, stop=2, fold=6, period=4), (12, 2), 1),
            (Part("w", 0, stop=2, fold=2, stride=4, period=3), (12, 2), 4),
        ],
    )
    def test_n_groups(self, part: Part, shape: tuple[int, ...], n_groups: int) -> None:
        assert part.n_groups(shape) == n_groups
        assert part.n_groups(torch.Size(shape)) == n_groups

    @pytest.mark.parametrize(
        ("part", "shape", "words"),
        [
            (Part("w", 2), (4, 3), "axis 2 is out of range"),
            (Part("w", 0), (), "axis 0 is out of range"),
            (Part("w", 1, stop=4), (4, 3), "0:4 of axis 1 is out of range"),
            (Part("w", 1, start=3), (4, 3), "3:3 of axis 1 is empty"),
            (Part("w", 0), (0, 3), "0:0 of axis 0 is empty"),
            (Part("w", 0, fold=3), (4, 3), "fold 3 does not divide"),
            (Part("w", 0, start=1, fold=2), (4, 3), "fold 2 does not divide"),
            (Part("w", 0, fold=8), (4, 3), "fold 8 does not divide"),
            (Part("w", 0, fold=2, stride=3), (4, 3), "fold 2, 3 apart, does not divide"),
            (Part("w", 0, period=3), (4, 3), "period 3 does not divide"),
            (Part("w", 0, stop=3, period=2), (4, 3), "0:3 of period of axis 0 is out of range"),
            (
                Part("w", 0, stop=2, fold=2, stride=2, period=4),
                (12, 3),
                "fold 2, 2 apart, does not divide the 6 indices",
            ),
            (Part("w", 0, stop=3, fold=2, period=4), (8, 3), "6 indices 0:3 of every 4 of axis 0"),
            (Part("w", 0, stop=3, fold=3, stride=2, period=4), (8, 3), "6 indices 0:3 of every 4 of axis 0"),
        ],
    )
    def test_misfits_name_parameter_and_shape(self, part: Part, shape: tuple[int, ...], words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            part.n_groups(shape)
        assert "'w'" in str(caught.value)
        assert str(shape) in str(caught.value)

    @given(
        start=st.integers(0, 3),
        n_blocks=st.integers(1, 3),
        fold=st.integers(2, 3),
        stride=st.integers(1, 3),
        n_periods=st.integers(1, 3),
        beyond=st.integers(0, 2),
        axis=st.integers(0, 2),
    )
    def test_groups_hold_indices_a_stride_apart_in_every_period(
        self, start: int, n_blocks: int, fold: int, stride: int, n_periods: int, beyond: int, axis: int
    ) -> None:
        stop = start + n_blocks * fold * stride
        period = stop + beyond
        part = Part("w", axis, start=start, stop=stop, fold=fold, stride=stride, period=period)
        expected = [
            [p * period + start + b * fold * stride + f * stride + s for f in range(fold)]
            for p in range(n_periods)
            for b in range(n_blocks)
            for s in range(stride)
        ]
        index = torch.arange(n_periods * period)
        assert part.gather(index).tolist() == expected
        shape = [2, 3, 2]
        shape[axis] = len(index)
        assert part.n_groups(shape) == len(expected)
        x = torch.randn(shape)
        groups = torch.stack([x.index_select(axis, torch.tensor(i)).sum() for i in expected])
        torch.testing.assert_close(part.grouped(x).sum(1), groups)

    @given(
        start=st.integers(0, 2),
        length=st.integers(1, 3),
        beyond=st.integers(0, 2),
        n_together=st.integers(1, 3),
        n_blocks=st.integers(1, 2),
        step=st.integers(1, 2),
    )
    def test_groups_of_all_periods(
        self, start: int, length: int, beyond: int, n_together: int, n_blocks: int, step: int
    ) -> None:
        """The same place of the slices of several periods: of neighbours, or of every second one."""
        period, n_periods = start + length + beyond, n_blocks * n_together * step
        fold = {"fold": n_together, "stride": length * step} if n_together > 1 else {}
        part = Part("w", 0, start=start, stop=start + length, period=period, **fold)
        step = step if fold else 1
        starts = [
            (b * n_together * step + s, place)
            for b in range(n_periods // (n_together * step))
            for s in range(step)
            for place in range(length)
        ]
        expected = [[(p + k * step) * period + start + place for k in range(n_together)] for p, place in starts]
        assert part.n_groups((n_periods * period, 2)) == len(expected)
        assert part.gather(torch.arange(n_periods * period)).tolist() == expected

    @given(start=st.integers(0, 9), n_groups=st.integers(1, 5), fold=st.integers(1, 4), beyond=st.integers(0, 3))
    def test_groups_tile_the_slice(self, start: int, n_groups: int, fold: int, beyond: int) -> None:
        stop = start + n_groups * fold
        part = Part("w", 0, start=start, stop=stop, fold=fold)
        assert part.bounds((stop + beyond, 2)) == (start, stop)
        assert part.n_groups((stop + beyond, 2)) == n_groups


class TestSymmetry:
    @pytest.mark.parametrize(
        ("symmetry", "kind", "law", "claimed"),
        [
            (TRANSLATION, "translation", "translation", True),
            (SCALE, "scale", "norm", True),
            (RESCALE, "rescale", "norm", True),
            (NORM, "norm", "norm", False),
        ],
    )
    def test_kinds(self, symmetry: Symmetry, kind: str, law: str, claimed: bool) -> None:
        assert (symmetry.kind, symmetry.law, symmetry.claimed) == (kind, law, claimed)

    def test_rescale_signs(self) -> None:
        assert [part.weight for part in RESCALE.parts] == [1, 1, -2]
        assert RESCALE.inward == (Part("conv.weight", axis=0), Part("conv.bias", axis=0))
        assert RESCALE.outward == (Part("fc.weight", axis=1, fold=4, weight=2),)
        assert [part.parameter for part in RESCALE.parts] == ["conv.weight", "conv.bias", "fc.weight"]

    def test_translation_takes_weights_of_any_sign(self) -> None:
        assert Translation("t", [Part("a", 0, weight=-2)]).parts[0].weight == -2

    @pytest.mark.parametrize(
        ("build", "error", "words"),
        [
            (lambda: Symmetry("s", [Part("w", 0)]), TypeError, "use Translation, Scale, Rescale, Norm or Balance"),
            (lambda: Scale("s", []), ValueError, "parts is empty"),
            (lambda: Rescale("s", [], [Part("w", 0)]), ValueError, "inward is empty"),
            (lambda: Rescale("s", [Part("w", 0)], []), ValueError, "outward is empty"),
            (lambda: Scale("", [Part("w", 0)]), ValueError, "name is empty"),
            (lambda: Scale(3, [Part("w", 0)]), TypeError, "name must be a str"),  # type: ignore[arg-type]
            (lambda: Scale("s", Part("w", 0)), TypeError, "sequence of Part"),  # type: ignore[arg-type]
            (lambda: Scale("s", "w"), TypeError, "sequence of Part"),  # type: ignore[arg-type]
            (lambda: Norm("s", ["w"]), TypeError, "hold Part only, got 'w'"),  # type: ignore[list-item]
            (lambda: Scale("s", [Part("w", 0, weight=-1)]), ValueError, "negative weight.*Rescale"),
            (lambda: Rescale("s", [Part("w", 0)], [Part("v", 1, weight=-1)]), ValueError, "negative weight"),
            (lambda: Rescale("s", [Part("w", 0, weight=-1)], [Part("v", 1)]), ValueError, "negative weight"),
        ],
    )
    def test_refuses(self, build: Callable[[], Symmetry], error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            build()

    @by_name
    def test_is_immutable(self, symmetry: Symmetry) -> None:
        for field in ("name", "parts"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(symmetry, field, getattr(symmetry, field))

    @by_name
    def test_comes_back_equal(self, symmetry: Symmetry) -> None:
        ways = [
            pickle.loads(pickle.dumps(symmetry)),
            copy.deepcopy(symmetry),
            eval(repr(symmetry)),
            Symmetry.from_dict(symmetry.to_dict()),
            *from_json(to_json([symmetry])),
        ]
        for other in ways:
            assert type(other) is type(symmetry)
            assert other == symmetry
            assert hash(other) == hash(symmetry)
            assert other.parts == symmetry.parts

    def test_equality_sees_every_field(self) -> None:
        part = Part("w", 0, start=0, stop=4, fold=2, weight=2)
        changes: list[dict[str, object]] = [
            {"parameter": "v"}, {"axis": 1}, {"start": 2}, {"stop": 8}, {"fold": 4}, {"weight": 1},
        ]  # fmt: skip
        symmetries = [Norm("n", [part]), Norm("m", [part]), Norm("n", [part, part]), Scale("n", [part])]
        symmetries += [Norm("n", [dataclasses.replace(part, **change)]) for change in changes]  # type: ignore[arg-type]
        assert len(set(symmetries)) == len(symmetries)
        assert set(symmetries) == set(copy.deepcopy(symmetries))


class TestJson:
    def test_round_trip_of_many(self) -> None:
        assert from_json(to_json(EXAMPLES)) == tuple(EXAMPLES)
        assert from_json(to_json([])) == ()

    def test_names_of_all_alphabets(self) -> None:
        symmetry = Norm('θ "quoted" → \n', [Part("слой.weight", axis=0)])
        assert from_json(to_json([symmetry])) == (symmetry,)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_bytes_of_any_editor(self, encoding: str) -> None:
        assert from_json(to_json(EXAMPLES).encode(encoding)) == tuple(EXAMPLES)

    def test_text_is_plain(self) -> None:
        data = json.loads(to_json([RESCALE]))
        assert data["version"] == 1
        assert data["symmetries"][0]["outward"] == [{"parameter": "fc.weight", "axis": 1, "fold": 4, "weight": 2.0}]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "symmetries file: is no JSON .Expecting"),
            (b"{\xe9}", "symmetries file: is no JSON"),
            ("[]", "must be an object"),
            ('{"symmetries": []}', "'version' is missing"),
            ('{"version": 1}', "'symmetries' is missing"),
            ('{"version": 2, "symmetries": []}', "version 2"),
            ('{"version": 1, "symmetries": [], "x": 1}', "unknown field 'x'"),
            ('{"version": 1, "symmetries": {}}', "must be a list"),
            ('{"version": 1, "symmetries": [3]}', "must be an object"),
        ],
    )
    def test_refuses_other_files(self, text: str | bytes, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            from_json(text)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"kind": "rotation"}, "unknown kind of symmetry 'rotation'"),
            ({"kind": None}, "unknown kind of symmetry None"),
            ({"kind": ["scale"]}, "unknown kind"),
            ({"kind": "rescale"}, "unknown field 'parts'"),
            ({"kind": "__import__('os')"}, "unknown kind"),
            ({"extra": 1}, "unknown field 'extra'"),
            ({"name": 3}, "name must be a str"),
            ({"name": ""}, "name is empty"),
            ({"parts": []}, "parts is empty"),
            ({"parts": "conv"}, "must be a list of parts"),
            ({"parts": ["conv"]}, "must be an object"),
            ({"parts": [{"parameter": "w"}]}, "'axis' is missing"),
            ({"parts": [{"axis": 0}]}, "'parameter' is missing"),
            ({"parts": [{"parameter": "w", "axis": 0, "step": 2}]}, "unknown field 'step'"),
            ({"parts": [{"parameter": "w", "axis": "0"}]}, "axis must be an integer"),
            ({"parts": [{"parameter": "w", "axis": 0, "_": 1}]}, "unknown field '_'"),
            ({"parts": [{"parameter": "w", "axis": 0, "weight": float("nan")}]}, "finite"),
        ],
    )
    def test_refuses_other_symmetries(self, change: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            from_json(json.dumps({"version": 1, "symmetries": [SCALE.to_dict() | change]}))

    def test_refuses_a_symmetry_without_parts(self) -> None:
        data = SCALE.to_dict()
        del data["parts"]
        with pytest.raises(ValueError, match="'parts' is missing"):
            Symmetry.from_dict(data)


class TestValidate:
    def test_returns_what_it_got(self) -> None:
        assert validate(EXAMPLES, SHAPES) == tuple(EXAMPLES)
        assert validate(iter(EXAMPLES), SHAPES) == tuple(EXAMPLES)
        assert validate([], {}) == ()

    @pytest.mark.parametrize(
        ("symmetry", "words"),
        [
            (Norm("n", [Part("conv.wieght", 0)]), ["'n'", "'conv.wieght'", "did you mean 'conv.weight'"]),
            (Norm("n", [Part("xyzzy", 0)]), ["'xyzzy'", "'conv.weight'", "'gain'"]),
            (Norm("n", [Part("conv.bias", 1)]), ["'n'", "'conv.bias'", "axis 1", "(8,)"]),
            (Norm("n", [Part("gain", 0)]), ["'gain'", "axis 0", "()"]),
            (Norm("n", [Part("fc.weight", 1, stop=33)]), ["'fc.weight'", "0:33", "(10, 32)"]),
            (Norm("n", [Part("fc.weight", 1, fold=5)]), ["'fc.weight'", "fold 5", "(10, 32)"]),
            (Scale("n", [Part("conv.weight", 0), Part("fc.bias", 0)]), ["'conv.weight'", "8", "'fc.bias'", "10"]),
            (Scale("n", [Part("conv.weight", None), Part("fc.bias", 0)]), ["'conv.weight'", " 1 ", "'fc.bias'", "10"]),
        ],
    )
    def test_misfits(self, symmetry: Symmetry, words: list[str]) -> None:
        with pytest.raises(ValueError, match="symmetry 'n'") as caught:
            validate([SCALE, symmetry], SHAPES)
        assert [word for word in words if word not in str(caught.value)] == []

    @pytest.mark.parametrize(
        "parts",
        [
            [Part("conv.weight", 0), Part("conv.weight", 0)],
            [Part("conv.weight", 0), Part("conv.weight", 0, start=0, stop=8)],
            [Part("fc.weight", 1, start=0, stop=16), Part("fc.weight", 1, start=15, stop=31)],
            [Part("fc.weight", 1, start=8), Part("fc.weight", 1, stop=24)],
            [Part("fc.weight", 1, start=0, stop=8, fold=2), Part("fc.weight", 1, start=4, stop=8)],
            [Part("fc.weight", None), Part("fc.weight", None)],
            [Part("fc.weight", None), Part("fc.weight", 0, fold=10)],
            [Part("fc.weight", 0, fold=10), Part("fc.weight", None)],
            [Part("gain", None), Part("gain", None)],
        ],
    )
    def test_overlaps(self, parts: list[Part]) -> None:
        with pytest.raises(ValueError, match=r"symmetry 'n'.*twice") as caught:
            validate([Norm("n", parts)], SHAPES)
        assert repr(parts[0]) in str(caught.value)
        assert repr(parts[1]) in str(caught.value)

    @pytest.mark.parametrize(
        "symmetry",
        [
            Norm("adjacent slices", [Part("fc.weight", 1, stop=16), Part("fc.weight", 1, start=16)]),
            Norm("the other order", [Part("fc.weight", 1, start=16), Part("fc.weight", 1, stop=16)]),
            Rescale("recurrent", [Part("rnn.weight_hh", 0)], [Part("rnn.weight_hh", 1)]),
            Norm("two tensors", [Part("fc.weight", None), Part("gain", None)]),
        ],
        ids=lambda symmetry: symmetry.name,
    )
    def test_no_overlap(self, symmetry: Symmetry) -> None:
        assert validate([symmetry], SHAPES) == (symmetry,)

    @given(
        first=st.tuples(st.integers(0, 20), st.integers(1, 11)),
        start=st.integers(0, 20),
    )
    def test_overlap_is_a_shared_index(self, first: tuple[int, int], start: int) -> None:
        length = first[1]
        parts = [Part("fc.weight", 1, start=s, stop=s + length) for s in (first[0], start)]
        if set(range(first[0], first[0] + length)) & set(range(start, start + length)):
            with pytest.raises(ValueError, match="twice"):
                validate([Norm("n", parts)], SHAPES)
        else:
            validate([Norm("n", parts)], SHAPES)

    @given(
        st.lists(st.tuples(st.integers(0, 1), st.sampled_from([2, 3, 4, 6, 12]), st.integers(0, 11)), max_size=6),
    )
    def test_overlap_of_many_parts_with_periods(self, drawn: list[tuple[int, int, int]]) -> None:
        """As sets of indices say; parts that have the same number of periods are one symmetry's."""
        alike: dict[int, list[Part]] = {}
        for axis, period, at in drawn:
            start = at % period
            alike.setdefault(period, []).append(Part("w", axis, start=start, stop=start + 1, period=period))
        for parts in alike.values():
            held = [{(part.axis, int(i)) for i in part.gather(torch.arange(12)).flatten()} for part in parts]
            apart = len(set().union(*held)) == sum(map(len, held))
            with nullcontext() if apart else pytest.raises(ValueError, match="twice"):
                validate([Norm("n", parts)], {"w": (12, 12)})

    def test_parts_are_not_compared_with_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Twice as many slices of one axis are looked at twice as often, and not four times."""
        looks = 0
        bounds = Part.bounds

        def watched(part: Part, shape: Sequence[int]) -> tuple[int, int]:
            nonlocal looks
            looks += 1
            return bounds(part, shape)

        monkeypatch.setattr(Part, "bounds", watched)
        counts = []
        for n in (50, 100):
            looks = 0
            validate([Norm("n", [Part("w", 0, start=i, stop=i + 1) for i in range(n)])], {"w": (n,)})
            counts.append(looks)
        assert counts[1] == 2 * counts[0] > 0

    def test_the_same_elements_in_two_symmetries_are_fine(self) -> None:
        validate([SCALE, Norm("again", SCALE.parts)], SHAPES)

    def test_names_are_unique(self) -> None:
        with pytest.raises(ValueError, match="two symmetries are named 'conv'"):
            validate([SCALE, TRANSLATION, Norm("conv", [Part("gain", None)])], SHAPES)

    def test_only_symmetries(self) -> None:
        with pytest.raises(TypeError, match="got 'conv'"):
            validate([SCALE, "conv"], SHAPES)  # type: ignore[list-item]
        with pytest.raises(TypeError, match="got Part"):
            validate([Part("conv.weight", 0)], SHAPES)  # type: ignore[list-item]
        with pytest.raises(TypeError, match="put it into a list"):
            validate(SCALE, SHAPES)  # type: ignore[arg-type]


class TestNeurons:
    def test_units_with_their_biases(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(5, 4), nn.Linear(4, 4, bias=False))
        assert neurons(model) == (
            Norm("0", [Part("0.weight", 0), Part("0.bias", 0)]),
            Norm("2", [Part("2.weight", 0), Part("2.bias", 0)]),
            Norm("3", [Part("3.weight", 0)]),
        )

    def test_embedding_rows(self) -> None:
        assert neurons(nn.ModuleDict({"embed": nn.Embedding(7, 3)})) == (Norm("embed", [Part("embed.weight", 0)]),)

    def test_a_bare_module(self) -> None:
        assert neurons(nn.Linear(3, 2)) == (Norm("weight[0]", [Part("weight", 0), Part("bias", 0)]),)

    @pytest.mark.parametrize(
        ("conv", "part", "n_units"),
        [
            (nn.ConvTranspose2d(4, 6, 3), Part("0.weight", 1), 6),
            (nn.ConvTranspose1d(4, 4, 3, groups=4), Part("0.weight", 0), 4),
            (nn.ConvTranspose2d(6, 3, 3, groups=3), Part("0.weight", 0, fold=2), 3),
            (nn.Conv2d(6, 9, 3, groups=3), Part("0.weight", 0), 9),
        ],
    )
    def test_units_of_convolutions(self, conv: nn.Conv2d | nn.ConvTranspose2d, part: Part, n_units: int) -> None:
        model = nn.Sequential(conv)
        assert neurons(model) == (Norm("0", [part, Part("0.bias", 0)]),)
        assert part.n_groups(conv.weight.shape) == n_units

    def test_units_of_a_transposed_convolution_are_what_one_output_reads(self) -> None:
        """Only the weights of unit i may move output channel i: found by the gradient, not by the layout."""
        conv = nn.ConvTranspose2d(6, 3, 3, groups=3)
        fold = neurons(nn.Sequential(conv))[0].parts[0].fold
        conv(torch.randn(1, 6, 4, 4))[:, 1].sum().backward()
        assert conv.weight.grad is not None
        touched = conv.weight.grad.abs().sum(dim=(1, 2, 3)).nonzero().flatten()
        assert touched.tolist() == list(range(fold, 2 * fold))

    def test_refuses_units_that_no_part_describes(self) -> None:
        with pytest.raises(ValueError, match=r"'0.weight'.*groups=2.*layers"):
            neurons(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)))

    def test_several_weights_in_one_module(self) -> None:
        model = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "heads": nn.MultiheadAttention(4, 2)})
        assert neurons(model) == (
            Norm("rnn.weight_ih_l0[0]", [Part("rnn.weight_ih_l0", 0), Part("rnn.bias_ih_l0", 0)]),
            Norm("rnn.weight_hh_l0[0]", [Part("rnn.weight_hh_l0", 0), Part("rnn.bias_hh_l0", 0)]),
            Norm("heads.in_proj_weight[0]", [Part("heads.in_proj_weight", 0), Part("heads.in_proj_bias", 0)]),
            Norm("heads.out_proj", [Part("heads.out_proj.weight", 0), Part("heads.out_proj.bias", 0)]),
        )

    def test_a_bias_of_another_length_is_no_bias_of_the_units(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2))
        model[0].bias = nn.Parameter(torch.zeros(3))
        assert neurons(model) == (Norm("0", [Part("0.weight", 0)]),)

    def test_shared_weights_once(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
        model[1].weight = model[0].weight
        assert neurons(model) == (Norm("0", [Part("0.weight", 0)]),)
        assert layers(model) == (Norm("0.weight", [Part("0.weight", None)]),)

    def test_frozen_parameters_are_left_out(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model[1].bias.requires_grad_(False)
        assert neurons(model) == (Norm("1", [Part("1.weight", 0)]),)
        assert layers(model) == (Norm("1.weight", [Part("1.weight", None)]),)

    def test_empty_parameters_are_left_out(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            model = nn.Sequential(nn.Linear(0, 2), nn.Linear(2, 2, bias=False))
        assert neurons(model) == (Norm("1", [Part("1.weight", 0)]),)

    @pytest.mark.parametrize("function", [neurons, layers])
    def test_lazy_parameters(self, function: Callable[[nn.Module], tuple[Symmetry, ...]]) -> None:
        with pytest.raises(ValueError, match=r"'0.weight' is lazy.*run the model once"):
            function(nn.Sequential(nn.LazyLinear(3)))


class TestLayers:
    def test_one_group_for_each_tensor(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        assert layers(model) == tuple(
            Norm(name, [Part(name, None)]) for name in ("0.weight", "0.bias", "1.weight", "1.bias")
        )

    def test_a_model_without_parameters(self) -> None:
        assert layers(nn.ReLU()) == neurons(nn.ReLU()) == ()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)),
        nn.Sequential(nn.LSTM(3, 4, bidirectional=True), nn.Bilinear(3, 4, 5)),
        nn.Sequential(nn.ConvTranspose3d(4, 2, 3), nn.LayerNorm([2, 3])),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Linear(2, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_norms_of_all_models_fit_them_and_each_other(model: nn.Module) -> None:
    symmetries = (*neurons(model), *layers(model))
    assert validate(symmetries, shapes_of(model)) == symmetries
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert {symmetry.parts[0].parameter for symmetry in neurons(model)} == matrices


class TestExplain:
    """The text names the parameters, and its formulas are those that the engine and the constraints use."""

    def test_a_rescale(self) -> None:
        inward = [Part("fc1.weight", 0), Part("fc1.bias", 0)]
        outward = [Part("fc2.weight", 1, start=8, fold=4, weight=2)]
        text = Rescale("fc1->fc2", inward, outward).explain()
        unfolded = " ".join(text.split())
        out = "fc2.weight[:,8+4i:12+4i]"
        for formula in (
            "Rescale “fc1->fc2”, a law for each group i",
            f"fc1.weight[i] and fc1.bias[i] are multiplied by α, and {out} is divided by α²",
            f"ψ = (fc1.weight[i], fc1.bias[i], −2·{out}), zero elsewhere",
            f"⟨∇fc1.weight[i], fc1.weight[i]⟩ + ⟨∇fc1.bias[i], fc1.bias[i]⟩ − 2·⟨∇{out}, {out}⟩ = 0",
            f"H ψ + (∇fc1.weight[i], ∇fc1.bias[i], −2·∇{out}) = 0",
            f"Q = |fc1.weight[i]|² + |fc1.bias[i]|² − 2·|{out}|²",
            "Q ← (1 − ηλ)² Q + η²F",
            "Q(t) = e^(−2λt) Q(0) + η ∫₀ᵗ e^(−2λ(t−s)) F(s) ds",
            "ω² = 4λ/(T(1 + β))",
        ):
            assert formula in unfolded

    def test_a_scale(self) -> None:
        text = Scale("conv", [Part("conv.weight", None)]).explain()
        assert "Scale “conv”, one law" in text
        assert "when conv.weight is multiplied by α\n" in text
        assert "H ψ + (∇conv.weight) = 0" in text

    def test_a_translation(self) -> None:
        symmetry = Translation("a, b", [Part("a", 0, weight=2), Part("b", 2, weight=-0.5)])
        text = " ".join(symmetry.explain().split())
        assert "2·s is added to every element of a[i], and −0.5·s is added to every element of b[:,:,i]" in text
        assert "ψ = (2·1 on a[i], −0.5·1 on b[:,:,i])" in text
        assert "2·⟨∇a[i], 1⟩ − 0.5·⟨∇b[:,:,i], 1⟩ = 0" in text
        assert "H ψ = 0" in text
        assert "ω² = 2λ/(T(1 + β))" in text
        assert "|²" not in text

    def test_scattered_indices_are_told(self) -> None:
        inward = [Part("q.weight", 0, fold=2, stride=4, start=8, stop=24), Part("q.bias", 0, stop=4, period=12)]
        text = Rescale("q->k", inward, [Part("k.weight", 0, fold=2, stop=4, period=12)]).explain()
        for line in (
            "in q.weight: the i-th 2 indices 4 apart among 8:24 along axis 0\n",
            "in q.bias: the i-th index among 0:4 of every 12 along axis 0\n",
            "in k.weight: the i-th 2 indices among 0:4 of every 12 along axis 0\n",
            "Q = |q.weight[I]|² + |q.bias[I]|² − |k.weight[I]|²",
        ):
            assert line in text

    def test_groups_of_all_periods_are_told(self) -> None:
        shared = Rescale("qv->k", [Part("qv", 0, stop=2, period=6, fold=2, stride=2)], [Part("k", 0)]).explain()
        assert "in qv: the i-th 2 indices 2 apart among 0:2 of every 6 along axis 0\n" in shared

    def test_a_norm_claims_nothing(self) -> None:
        text = Norm("n", [Part("a", 0)]).explain()
        assert "Q = |a[i]|²" in text
        assert "no symmetry is known" in text
        for heading in ("symmetry ", "generator", "Hessian", "flow"):
            assert f"\n{heading}" not in text

    def test_a_prompt_shows_it_and_lines_are_short(self) -> None:
        parts = [Part(f"blocks.{i}.attention.output.weight", 0) for i in range(20)]
        text = Scale("stream", parts).explain()
        assert repr(text) == str(text)
        assert isinstance(text, str)
        assert max(map(len, text.splitlines())) <= 110
        assert "\N{NO-BREAK SPACE}" not in text
        assert all(text.count(f"blocks.{i}.attention.output.weight[i]") == 6 for i in range(20))

    @pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
    @pytest.mark.parametrize("kind", [Translation, Scale])
    def test_its_discrete_laws_are_the_updates(self, kind: type[Symmetry], momentum: float, nesterov: bool) -> None:
        """The printed recursions, transcribed, follow torch.optim.SGD where the gradient obeys the constraint."""
        eta, decay, tau, translation = 0.1, 0.03, 0.0 if nesterov else 0.4, kind is Translation
        text = kind("s", [Part("p", None)]).explain()
        p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], eta, momentum, tau, decay, nesterov)
        q, pp = self.charge(p, translation), 0.0
        for step in range(6):
            before, g = p.detach().clone(), torch.randn(5, dtype=torch.float64)
            direction = torch.ones_like(before) if translation else before
            p.grad = g - (g @ direction) / (direction @ direction) * direction
            optimizer.step()
            u = (before - p.detach()) / eta
            gain = 1.0 if step == 0 else 1.0 - tau
            F, U = float(p.grad.square().sum()), float(u.square().sum())
            if translation and not momentum:
                assert "Q ← (1 − ηλ) Q;" in text
                q = (1 - eta * decay) * q
            elif translation and not nesterov:
                assert "P ← βP + (1 − τ)λQ, then Q ← Q − ηP" in text
                pp = momentum * pp + gain * decay * q
                q = q - eta * pp
            elif translation:
                assert "P ← βP + λQ, and Q ← Q − η(λQ + βP) with the new P and the old Q" in text
                pp = momentum * pp + decay * q
                q = q - eta * (decay * q + momentum * pp)
            elif not momentum:
                assert "Q ← (1 − ηλ)² Q + η²F" in text
                q = (1 - eta * decay) ** 2 * q + eta**2 * F
            elif not nesterov:
                assert "R = βP + (1 − τ)λQ, then Q ← Q − 2ηR + η²U and P ← R − ηU" in text
                r = momentum * pp + gain * decay * q
                q, pp = q - 2 * eta * r + eta**2 * U, r - eta * U
            else:
                assert "R = βP + λQ, then Q ← Q − 2η(λQ + βR) + η²U and P ← R − ηW" in text
                r = momentum * pp + decay * q
                W = float(u @ optimizer.state[p]["momentum_buffer"])
                q, pp = q - 2 * eta * (decay * q + momentum * r) + eta**2 * U, r - eta * W
            assert q == pytest.approx(self.charge(p, translation), rel=1e-12)

    @staticmethod
    def charge(p: torch.Tensor, translation: bool) -> float:
        return float(p.detach().sum() if translation else p.detach().square().sum())


def test_a_charge_is_what_its_definition_says() -> None:
    w, b, v = torch.randn(4, 6), torch.randn(4), torch.randn(3, 8)
    named = {"w": w, "b": b, "v": v}
    outward = Part("v", axis=1, fold=2, weight=2.0)
    rescale = Rescale("r", inward=[Part("w", axis=0), Part("b", axis=0)], outward=[outward])
    truth = w.double().square().sum(1) + b.double().square()
    out = v.double().view(3, 4, 2).square().sum((0, 2))
    torch.testing.assert_close(rescale.charge(named), truth - 2 * out, rtol=1e-15, atol=1e-14)
    torch.testing.assert_close(rescale.charge(named, magnitude=True), truth + 2 * out, rtol=1e-15, atol=1e-14)
    columns = Translation("t", [Part("w", axis=1)])
    torch.testing.assert_close(columns.charge(named), w.double().sum(0), rtol=1e-15, atol=1e-14)
    torch.testing.assert_close(columns.charge(named, magnitude=True), w.double().abs().sum(0), rtol=1e-15, atol=1e-14)
    with pytest.raises(KeyError, match="b"):
        rescale.charge({"w": w, "v": v})
