"""The cost on paper of models that are too large to run: prints a table, and writes it into docs/performance.md.

python -m bench.paper
"""

import torch

import noetherperf as nperf
from bench import page
from noetherperf import Norm, Part

COMMAND = "python -m bench.paper"
RANKS = 8  # rows are shared among so many

#: Weight matrices of one layer, [out features, in features].
LAYERS = {
    "GPT-3 (175B)": {"qkv": (36864, 12288), "proj": (12288, 12288), "up": (49152, 12288), "down": (12288, 49152)},
    "Llama (70B)": {
        "q": (8192, 8192),
        "k": (1024, 8192),
        "v": (1024, 8192),
        "o": (8192, 8192),
        "gate": (28672, 8192),
        "up": (28672, 8192),
        "down": (8192, 28672),
    },
}


def table() -> str:
    """One line a model and view: what one rank's step moves, and what measuring adds."""
    lines = ["| one layer, a rank of eight | view | parameters | groups | a step moves | measuring adds | keeps |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for model, shapes in LAYERS.items():
        shard = {name: (rows // RANKS, cols) for name, (rows, cols) in shapes.items()}
        for view, axes in (("rows", [0]), ("columns", [1]), ("both", [0, 1])):
            norms = [Norm(f"{name}[{axis}]", [Part(name, axis)]) for name in shard for axis in axes]
            c = nperf.cost(shard, norms, torch.bfloat16)
            lines.append(
                f"| {model} | {view} | {c.n_parameters:,} | {c.n_segments:,} | {c.step / 1e9:.3g} GB | "
                f"{100 * c.overhead:.2f} % | {(c.state + c.workspace) / 1e6:.3g} MB |"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the table and put it where the page keeps it."""
    rows = table()
    page.write("cost", COMMAND, f"{rows}\n\nPrinted by `{COMMAND}`.\n")
    print(rows)


if __name__ == "__main__":
    main()
