"""Loaders, on small folders in the true layouts, and on broken ones."""

import io
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from noetherperf.recipes import datasets

CLASSES = ("n02124075", "n04067472", "n01443537")  # in the archive's wnids.txt they are in no order, either


def write_jpeg(path: Path, grey: int, *, size: int = 64, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), grey if mode == "L" else (grey, 0, 0)).save(path, "JPEG")


def make_tiny_imagenet(folder: Path) -> Path:
    """Two training images a class, one of them grey as some of the real ones are; three validation images."""
    for number, name in enumerate(CLASSES):
        for index in range(2):
            mode = "L" if index else "RGB"
            write_jpeg(folder / "train" / name / "images" / f"{name}_{index}.JPEG", 50 * number + 50, mode=mode)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for index, name in enumerate(reversed(CLASSES)):
        write_jpeg(folder / "val" / "images" / f"val_{index}.JPEG", 10)
        lines.append(f"val_{index}.JPEG\t{name}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    return folder


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str, which CIFAR-10's files are made of."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_string
    dispatch[str] = save_string


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def write_cifar10_file(path: Path, n: int, seed: int) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    content = {
        b"batch_label": b"a batch",
        b"labels": [(seed + i) % 10 for i in range(n)],
        b"data": pixels,
        b"filenames": [b"%d.png" % i for i in range(n)],
    }
    path.write_bytes(python2_pickle(content))
    return pixels


def make_cifar10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(1, 6):
        write_cifar10_file(folder / f"data_batch_{number}", 4, number)
    write_cifar10_file(folder / "test_batch", 3, 6)
    return folder


def test_tiny_imagenet_is_read_as_it_lies(tmp_path: Path) -> None:
    data = datasets.tiny_imagenet(make_tiny_imagenet(tmp_path), augment=False)
    assert (data.n_classes, data.channels, data.image_size) == (3, 3, 64)
    assert (len(data.train), len(data.test)) == (6, 3)
    assert data.train.labels == [0, 0, 1, 1, 2, 2]  # alphabetical: n01443537, n02124075, n04067472
    assert data.test.labels == [0, 2, 1]
    mean, std = (torch.tensor(values) for values in datasets.TINY_IMAGENET_COLOURS)
    red, label = data.train[2]  # of CLASSES[0], grey level 50
    assert (red.shape, red.dtype, label) == ((3, 64, 64), torch.float32, 1)
    colours = red.mean((1, 2)) * std + mean
    torch.testing.assert_close(colours, torch.tensor([50 / 255, 0.0, 0.0]), atol=0.01, rtol=0)
    grey = data.train[3][0].mean((1, 2)) * std + mean
    torch.testing.assert_close(grey, torch.full((3,), 50 / 255), atol=0.01, rtol=0)


def empty_a_class(folder: Path) -> None:
    for path in (folder / "train" / CLASSES[1] / "images").iterdir():
        path.unlink()


BREAK_TINY: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (shutil.rmtree, FileNotFoundError, r"expected a folder at .*tiny"),
    (lambda f: (f / "wnids.txt").unlink(), FileNotFoundError, r"expected the list of classes at .*wnids\.txt"),
    (lambda f: (f / "wnids.txt").write_text(""), FileNotFoundError, r"one class a line, not an empty file, at .*wnids"),
    (
        lambda f: shutil.rmtree(f / "train" / CLASSES[1]),
        FileNotFoundError,
        rf"expected the images of class {CLASSES[1]} at .*train/{CLASSES[1]}/images",
    ),
    (
        empty_a_class,
        FileNotFoundError,
        rf"expected \*\.JPEG files of class {CLASSES[1]}",
    ),
    (lambda f: (f / "val" / "val_annotations.txt").unlink(), FileNotFoundError, r"labels at .*val_annotations\.txt"),
    (lambda f: (f / "val" / "val_annotations.txt").write_text(""), FileNotFoundError, r"one validation image a line"),
    (lambda f: shutil.rmtree(f / "val" / "images"), FileNotFoundError, r"expected the validation images at"),
    (lambda f: (f / "val/images/val_1.JPEG").unlink(), FileNotFoundError, r"validation image .* at .*val_1\.JPEG"),
    (
        lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG n01443537\n"),
        ValueError,
        r"val_annotations\.txt, line 1: expected an image's name and a class of wnids\.txt with a tab",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), BREAK_TINY)
def test_a_broken_tiny_imagenet_says_what_was_expected_where(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = make_tiny_imagenet(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(error, match=message):
        datasets.tiny_imagenet(folder)


def test_a_broken_or_strange_image_is_named(tmp_path: Path) -> None:
    data = datasets.tiny_imagenet(make_tiny_imagenet(tmp_path))
    images = tmp_path / "val" / "images"
    whole = (images / "val_0.JPEG").read_bytes()
    (images / "val_0.JPEG").write_bytes(whole[: len(whole) // 2])
    (images / "val_1.JPEG").write_text("no image")
    write_jpeg(images / "val_2.JPEG", 3, size=32)
    for index, message in enumerate(("cannot be read", "cannot be read", "expected 64×64 pixels, got 32×32")):
        with pytest.raises(ValueError, match=rf"val_{index}\.JPEG: {message}"):
            data.test[index]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    folder = make_tiny_imagenet(tmp_path)
    for images in [folder / "train" / name / "images" for name in CLASSES] + [folder / "val" / "images"]:
        for name in ("._n.JPEG", ".hidden.JPEG", ".DS_Store"):
            (images / name).write_bytes(b"\x00\x05\x16\x07")  # what macOS writes beside a file it copies
    data = datasets.tiny_imagenet(folder)
    assert (len(data.train), len(data.test)) == (6, 3)
    for index in range(6):
        data.train[index]
    for name in CLASSES[:1]:
        for path in (folder / "train" / name / "images").glob("n*.JPEG"):
            path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected \*\.JPEG files of class {CLASSES[0]}"):
        datasets.tiny_imagenet(folder)


def write_png(path: Path, pixels: np.ndarray[Any, Any], colour_type: int, *chunks: tuple[bytes, bytes]) -> None:
    """A PNG of 8 or 16 bits, [height, width, channels], of those kinds that PIL does not write."""
    height, width, _ = pixels.shape
    depth = 8 * pixels.itemsize
    raw = b"".join(b"\0" + row.tobytes() for row in pixels.astype(pixels.dtype.newbyteorder(">")))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in body
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_pngs_of_8_and_16_bits_are_read_alike(tmp_path: Path, bits: int, colour_type: int, channels: int) -> None:
    folder = make_tiny_imagenet(tmp_path)
    largest = 2**bits - 1
    ramp = np.linspace(0, largest, 64 * 64 * channels).round().reshape(64, 64, channels)
    write_png(folder / "val/images/val_0.JPEG", ramp.astype(np.uint8 if bits == 8 else np.uint16), colour_type)
    image = datasets.tiny_imagenet(folder).test._read(0)
    image = image / 255 if image.dtype == torch.uint8 else image
    colours = ramp[:, :, :3] if channels >= 3 else ramp[:, :, :1].repeat(3, 2)
    torch.testing.assert_close(
        image.double(), torch.from_numpy(colours / largest).permute(2, 0, 1), rtol=0, atol=1 / 255
    )


@pytest.mark.parametrize("transparency", [(), ((b"tRNS", bytes(range(256))),)], ids=["opaque", "transparent"])
def test_palettes_are_looked_up(tmp_path: Path, transparency: tuple[tuple[bytes, bytes], ...]) -> None:
    folder = make_tiny_imagenet(tmp_path)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indices = np.arange(64 * 64).reshape(64, 64, 1).astype(np.uint8)
    write_png(folder / "val/images/val_0.JPEG", indices, 3, (b"PLTE", palette.tobytes()), *transparency)
    image = datasets.tiny_imagenet(folder).test._read(0)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), palette[indices[:, :, 0]])


def test_other_modes_are_read_or_refused(tmp_path: Path) -> None:
    folder = make_tiny_imagenet(tmp_path)
    path = folder / "val/images/val_0.JPEG"
    data = datasets.tiny_imagenet(folder)
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(path, "JPEG")
    torch.testing.assert_close(data.test._read(0)[:, 5, 5].float(), torch.tensor([255.0, 0.0, 0.0]), rtol=0, atol=3)
    Image.new("1", (64, 64), 1).save(path, "PNG")
    assert torch.equal(data.test._read(0), torch.full((3, 64, 64), 255, dtype=torch.uint8))
    Image.new("I;16", (64, 64), 0x8000).save(path, "TIFF")
    torch.testing.assert_close(data.test._read(0), torch.full((3, 64, 64), 0x8000 / 65535))
    for mode in ("I", "F"):
        Image.new(mode, (64, 64), 1).save(path, "TIFF")
        with pytest.raises(
            ValueError, match=r"val_0\.JPEG: cannot be read .*32 bits and no known range; save it with 8"
        ):
            data.test[0]


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_is_read_as_it_lies(tmp_path: Path, inside: bool) -> None:
    folder = make_cifar10(tmp_path / "cifar-10-batches-py")
    data = datasets.cifar10(folder if inside else tmp_path, augment=False)
    assert (data.n_classes, data.channels, data.image_size) == (10, 3, 32)
    assert (len(data.train), len(data.test)) == (20, 3)
    pixels = write_cifar10_file(tmp_path / "again", 4, 2)  # data_batch_2 once more
    image, label = data.train[5]
    assert label == 3
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in datasets.CIFAR10_COLOURS)
    restored = ((image * std + mean) * 255).round().to(torch.uint8)
    assert np.array_equal(restored.flatten().numpy(), pixels[1])  # red, green, blue, each row by row


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_cifar10_file_never_runs_code(tmp_path: Path) -> None:
    folder = make_cifar10(tmp_path / "cifar")
    content = {b"data": Harmful(tmp_path / "harm"), b"labels": []}
    (folder / "data_batch_3").write_bytes(python2_pickle(content))
    with pytest.raises(ValueError, match=r"data_batch_3: .*it asks for posix\.mkdir, which no CIFAR-10 file holds"):
        datasets.cifar10(folder)
    assert not (tmp_path / "harm").exists()
    pickle.loads((folder / "data_batch_3").read_bytes())  # an ordinary unpickler would have made it
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.frombuffer", "os.system"])
def test_the_unpickler_knows_numpy_arrays_alone(name: str) -> None:
    module, _, function = name.rpartition(".")
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for {name}"):
        datasets._NumbersUnpickler(io.BytesIO()).find_class(module, function)


BREAK_CIFAR: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (shutil.rmtree, FileNotFoundError, r"expected a folder at .*cifar; CIFAR-10's python archive unpacks to"),
    (lambda f: (f / "data_batch_4").unlink(), FileNotFoundError, r"a file of the python archive at .*data_batch_4"),
    (lambda f: (f / "test_batch").write_bytes(b"\x80\x02}q"), ValueError, r"test_batch: no file of CIFAR-10's"),
    (lambda f: (f / "test_batch").write_bytes(pickle.dumps({}, 2)), ValueError, r"test_batch: no file .*b'data'"),
    (
        lambda f: (f / "test_batch").write_bytes(
            python2_pickle({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]})
        ),
        ValueError,
        r"test_batch: expected b'data', uint8 \[n, 3072\].* got uint8 \[2, 7\] and 2 labels",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), BREAK_CIFAR)
def test_a_broken_cifar10_says_what_was_expected_where(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = make_cifar10(tmp_path / "cifar")
    damage(folder)
    with pytest.raises(error, match=message):
        datasets.cifar10(folder)


def test_training_images_are_cropped_and_mirrored_and_test_images_are_not() -> None:
    ramp = torch.arange(1.0, 17.0).expand(1, 16, 16)
    plain = datasets.Images(lambda _: ramp, [0])
    mirrored = datasets.Images(lambda _: ramp, [0], mirror=True)
    cropped = datasets.Images(lambda _: ramp, [0], crop=True)
    torch.manual_seed(0)
    assert torch.equal(plain[0][0], ramp)
    seen = [torch.equal(mirrored[0][0], ramp.flip(-1)) for _ in range(200)]
    assert 70 < sum(seen) < 130
    corners = set()
    for _ in range(400):
        image = cropped[0][0]
        assert image.shape == ramp.shape
        padded = torch.nn.functional.pad(ramp, (2,) * 4)
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, padded[:, i : i + 16, j : j + 16])]
        corners.update(places)
    assert len(corners) == 25


def test_digits_of_any_size_are_enlarged() -> None:
    small, large = datasets.load("digits", image_size=8), datasets.load("digits", image_size=24)
    assert (large.channels, large.image_size, large.n_classes) == (1, 24, 10)
    assert large.train[0][0].shape == (1, 24, 24)
    assert large.train.labels == small.train.labels
    torch.testing.assert_close(large.train[0][0][:, 1::3, 1::3], small.train[0][0])  # a pixel's middle keeps its value


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_synthetic_images_have_any_size_and_are_the_same_again(size: int) -> None:
    data, again = (datasets.synthetic(size, n_train=30, n_test=5) for _ in range(2))
    assert data.train[7][0].shape == (3, size, size)
    assert torch.equal(data.train[7][0], again.train[7][0])
    assert not torch.equal(data.train[7][0], data.train[17][0])  # of one class
    assert not torch.equal(data.train[2][0], data.test[2][0])
    assert not torch.equal(data.train[7][0], datasets.synthetic(size, n_train=30, seed=1).train[7][0])
    assert data.train.labels[:12] == [*range(10), 0, 1]


def test_synthetic_classes_are_told_apart_by_their_patterns() -> None:
    data = datasets.synthetic(16, n_train=100, n_test=100)
    images = torch.stack([data.train[i][0] for i in range(100)])
    assert abs(images.std().item() - 1) < 0.05
    means = torch.stack([images[label::10].mean(0) for label in range(10)])
    tests = torch.stack([data.test[i][0] for i in range(100)])
    nearest = torch.einsum("nchw,kchw->nk", tests, means).argmax(1)
    assert torch.equal(nearest, torch.tensor(data.test.labels))


def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    data = datasets.load("tiny-imagenet", make_tiny_imagenet(tmp_path), augment=False)
    _, alone = data.loaders(2)
    train, shared = data.loaders(2, workers=2)
    for mine, theirs in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert sorted(int(label) for _, labels in train for label in labels) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet", {}, r"dataset: there is no 'imagenet'; there are: tiny-imagenet, cifar10, digits, synthetic"),
        ("cifar10", {}, r"'cifar10' is read from a folder and never downloaded"),
        ("tiny-imagenet", {"data_dir": "x", "image_size": 32}, r"images of its own size"),
        ("digits", {"data_dir": "x"}, r"'digits' needs no folder"),
        ("synthetic", {"image_size": 0}, r"image_size: must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_a_data_set_is_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(name, **options)
