"""Small records for tests of the page."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

import noetherperf as nperf

HOSTILE = "<img src=x onerror=alert(1)>"


def attention(path: Path, *, matrices: bool = True, n_steps: int = 6) -> Path:
    """A record of a Balance "q, k", two heads of four units, beside a norm "rows"."""
    torch.manual_seed(0)
    q, k = (nn.Parameter(torch.randn(8, 5)) for _ in range(2))
    parts = [nperf.Part("q", axis=0)], [nperf.Part("k", axis=0)]
    symmetries = [nperf.Norm("rows", parts[0]), nperf.Balance("q, k", *parts, size=4)]
    optimizer = nperf.SGD([("q", q), ("k", k)], lr=0.003, weight_decay=0.1, symmetries=symmetries)
    x = torch.randn(6, 5)
    with nperf.Recorder(optimizer, path, exists="overwrite", matrices=matrices):
        for _ in range(n_steps):
            optimizer.zero_grad()
            heads = [(x @ w.T).unflatten(-1, (2, 4)) for w in (q, k)]
            torch.einsum("ihu,jhu->hij", *heads).square().mean().backward()
            optimizer.step()
    return path


class Training:
    """A training whose record grows: `step` makes steps, and commits their rows.

    Args:
        path: Of the record.
        lr: Learning rate.
        width: Units of its layers.
        optimizer: The class.
        **options: Of the recorder.
    """

    def __init__(
        self, path: Path, *, lr: float = 0.05, width: int = 8, optimizer: Any = nperf.SGD, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.path = path
        self._inputs, self._targets = torch.randn(32, 6), torch.randint(3, (32,))
        self.model = nn.Sequential(
            nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
        )
        symmetries = [
            nperf.Scale("scale of 0", [nperf.Part("0.weight", axis=0)]),
            nperf.Translation("head", [nperf.Part("3.weight", axis=1)]),
            nperf.Norm(HOSTILE, [nperf.Part("3.weight", axis=0)]),
        ]
        self.optimizer = optimizer(self.model.named_parameters(), lr=lr, weight_decay=0.01, symmetries=symmetries)
        self.recorder = nperf.Recorder(self.optimizer, path, exists="overwrite", **options)

    def step(self, n: int = 1) -> Self:
        for _ in range(n):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self._inputs), self._targets)
            self.recorder.log(loss=loss)
            loss.backward()
            self.optimizer.step()
        self.recorder.flush()
        return self
