"""Gatherers: what parameters have, from the compiled gatherer and from the one in Python."""

import gc
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noetherperf.engines.reader import Gatherer, PythonGatherer, make_gatherer

Make = Callable[[list[Tensor]], Gatherer]
pytestmark = pytest.mark.parametrize("make", [make_gatherer, PythonGatherer], ids=["compiled", "python"])


def parameters(n: int) -> list[Tensor]:
    return [nn.Parameter(torch.randn(2, 3)) for _ in range(n)]


def test_attributes(make: Make) -> None:
    params = parameters(40)
    gatherer = make(params)
    for p in params[::3]:
        p.grad = torch.randn(2, 3)
    for _ in range(2):  # the second time with what was remembered
        grads, missing = gatherer.attributes(params, "grad")
        assert all(found is p.grad for found, p in zip(grads, params, strict=True))
        assert missing == bytes([p.grad is None for p in params])
        for p in params[:20]:
            p.grad = None if p.grad is not None else torch.randn(2, 3)
    assert make([]).attributes([], "grad") == ([], b"")


def test_an_attribute_may_raise(make: Make) -> None:
    params = parameters(2)
    with pytest.raises(AttributeError, match="nothing"):
        make(params).attributes(params, "nothing")


def test_another_number_of_parameters(make: Make) -> None:
    params = parameters(3)
    with pytest.raises(ValueError, match="expected 3 parameters, got 2"):
        make(params).attributes(params[:2], "grad")


def test_items(make: Make) -> None:
    params, stranger = parameters(5), torch.zeros(2)
    gatherer = make(params)
    state: defaultdict[Tensor, Any] = defaultdict(dict)

    def found() -> list[Tensor | None]:
        values, missing = gatherer.items(state, "momentum_buffer")
        assert missing == bytes([x is None for x in values])
        return values

    a, b, c, d = (torch.randn(2, 3) for _ in range(4))
    assert found() == [None] * 5
    state[params[3]] = {"momentum_buffer": a}  # in another order than the parameters
    state[params[0]] = {"step": 1}
    state[stranger] = {"momentum_buffer": b}
    state[params[1]] = UserDict({"momentum_buffer": c})  # no dict, and read as one
    state[params[4]] = {"momentum_buffer": None}
    for _ in range(2):
        values = found()
        assert [values[i] is x for i, x in enumerate((None, c, None, a, None))] == [True] * 5
    state[params[0]]["momentum_buffer"] = d
    del state[params[3]]
    values = found()
    assert [values[i] is x for i, x in enumerate((d, c, None, None, None))] == [True] * 5
    state.clear()
    assert found() == [None] * 5


def test_it_keeps_nothing_alive(make: Make) -> None:
    params = parameters(1)
    params[0].grad = torch.randn(2, 3)
    gatherer, dead = make(params), weakref.ref(params[0].grad)
    gatherer.attributes(params, "grad")
    gatherer.items({params[0]: {"momentum_buffer": params[0].grad}}, "momentum_buffer")
    params[0].grad = None
    gc.collect()
    assert dead() is None
