"""The plan's views and parts, the tiles over them, and the tables' agreement with csrc."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noetherperf import Norm, Part, Rescale, Translation
from noetherperf.engines import rows, tiling
from noetherperf.engines.backends import BACKENDS
from noetherperf.engines.tiling import CPU, CUDA, TRITON, Tables, Tiling, make_tables
from noetherperf.measure.plan import make_plan
from noetherperf.rules.adam import ADAM
from noetherperf.rules.given import GIVEN
from noetherperf.rules.law import Law
from noetherperf.rules.moments import COMMON, Moment
from noetherperf.rules.rule import Rule
from noetherperf.rules.sgd import SGD

_cpu = pytest.importorskip("noetherperf._cpu")


@pytest.mark.parametrize("name", ["TENSOR", "DIM", "VIEW", "TILE", "SPAN", "GROUP", "COMPONENT"])
def test_tables_mirror_the_structs(name: str) -> None:
    dtype, layout = getattr(rows if hasattr(rows, name) else tiling, name), dict(_cpu.layouts()[name])
    assert dtype.itemsize == layout.pop("__size__")
    assert dtype.fields is not None
    assert {field: (offset, kind.itemsize) for field, (kind, offset, *_) in dtype.fields.items()} == layout


@pytest.mark.parametrize("rule", [SGD, ADAM, GIVEN], ids=lambda rule: rule.name)
def test_compiled_rules_mirror_the_rules(rule: Rule[Any]) -> None:
    compiled = _cpu.rules()[rule.name]
    assert list(rule.moment_rows) == compiled["moments"]
    assert len(rule.coefficients) == compiled["n_coefficients"]
    assert len(rule.buffers) == compiled["n_buffers"]


def test_every_rule_of_the_backend_is_compiled() -> None:
    rules = BACKENDS["cpu"].rules
    assert rules is not None
    assert {rule.name for rule in rules} <= {*_cpu.rules()}


def test_the_common_moments_come_first() -> None:
    assert [moment.name.lower() for moment in Moment] == [pair.name for pair in COMMON]


def test_parts_on_one_axis_share_a_view_at_the_finest_fold() -> None:
    plan = make_plan(
        [
            Norm("folded", [Part("w", 1, fold=4)]),
            Norm("sliced", [Part("w", 1, start=6, stop=10, fold=2)]),
            Translation("whole", [Part("w", None)]),
        ],
        ["w"],
        [(5, 12)],
    )
    (view,) = plan.views
    assert (view.axis, view.fold, view.n_segments) == (1, 2, 6)
    assert view.law_segment == (0, 0)
    values = torch.arange(6.0)
    (folded,), (sliced,), (whole,) = plan.parts["folded"], plan.parts["sliced"], plan.parts["whole"]
    assert folded.reduce(values).tolist() == [1.0, 5.0, 9.0]
    assert sliced.reduce(values).tolist() == [3.0, 4.0]
    assert whole.reduce(values).tolist() == [15.0]
    assert (folded.n_elements, sliced.n_elements, whole.n_elements) == (20, 10, 60)


def test_groups_of_distant_indices_are_sums_of_segments() -> None:
    plan = make_plan(
        [
            Norm("rotary", [Part("w", 0, fold=2, stride=2)]),
            Norm("keys of each head", [Part("w", 0, start=2, stop=4, period=4)]),
            Norm("heads", [Part("b", 0, start=4, stop=8, fold=4, period=8)]),
            Norm("queries of one key", [Part("w", 0, start=2, stop=4, fold=2, stride=2, period=4)]),
            Norm("pairs of all heads", [Part("b", 0, start=4, stop=8, fold=4, stride=2, period=8)]),
        ],
        ["w", "b"],
        [(8, 3), (16,)],
    )
    assert [(view.axis, view.fold, view.n_segments) for view in plan.views] == [(0, 1, 8), (0, 1, 16)]
    (rotary,), (keys,), (heads,) = plan.parts["rotary"], plan.parts["keys of each head"], plan.parts["heads"]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    assert rotary.reduce(values).tolist() == [5.0, 10.0, 80.0, 160.0]
    assert keys.reduce(values).tolist() == [4.0, 8.0, 64.0, 128.0]
    (one_key,), (pairs,) = plan.parts["queries of one key"], plan.parts["pairs of all heads"]
    assert one_key.reduce(values).tolist() == [68.0, 136.0]
    assert heads.reduce(values.repeat_interleave(2)).tolist() == [24.0, 384.0]
    assert pairs.reduce(values.repeat_interleave(2)).tolist() == [204.0, 204.0]
    assert (rotary.n_elements, keys.n_elements, heads.n_elements) == (6, 3, 4)


def test_a_whole_tensor_alone_is_one_segment() -> None:
    plan = make_plan([Norm("whole", [Part("w", None)])], ["w"], [(7, 3)])
    assert [(view.axis, view.fold, view.n_segments) for view in plan.views] == [(0, 7, 1)]
    assert plan.n_law_segments(Law.NORM) == 1
    assert plan.n_law_segments(Law.TRANSLATION) == 0


def test_parts_of_tensors_elsewhere_are_left_to_other_plans() -> None:
    symmetry = Rescale("a->b", inward=[Part("a", 0)], outward=[Part("b", 1)])
    plan = make_plan([symmetry], ["b"], [(4, 3)])
    assert [planned.part for planned in plan.parts["a->b"]] == [symmetry.parts[1]]


SHAPE = st.lists(st.integers(0, 40), min_size=0, max_size=4).map(tuple)


def assert_slices_are_apart(tables: Tables) -> None:
    """Slices of lines fill the workspace; the views by position have one place between them."""
    (tensor,) = tables.tensors
    end = 0
    for by_row, lines in ((1, int(tensor["n_rows"])), (0, int(tensor["n_cols"]))):
        views = tables.views[tables.views["by_row"] == by_row]
        if len(views):
            assert {*views["workspace"].tolist()} == {end}
            n_values = int(views["n_slices"][0]) * len(SGD.moments) * lines
            end += n_values if tensor["dtype"] == tiling.DTYPES[torch.float64] else -(-n_values // 2)
    assert tables.workspace == end


@given(
    shape=SHAPE,
    axes=st.sets(st.integers(0, 3)),
    permute=st.randoms(),
    stretch=st.sampled_from([1, 97, 1500]),
    cut=st.sampled_from([CPU, CUDA, TRITON]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_tiles_cover_every_element_once(
    shape: tuple[int, ...],
    axes: set[int],
    permute: random.Random,
    stretch: int,
    cut: Tiling,
    dtype: torch.dtype,
) -> None:
    if shape:
        shape = (shape[0] * stretch, *shape[1:])
    order = list(range(len(shape)))
    permute.shuffle(order)
    p = torch.empty([shape[axis] for axis in order], device="meta", dtype=dtype).permute(
        [order.index(axis) for axis in range(len(shape))]
    )
    parts = [Part("w", axis) for axis in sorted(axes) if axis < len(shape) and shape[axis]]
    plan = make_plan([Norm(str(part.axis), [part]) for part in parts], ["w"], [tuple(p.shape)])
    tables = make_tables(plan, [p], [0], cut)
    (tensor,) = tables.tensors
    assert tensor["dense"]
    assert tensor["n_rows"] * tensor["n_cols"] == p.numel()
    rows, cols = (
        sorted({(t["row_begin"], t["row_end"]) for t in tables.tiles}),
        sorted({(t["col_begin"], t["col_end"]) for t in tables.tiles}),
    )
    assert len(tables.tiles) == len(rows) * len(cols)
    for ranges, length in ((rows, tensor["n_rows"]), (cols, tensor["n_cols"])):
        if p.numel():
            assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), length]
    for view in tables.views:
        by_row = bool(view["by_row"])
        assert view["n_slices"] == len(cols if by_row else rows)
        if not by_row and p.numel():
            assert view["n_slices"] <= cut.max_slices
            if cut.by_line:  # lines are folded later
                assert all(end - begin <= cut.tile_cols // p.element_size() for begin, end in cols)
            elif view["inner"] * view["n_segments"] == tensor["n_cols"]:  # cuts fall between segments
                assert all(begin % view["inner"] == 0 for begin, _ in cols)
            else:
                assert len(cols) == 1
        if by_row and not cut.by_line:
            assert all(begin % view["inner"] == 0 for begin, _ in rows)
    if cut.by_line:
        assert_slices_are_apart(tables)
    covered = [(span["view"], i) for span in tables.spans for i in range(span["begin"], span["end"])]
    assert covered == [(v, i) for v, view in enumerate(tables.views) for i in range(view["n_segments"])]


@pytest.mark.parametrize("axes", [[0], [1], [0, 1]])
def test_the_workspace_grows_with_segments_not_parameters(axes: list[int]) -> None:
    def per_segment(shape: tuple[int, int]) -> float:
        plan = make_plan([Norm(str(axis), [Part("w", axis)]) for axis in axes], ["w"], [shape])
        return make_tables(plan, [torch.empty(shape, device="meta")], [0]).workspace / plan.n_segments

    assert per_segment((1 << 20, 1 << 20)) <= CPU.max_slices * len(SGD.moments) * 2
