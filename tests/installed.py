"""Tries an installed noetherperf, in an environment that has its declared dependencies alone.

    python installed.py [BACKEND]     BACKEND: the one that must step, "cpu" by default

`make wheel` and every job that builds wheels run it. It is no test of pytest's, which such an environment lacks.
"""

import math
import subprocess
import sys
from pathlib import Path

import torch

import noetherperf as nperf


def main(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    twin = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    inward = [nperf.Part("0.weight", axis=0), nperf.Part("0.bias", axis=0)]
    symmetry = nperf.Rescale("hidden", inward=inward, outward=[nperf.Part("2.weight", axis=1)])
    ours = nperf.SGD(model.named_parameters(), lr=0.05, momentum=0.9, symmetries=[symmetry])
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    weight, bias, onward, _ = (p.detach().double() for p in model.parameters())
    expected = weight.square().sum(1) + bias.square() - onward.square().sum(0)
    torch.testing.assert_close(ours.readout()["hidden"].charge, expected, rtol=1e-5, atol=1e-6)
    assert all(math.isfinite(value) for value in ours.readout()["hidden"].discrete.total.tolist())

    state = nperf.backends()
    assert (state["cpu"] == "available") == (backend == "cpu"), state
    command = Path(sys.executable).with_name("noetherperf")
    shown = subprocess.run([command, "info"], capture_output=True, text=True, check=True).stdout
    assert f"backend {backend}" in " ".join(shown.split()), shown
    print(shown)
    print(f"noetherperf {nperf.__version__} from {Path(nperf.__file__).parent}: steps as torch does, with {backend}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cpu"]))
