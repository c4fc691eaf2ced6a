"""Torch's part of an optimizer's state_dict, and the checks before torch loads it.

{"state": {parameter's number: {name: tensor}}, "param_groups": [options of each]}
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from noetherperf.common.untrusted import shown
from noetherperf.optim.names import check_order, names_in
from noetherperf.rules.rule import Rule


def kind_of(x: Tensor) -> str:
    """The kind of a tensor, for an error message."""
    layout = "" if x.layout == torch.strided else f", {x.layout}"
    return f"{x.dtype}{layout}{' on meta' if x.is_meta else ''}"


def check_state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rule: Rule[Any]) -> None:
    """Raise if torch would load a state that no step can use, or would fail with a misleading error.

    Every state that torch's optimizer of this kind writes passes: buffers of another float dtype or device are
    converted, and None means no buffer yet.

    Args:
        state_dict: {"state", "param_groups"}.
        groups, rule: The optimizer's own.

    Raises:
        ValueError: With the field's name; or it has the parameters in another order, or groups of other sizes.
    """
    state = _entry(state_dict, "state", Mapping, "dict")
    saved_groups = _entry(state_dict, "param_groups", list | tuple, "list")
    for g, group in enumerate(saved_groups):
        place = f"param_groups[{g}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"state_dict: {place} must be a dict, got {shown(group)}")
        ids = group.get("params")
        if not isinstance(ids, list | tuple) or not all(isinstance(i, int | str) for i in ids):
            raise ValueError(f"state_dict: {place}['params'] must be a list of parameters' numbers, got {shown(ids)}")
        given = group.get("param_names", [])
        if not isinstance(given, list | tuple) or not all(x is None or isinstance(x, str) for x in given):
            raise ValueError(f"state_dict: {place}['param_names'] must be a list of names, got {shown(given)}")
    if len(saved_groups) != len(groups):
        raise ValueError("loaded state dict has a different number of parameter groups")  # in torch's words
    if any(len(theirs["params"]) != len(own["params"]) for theirs, own in zip(saved_groups, groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    names = names_in(groups)
    check_order(names_in(saved_groups), names)
    for g, group in enumerate(saved_groups):
        place = f"param_groups[{g}]"
        for option in rule.option_names:
            if option not in group and option not in dict(rule.late_options):
                raise _missing(place, option)
        for option in rule.number_options:
            _check_number(f"{place}[{option!r}]", _option(place, group, option))
        for option in rule.pair_options:
            _check_pair(f"{place}[{option!r}]", _option(place, group, option))
    ids = [i for group in saved_groups for i in group["params"]]
    places = {key: i for i, key in enumerate(ids)}
    if len(places) < len(ids):
        raise ValueError(f"state_dict: param_groups name a parameter twice in their 'params', {shown(ids)}")
    params = [p for group in groups for p in group["params"]]
    for key, slot in state.items():
        if key in places:
            i = places[key]
            _check_slot(f"state[{shown(key)}]", slot, params[i], names[i], rule)
        elif not isinstance(key, str) or key in map(str, ids) or any(isinstance(i, str) for i in ids):
            # else it is an entry of other code, which torch keeps as it is
            raise ValueError(
                f"state_dict: state[{shown(key)}] is of no parameter: param_groups have {shown(ids)} in their 'params'"
            )


def _entry(state_dict: Mapping[str, Any], field: str, kind: Any, called: str) -> Any:
    if field not in state_dict:
        raise ValueError(f"state_dict: {field!r} is missing; an optimizer's state_dict() has it")
    if not isinstance(state_dict[field], kind):
        raise ValueError(f"state_dict: {field!r} must be a {called}, got {shown(state_dict[field])}")
    return state_dict[field]


def _missing(place: str, option: str) -> ValueError:
    return ValueError(f"state_dict: {place}[{option!r}] is missing; it is the checkpoint of another kind of optimizer")


def _option(place: str, group: Mapping[str, Any], option: str) -> Any:
    if option not in group:
        raise _missing(place, option)
    return group[option]


def _check_number(where: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.layout != torch.strided or value.is_complex() or value.is_meta:
            raise ValueError(f"state_dict: {where} must be a number, got {kind_of(value)} of {value.numel()}")
    elif not isinstance(value, Real):
        raise ValueError(f"state_dict: {where} must be a number, got {shown(value)}")
    else:
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"state_dict: {where} is out of range, {shown(value)}") from None


def _check_pair(where: str, pair: object) -> None:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"state_dict: {where} must be two numbers, got {shown(pair)}")
    for i, value in enumerate(pair):
        _check_number(f"{where}[{i}]", value)


def _check_slot(place: str, slot: object, p: Tensor, name: str | None, rule: Rule[Any]) -> None:
    """Raise if an entry cannot be the state of its parameter."""
    whose = f"state_dict: {place}" + (f" of {name!r}" if name else "")
    if not isinstance(slot, dict):
        raise ValueError(f"{whose} must be a dict, got {shown(slot)}")
    for key, value in slot.items():
        if isinstance(value, Tensor) and value.is_meta and not p.is_meta:
            raise ValueError(f"{whose}: {shown(key)} is on meta and holds no numbers; load the checkpoint to a device")
    steps = 0 if rule.step_key is None or not slot else _count(whose, slot, rule.step_key)
    for key in rule.buffers:
        buffer = slot.get(key)
        if buffer is None and steps > 0 and key not in rule.late_buffers:
            raise ValueError(
                f"{whose}: {key} is missing, but its {rule.step_key!r} counts steps, which have written it"
            )
        if buffer is None:
            continue
        if not isinstance(buffer, Tensor):
            raise ValueError(f"{whose}: {key} must be a tensor, got {shown(buffer)}")
        if not buffer.is_floating_point() or buffer.layout != torch.strided:
            raise ValueError(f"{whose}: {key} must be a dense tensor of floats, got {kind_of(buffer)}")
        if buffer.shape != p.shape:
            raise ValueError(
                f"{whose}: {key} has shape {tuple(buffer.shape)}, but the parameter has {tuple(p.shape)}; is it a "
                "checkpoint of another model?"
            )


def _count(whose: str, slot: Mapping[str, Any], key: str) -> int:
    """The steps that an entry counts."""
    if key not in slot:
        raise ValueError(f"{whose}: {key!r} is missing; it counts the steps, and bias corrections need it")
    count = slot[key]
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.layout != torch.strided or count.is_complex() or count.is_meta:
            raise ValueError(f"{whose}: {key} must be a number, got {kind_of(count)} of {count.numel()}")
        count = count.item()
    steps = math.nan
    if isinstance(count, Real):
        with suppress(OverflowError):
            steps = float(count)
    if not steps.is_integer() or steps < 0:
        raise ValueError(f"{whose}: {key} must be a whole number of steps, got {shown(count)}")
    return int(steps)
