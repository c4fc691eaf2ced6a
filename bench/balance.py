"""What matrices of charges cost: iterations of GPT-2 with all heads measured, beside the same ones without.

    python -m bench.balance [--threads 2] [--rounds 5] [--tokens 1024] [--batch 1] [--only SGD]

An iteration is forward, backward and step, by the clock on the wall and in processor time (all threads together, which
other programs change less). Both variants train a copy of the network of their own on the same batch; they take turns,
and the other begins in the next round. Shares compare two times of one round: what the whole iterations took longer,
which is noisy, and what their steps took longer, both relative to an iteration. Medians, with quartiles in brackets.
Defaults take about 3 minutes and 6 GB on two cores.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

import noetherperf as nperf
from bench.networks import GPT2
from bench.timing import Spread
from noetherperf import Balance, Part

D, HEAD, N_BLOCKS = 768, 64, 12
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda named, **options: nperf.SGD(named, lr=1e-3, momentum=0.9, **options),
    "AdamW": lambda named, **options: nperf.AdamW(named, lr=1e-4, **options),
}


def heads(d: int = D, size: int = HEAD, n_blocks: int = N_BLOCKS) -> list[Balance]:
    """Queries and keys, and values and output, of every head: two Balances a layer."""
    found = []
    for i in range(n_blocks):
        q, k, v = (
            [Part(f"blocks.{i}.qkv.{name}", 0, start=j * d, stop=(j + 1) * d) for name in ("weight", "bias")]
            for j in range(3)
        )
        found.append(Balance(f"{i}: q, k", q, k, size=size))
        found.append(Balance(f"{i}: v, o", v, [Part(f"blocks.{i}.out.weight", 1)], size=size))
    return found


class Times(NamedTuple):
    """Seconds by the clock on the wall, and of the processor, all threads together."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Times":
        return cls(time.perf_counter(), time.process_time())

    def since(self, begin: "Times") -> "Times":
        return Times(self.wall - begin.wall, self.processor - begin.processor)


class Trainer:
    """A GPT-2 in training; the same whatever its optimizer measures.

    Args:
        make: The optimizer, of named parameters.
        tokens: [batch, length].
    """

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], tokens: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.model, self.tokens = GPT2(), tokens
        self.optimizer = make(self.model.named_parameters())

    def iterate(self) -> tuple[Times, Times]:
        """Make an iteration; the times of all of it, and of its step."""
        begin = Times.now()
        self.model.zero_grad()
        cross_entropy(self.model(self.tokens).flatten(0, 1), self.tokens.roll(-1, -1).flatten()).backward()
        middle = Times.now()
        self.optimizer.step()
        end = Times.now()
        return end.since(begin), end.since(middle)


def n_bytes(state: dict[str, Any]) -> int:
    """Of all tensors in it."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))


def shown(values: Sequence[float]) -> str:
    median, low, high = (100 * x for x in Spread.of(values))
    return f"{median:+.2f} % [{low:+.2f}, {high:+.2f}]"


def compare(name: str, balances: list[Balance], tokens: torch.Tensor, n_rounds: int) -> None:
    """Time an optimizer with and without heads, and print it."""
    make = OPTIMIZERS[name]
    variants = {
        "alone": Trainer(make, tokens),
        "heads": Trainer(partial(make, symmetries=balances), tokens),
    }
    for trainer in variants.values():  # the first iterations make buffers, and the first steps start laws
        trainer.iterate()
    times: dict[str, list[tuple[Times, Times]]] = {key: [] for key in variants}
    for number in range(n_rounds):
        for key in list(variants)[:: -1 if number % 2 else 1]:
            times[key].append(variants[key].iterate())
    kept = n_bytes(variants["heads"].optimizer.state_dict()) - n_bytes(variants["alone"].optimizer.state_dict())
    print(f"{name}: a checkpoint has {kept / 1e6:.0f} MB more")
    for clock in ("wall", "processor"):
        alone, heads = ([[getattr(x, clock) for x in pair] for pair in times[key]] for key in variants)
        rounds = list(zip(alone, heads, strict=True))
        for k, what in enumerate(("iteration", "step")):
            one, other = (Spread.of([pair[k] for pair in found]).median for found in (alone, heads))
            added = shown([(b[k] - a[k]) / a[0] for a, b in rounds])
            print(
                f"  {clock:9} {what:9} {one:7.3f} s, with all heads {other:7.3f} s: {added} of an iteration", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence, at most 1024")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--only", choices=OPTIMIZERS, help="one optimizer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = torch.randint(50257, (arguments.batch, arguments.tokens), generator=torch.Generator().manual_seed(0))
    balances = heads()
    with torch.device("meta"):
        cost = nperf.cost(GPT2(), balances)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {arguments.batch} × {arguments.tokens} tokens"
    )
    print(cost, flush=True)
    for name in [arguments.only] if arguments.only else OPTIMIZERS:
        compare(name, balances, tokens, arguments.rounds)


if __name__ == "__main__":
    main()
