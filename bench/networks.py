"""Networks that whole training iterations are timed on, built from torch.nn, and the batches that they learn from.

Their parameters have the shapes of bench.cases.MODELS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

# ---- ResNet-50 ------------------------------------------------------------------------------------------------------


def _convolution(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """With its BatchNorm."""
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut."""

    def __init__(self, n_in: int, width: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.first = _convolution(n_in, width, 1)
        self.second = _convolution(width, width, 3, stride)
        self.third = _convolution(width, 4 * width, 1)
        self.shortcut = _convolution(n_in, 4 * width, 1, stride) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.third(self.second(self.first(x).relu()).relu())
        return torch.relu(branch + self.shortcut(x))


def resnet50(n_classes: int = 1000) -> nn.Module:
    """He et al. (2016), the stride in the 3×3 convolution."""
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    n_in = 64
    for width, n_blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(n_blocks):
            layers.append(Bottleneck(n_in, width, stride if block == 0 else 1, projects=block == 0))
            n_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention to what came before, and a two-layer network, each after a LayerNorm and beside the stream."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm_2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        stream: Tensor = x + self.down(gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return stream


class GPT2(nn.Module):
    """Radford et al. (2019), without dropout; the output head shares the embedding."""

    def __init__(self, d: int = 768, n_blocks: int = 12, n_tokens: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_tokens, d), nn.Embedding(length, d)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(d, d // 64) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, n_tokens] of tokens [batch, length]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return logits


# ---- a small one ----------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """10,000 parameters in six tensors."""
    return nn.Sequential(nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 50), nn.ReLU(), nn.Linear(50, 10))


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network and its batches: random inputs, random classes.

    Fields:
        network: Makes it.
        shape: Of one input: numbers, or with `is_text` tokens.
        n_classes: Of each output.
        unit: What an input is called.
        batch: Inputs of an iteration, on a CPU and on a GPU.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_classes: int
    unit: str
    batch: tuple[int, int]
    is_text: bool = False

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of inputs, and the class of each output."""
        shape = (self.size(device), *self.shape)
        generator = torch.Generator().manual_seed(0)
        classes = torch.randint(self.n_classes, shape if self.is_text else shape[:1], generator=generator)
        inputs = classes if self.is_text else torch.randn(shape, generator=generator)
        return inputs.to(device), classes.roll(-1, -1).to(device)

    def size(self, device: torch.device) -> int:
        return self.batch[device.type != "cpu"]

    def described(self, device: torch.device) -> str:
        """The batch in words."""
        return f"{self.size(device)} {self.unit}"


#: By the names that cases give them.
TASKS = {
    "train-resnet50": Task(resnet50, (3, 64, 64), 1000, "images of 64×64", (8, 256)),
    "train-gpt2": Task(GPT2, (128,), 50257, "× 128 tokens", (1, 64), is_text=True),
    "train-mlp": Task(mlp, (64,), 10, "inputs of 64 numbers", (32, 32)),
}
