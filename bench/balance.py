"""What matrices of charges cost: the step of GPT-2 with all heads measured, beside the step alone and the iteration.

    python -m bench.balance [--threads 1] [--rounds 5] [--tokens 1024]

Times are of the processor (all threads together), so that other programs do not count; steps alternate. Memory is what
the measurement keeps. The last column is the share of a whole iteration on so many tokens; larger batches cost less.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import noetherperf as nperf
from bench.networks import GPT2
from noetherperf import Balance, Part

D, HEAD, N_BLOCKS = 768, 64, 12
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD, momentum 0.9": lambda named, **options: nperf.SGD(named, lr=1e-3, momentum=0.9, **options),
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


def processor_time(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def n_bytes(state: dict[str, Any]) -> int:
    """Of all tensors in it."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GPT2()
    tokens = torch.randint(50257, (1, arguments.tokens))

    def backward() -> None:
        model.zero_grad()
        cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1).flatten()).backward()

    iteration = min(processor_time(backward) for _ in range(2))
    balances, twin = heads(), copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    print(f"{torch.__version__}, {torch.get_num_threads()} thread(s); {nperf.cost(model, balances)}")
    print(f"forward and backward on {arguments.tokens} tokens: {iteration:.2f} s")
    for name, make in OPTIMIZERS.items():
        # Each with parameters of its own: a step of the other would be a change made outside of its steps.
        measured = make(twin.named_parameters(), symmetries=balances)
        variants = {"alone": make(model.named_parameters()), "heads": measured}
        for optimizer in variants.values():
            optimizer.step()
        times: dict[str, list[float]] = {key: [] for key in variants}
        for _ in range(arguments.rounds):
            for key, optimizer in variants.items():
                times[key].append(processor_time(optimizer.step))
        alone, all_heads = (median(times[key]) for key in ("alone", "heads"))
        kept = n_bytes(measured.state_dict()) - n_bytes(variants["alone"].state_dict())
        print(
            f"{name}: step {1e3 * alone:.0f} ms, with all heads {1e3 * all_heads:.0f} ms, keeps {kept / 1e6:.0f} MB; "
            f"{100 * (all_heads - alone) / (iteration + alone):.1f} % of an iteration"
        )


if __name__ == "__main__":
    main()
