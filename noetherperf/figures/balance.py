"""Figure: the matrices that attention heads and linear layers conserve, and their eigenvalues in training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherperf.figures.claims import Claim, Data
from noetherperf.measure.balances import BalanceReadout
from noetherperf.optim.adam import AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.train import Loop, charge_error
from noetherperf.symmetry import Balance, Part

__all__ = ["claims", "compute"]

N_HEADS, HEAD = 4, 8
WIDTH = N_HEADS * HEAD
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-3}),
    "AdamW": (AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
}
HEADS = ("q, k", "v, o")
LINEAR = ("1, 2", "2, 3")
BATCH = 32


class Reader(nn.Module):
    """One block of attention that reads the rows of an image as tokens, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(8, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.squeeze(1)) + self.position
        normed = self.norm(x)
        q, k, v = (f(normed).unflatten(-1, (N_HEADS, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def heads() -> list[Balance]:
    """Those of all heads of a Reader."""

    def rows(name: str) -> list[Part]:
        return [Part(f"{name}.weight", 0), Part(f"{name}.bias", 0)]

    return [
        Balance("q, k", rows("q"), rows("k"), size=HEAD),
        Balance("v, o", rows("v"), [Part("o.weight", 1)], size=HEAD),
    ]


def compute(quick: bool) -> Data:
    """A block of attention under SGD and AdamW, and a linear network of three layers under SGD, in float64.

    Arrays, for each rule ("SGD", "AdamW") and Balance ("q, k", "v, o"), under "rule/balance/…": charge, law, forced and
    rounding [n rows, blocks, n, n], which are X, free + forced, forced, and what the identity misses; scale, the
    largest |entry| of W₁W₁ᵀ and W₂W₂ᵀ; constraint, the largest relative defect of all rows. "rule/steps". The linear
    network's are under "linear/1, 2/…" and "linear/2, 3/…".
    """
    n_steps, every = (200, 10) if quick else (1500, 15)
    data: dict[str, np.ndarray] = {}
    for rule, (kind, options) in RULES.items():
        torch.manual_seed(0)
        model = Reader().double()
        optimizer = kind(model.named_parameters(), **options, symmetries=heads())
        data |= _train(rule, model, optimizer, HEADS, n_steps, every)
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), *(nn.Linear(m, n, bias=False) for m, n in ((64, 16), (16, 16), (16, 10))))
    for p in linear.parameters():
        nn.init.normal_(p, std=0.1)
    pairs = [
        Balance(f"{i}, {i + 1}", [Part(f"{i}.weight", 0)], [Part(f"{i + 1}.weight", 1)]) for i in (1, 2)
    ]  # W₁W₁ᵀ − W₂ᵀW₂ of neighbours
    optimizer = SGD(linear.double().named_parameters(), lr=0.02, momentum=0.9, weight_decay=2e-3, symmetries=pairs)
    return data | _train("linear", linear, optimizer, LINEAR, n_steps, every)


def _train(
    name: str, model: nn.Module, optimizer: MeasuredOptimizer, balances: Sequence[str], n_steps: int, every: int
) -> dict[str, np.ndarray]:
    images = digits.load(dtype=torch.float64)
    loop, rows = Loop(model, optimizer), torch.Generator().manual_seed(0)
    steps, kept = [0], [optimizer.readout().balances]
    for step in range(1, n_steps + 1):
        batch = torch.randint(len(images.train_labels), (BATCH,), generator=rows)
        loop.step(images.train_images[batch], images.train_labels[batch])
        if step % every == 0:
            steps.append(step)
            kept.append(optimizer.readout().balances)
    charge_error(optimizer)

    def series(balance: str, read: Any) -> np.ndarray:
        return torch.stack([read(row[balance]) for row in kept]).numpy()

    data: dict[str, np.ndarray] = {f"{name}/steps": np.array(steps)}
    parameters = dict(model.named_parameters())
    for balance in balances:
        law = kept[-1][balance]
        data |= {
            f"{name}/{balance}/charge": series(balance, lambda x: x.charge),
            f"{name}/{balance}/law": series(balance, lambda x: x.discrete.total),
            f"{name}/{balance}/forced": series(balance, lambda x: x.discrete.forced),
            f"{name}/{balance}/rounding": series(balance, lambda x: x.rounding),
            f"{name}/{balance}/scale": law.symmetry.charge(parameters, magnitude=True).max().detach().numpy(),
            f"{name}/{balance}/constraint": np.array(max(float(_largest(row[balance])) for row in kept)),
        }
    return data


def _largest(law: BalanceReadout) -> Tensor:
    return law.relative_defect.max()


def off_diagonal(x: np.ndarray) -> np.ndarray:
    """The share of matrices [..., n, n] off their diagonals, of Frobenius norms."""
    rest = x * (1.0 - np.eye(x.shape[-1]))
    return np.asarray(np.linalg.norm(rest, axis=(-2, -1)) / np.linalg.norm(x, axis=(-2, -1)))


def missed(data: Data, name: str) -> np.ndarray:
    """What the law misses of the change of each block's X, in the last row; Frobenius norms."""
    charge, law = data[f"{name}/charge"], data[f"{name}/law"]
    change = np.linalg.norm(charge[-1] - charge[0], axis=(-2, -1))
    return np.asarray(np.linalg.norm(charge[-1] - law[-1], axis=(-2, -1)) / change)


def claims(data: Data) -> list[Claim]:
    """Constraints hold in every entry, SGD's law is exact, AdamW's identity is, and much of X is off the diagonal."""
    every = {name.removesuffix("/charge") for name in data if name.endswith("/charge")}
    of_sgd, of_adamw = (sorted(x for x in every if x.startswith("AdamW") == adaptive) for adaptive in (False, True))

    def worst(names: Sequence[str], what: str) -> float:
        found = []
        for name in names:
            error = data[f"{name}/charge"] - data[f"{name}/law"] if what == "law" else data[f"{name}/rounding"]
            found.append(float(np.abs(error).max() / data[f"{name}/scale"]))
        return max(found)

    start, end = (
        float(np.median(np.concatenate([off_diagonal(data[f"SGD/{name}/charge"][row]) for name in HEADS])))
        for row in (0, -1)
    )
    adamw = np.concatenate([missed(data, f"AdamW/{name}") for name in HEADS])
    linear = float(np.median(np.concatenate([off_diagonal(data[f"linear/{name}/charge"][-1]) for name in LINEAR])))
    constraint = max(float(data[f"{name}/constraint"]) for name in every)
    return [
        Claim("largest relative defect of the constraint of any block", constraint, high=1e-13),
        Claim("SGD: largest error of the law in any entry, of the sum of |terms|", worst(of_sgd, "law"), high=1e-13),
        Claim("AdamW: the same of the identity", worst(of_adamw, "identity"), high=1e-13),
        Claim("AdamW: the law misses of the change of a head, median", float(np.median(adamw)), low=0.1),
        Claim("share of a head's matrix off its diagonal, at the start, median of heads", start, low=0.4),
        Claim("at the end", end, low=0.4),
        Claim("and of a pair of linear layers, at the end", linear, low=0.3),
    ]
