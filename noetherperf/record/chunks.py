"""Arrays of numbers on disk, in the format of zarr (version 3), each chunk with a checksum and with its own address.

The format alone is zarr's, and zarr and xarray read what is written here. The library is not used, for a training must
not depend on it: it works in an event loop and a pool of threads, which are busy while a signal handler runs and gone
at the end of a process, and writes what the user's configuration says. Nor must a reader, for it takes what a file
declares as true and allocates it.

A chunk is little-endian numbers, compressed by zstd, then a CRC32C. After the compressed data comes a skippable frame,
which decompressors pass over, with a digest of the chunk's address: (record, array, place). So neither a changed bit
nor a chunk that was moved is read as a number.
"""

import itertools
import math
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import blosc, zstd
from numpy.typing import NDArray

__all__ = ["CODECS", "Array", "Damaged", "replace_file"]

COMPRESSORS = ("zstd", "gzip", "blosc")  # the last two for records that others have written anew
CODECS = ("bytes", *COMPRESSORS, "crc32c")  # of arrays of numbers; none of them executes anything
FILL = {"int64": -1, "float64": math.nan}  # of what is not there: no valid step, no number
LARGEST = 2**62  # of a number in metadata
SLACK = 2**26  # bytes that may be allocated for what no file is there to vouch for
RATIO = 2**15  # no more bytes than this can one byte of zstd stand for
ADDRESS = struct.pack("<II", 0x184D2A50, 16)  # header of a skippable frame of 16 bytes


class Damaged(ValueError):
    """What is on disk was not written so; the message says what is wrong."""


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{uuid4().hex}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class Array(NamedTuple):
    """One array: what its metadata say, and where its chunks are.

    Attributes:
        folder: Its directory, whose name is the array's.
        record: Identity of the record that it is part of, which its chunks' addresses begin with; "": has none.
        dtype: "int64" or "float64".
        shape: Of all of it, as committed.
        chunk: Shape of a chunk.
        dims: Name of each dimension.
        codecs: Names, in the order of writing, of "bytes", a compressor, and "crc32c"; the last two may be absent.
        big_endian: Whether numbers are.
        separator: Between a chunk's numbers in its file name.
        attributes: Of the array.
    """

    folder: Path
    record: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dims: tuple[str, ...]
    codecs: tuple[str, ...] = ("bytes", "zstd", "crc32c")
    big_endian: bool = False
    separator: str = "/"
    attributes: Mapping[str, Any] = {}

    @classmethod
    def parse(cls, folder: Path, record: str, metadata: Any) -> "Array":
        """An array from its metadata.

        Raises:
            Damaged: They are not those of an array of numbers, or ask for what is not known here.
        """

        def field(name: str, kind: type) -> Any:
            value: Any = metadata
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                raise Damaged(f"its array {folder.name} has no proper {name}")
            return value

        def numbers(name: str, least: int) -> tuple[int, ...]:
            found = field(name, list)
            if not all(type(n) is int and least <= n <= LARGEST for n in found):
                raise Damaged(f"its array {folder.name} has {name} {str(found)[:99]}")
            return tuple(found)

        plain = isinstance(metadata, dict) and metadata.get("zarr_format") == 3 and metadata.get("node_type") == "array"
        if not plain or metadata.get("data_type") not in ("int64", "float64"):
            raise Damaged(f"its array {folder.name} is of another kind than numbers")
        codecs = field("codecs", list)
        if not all(isinstance(codec, dict) and codec.get("name") in CODECS for codec in codecs):
            raise Damaged(f"its array {folder.name} asks for a codec other than {', '.join(CODECS)}")
        names = tuple(codec["name"] for codec in codecs)
        if names not in {("bytes", *c, *s) for c in [(), *zip(COMPRESSORS)] for s in [(), ("crc32c",)]}:
            raise Damaged(f"its array {folder.name} has its codecs in an order that no recorder writes")
        shape, chunk = numbers("shape", 0), numbers("chunk_grid.configuration.chunk_shape", 1)
        dims = field("dimension_names", list)
        named = all(isinstance(name, str) for name in dims) and len(set(dims)) == len(dims)
        if not (named and len(shape) == len(chunk) == len(dims) > 0):
            raise Damaged(f"its array {folder.name} has shape, chunks and dimension names that do not agree")
        if chunk[0] > max(1024, shape[0]) or any(c > max(16, n) for c, n in zip(chunk[1:], shape[1:], strict=True)):
            raise Damaged(f"its array {folder.name} of shape {shape} has chunks of shape {chunk}, far larger than it")
        if metadata["chunk_grid"].get("name") != "regular" or metadata.get("storage_transformers"):
            raise Damaged(f"its array {folder.name} is stored in a way that no recorder writes")
        encoding, configuration = field("chunk_key_encoding", dict), codecs[0].get("configuration")
        key = encoding.get("configuration", {})
        separator = key.get("separator", "/") if isinstance(key, dict) else None
        endian = configuration.get("endian") if isinstance(configuration, dict) else None
        if encoding.get("name") != "default" or separator not in ("/", ".") or endian not in ("little", "big"):
            raise Damaged(f"its array {folder.name} has chunks named, or numbers stored, as no recorder does")
        return cls(
            folder,
            record,
            metadata["data_type"],
            shape,
            chunk,
            tuple(dims),
            names,
            endian == "big",
            separator,
            field("attributes", dict),
        )

    def metadata(self) -> dict[str, Any]:
        """What `zarr.json` says of the array."""
        configurations = {
            "bytes": {"endian": "big" if self.big_endian else "little"},
            "zstd": {"level": 0, "checksum": False},
        }
        fill = FILL[self.dtype]
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": self.separator}},
            "fill_value": "NaN" if math.isnan(fill) else fill,
            "codecs": [{"name": name, "configuration": configurations.get(name, {})} for name in self.codecs],
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dims),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def blank(self, shape: Sequence[int]) -> NDArray[Any]:
        """Numbers that are not there."""
        return np.full(shape, FILL[self.dtype], dtype=self.dtype)

    def read(self, box: Sequence[range] | None = None) -> tuple[NDArray[Any], list[str]]:
        """Numbers from disk; NaN, or -1 in whole numbers, where a chunk is missing or is not what was written.

        Args:
            box: What to read of each dimension, without steps; by default all.

        Returns:
            The numbers, and of each chunk that could not be read where it is in the array, and why.

        Raises:
            Damaged: So much is declared that the files on disk cannot be all that.
        """
        box = [range(n) for n in self.shape] if box is None else box
        touched = [
            range(r.start // c, -(-r.stop // c)) if len(r) else range(0) for r, c in zip(box, self.chunk, strict=True)
        ]
        n_bytes, n_chunks = 8 * math.prod(map(len, box)), math.prod(map(len, touched))
        if n_bytes > SLACK or n_chunks > 1024:
            sizes = self._sizes()
            if n_bytes > SLACK + sum(sizes) or n_chunks > 1024 + 2 * len(sizes):
                raise Damaged(f"its array {self.folder.name} has shape {self.shape}, far more than is on disk")
        found, lost = self.blank([len(r) for r in box]), []
        for place in itertools.product(*touched):
            corner = [i * c for i, c in zip(place, self.chunk, strict=True)]
            part = [
                range(max(r.start, at), min(r.stop, at + c)) for r, at, c in zip(box, corner, self.chunk, strict=True)
            ]
            try:
                values = self._chunk(place)
            except (Damaged, OSError) as error:
                why = "is missing" if isinstance(error, FileNotFoundError) else str(error)
                rows = ", ".join(f"{name} {r.start}:{r.stop}" for name, r in zip(self.dims, part, strict=True))
                lost.append(f"[{rows}] {why}")
                continue
            source = tuple(slice(r.start - at, r.stop - at) for r, at in zip(part, corner, strict=True))
            target = tuple(slice(r.start - b.start, r.stop - b.start) for r, b in zip(part, box, strict=True))
            found[target] = values[source]
        return found, lost

    def write(self, start: int, block: NDArray[Any]) -> "Array":
        """Put rows at `start` and end the array with them. What was before stays; a block may be wider than the array.

        Returns:
            The array as it is now. Nobody is told so: the metadata is for the caller to write.

        Raises:
            Damaged: Earlier rows of the same chunk cannot be read.
            OSError: The disk fails.
        """
        now = self._replace(shape=(start + len(block), *block.shape[1:]))
        n_rows = self.chunk[0]
        before, width = [], []
        for old, new, c in zip(self.shape[1:], now.shape[1:], self.chunk[1:], strict=True):
            before.append(range(-(-old // c) if self.shape[0] else 0))
            width.append(range(-(-new // c)))
        for place in itertools.product(range(-(-now.shape[0] // n_rows)), *width):
            first = place[0] * n_rows
            is_new = any(i not in r for i, r in zip(place[1:], before, strict=True))
            if first + n_rows <= start and not is_new:
                continue
            if first < start and not is_new:
                try:
                    chunk = self._chunk(place)
                except Damaged as error:
                    raise Damaged(f"chunk {place} of its array {self.folder.name} {error}") from error
                chunk[start - first :] = FILL[self.dtype]
            else:
                chunk = self.blank(self.chunk)
            rows = range(max(first, start), min(first + n_rows, now.shape[0]))
            columns = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(place[1:], self.chunk[1:], now.shape[1:], strict=True)
            )
            part = block[(slice(rows.start - start, rows.stop - start), *columns)]
            chunk[(slice(rows.start - first, rows.stop - first), *(slice(n) for n in part.shape[1:]))] = part
            path = self._path(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self._encode(place, chunk))
        return now

    def _path(self, place: Sequence[int]) -> Path:
        return self.folder / self.separator.join(["c", *map(str, place)])

    def _address(self, place: Sequence[int]) -> bytes:
        text = "/".join([self.record, self.folder.name, *map(str, place)])
        return ADDRESS + blake2b(text.encode(), digest_size=16).digest()

    def _sizes(self) -> list[int]:
        """How many bytes of numbers each of its files can hold at most."""
        chunk = 8 * math.prod(self.chunk)
        files = (file for file in self.folder.rglob("*") if file.name != "zarr.json" and file.is_file())
        return [min(chunk, RATIO * file.stat().st_size) for file in files]

    def _encode(self, place: Sequence[int], values: NDArray[Any]) -> bytes:
        values = values.astype(values.dtype.newbyteorder(">" if self.big_endian else "<"), copy=False)
        data: bytes = zstd.compress(values, 0) if "zstd" in self.codecs else values.tobytes()
        if "crc32c" in self.codecs:
            if self.record and "zstd" in self.codecs:
                data += self._address(place)
            data += struct.pack("<I", crc32c(data))
        return data

    def _chunk(self, place: Sequence[int]) -> NDArray[Any]:
        """One chunk's numbers.

        Raises:
            Damaged: The file is not what was written there.
            OSError: There is none, or the disk fails.
        """
        n_bytes = 8 * math.prod(self.chunk)
        path = self._path(place)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
            raise Damaged("is no file")
        if status.st_size > 2 * n_bytes + 4096 or n_bytes > SLACK + 64 * status.st_size:
            raise Damaged(f"has {status.st_size} bytes, which cannot be {n_bytes} bytes of numbers")
        data = path.read_bytes()
        if "crc32c" in self.codecs:
            data, checksum = data[:-4], data[-4:]
            if struct.pack("<I", crc32c(data)) != checksum:
                raise Damaged("does not match its checksum")
            if self.record and data[-24:-16] == ADDRESS and data[-24:] != self._address(place):
                raise Damaged("is the chunk of another place, array or record")
        try:
            numbers = _decompress(self.codecs[1] if self.codecs[1:] else "", data, n_bytes)
        except (RuntimeError, ValueError, zlib.error) as error:
            raise Damaged(f"cannot be decompressed ({error})") from error
        if len(numbers) != n_bytes:
            raise Damaged(f"has {len(numbers)} bytes of numbers instead of {n_bytes}")
        values = np.frombuffer(numbers, dtype=np.dtype(self.dtype).newbyteorder(">" if self.big_endian else "<"))
        return values.astype(self.dtype, copy=False).reshape(self.chunk)


def _decompress(codec: str, data: bytes, n_bytes: int) -> bytearray:
    """Decompress what must have a size, and never more: a few bytes can say that they are many."""
    if codec == "gzip":
        return bytearray(zlib.decompressobj(wbits=31).decompress(data, n_bytes + 1))
    if codec not in COMPRESSORS:
        return bytearray(data)
    declared = _zstd_size(data) if codec == "zstd" else int.from_bytes(data[4:8], "little")
    if declared != n_bytes:
        raise ValueError(f"it declares {declared} bytes of numbers instead of {n_bytes}")
    decompress = zstd.decompress if codec == "zstd" else blosc.decompress
    numbers: bytearray = decompress(data, bytearray(n_bytes))
    return numbers


def _zstd_size(data: bytes) -> int | None:
    """The size that a zstd frame declares, RFC 8878 section 3.1.1.1; None where it declares none."""
    if len(data) < 5 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = data[4]
    kind, single_segment = flags >> 6, flags >> 5 & 1
    at = 5 + (not single_segment) + (0, 1, 2, 4)[flags & 3]
    size = 2**kind if kind else single_segment
    return int.from_bytes(data[at : at + size], "little") + (256 if kind == 1 else 0) if size else None
