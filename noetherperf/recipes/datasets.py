"""Image data sets: Tiny ImageNet and CIFAR-10 from their folders, digits enlarged, and synthetic images of any size.

Nothing is downloaded. Each data set has a training and a test part of pairs (image, label): float32 [channels, size,
size] with mean about 0 and standard deviation about 1 over the training part, and an int. Augmentation of training
images: padding by an eighth of their size, a random crop, and a horizontal flip with probability ½ (not of digits).
"""

import importlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from noetherperf.common.paths import local_path
from noetherperf.recipes import digits
from noetherperf.recipes.settings import SettingError

__all__ = ["DATASETS", "ImageData", "Images", "cifar10", "enlarged_digits", "load", "synthetic", "tiny_imagenet"]

Item = tuple[Tensor, int]

TINY_IMAGENET_SIZE = 64
# Mean and standard deviation of the training part's red, green and blue, of 0 to 1.
TINY_IMAGENET_COLOURS = (0.480, 0.448, 0.397), (0.276, 0.269, 0.282)
CIFAR10_COLOURS = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class Images(Dataset[Item]):
    """Images that are read on access, normalised, and optionally augmented.

    Args:
        read: Image number -> image [channels, size, size], floating point, or uint8, whose 0 to 255 become 0 to 1.
        labels: One per image.
        colours: Mean and standard deviation for normalisation, one per channel; None: no normalisation.
        crop, mirror: Whether to take a random crop of the padded image, and to flip at random.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        labels: Sequence[int],
        *,
        colours: tuple[Sequence[float], Sequence[float]] | None = None,
        crop: bool = False,
        mirror: bool = False,
    ) -> None:
        self.labels = list(labels)
        self._read, self._colours, self._crop, self._mirror = read, colours, crop, mirror

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        image = self._read(index)
        if image.dtype == torch.uint8:
            image = image.float() / 255
        if self._colours is not None:
            mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in self._colours)
            image = (image - mean) / std
        if self._crop:
            size = image.shape[-1]
            border = max(1, size // 8)
            top, left = torch.randint(2 * border + 1, (2,)).tolist()
            image = nn.functional.pad(image, (border,) * 4)[:, top : top + size, left : left + size]
        if self._mirror and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image.contiguous(), self.labels[index]


@dataclass(frozen=True)
class ImageData:
    """A data set: its two parts, and the sizes that a network for it needs."""

    train: Images
    test: Images
    n_classes: int
    channels: int
    image_size: int

    def loaders(
        self, batch_size: int, *, workers: int = 0, pin_memory: bool = False
    ) -> tuple[DataLoader[Item], DataLoader[Item]]:
        """Batches of the training part, shuffled, and of the test part, in order, read by worker processes."""
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "pin_memory": pin_memory}
        return DataLoader(self.train, shuffle=True, **options), DataLoader(self.test, **options)


# ---- Tiny ImageNet ---------------------------------------------------------------------------------------------------


class _Files:
    """Reads image files by number."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __call__(self, index: int) -> Tensor:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = _rgb(image)
        except OSError as error:  # PIL's errors for other files and truncated images are OSErrors too
            raise ValueError(f"{path}: cannot be read as an image ({error}); unpack the archive again") from error
        if pixels.shape[:2] != (TINY_IMAGENET_SIZE, TINY_IMAGENET_SIZE):
            size = TINY_IMAGENET_SIZE
            raise ValueError(
                f"{path}: expected {size}×{size} pixels, got {pixels.shape[1]}×{pixels.shape[0]}; unpack the "
                "archive again"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Any) -> NDArray[Any]:
    """The stored colours of a PIL image of any mode, [height, width, 3]: uint8, or floats from 0 to 1 for 16 bits.

    Raises:
        OSError: Its pixels have 32 bits, with an unknown value for white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # PIL clips these
        grey = np.asarray(image).astype(np.float32) / 65535
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.mode in ("I", "F"):
        raise OSError("its pixels have 32 bits and no known range; save it with 8 or 16")
    if "transparency" in image.info:  # PIL warns where a palette's colours are read without their transparency
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def tiny_imagenet(folder: Path | str, *, augment: bool = True) -> ImageData:
    """Tiny ImageNet from its unpacked archive: 200 classes, 500 training and 50 validation images of 64×64 each.

        wnids.txt                        the classes, one a line; labels number them in alphabetical order
        train/<class>/images/*.JPEG
        val/val_annotations.txt          name, class and box of each image, separated by tabs
        val/images/*.JPEG

    The archive's test images have no labels, so the validation images are the test part. A folder with fewer classes
    or images is accepted. Image files are opened on access.

    Args:
        folder: The folder that holds wnids.txt, usually tiny-imagenet-200.
        augment: Crop and mirror the training images.

    Raises:
        FileNotFoundError: A file or folder is missing; the message says what was expected where.
        ValueError: val_annotations.txt cannot be read; on access, an image cannot be read.
    """
    folder = local_path(folder, "folder")
    layout = "Tiny ImageNet's folder holds wnids.txt, train/<class>/images/*.JPEG, val/val_annotations.txt, val/images"
    _require(folder, folder.is_dir(), "a folder", layout)
    wnids = folder / "wnids.txt"
    _require(wnids, wnids.is_file(), "the list of classes", layout)
    classes = sorted(set(wnids.read_text(encoding="utf-8").split()))
    _require(wnids, bool(classes), "one class a line, not an empty file,", layout)
    label_of = {name: label for label, name in enumerate(classes)}

    train_paths: list[Path] = []
    train_labels: list[int] = []
    for name in classes:
        images = folder / "train" / name / "images"
        _require(images, images.is_dir(), f"the images of class {name}", layout)
        found = sorted(path for path in images.glob("*.JPEG") if not path.name.startswith("."))  # ._a.JPEG of macOS
        _require(images, bool(found), f"*.JPEG files of class {name}", layout)
        train_paths += found
        train_labels += [label_of[name]] * len(found)

    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    _require(annotations, annotations.is_file(), "the validation labels", layout)
    _require(images, images.is_dir(), "the validation images", layout)
    test_paths: list[Path] = []
    test_labels: list[int] = []
    present = {path.name for path in images.iterdir()}
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise ValueError(
                f"{annotations}, line {number}: expected an image's name and a class of wnids.txt with a tab between, "
                f"got {line!r}"
            )
        _require(images / fields[0], fields[0] in present, "a validation image (val_annotations.txt names it)", layout)
        test_paths.append(images / fields[0])
        test_labels.append(label_of[fields[1]])
    _require(annotations, bool(test_paths), "one validation image a line, not an empty file,", layout)

    colours = TINY_IMAGENET_COLOURS
    return ImageData(
        Images(_Files(train_paths), train_labels, colours=colours, crop=augment, mirror=augment),
        Images(_Files(test_paths), test_labels, colours=colours),
        n_classes=len(classes),
        channels=3,
        image_size=TINY_IMAGENET_SIZE,
    )


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _NumbersUnpickler(pickle.Unpickler):
    """Loads containers, numbers, bytes and numpy arrays only, so no code can run."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file holds")
        if name == "_reconstruct":  # one function with an old and a new name
            return importlib.import_module("numpy._core.multiarray")._reconstruct
        return getattr(np, name)


def _cifar10_file(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels [n, 3, 32, 32] and labels of one of the archive's files."""
    _require(path, path.is_file(), "a file of the python archive", _CIFAR10_LAYOUT)
    try:
        with path.open("rb") as file:
            content = _NumbersUnpickler(file, encoding="bytes").load()
        pixels, labels = content[b"data"], [int(label) for label in content[b"labels"]]
        good = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * 32 * 32) and set(labels) <= set(range(10))
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path}: no file of CIFAR-10's python archive ({error}); unpack the archive again") from error
    if not good:
        raise ValueError(
            f"{path}: expected b'data', uint8 [n, 3072], and b'labels', n numbers from 0 to 9; got {pixels.dtype} "
            f"{list(pixels.shape)} and {len(labels)} labels; unpack the archive again"
        )
    return pixels.reshape(-1, 3, 32, 32), labels


_CIFAR10_LAYOUT = (
    "CIFAR-10's python archive unpacks to cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch"
)


def cifar10(folder: Path | str, *, augment: bool = True) -> ImageData:
    """CIFAR-10 from its unpacked python archive: 50,000 training and 10,000 test images of 32×32, ten classes.

    The archive's files are pickles, and a pickle can run code when it is loaded. They are read by an unpickler that
    accepts numpy arrays, bytes, numbers, lists and dicts, and refuses everything else.

    Args:
        folder: cifar-10-batches-py, or the folder that holds it.
        augment: Crop and mirror the training images.

    Raises:
        FileNotFoundError: A file is missing; the message says what was expected where.
        ValueError: A file is broken, or refers to anything but numpy arrays.
    """
    folder = local_path(folder, "folder")
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    _require(folder, folder.is_dir(), "a folder", _CIFAR10_LAYOUT)
    batches = [_cifar10_file(folder / f"data_batch_{number}") for number in range(1, 6)]
    pixels = torch.from_numpy(np.concatenate([batch for batch, _ in batches]))
    labels = [label for _, some in batches for label in some]
    test_pixels, test_labels = _cifar10_file(folder / "test_batch")
    colours = CIFAR10_COLOURS
    return ImageData(
        Images(pixels.__getitem__, labels, colours=colours, crop=augment, mirror=augment),
        Images(torch.from_numpy(test_pixels).__getitem__, test_labels, colours=colours),
        n_classes=10,
        channels=3,
        image_size=32,
    )


# ---- data sets without a folder --------------------------------------------------------------------------------------


def enlarged_digits(image_size: int = 32, *, seed: int = 0, augment: bool = False) -> ImageData:
    """The digits of recipes.digits, enlarged to any size.

    Args:
        image_size: Pixels of a side.
        seed: Draws the split.
        augment: Crop the training images. They are not mirrored: a mirrored digit is no digit.
    """
    data = digits.load(seed, image_size=image_size)
    return ImageData(
        Images(data.train_images.__getitem__, data.train_labels.tolist(), crop=augment),
        Images(data.test_images.__getitem__, data.test_labels.tolist()),
        n_classes=10,
        channels=1,
        image_size=image_size,
    )


class _Drawn:
    """Draws an image on access: the pattern of its class plus noise, the same at each access."""

    def __init__(self, patterns: NDArray[np.float32], labels: Sequence[int], seed: tuple[int, int]) -> None:
        self.patterns, self.labels, self.seed = patterns, labels, seed

    def __call__(self, index: int) -> Tensor:
        pattern = self.patterns[self.labels[index]]
        noise = np.random.default_rng((*self.seed, index)).standard_normal(pattern.shape, dtype=np.float32)
        return torch.from_numpy((pattern + noise) * np.float32(0.5**0.5))


def synthetic(
    image_size: int = 64,
    *,
    n_train: int = 1024,
    n_test: int = 256,
    n_classes: int = 10,
    channels: int = 3,
    seed: int = 0,
    augment: bool = False,
) -> ImageData:
    """Images of any size with learnable classes: a random pattern per class plus noise of the same variance.

    An image takes memory only while it is in use, so their number is not limited.

    Args:
        image_size: Pixels of a side.
        n_train, n_test: Number of images; labels repeat in order.
        n_classes, channels: Number of classes, and of channels of each image.
        seed: Draws patterns and noise.
        augment: Crop and mirror the training images.
    """
    for name, value in (("image_size", image_size), ("n_train", n_train), ("n_test", n_test), ("n_classes", n_classes)):
        if value < 1:
            raise SettingError(name, f"must be at least 1, not {value}")
    patterns = np.random.default_rng(seed).standard_normal(
        (n_classes, channels, image_size, image_size), dtype=np.float32
    )
    labels = [index % n_classes for index in range(max(n_train, n_test))]
    return ImageData(
        Images(_Drawn(patterns, labels, (seed, 1)), labels[:n_train], crop=augment, mirror=augment),
        Images(_Drawn(patterns, labels, (seed, 2)), labels[:n_test]),
        n_classes=n_classes,
        channels=channels,
        image_size=image_size,
    )


# ---- by name ---------------------------------------------------------------------------------------------------------

DATASETS = ("tiny-imagenet", "cifar10", "digits", "synthetic")


def load(
    name: str,
    data_dir: Path | str | None = None,
    *,
    image_size: int | None = None,
    seed: int = 0,
    augment: bool | None = None,
) -> ImageData:
    """A data set by name.

    Args:
        name: One of DATASETS.
        data_dir: The folder of Tiny ImageNet or CIFAR-10.
        image_size: Pixels of a side of digits (32 by default) and synthetic images (64); the others have a fixed size.
        seed: Seed of digits and synthetic images.
        augment: Whether to augment training images; by default only those of Tiny ImageNet and CIFAR-10.

    Raises:
        ValueError: The name is unknown, data_dir is missing, or data_dir or image_size does not apply.
        FileNotFoundError: A file of the data set is missing in the folder.
    """
    if name not in DATASETS:
        raise SettingError("dataset", f"there is no {name!r}; there are: {', '.join(DATASETS)}")
    if name in ("tiny-imagenet", "cifar10"):
        if data_dir is None:
            raise SettingError("data_dir", f"{name!r} is read from a folder and never downloaded: say where it is")
        if image_size is not None:
            raise SettingError("image_size", f"{name!r} has images of its own size; leave it out")
        read = tiny_imagenet if name == "tiny-imagenet" else cifar10
        return read(data_dir, augment=augment is not False)
    if data_dir is not None:
        raise SettingError("data_dir", f"{name!r} needs no folder; leave it out")
    if name == "digits":
        return enlarged_digits(32 if image_size is None else image_size, seed=seed, augment=augment is True)
    return synthetic(64 if image_size is None else image_size, seed=seed, augment=augment is True)


def _require(path: Path, good: bool, what: str, layout: str) -> None:
    if not good:
        raise FileNotFoundError(f"expected {what} at {path}; {layout}")
