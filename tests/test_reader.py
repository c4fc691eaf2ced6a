"""Readers of tensors: addresses and layouts as torch tells them, from the compiled reader and from the one in torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from noetherperf.engines.reader import PythonReader, Reader, _readable, make_reader

pytestmark = pytest.mark.parametrize("make", [make_reader, PythonReader], ids=["compiled", "python"])

BASE = torch.arange(120.0)
TENSORS: list[Tensor | None] = [
    nn.Parameter(torch.randn(3, 4)),
    None,
    torch.zeros(0, 5),
    torch.tensor(1.0),
    BASE[7:].view(-1),
    BASE.view(10, 12)[1::2, 3:].t(),
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.zeros(4, dtype=torch.bfloat16),
    torch.zeros(2, 3, 1, 2, 3, 1, 2, dtype=torch.float64),
]


def test_addresses(make: Callable[[int], Reader]) -> None:
    addresses = np.full((len(TENSORS), 3), 99, np.uint64)
    make(len(TENSORS)).read(TENSORS, addresses, 1)
    expected = [0 if x is None else 1 if x.numel() == 0 else x.data_ptr() for x in TENSORS]
    assert addresses[:, 1].tolist() == expected
    assert (addresses[:, [0, 2]] == 99).all()


def test_what_is_remembered_is_not_told_again(make: Callable[[int], Reader]) -> None:
    reader, addresses = make(len(TENSORS)), np.zeros((len(TENSORS), 1), np.uint64)
    there = [i for i, x in enumerate(TENSORS) if x is not None]
    assert reader.read(TENSORS, addresses, 0) == there
    assert reader.read(TENSORS, addresses, 0) == there  # not for having been read
    for i in there:
        tensor = TENSORS[i]
        assert tensor is not None
        reader.remember(i, tensor)
    assert reader.read(TENSORS, addresses, 0) == []
    moved = [None if x is None else x.clone(memory_format=torch.preserve_format) for x in TENSORS]
    moved[5] = TENSORS[5]  # a clone would be dense
    assert reader.read(moved, addresses, 0) == []
    assert addresses[0, 0] == moved[0].data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 4, dtype=torch.float16),
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(4, 3),
        torch.zeros(4, 3).t(),
        torch.zeros(12),
        torch.zeros(3, 4, 1),
        torch.zeros(3, 8)[:, :4],
    ],
    ids=["half", "int", "shape", "strides", "flat", "dimension", "slice"],
)
def test_another_layout_is_told(make: Callable[[int], Reader], other: Tensor) -> None:
    reader, addresses = make(2), np.zeros((2, 1), np.uint64)
    same = torch.ones(3, 4)
    for i in range(2):
        reader.remember(i, same)
    assert reader.read([same, other], addresses, 0) == [1]
    reader.remember(1, other)
    assert reader.read([same, other], addresses, 0) == []
    assert reader.read([same, same], addresses, 0) == [1]


@pytest.mark.parametrize("other", [torch.eye(3).to_sparse(), "no tensor"], ids=["sparse", "string"])
def test_what_is_no_strided_tensor_has_no_layout(make: Callable[[int], Reader], other: Tensor) -> None:
    reader, addresses = make(1), np.full((1, 1), 99, np.uint64)
    assert reader.read([other], addresses, 0) == [0]
    assert addresses.item() == 0


@pytest.mark.parametrize("n_dims", range(8))
@pytest.mark.parametrize("kind", ["negated", "zeros", "wrapper", "emptied", "meta", "its own dispatch"])
def test_what_is_not_the_numbers_at_its_address_has_no_layout(
    make: Callable[[int], Reader], kind: str, n_dims: int
) -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            return func(*args, **(kwargs or {}))

    plain = torch.ones([2] * n_dims)
    odd = {
        "negated": lambda: torch._neg_view(plain),
        "zeros": lambda: torch._efficientzerotensor(plain.shape),
        "wrapper": lambda: TwoTensor(plain, plain),
        "emptied": lambda: torch.ones([2] * n_dims),
        "meta": lambda: plain.to("meta"),
        "its own dispatch": lambda: Tensor._make_subclass(Doubled, plain),
    }[kind]()
    if kind == "emptied":
        odd.untyped_storage().resize_(0)
    reader, addresses = make(2), np.full((2, 1), 99, np.uint64)
    for i in range(2):
        reader.remember(i, plain)
    for x in (odd, plain, nn.Parameter(plain), odd):
        changed = reader.read([plain, x], addresses, 0)
        assert changed == ([1] if x is odd else [])
        assert addresses[:, 0].tolist() == [plain.data_ptr(), 0 if x is odd else plain.data_ptr()]


def test_this_torch_says_quickly_what_is_negated(make: Callable[[int], Reader]) -> None:
    """Else a step with thousands of tensors takes a tenth longer."""
    if make is make_reader and type(make(1)) is not PythonReader:
        assert _readable().is_quick


def test_without_that_torch_is_asked(make: Callable[[int], Reader]) -> None:
    if type(make(1)) is PythonReader:
        return
    from noetherperf._cpu import Readable, TensorReader

    slow = Readable(Tensor, nn.Parameter, [BASE], [BASE])  # no two tensors that differ
    assert not slow.is_quick
    reader, addresses = TensorReader(2, Tensor, slow), np.zeros((2, 1), np.uint64)
    for i in range(2):
        reader.remember(i, BASE)
    assert reader.read([BASE, torch._neg_view(BASE)], addresses, 0) == [1]
    assert addresses[:, 0].tolist() == [BASE.data_ptr(), 0]


def test_wrong_numbers_of_tensors(make: Callable[[int], Reader]) -> None:
    addresses = np.full((2, 1), 99, np.uint64)
    with pytest.raises(ValueError, match="expected 2 tensors"):
        make(2).read([BASE], addresses, 0)
    assert (addresses == 99).all()
