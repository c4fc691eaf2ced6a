"""A measured run that any version can make, and its measurement in version 2 of the format.

`python tests/version_2.py` writes measurement_version_2.json; it was run with the last version that wrote that format.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Translation

PATH = Path(__file__).with_name("measurement_version_2.json")
N_STEPS = 5


def make() -> tuple[nn.Module, nperf.SGD]:
    net = nn.ModuleDict({"fc1": nn.Linear(3, 2), "fc2": nn.Linear(2, 4, bias=False)}).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_((torch.arange(p.numel(), dtype=torch.float64) + k).cos().view(p.shape))
    rows = [Part("fc1.weight", 0), Part("fc1.bias", 0)]
    symmetries = [
        Rescale("fc1->fc2", inward=rows, outward=[Part("fc2.weight", 1)]),
        Translation("columns", [Part("fc2.weight", 1)]),
        Norm("fc1", [Part("fc1.weight", 1)]),
    ]
    named = list(net.named_parameters())
    groups: list[dict[str, Any]] = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.01}]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}
    return net, nperf.SGD(groups, **options, symmetries=symmetries, backend="reference")


def train(net: nn.Module, optimizer: nperf.SGD, steps: range) -> None:
    """Steps with gradients that are a formula; in the third the learning rate changes."""
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 if step < 3 else 0.05
        for k, p in enumerate(net.parameters()):
            x = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            p.grad = (x + 3 * step + k).sin() + 0.5 * p.detach()
        optimizer.step()


def main() -> None:
    net, optimizer = make()
    train(net, optimizer, range(N_STEPS))
    measured = optimizer.state_dict()["measurement"]
    measured["tensors"] = [[x.tolist() for x in tensors] for tensors in measured["tensors"]]
    PATH.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
