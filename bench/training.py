"""The table of whole training iterations. Needs nothing but Python."""

from collections.abc import Sequence

from bench.cells import Info, ratio_cell, time_cell
from bench.markdown import Notes, table

TRAIN = "train"  # the suite; each of its cases compares all views
STEPS = "gpu"  # the suite of steps on a GPU
EVERY = 10  # steps between two rows of the recorded variant

#: What tables call the models, and the rules.
NETWORKS = {"train-resnet50": "ResNet-50", "train-gpt2": "GPT-2, 124 million", "train-mlp": "MLP, 10,000 parameters"}
RULES = {"b0.9": "SGD", "b0": "SGD, β = 0", "adamw": "AdamW"}

TITLE = "Whole training iterations: forward, backward and step, × those with torch's fused optimizer"


def training_table(infos: Sequence[Info], notes: Notes) -> str:
    """Whole iterations, as multiples of those with torch's fused optimizer."""
    variants = ("unmeasured", "rows", "both", "recorded")
    head = ["model", "batch", "optimizer", "torch fused", "not measuring", "rows", "both"]
    head.append(f"both, recorded every {EVERY} steps")
    rows = [
        [
            NETWORKS[info["model"]],
            info["batch"],
            RULES[info["rule"]],
            time_cell(info, "fused"),
            *(ratio_cell(info, name, "per fused", notes) for name in variants),
        ]
        for info in infos
    ]
    return table(head, rows)
