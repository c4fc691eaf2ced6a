"""Watches: which tensors were written or replaced, from the compiled watch and from the one in Python."""

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from noetherperf.engines.reader import PythonWatch, Watch, make_watch

Make = Callable[[Sequence[int]], Watch]
pytestmark = pytest.mark.parametrize("make", [make_watch, PythonWatch], ids=["compiled", "python"])


def watched(make: Make, tensors: Sequence[Tensor | None], which: Sequence[int]) -> Watch:
    watch = make(which)
    for i, x in enumerate(tensors):
        watch.know(i, x)
    return watch


def test_writes_are_seen(make: Make) -> None:
    tensors: list[Tensor | None] = [nn.Parameter(torch.ones(2, 3)) if i % 4 else None for i in range(40)]
    which = [i for i in range(40) if i % 3]
    watch = watched(make, tensors, which)
    assert watch.look(tensors) == []
    with torch.no_grad():
        for i in (1, 2, 3, 38):
            tensors[i].mul_(2.0)  # type: ignore[union-attr]
    assert watch.look(tensors) == [1, 2, 38]
    assert watch.look(tensors) == [1, 2, 38]  # looking is not knowing
    watch.know(2, tensors[2])
    watch.know(3, tensors[3])
    assert watch.look(tensors) == [1, 38]
    tensors[4], tensors[5], tensors[7] = torch.ones(1), None, torch.ones(2, 3)
    assert watch.look(tensors) == [1, 4, 5, 7, 38]
    for i in (1, 4, 5, 7, 38):
        watch.know(i, tensors[i])
    assert watch.look(tensors) == []
    assert watched(make, [], []).look([]) == []


def test_what_is_not_known_yet_is_none(make: Make) -> None:
    assert make([0, 1]).look([None, torch.ones(1)]) == [1]


@pytest.mark.parametrize("n_writes", [0, 300])
def test_own_writes_are_expected(make: Make, n_writes: int) -> None:
    tensors: list[Tensor | None] = [torch.ones(2) for _ in range(5)]
    for x in tensors:
        for _ in range(n_writes):
            x.add_(1)  # type: ignore[union-attr]
    watch = watched(make, tensors, [1, 2, 4])
    watch.expect(bytes([0, 0, 1, 0, 0]))
    torch.autograd.graph.increment_version([x for i, x in enumerate(tensors) if i != 2 and x is not None])
    assert watch.look(tensors) == []
    watch.expect(bytes(5))
    assert watch.look(tensors) == [1, 2, 4]


def test_another_tensor_at_the_same_address_is_another(make: Make) -> None:
    for _ in range(20):
        tensors: list[Tensor | None] = [torch.zeros(1000)]
        watch, address = watched(make, tensors, [0]), id(tensors[0])
        tensors.clear()
        tensors.append(torch.zeros(1000))
        assert watch.look(tensors) == [0]
        if id(tensors[0]) == address:
            return
    pytest.skip("no tensor came to lie where another had lain")


@pytest.mark.parametrize("placed", [True, False])
def test_moved_elements_are_seen_if_wanted(make: Callable[..., Watch], placed: bool) -> None:
    tensors = [torch.zeros(()) for _ in range(4)]
    watch = make(range(4), placed=placed)
    for i, x in enumerate(tensors):
        watch.know(i, x)
    tensors[1].data = tensors[1].data.clone()
    tensors[2].data = tensors[2].data  # to the same place
    assert watch.look(tensors) == ([1] if placed else [])
    watch.know(1, tensors[1])
    assert watch.look(tensors) == []
    torch.autograd.graph.increment_version(tensors)
    watch.expect(bytes(4))
    assert watch.look(tensors) == []


def test_it_keeps_nothing_alive(make: Make) -> None:
    tensors: list[Tensor | None] = [torch.zeros(3)]
    watch, dead = watched(make, tensors, [0]), weakref.ref(tensors[0])
    watch.look(tensors)
    tensors[0] = None
    gc.collect()
    assert dead() is None
    assert watch.look(tensors) == [0]


def test_it_has_no_weak_reference_to_what_is_kept(make: Callable[..., Watch]) -> None:
    tensors: list[Tensor | None] = [torch.zeros(3), None, torch.zeros(3)]
    watch = make([0, 1, 2], kept=True)
    for i, x in enumerate(tensors):
        watch.know(i, x)
    assert not any(weakref.getweakrefcount(x) for x in tensors if x is not None)
    assert watch.look(tensors) == []
    tensors[1] = tensors[2]
    torch.utils.swap_tensors(tensors[0], torch.zeros(2).add_(1))
    assert watch.look(tensors) == [0, 1]


def test_tensors_without_a_counter_are_told_by_identity(make: Make) -> None:
    with torch.inference_mode():
        tensors: list[Tensor | None] = [torch.zeros(3), torch.zeros(3)]
    watch = watched(make, tensors, [0, 1])
    watch.expect(bytes(2))
    assert watch.look(tensors) == []
    tensors.reverse()
    assert watch.look(tensors) == [0, 1]


def test_lists_that_are_too_short(make: Make) -> None:
    watch = make([0, 2])
    with pytest.raises(ValueError, match="expected at least 3 tensors, got 2"):
        watch.look([None, None])
    with pytest.raises(ValueError, match="expected at least 3 tensors, got 2"):
        watch.expect(bytes(2))
