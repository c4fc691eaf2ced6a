"""Time and memory of find_symmetries by size of the model: prints the table of docs/symmetries.md.

Each model is searched in a process of its own. Processor time is that of all its threads, which other programs on the
machine hardly change. Memory is the process's peak during the search less what it had before.

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
from bench.environment import describe, environment
from bench.markdown import seconds, size, table

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


class Bottleneck(nn.Module):
    """A block of a ResNet-50."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(n_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if n_in != 4 * width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def gpt2(width: int, n_layers: int, n_heads: int, vocabulary: int, positions: int) -> tuple[nn.Module, Tensor]:
    return GPT2(width, n_layers, n_heads, vocabulary, positions), torch.randint(vocabulary, (2, TOKENS))


def resnet50() -> tuple[nn.Module, Tensor]:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    n_in = 64
    for stage, n_blocks in enumerate((3, 4, 6, 3)):
        for i in range(n_blocks):
            width = 64 << stage
            blocks.append(Bottleneck(n_in, width, 2 if stage and not i else 1))
            n_in = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 1000)]
    return nn.Sequential(*stem, *blocks, *head), torch.randn(4, 3, 64, 64)


#: How each model and one input are made.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "GPT-2, 4 layers of 128": lambda: gpt2(128, 4, 4, 256, 64),
    "GPT-2, 6 layers of 192": lambda: gpt2(192, 6, 6, 1000, 128),
    "GPT-2, 6 layers of 384": lambda: gpt2(384, 6, 6, 10_000, 512),
    "GPT-2 small": lambda: gpt2(768, 12, 12, 50_257, 1024),
    "ResNet-50": resnet50,
}


def measured(name: str) -> dict[str, float]:
    """Parameters, cost, symmetries and undecided questions of one search; to be run in a fresh process."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_processor = time.perf_counter(), time.process_time()
    found = nperf.find_symmetries(model, example, progress=False)
    took, took_processor = time.perf_counter() - start, time.process_time() - start_processor
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": took,
        "processor": took_processor,
        "bytes": 1024 * (after - before),
        "symmetries": len(found),
        "undecided": len(found.undecided),
    }


def main() -> None:
    """Print the table."""
    rows = []
    for name in MODELS:
        script = f"import json; from bench.search import measured; print(json.dumps(measured({name!r})))"
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        cost = [seconds(found["seconds"]), seconds(found["processor"]), size(found["bytes"])]
        rows.append([name, f"{found['parameters']:,}", *cost, str(found["symmetries"]), str(found["undecided"])])
    print(table(["model", "parameters", "time", "processor time", "memory", "symmetries", "undecided"], rows))
    print(f"\nBy `{COMMAND}` on {describe(environment(cpuinfo.get_cpu_info()['brand_raw']))}.")


if __name__ == "__main__":
    main()
