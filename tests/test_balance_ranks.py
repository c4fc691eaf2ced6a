"""Matrices of charges over ranks: what shards add up to is what one process measures; what does not add up is told."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from test_distributed import Distributed, fsdp, mesh_1d, run_world
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import noetherperf as nperf
from noetherperf import Balance, Part

N_STEPS = 5
BALANCES = [Balance("pair", [Part("fc1.weight", 0), Part("fc1.bias", 0)], [Part("fc2.weight", 1)], size=2)]
WHOLE = [Balance("pair", BALANCES[0].inward, BALANCES[0].outward)]


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(fc1=nn.Linear(6, 4), fc2=nn.Linear(4, 3))).double()


def make_optimizer(net: nn.Module, balances: list[Balance] = BALANCES) -> Any:
    return nperf.SGD(net.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.05, symmetries=balances)


def train(net: nn.Module, optimizer: Any, steps: range, share: tuple[int, int] = (0, 1)) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=random, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=random)
        optimizer.zero_grad()
        cross_entropy(net(x.chunk(share[1])[share[0]]), y.chunk(share[1])[share[0]]).backward()
        optimizer.step()


def told(optimizer: Any) -> list[Tensor]:
    law = optimizer.readout().balances["pair"]
    return [law._matrices, law.relative_defect, torch.tensor(law.closed)]


def tensor_parallel(net: nn.Module) -> Distributed:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(net, mesh_1d(), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return Distributed(net, (0, 1))


def measure(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, distribute in {"fsdp": fsdp, "tensor parallel": tensor_parallel}.items():
        net = make_net()
        over = distribute(net)
        optimizer = make_optimizer(net)
        train(over.net, optimizer, range(N_STEPS), over.share)
        saved = copy.deepcopy(optimizer.state_dict()["measurement"])
        ended = told(optimizer)
        optimizer.load_measurement(saved)
        resumed = told(optimizer)
        train(over.net, optimizer, range(N_STEPS, 2 * N_STEPS), over.share)
        found[name] = {"ended": ended, "resumed": resumed, "on": told(optimizer), "saved": saved}
    net = make_net()
    fsdp(net)
    try:
        make_optimizer(net, WHOLE)
        found["refused"] = "not"
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_shards_add_up(tmp_path: Path) -> None:
    net = make_net()
    optimizer = make_optimizer(net)
    train(net, optimizer, range(N_STEPS))
    ended, saved = told(optimizer), optimizer.state_dict()["measurement"]
    train(net, optimizer, range(N_STEPS, 2 * N_STEPS))
    on = told(optimizer)

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.allclose(x.double(), y.double(), rtol=0, atol=1e-13) for x, y in zip(a, b, strict=True))

    for found in run_world(2, measure, tmp_path):
        for name in ("fsdp", "tensor parallel"):
            assert same(found[name]["ended"], ended), name
            assert same(found[name]["resumed"][:1], ended[:1]), name
            assert same(found[name]["on"], on), name
            for key in ("gram_state", "gram_defect", "gram_sq_g", "gram_propagators"):
                mine, alone = found[name]["saved"]["tensors"][0][key], saved["tensors"][0][key]
                assert torch.allclose(mine, alone, rtol=0, atol=1e-13), (name, key)
        assert "fc1.weight' is sharded so that units of one block are on several ranks" in found["refused"]
