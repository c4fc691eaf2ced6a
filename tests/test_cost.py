"""The cost on paper against what the engine really keeps and moves."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import noetherperf as nperf
from bench import oracle
from noetherperf import Norm, Part
from noetherperf.engines.cost import N_ADVANCED, N_TAKEN
from noetherperf.rules.law import N_START, Law
from noetherperf.rules.sgd import SGD, Hyper

pytest.importorskip("noetherperf._cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(2000, 700), nn.Linear(700, 300))


def test_memory_is_what_the_engine_keeps() -> None:
    net = model()
    symmetries = [*nperf.neurons(net), Norm("in", [Part("2.weight", 1)])]
    optimizer = nperf.SGD(net.named_parameters(), 0.1, momentum=0.9, symmetries=symmetries, backend="cpu")
    (meter,) = optimizer._prepare()
    predicted = nperf.cost(net, symmetries)
    assert predicted.state == sum(x.numel() * x.element_size() for x in meter.measurement.tensors())
    assert predicted.workspace == meter.engine._workspace.numel() * 8  # type: ignore[attr-defined]
    assert predicted.n_segments == meter.ranks.plan.n_segments
    assert predicted.n_parameters == sum(p.numel() for p in net.parameters())
    assert predicted.step == 20 * predicted.n_parameters


def test_slices_that_are_counted_are_slices_that_are_written() -> None:
    """A poisoned workspace shows what one step writes: every slice of every accumulated moment, nothing else."""
    net = model()
    symmetries = [Norm("in", [Part("2.weight", 1)]), Norm("out", [Part("2.weight", 0)])]
    optimizer = nperf.SGD(net.named_parameters(), 0.1, momentum=0.9, symmetries=symmetries, backend="cpu")
    net(torch.randn(2, 3, 12, 12)).sum().backward()
    optimizer.step()
    (meter,) = optimizer._prepare()
    workspace = meter.engine._workspace  # type: ignore[attr-defined]
    workspace.fill_(torch.nan)
    optimizer.step()
    written = int((~workspace.isnan()).sum())
    assert written > 0
    views = meter.engine._tables.views  # type: ignore[attr-defined]
    counted = sum(int(v["n_slices"] * v["n_segments"]) * N_TAKEN for v in views if v["n_slices"] > 1)
    assert written == counted
    moved = sum(
        int(v["n_segments"]) * (N_TAKEN * (2 + (2 * int(v["n_slices"]) if v["n_slices"] > 1 else 0)) + 2 * 7)
        for v in views
    )
    assert nperf.cost(net, symmetries).measuring == 8 * moved


@pytest.mark.parametrize("law", Law)
def test_rows_that_are_counted_are_rows_that_advance(law: Law) -> None:
    state = torch.ones(SGD.laws[law].n_rows, 3, dtype=torch.float64)
    moments = torch.full((len(SGD.moments), 3), 2.5, dtype=torch.float64)
    oracle.advance(SGD, law, state, moments, Hyper(0.1, momentum=0.9, weight_decay=0.3), age=1)
    moved = [row for row in range(len(state)) if not (state[row] == 1.0).all()]
    assert len(moved) == N_ADVANCED[law]
    assert min(moved) == N_START


def test_shapes_alone_will_do_and_16_bits_move_half() -> None:
    shapes = {"w": (4096, 11008)}
    rows = [Norm("rows", [Part("w", 0)])]
    full, half = nperf.cost(shapes, rows), nperf.cost(shapes, rows, torch.bfloat16)
    assert full.step == 2 * half.step == 20 * 4096 * 11008
    assert full.measuring == half.measuring > 0
    assert half.overhead == 2 * full.overhead
    assert nperf.cost(shapes, rows, momentum=False).step == 12 * 4096 * 11008
    assert nperf.cost(shapes).measuring == 0
    with torch.device("meta"):
        big = nn.Linear(100_000, 50_000, bias=False)
    assert nperf.cost(big, nperf.neurons(big)).n_parameters == 5_000_000_000


def test_symmetries_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="nope"):
        nperf.cost({"w": (3, 4)}, [Norm("x", [Part("nope", 0)])])


def test_it_is_told_at_once() -> None:
    """On the meta device, torch imports sympy for a few operations, which takes a second."""
    script = (
        "import sys, torch, noetherperf as n; pair = n.Balance('a', [n.Part('a', 0)], [n.Part('b', 1)]);"
        "n.cost({'a': (4, 5), 'b': (3, 4)}, [pair, n.Norm('a rows', [n.Part('a', 0)])]);"
        "sys.exit('sympy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
