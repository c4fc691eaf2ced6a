"""Time and memory of find_symmetries by size of the model: prints a table, and writes it into docs/symmetries.md.

Each model is searched in a process of its own, whose peak of memory less what it had before is the search's.

python -m bench.search
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import cpuinfo
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherperf as nperf
from bench import page
from bench.environment import describe, environment
from bench.markdown import table
from noetherperf.recipes.resnet import ResNet

COMMAND = "python -m bench.search"
TOKENS = 16


class Block(nn.Module):
    """A block of a GPT-2."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """A GPT-2 without dropout; the head is the embedding."""

    def __init__(self, width: int, n_layers: int, n_heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.ln_f(self.blocks(x)), self.wte.weight)


def gpt2(width: int, n_layers: int, n_heads: int, vocabulary: int, positions: int) -> tuple[nn.Module, Tensor]:
    return GPT2(width, n_layers, n_heads, vocabulary, positions), torch.randint(vocabulary, (2, TOKENS))
