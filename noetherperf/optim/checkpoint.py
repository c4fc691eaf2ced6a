"""Checkpoints: the format of a measurement, and the checks before anything of a checkpoint is loaded.

    {"version": 3, "rule", "id", "names", "symmetries", "began",
     "openness": {"classes", "reasons", "changes", "by_rule", "digests"},
     "tensors": [{"moments", "translation", "norm", "propagators", "clock"}, one for each device]}

Where a Balance is measured, each device also has the tensors of measure/grams.py, under their names there.

The measurement is that of the whole parameters, however they are sharded. A checkpoint may be damaged, truncated, made
by hand, or of another model. One that cannot be continued is refused with the field's name, and nothing is changed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noetherperf.common.untrusted import load_json, shown
from noetherperf.measure.cells import GramPlan, GramsCopy
from noetherperf.measure.openness import Openness
from noetherperf.measure.plan import N_STATE_VERSION_2, Measurement, Plan
from noetherperf.optim.names import check_order, unwrapped
from noetherperf.optim.torch_state import kind_of
from noetherperf.rules import sgd
from noetherperf.rules.law import Law, Shape
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry, from_json, to_json

VERSION = 3
_TENSORS = ("moments", "translation", "norm", "propagators", "clock")  # in the order of Measurement.tensors()
_DROP = 'drop the measurement (del state_dict["measurement"]) to load the rest and measure anew'


@dataclass(frozen=True)
class Saved:
    """A measurement that was read and checked: of this version, under the optimizer's own names."""

    id: str | None  # None in older versions
    began: bool
    steps: int
    openness: dict[str, Any]
    wholes: list[Measurement]  # one for each device
    grams: list[list[Tensor]]  # of each


# ---- a measurement --------------------------------------------------------------------------------------------------


def write(
    rule: Rule[Any],
    wholes: Sequence[Measurement],
    grams: Sequence[GramsCopy],
    symmetries: Sequence[Symmetry],
    names: Sequence[str | None],
    openness: Openness,
    *,
    identity: str,
    began: bool,
) -> dict[str, Any]:
    """A state_dict's "measurement"; its tensors are copies."""
    return {
        "version": VERSION,
        "rule": rule.name,
        "id": identity,
        "names": list(names),
        "symmetries": to_json(symmetries),
        "began": began,
        "openness": openness.state_dict(),
        "tensors": [
            {name: x.clone() for name, x in zip(_TENSORS, whole.tensors(), strict=True)}
            | {name: x.clone() for name, x in zip(own.plan.shapes, own.tensors, strict=True)}
            for whole, own in zip(wholes, grams, strict=True)
        ],
    }


def read(
    measured: object,
    rule: Rule[Any],
    plans: Sequence[Plan],
    gram_plans: Sequence[GramPlan],
    symmetries: Sequence[Symmetry],
    names: Sequence[str | None],
    openness: Openness,
    groups: Sequence[Mapping[str, Any]],
) -> Saved:
    """Read what `write` wrote, in this version or the one before.

    Args:
        measured: A state_dict's "measurement".
        rule: The optimizer's.
        plans, gram_plans: Of the whole parameters, one for each device.
        symmetries, names, openness: The optimizer's own.
        groups: The parameter groups' options that it was measured with.

    Raises:
        ValueError: It was measured with another rule, other symmetries or parameters, or is damaged; it names the
            field.
    """
    if not isinstance(measured, Mapping):
        raise _refused("", f"must be a dict, got {shown(measured)}")
    version = _field(measured, "version", int)
    if version not in (2, VERSION):
        raise ValueError(
            f"state_dict: its measurement has version {shown(version)}, this is version {VERSION}; {_DROP}"
        )
    saved_rule = _field({"rule": sgd.SGD.name, **measured}, "rule", str)  # the first checkpoints do not have it
    if saved_rule != rule.name:
        raise ValueError(
            f"state_dict: it was measured with the update rule {shown(saved_rule)}, and this optimizer's is "
            f"{rule.name!r}, which has other laws; {_DROP}"
        )
    is_old = version == 2
    saved_names = measured.get("names") if is_old else _field(measured, "names", list)
    if saved_names is not None:
        if not isinstance(saved_names, list) or not all(x is None or isinstance(x, str) for x in saved_names):
            raise _refused('["names"]', f"must be a list of names, got {shown(saved_names)}")
        if len(saved_names) != len(names):
            raise _refused('["names"]', f"has {len(saved_names)} names, but the optimizer has {len(names)} parameters")
        check_order(saved_names, names)
    own_names = _check_symmetries(_field(measured, "symmetries", str), symmetries)
    identity = measured.get("id") if is_old and "id" not in measured else _field(measured, "id", str)
    began = _field(measured, "began", bool)
    state = dict(_field(measured, "openness", dict))
    for field in ("reasons", "changes", "by_rule"):
        if field == "changes" and is_old:
            state.setdefault(field, {})
        if isinstance(values := state.get(field), dict):
            state[field] = {own_names.get(name, name): reason for name, reason in values.items()}
    try:
        openness.check(state)
    except ValueError as error:
        raise _refused('["openness"]', str(error)) from None
    tensors = _field(measured, "tensors", list)
    if len(tensors) != len(plans):
        raise _refused(
            '["tensors"]',
            f"is of {len(tensors)} device(s), but the optimizer's parameters are on {len(plans)}; it was measured on "
            "parameters of other shapes, groups or devices",
        )
    wholes = [
        _read_tensors(f'["tensors"][{i}]', x, plan, groups, is_old=is_old)
        for i, (x, plan) in enumerate(zip(tensors, plans, strict=True))
    ]
    steps = sorted({whole.clock[0].item() for whole in wholes})
    if len(steps) > 1:
        raise _refused('["tensors"]', f"has clocks at different steps ({steps[0]:.0f} and {steps[-1]:.0f})")
    if not began and steps[:1] != [0.0]:
        raise _refused('["began"]', "is False, but its clock counts steps")
    grams = [
        list(_checked(f'["tensors"][{i}]', x, plan.shapes).values())
        for i, (x, plan) in enumerate(zip(tensors, gram_plans, strict=True))
    ]
    return Saved(identity, began, int(steps[0]) if steps else 0, state, wholes, grams)


def _refused(place: str, why: str) -> ValueError:
    return ValueError(f"state_dict: measurement{place} {why}; {_DROP}")


def _field(measured: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in measured:
        raise _refused(f'["{name}"]', "is missing")
    value = measured[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _refused(f'["{name}"]', f"must be of type {kind.__name__}, got {shown(value)}")
    return value


def _check_symmetries(text: str, symmetries: Sequence[Symmetry]) -> dict[str, str]:
    """Saved names of the symmetries -> the optimizer's own; wrappers' prefixes may differ."""
    try:
        theirs, saved = from_json(text), from_json(unwrapped(text))
    except ValueError as error:
        raise _refused('["symmetries"]', f"cannot be read: {error}") from error
    own = from_json(unwrapped(to_json(symmetries)))
    if [s.content for s in saved] != [s.content for s in own]:  # their names may have changed
        common = {s.content for s in saved} & {s.content for s in own}
        differ = {s.name for s in (*saved, *own) if s.content not in common}
        raise ValueError(
            f"state_dict: it was measured with other symmetries (they differ in: {', '.join(sorted(differ)) or 'order'}"
            f"); make the optimizer with the same ones, or {_DROP}"
        )
    return dict(zip((s.name for s in theirs), (s.name for s in symmetries), strict=True))


def _read_tensors(
    place: str, tensors: object, plan: Plan, groups: Sequence[Mapping[str, Any]], *, is_old: bool
) -> Measurement:
    """One device's measurement.

    Raises:
        ValueError: A tensor is missing, of another kind, or has values that no step produces.
    """
    if is_old:
        if not isinstance(tensors, list | tuple) or len(tensors) != len(_TENSORS):
            raise _refused(place, f"must be a list of {len(_TENSORS)} tensors")
        tensors = dict(zip(_TENSORS, tensors, strict=True))
    if not isinstance(tensors, Mapping):
        raise _refused(place, f"must be a dict of tensors, got {shown(tensors)}")
    expected = {
        name: tuple(x.shape)
        for name, x in zip(_TENSORS, Measurement.empty(plan, "meta", len(groups)).tensors(), strict=True)
    }
    if is_old:
        for law, n_rows in N_STATE_VERSION_2.items():
            expected[law.name.lower()] = (n_rows, plan.n_law_segments(law))
    read = Measurement.of(_checked(place, tensors, expected).values())
    _check_values(place, read, plan, groups)
    return Measurement.of_version_2(read.tensors(), plan) if is_old else read


def _checked(place: str, tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these names and shapes.

    Raises:
        ValueError: One is missing, or of another kind or shape.
    """
    for name, shape in expected.items():
        where = f'{place}["{name}"]'
        if name not in tensors:
            raise _refused(where, "is missing")
        x = tensors[name]
        if not isinstance(x, Tensor):
            raise _refused(where, f"must be a tensor, got {shown(x)}")
        if x.dtype != torch.float64 or x.layout != torch.strided or x.is_meta:
            raise _refused(where, f"must be a dense float64 tensor, got {kind_of(x)}")
        if tuple(x.shape) != shape:
            raise _refused(
                where,
                f"must have shape {shape}, got {tuple(x.shape)}: it was measured on parameters of other shapes, groups "
                "or devices",
            )
    return {name: tensors[name].detach() for name in expected}


def _check_values(place: str, read: Measurement, plan: Plan, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a clock or a propagator holds what no step can have left.

    Moments and laws may be NaN, because of a single gradient. A propagator depends on hyperparameters alone. A
    hyperparameter that makes it NaN, such as a NaN learning rate, makes the law's state NaN too, which was multiplied
    by the same matrix, and the group's time. (A translation has no state of its flow law, so that is not checked.)
    """
    clock = f'{place}["clock"]'
    steps, *times = read.clock.tolist()
    if not (math.isfinite(steps) and steps >= 0 and steps.is_integer()):
        raise _refused(clock, f"must count whole steps, got {steps}")
    propagators = read.propagators.cpu()
    for number, (time, group) in enumerate(zip(times, groups, strict=True)):
        if not math.isfinite(time):
            if bool(propagators.isfinite().all()):
                raise _refused(clock, f"has the time {time} for parameter group {number}, but every law went on")
        elif time < 0 and not plan.rule.time_may_fall(plan.rule.options(group)):
            raise _refused(clock, f"has the time {time} for parameter group {number}: a time below zero")
        if time != 0 and steps == 0:
            raise _refused(clock, f"has no step, but the time {time} for parameter group {number}")
    where = f'{place}["propagators"]'
    identity = torch.eye(2, dtype=torch.float64, device="cpu")
    if steps == 0 and not torch.equal(propagators, identity.expand_as(propagators)):
        raise _refused(where, "must be the identity before the first step")
    for view in plan.views:
        for law in Law:
            if (at := view.law_segment[law]) >= 0 and view.n_segments > 0:
                rows = read.states[law][:, at : at + view.n_segments]
                own = _by_propagated(plan.rule.laws[law], rows)
                for matrix, state in zip(propagators[view.tensor, law], own, strict=False):
                    if bool(matrix.isnan().any()) and bool(state.isfinite().all()):
                        raise _refused(where, f"is NaN for the {law.name.lower()} law of a tensor whose state is not")


def _by_propagated(shape: Shape, rows: Tensor) -> list[Tensor]:
    """The rows that each propagated matrix has moved: the discrete law's and, where it keeps any, the flow law's."""
    at = shape.rows.get("flow")
    return [rows] if at is None else [rows[:at], rows[at:]]


# ---- for torch.distributed.checkpoint -------------------------------------------------------------------------------


def pack(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement as tensors of fixed shapes and one JSON text: {"tensors", "about"}."""
    about = {name: value for name, value in measured.items() if name != "tensors"}
    return {"tensors": measured["tensors"], "about": json.dumps(about)}


def unpack(state_dict: object) -> dict[str, Any]:
    """The measurement that `pack` packed.

    Raises:
        ValueError: A field is missing or of another kind.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict: must be a dict, got {shown(state_dict)}")
    for field in ("tensors", "about"):
        if field not in state_dict:
            raise ValueError(f"state_dict: {field!r} is missing; get_measurement_state_dict gives it")
    if not isinstance(state_dict["about"], str):
        raise ValueError(f"state_dict: 'about' must be JSON text, got {shown(state_dict['about'])}")
    about = load_json(state_dict["about"], "state_dict: 'about'")
    if not isinstance(about, dict):
        raise ValueError(f"state_dict: 'about' must be a JSON object, got {shown(about)}")
    return {**about, "tensors": state_dict["tensors"]}
