"""What a search takes: threads, imports, and losses that both kinds of law share."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noetherperf import detect, find_symmetries
from noetherperf.detect import relations
from noetherperf.detect.probe import Probe
from noetherperf.detect.sums import Sums

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("small", [True, False])
def test_threads(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a large model take all threads, the rest takes one; afterwards there are as many as before."""
    seen: dict[str, set[int]] = {"gradients": set(), "relations": set()}
    row, nullity = Sums._row, relations.nullity

    def seen_row(sums: Sums, gradients: Mapping[str, Tensor]) -> Tensor:
        seen["gradients"].add(torch.get_num_threads())
        return row(sums, gradients)

    def seen_nullity(columns: Any) -> int:
        seen["relations"].add(torch.get_num_threads())
        return nullity(columns)

    monkeypatch.setattr(Sums, "_row", seen_row)
    monkeypatch.setattr("noetherperf.detect.search.nullity", seen_nullity)
    monkeypatch.setattr(detect, "SMALL", 1000 if small else 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        find_symmetries(model(), X)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {"gradients": {1 if small else 2}, "relations": {1}}


def test_nothing_is_compiled() -> None:
    """torch._dynamo takes seconds to import."""
    script = (
        "import sys, torch, noetherperf; from torch import nn;"
        "noetherperf.find_symmetries(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), torch.randn(4, 5));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_whole_tensors_are_decided_for_both_kinds_of_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more tensors than losses and an operation has no forward derivative, both take further losses."""

    def none(*arguments: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("noetherperf.detect.probe.Probe.tangents", none)
    monkeypatch.setattr("noetherperf.detect.sums.N_LOSSES", 8)
    monkeypatch.setattr("noetherperf.detect.sums.WORK", 1)
    taken = []
    more = Sums._collect_more

    def counted(sums: Sums, n_losses: int) -> None:
        more(sums, n_losses)
        taken.append((n_losses, sums.n_losses + len(sums._more)))

    monkeypatch.setattr(Sums, "_collect_more", counted)
    deep = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 4))
    symmetries = find_symmetries(deep, X)
    assert "sums of whole tensors" not in symmetries.undecided
    assert "norms of whole tensors" not in symmetries.undecided
    assert len(taken) == 2
    assert all(wanted <= there for wanted, there in taken)
    assert taken[1][1] < taken[0][0] + taken[1][0]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_whole_tensors_are_decided_by_forward_derivatives(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the laws that further losses give, also where the forward pass writes buffers."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        maps = (layer for n in (6, 7, 6) for layer in (nn.Linear(n, 13 - n), norm(13 - n), nn.ReLU()))
        return nn.Sequential(nn.Linear(5, 6), *maps, nn.Linear(7, 40))

    def backward(sums: Sums, n_losses: int) -> None:
        raise AssertionError("went backward")

    plain = find_symmetries(build(), X)
    monkeypatch.setattr("noetherperf.detect.sums.N_LOSSES", 8)
    monkeypatch.setattr("noetherperf.detect.sums.WORK", 1)
    monkeypatch.setattr(Sums, "_collect_more", backward)
    symmetries = find_symmetries(build(), X)
    assert symmetries.undecided == {}
    assert set(symmetries) == set(plain)


def test_there_is_one_gradient_in_memory() -> None:
    probe = Probe(model(), [X], {}, "cross_entropy")
    probe.redraw()
    last: Mapping[str, Tensor] = {}
    for gradients in probe.gradients(3):
        assert last == {}
        assert set(gradients) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        last = gradients


def test_the_batch_is_no_size_of_the_model() -> None:
    """A batch of 4 would cut each axis of 4 n into four maps."""
    wide = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4 * 7), nn.ReLU(), nn.Linear(28, 3))
    assert Probe(wide, [X], {}, "cross_entropy").shapes.slices(28) == set()
