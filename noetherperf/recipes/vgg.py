"""VGG-16 with hand-written symmetries: the paper's network, at any width and image size."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from noetherperf.recipes.settings import SettingError
from noetherperf.symmetry import Part, Rescale, Scale, Symmetry, Translation

__all__ = ["centre", "vgg16"]

#: Channels of the convolutions, block by block. Each block ends with a pooling that halves the image.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 512


def vgg16(
    *,
    batch_norm: bool,
    n_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 64,
    width: float = 1.0,
    dropout: float = 0.5,
) -> tuple[nn.Sequential, list[Symmetry]]:
    """Thirteen convolutions and three linear layers, ReLU between all of them (Simonyan and Zisserman, 2015).

    Without BatchNorm, a Rescale joins each layer to the next. With BatchNorm, the length of the weights into each
    channel is divided out (a Scale, exact for eps = 0), and the inward parts of the Rescale are BatchNorm's gain and
    shift. Softmax gives the Translations.

    Args:
        batch_norm: Whether a BatchNorm stands between each convolution (then without bias) and its ReLU.
        n_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a side, a multiple of 32.
        width: Factor on all channels and hidden units.
        dropout: Probability of dropout before the second and the third linear layer.

    Returns:
        The network, for images [batch, in_channels, image_size, image_size], and its symmetries, layer by layer.

    Raises:
        ValueError: image_size is no multiple of 32.
    """
    if image_size < 32 or image_size % 32:
        raise SettingError("image_size", f"must be a multiple of 32, for VGG-16 halves it five times; got {image_size}")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    layers: list[tuple[str, bool]] = []  # name, and whether a BatchNorm follows
    channels = in_channels
    for block, sizes in enumerate(BLOCKS, start=1):
        for index, size in enumerate(sizes, start=1):
            name, out = f"{block}_{index}", max(1, round(width * size))
            modules[f"conv{name}"] = nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm)
            if batch_norm:
                modules[f"norm{name}"] = nn.BatchNorm2d(out)
            modules[f"relu{name}"] = nn.ReLU()
            layers.append((name, batch_norm))
            channels = out
        modules[f"pool{block}"] = nn.MaxPool2d(2)
    pixels, hidden = (image_size // 32) ** 2, max(1, round(width * HIDDEN))
    modules |= OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * pixels, hidden),
        relu6=nn.ReLU(),
        dropout6=nn.Dropout(dropout),
        fc2=nn.Linear(hidden, hidden),
        relu7=nn.ReLU(),
        dropout7=nn.Dropout(dropout),
        fc3=nn.Linear(hidden, n_classes),
    )
    model = nn.Sequential(modules)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    symmetries: list[Symmetry] = []
    readers = [f"conv{name}" for name, _ in layers[1:]] + ["fc1"]
    for (name, normalised), reader in zip(layers, readers, strict=True):
        if normalised:
            symmetries.append(Scale(f"conv{name}", [Part(f"conv{name}.weight", axis=0)]))
        writer = f"norm{name}" if normalised else f"conv{name}"
        fold = pixels if reader == "fc1" else 1
        symmetries.append(_rescale(writer, Part(f"{reader}.weight", axis=1, fold=fold)))
    symmetries += [_rescale("fc1", Part("fc2.weight", axis=1)), _rescale("fc2", Part("fc3.weight", axis=1))]
    symmetries += [
        Translation("fc3", [Part("fc3.weight", axis=1)]),
        Translation("fc3.bias", [Part("fc3.bias", axis=None)]),
    ]
    return model, symmetries


@torch.no_grad()
def centre(model: nn.Sequential, images: Tensor) -> None:
    """Initialise the biases such that every unit has mean zero over some images, as with BatchNorm.

    In a deep and narrow ReLU network without BatchNorm, the units' means grow from layer to layer and hide the
    differences between images, so training stays at chance for long. Weights and the last layer do not change. The
    symmetries hold for any biases.

    Args:
        model: From `vgg16`, without BatchNorm; changed in place.
        images: A batch of the training images.

    Source: The centring part of data-dependent initialisation, Salimans and Kingma (2016), arXiv:1602.07868.
    """
    signal = images
    for module in list(model)[:-1]:
        if isinstance(module, nn.Dropout):
            continue
        signal = module(signal)
        if isinstance(module, nn.Conv2d | nn.Linear):
            others = [axis for axis in range(signal.ndim) if axis != 1]
            mean = signal.mean(others, keepdim=True)
            assert module.bias is not None, "a network without BatchNorm has biases everywhere"
            module.bias -= mean.flatten()
            signal = signal - mean


def _rescale(writer: str, outward: Part) -> Rescale:
    reader = outward.parameter.partition(".")[0]
    inward = [Part(f"{writer}.weight", axis=0), Part(f"{writer}.bias", axis=0)]
    return Rescale(f"{writer}->{reader}", inward=inward, outward=[outward])
