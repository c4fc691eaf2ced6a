"""A small network with hand-written symmetries."""

from collections import OrderedDict

from torch import nn

from noetherperf.symmetry import Part, Rescale, Scale, Symmetry, Translation

__all__ = ["digits_network"]


def digits_network(channels: int = 16, hidden: int = 64) -> tuple[nn.Sequential, list[Symmetry]]:
    """A small convolutional network for 8×8 images that has all three kinds of symmetry.

        image ─ conv1 ─ norm1 ─ ReLU ─ conv2 ─ norm2 ─ ReLU ─ pool ─ conv3 ─ ReLU ─ flatten ─
                                                                     fc1 ─ ReLU ─ dropout ─ fc2 ─ softmax

    Scale: BatchNorm divides out the length of the weights into each of its channels. The symmetry is exact for eps = 0;
    with torch's default eps = 1e-5, used here, the defect measures the deviation.
    Rescale: the input of a ReLU unit times α and its output divided by α change nothing. Its input is the unit's row of
    weights and its bias, or BatchNorm's gain and shift; its output is its column in the next layer. Flatten turns a
    channel into its pixels, so one channel of conv3 faces a block of 4·4 columns of fc1.
    Translation: softmax does not change when one number is added to all logits.
    Dropout breaks no symmetry, since all hold under every mask; it keeps the gradients noisy to the end.

    Args:
        channels: Output channels of conv1; conv2 and conv3 have twice as many.
        hidden: Units of fc1.

    Returns:
        The network, from images [batch, 1, 8, 8] to logits [batch, 10], and its symmetries, layer by layer.
    """
    wide = 2 * channels
    pixels = 4 * 4  # 8×8 after pooling
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, channels, 3, padding=1, bias=False),  # BatchNorm would remove a bias again
            norm1=nn.BatchNorm2d(channels),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(channels, wide, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(wide),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(wide, wide, 3, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(wide * pixels, hidden),
            relu4=nn.ReLU(),
            dropout=nn.Dropout(0.5),
            fc2=nn.Linear(hidden, 10),
        )
    )
    symmetries: list[Symmetry] = [
        Scale("conv1", [Part("conv1.weight", axis=0)]),
        Rescale(
            "norm1->conv2",
            inward=[Part("norm1.weight", axis=0), Part("norm1.bias", axis=0)],
            outward=[Part("conv2.weight", axis=1)],
        ),
        Scale("conv2", [Part("conv2.weight", axis=0)]),
        Rescale(
            "norm2->conv3",
            inward=[Part("norm2.weight", axis=0), Part("norm2.bias", axis=0)],
            outward=[Part("conv3.weight", axis=1)],
        ),
        Rescale(
            "conv3->fc1",
            inward=[Part("conv3.weight", axis=0), Part("conv3.bias", axis=0)],
            outward=[Part("fc1.weight", axis=1, fold=pixels)],
        ),
        Rescale(
            "fc1->fc2",
            inward=[Part("fc1.weight", axis=0), Part("fc1.bias", axis=0)],
            outward=[Part("fc2.weight", axis=1)],
        ),
        Translation("fc2", [Part("fc2.weight", axis=1)]),
        Translation("fc2.bias", [Part("fc2.bias", axis=None)]),
    ]
    return model, symmetries
