"""Readers of tensors: addresses and layouts as torch tells them, from the compiled reader and from the one in torch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noetherperf.engines.reader import PythonReader, Reader, make_reader

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


def test_wrong_numbers_of_tensors(make: Callable[[int], Reader]) -> None:
    addresses = np.full((2, 1), 99, np.uint64)
    with pytest.raises(ValueError, match="expected 2 tensors"):
        make(2).read([BASE], addresses, 0)
    assert (addresses == 99).all()
