"""Small models of every family that the detector and the constraints are tested on, each with its batches and loss.

    family = FAMILIES["vgg_bn"]
    model = family.make()                  # float64, seeded, eps of every normalisation 1e-14, in training mode
    inputs, target = family.batch(seed=3)
    loss = family.loss(model(*inputs), target)

Widths differ from layer to layer wherever the architecture lets them, so that a wrong match has the wrong length.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, TOKENS, VOCABULARY = 5, 6, 11
EXACT_EPS = 1e-14


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: Its key in FAMILIES.
        build: Makes the model in float32 with torch's global generator.
        inputs: Makes the example inputs of a batch of n from a generator; floating ones in float64.
        loss_name: The loss as find_symmetries takes it: "cross_entropy" or "mse".
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    loss_name: str = "cross_entropy"

    def make(self, seed: int = 0, eps: float = EXACT_EPS) -> nn.Module:
        """The model in float64; no parameter is left at 0 or 1, where a wrong sign or index could hide."""
        torch.manual_seed(seed)
        model = self.build().double()
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "eps"):
                    module.eps = eps  # type: ignore[assignment]
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        return model

    def example(self, n: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
        """Example inputs for a batch of n."""
        return self.inputs(n, torch.Generator().manual_seed(seed))

    def batch(self, seed: int, n: int = 8) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs and target of a batch that depends on n and the seed alone; the target of "mse" is the input."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.inputs(n, generator)
        if self.loss_name == "mse":
            return inputs, inputs[0]
        if not inputs[0].is_floating_point():
            return inputs, torch.randint(VOCABULARY, inputs[0].shape, generator=generator)
        return inputs, torch.randint(CLASSES, (n,), generator=generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss: squared error, or cross entropy over the last axis."""
        if self.loss_name == "mse":
            return F.mse_loss(output, target)
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def closure(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
        """A function that gives the loss of one fixed batch."""
        inputs, target = self.batch(seed)
        return lambda: self.loss(model(*inputs), target)


def vectors(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n, 6, generator=generator, dtype=torch.float64),)


def images(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64),)


def tokens(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(VOCABULARY, (n, TOKENS), generator=generator),)


# ---- multilayer perceptron and convolutional networks ---------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9),
        nn.ReLU(),
        nn.Linear(9, 7),
        nn.LeakyReLU(0.1),
        nn.Linear(7, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


class VGG(nn.Module):
    """Convolutions with or without BatchNorm, flattened into a classifier with dropout."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 3
        for width in (6, 7, 0, 8, 10, 0):
            if not width:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(n_in, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU())
            n_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(10 * 4, 12),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(12, 9),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(9, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """torchvision's basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1) block."""

    def __init__(self, n_in: int, width: int, n_out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            sizes = [(n_in, width, 1, 1), (width, width + 1, 3, stride), (width + 1, n_out, 1, 1)]
        else:
            sizes = [(n_in, width, 3, stride), (width, n_out, 3, 1)]
        for i, (a, b, kernel, step) in enumerate(sizes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.depth = len(sizes)
        self.downsample = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            if stride != 1 or n_in != n_out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A stem, two stages of two blocks, global average pooling, a linear head."""

    def __init__(self, bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        first, second = (13, 14) if bottleneck else (6, 11)
        self.layer1 = nn.Sequential(
            ResidualBlock(6, 7, first, 1, bottleneck), ResidualBlock(first, 7, first, 1, bottleneck)
        )
        self.layer2 = nn.Sequential(
            ResidualBlock(first, 9, second, 2, bottleneck), ResidualBlock(second, 9, second, 1, bottleneck)
        )
        self.fc = nn.Linear(second, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Separable(nn.Module):
    """A depthwise-separable network (MobileNet v1), with one depthwise convolution that doubles its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise1 = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise1 = nn.Conv2d(6, 8, 1)
        self.depthwise2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8)
        self.pointwise2 = nn.Conv2d(16, 10, 1, bias=False)
        self.bn = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise1(F.relu(self.stem(x))))
        x = F.relu(self.depthwise2(F.relu(self.pointwise1(x))))
        return self.fc(F.relu(self.bn(self.pointwise2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def autoencoder() -> nn.Module:
    """Convolutions down, transposed convolutions up; the output is symmetric under nothing."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 7, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(7, 3, 2, stride=2),
    )


# ---- transformers ---------------------------------------------------------------------------------------------------

WIDTH, HEADS = 12, 2


class FusedAttention(nn.Module):
    """Softmax attention with one projection for queries, keys and values, as in GPT-2 and ViT."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """The pre-LayerNorm block of GPT-2 and ViT, with GELU."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(WIDTH)
        self.attn = FusedAttention(causal)
        self.ln2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Token and position embeddings, two blocks, a head that may be the token embedding itself."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(Block(causal=True), Block(causal=True))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches by a strided convolution, a class token, positions, two blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.Sequential(Block(causal=False), Block(causal=False))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class LlamaAttention(nn.Module):
    """Grouped-query attention (two query heads to a key head) with rotary positions that turn dims (i, i + d/2)."""

    n_heads, n_keys, dim = 4, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, self.n_heads * self.dim, bias=False)
        self.k_proj = nn.Linear(WIDTH, self.n_keys * self.dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, self.n_keys * self.dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.dim, WIDTH, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = 10.0 ** -torch.arange(half, dtype=x.dtype, device=x.device)
        angle = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.dim)).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        k, v = (y.repeat_interleave(self.n_heads // self.n_keys, dim=1) for y in (self.rotate(k), v))
        y = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class LlamaBlock(nn.Module):
    """RMSNorm before attention and before the gated unit (SwiGLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(WIDTH)
        self.attn = LlamaAttention()
        self.post_norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 14, bias=False)
        self.up = nn.Linear(WIDTH, 14, bias=False)
        self.down = nn.Linear(14, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.input_norm(x))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Embedding, two blocks, a last RMSNorm and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(LlamaBlock(), LlamaBlock())
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.layers(self.embed(tokens))))  # type: ignore[no-any-return]


FAMILIES = {
    family.name: family
    for family in (
        Family("mlp", mlp, vectors),
        Family("vgg", functools.partial(VGG, batch_norm=False), images),
        Family("vgg_bn", functools.partial(VGG, batch_norm=True), images),
        Family("resnet_basic", functools.partial(ResNet, bottleneck=False), images),
        Family("resnet_bottleneck", functools.partial(ResNet, bottleneck=True), images),
        Family("separable", Separable, images),
        Family("autoencoder", autoencoder, images, "mse"),
        Family("vit", ViT, images),
        Family("gpt", functools.partial(GPT, tied=False), tokens),
        Family("gpt_tied", functools.partial(GPT, tied=True), tokens),
        Family("llama", Llama, tokens),
    )
}
