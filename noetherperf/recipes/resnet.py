"""ResNet-18 with hand-written symmetries: what skip connections change."""

import torch
from torch import Tensor, nn

from noetherperf.recipes.settings import SettingError
from noetherperf.symmetry import Part, Rescale, Scale, Symmetry, Translation

__all__ = ["ResNet18", "resnet18"]

#: Channels of the four layers of two blocks each. From the second layer on, the first block halves the image.
LAYERS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1×1 convolution where the size of the image changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            if stride > 1
            else None
        )

    def forward(self, stream: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.bn1(self.conv1(stream)).relu()))
        return torch.relu(branch + (stream if self.downsample is None else self.downsample(stream)))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016), with torchvision's parameter names and a 3×3 stem without pooling for small images.

    Args:
        n_classes: Number of logits.
        in_channels: Channels of the images.
        channels: Channels of the four layers.
    """

    def __init__(self, n_classes: int, in_channels: int, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        before = channels[0]
        for index, size in enumerate(channels, start=1):
            blocks = (BasicBlock(before, size, 1 if index == 1 else 2), BasicBlock(size, size, 1))
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
            before = size
        self.fc = nn.Linear(before, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, n_classes] of images [batch, in_channels, height, width]."""
        stream = self.bn1(self.conv1(images)).relu()
        for index in range(1, len(LAYERS) + 1):
            stream = self.get_submodule(f"layer{index}")(stream)
        logits: Tensor = self.fc(stream.mean((2, 3)))
        return logits


def resnet18(
    *, n_classes: int = 10, in_channels: int = 1, image_size: int = 64, width: float = 1.0
) -> tuple[ResNet18, list[Symmetry]]:
    """Seventeen convolutions with BatchNorm, three shortcuts with BatchNorm, and a linear layer (He et al., 2016).

    Every convolution is followed by a BatchNorm, which divides out the length of the weights into each channel: a
    Scale, exact for eps = 0. Inside a block, only the second convolution reads the first BatchNorm: a Rescale as in
    VGG. Between blocks, one Rescale for each layer has all writers of the stream's channels (gains and shifts of
    BatchNorms) as its inward parts and all readers as its outward parts. Where a shortcut has a BatchNorm, two shifts
    are added and only their sum matters: a Translation with a minus sign. Softmax gives the Translations of the linear
    layer.

    Args:
        n_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a side, at least 8. The network does not depend on it.
        width: Factor on all channels.

    Returns:
        The network, for images [batch, in_channels, image_size, image_size], and its symmetries, layer by layer.

    Raises:
        ValueError: image_size is below 8.
    """
    if image_size < 8:
        raise SettingError("image_size", f"must be at least 8, for ResNet-18 halves it three times; got {image_size}")
    first, second, third, fourth = (max(1, round(width * channels)) for channels in LAYERS)
    model = ResNet18(n_classes, in_channels, (first, second, third, fourth))

    symmetries: list[Symmetry] = [_scale("conv1")]
    writers = ["bn1"]
    for index in range(1, len(LAYERS) + 1):
        layer = f"layer{index}"
        readers = []
        for block in (f"{layer}.0", f"{layer}.1"):
            symmetries += [
                _scale(f"{block}.conv1"),
                Rescale(None, inward=_affine(f"{block}.bn1"), outward=[_columns(f"{block}.conv2")]),
                _scale(f"{block}.conv2"),
            ]
            writers.append(f"{block}.bn2")
            if block.endswith(".0") and index > 1:
                shortcut = f"{block}.downsample"
                symmetries += [
                    _scale(f"{shortcut}.0"),
                    Translation(
                        None, [Part(f"{block}.bn2.bias", axis=0), Part(f"{shortcut}.1.bias", axis=0, weight=-1.0)]
                    ),
                ]
                writers.append(f"{shortcut}.1")
            else:
                readers.append(f"{block}.conv1")
        following = f"layer{index + 1}.0"
        readers += ["fc"] if index == len(LAYERS) else [f"{following}.conv1", f"{following}.downsample.0"]
        symmetries.append(
            Rescale(
                None,
                inward=[part for writer in writers for part in _affine(writer)],
                outward=[_columns(reader) for reader in readers],
            )
        )
        writers = []
    symmetries += [
        Translation(None, [Part("fc.weight", axis=1)]),
        Translation(None, [Part("fc.bias", axis=None)]),
    ]
    return model, symmetries


def _scale(convolution: str) -> Scale:
    return Scale(None, [Part(f"{convolution}.weight", axis=0)])


def _affine(norm: str) -> list[Part]:
    return [Part(f"{norm}.weight", axis=0), Part(f"{norm}.bias", axis=0)]


def _columns(reader: str) -> Part:
    return Part(f"{reader}.weight", axis=1)
