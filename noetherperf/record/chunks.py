"""Chunks: how numbers become the bytes of one file, and how far such bytes are trusted.

A chunk is little-endian numbers, their bytes sorted by place and compressed by blosc, in a zstd frame, then a CRC32C.
After the zstd frame comes a skippable one, which decompressors pass over, with a digest of the chunk's address:
(record, array, place). So neither a changed bit nor a chunk that was moved is read as a number.

Sizes in a file may be wrong or made up. Nothing is allocated before they agree with the size of the file.
"""

import math
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import blosc, zstd
from numpy.typing import NDArray

#: Without threads, as zarr sets it too: they are gone in forked processes, and their lock cannot be taken by a signal
#: handler that interrupts a compression.
blosc.use_threads = False

COMPRESSORS = ("blosc", "zstd", "gzip")
#: Chains of compressors that are read: the recorder's own, its earlier ones, and those of tools that rewrote a record.
CHAINS = (("blosc", "zstd"), ("zstd",), ("blosc",), ("gzip",), ())
CODECS = ("transpose", "bytes", *COMPRESSORS, "crc32c")  # of arrays of numbers; none of them executes anything
CHECKED = 4  # bytes of a checksum
SLACK = 2**26  # bytes that may be allocated although no file accounts for them
RATIO = 2**15  # an upper bound of zstd's compression ratio
OVERHEAD = 4096  # an upper bound of what a compressor adds to incompressible numbers, for each megabyte
ADDRESS = struct.pack("<II", 0x184D2A50, 16)  # header of a skippable frame of 16 bytes
BLOSC: Mapping[str, Any] = {"cname": "zstd", "clevel": 4, "shuffle": "shuffle", "blocksize": 0}

Order = Literal["<", ">"]  # of the bytes in a number: little-endian, big-endian


class Damaged(ValueError):
    """The data on disk is not what a recorder wrote; the message says what is wrong."""


class Coding(NamedTuple):
    """How the numbers of an array's chunks are written.

    Attributes:
        dtype: Of the numbers.
        codecs: Names, in the order of writing.
        order: Of the bytes in a number.
    """

    dtype: str
    codecs: tuple[str, ...]
    order: Order

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def encode(self, values: NDArray[Any], frame: bytes) -> bytes:
        """One chunk's file.

        Args:
            values: The numbers.
            frame: The chunk's address; empty for a record without identity.
        """
        values = values.astype(np.dtype(self.dtype).newbyteorder(self.order), copy=False)
        data: Any = np.ascontiguousarray(values.T if "transpose" in self.codecs else values)
        if "blosc" in self.codecs:
            data = blosc.compress(data, BLOSC["cname"].encode(), BLOSC["clevel"], blosc.SHUFFLE)
        if "zstd" in self.codecs:
            data = zstd.compress(data, 1 if "blosc" in self.codecs else 0)
        content = bytes(data)
        if "crc32c" in self.codecs:
            if "zstd" in self.codecs:
                content += frame
            content += struct.pack("<I", crc32c(content))
        return content

    def load(self, path: Path, shape: tuple[int, ...], frame: bytes) -> NDArray[Any]:
        """One chunk's numbers, from its file.

        Args:
            path: The file.
            shape: Of the chunk.
            frame: As in `encode`.

        Raises:
            Damaged: The file is not what was written there.
            OSError: There is no file, or the disk fails.
        """
        n_bytes = self.itemsize * math.prod(shape)
        data = _read(path, n_bytes)
        if "crc32c" in self.codecs:
            data, checksum = data[:-CHECKED], data[-CHECKED:]
            if struct.pack("<I", crc32c(data)) != checksum:
                raise Damaged("does not match its checksum")
            if frame and data[-24:-16] == ADDRESS and data[-24:] != frame:
                raise Damaged("is the chunk of another place, array or record")
        compressors = [codec for codec in self.codecs if codec in COMPRESSORS]
        try:
            for codec in reversed(compressors[1:]):
                data = _envelope(codec, data, n_bytes)
            numbers = _decompress(compressors[0] if compressors else "", data, n_bytes)
        except (RuntimeError, ValueError, zlib.error) as error:
            raise Damaged(f"cannot be decompressed ({error})") from error
        if len(numbers) != n_bytes:
            raise Damaged(f"has {len(numbers)} bytes of numbers instead of {n_bytes}")
        values = np.frombuffer(numbers, dtype=np.dtype(self.dtype).newbyteorder(self.order))
        values = values.astype(self.dtype, copy=False)
        return values.reshape(shape[::-1]).T if "transpose" in self.codecs else values.reshape(shape)


def address(record: str, array: str, place: Sequence[int]) -> bytes:
    """The skippable frame that ties a chunk to its record, array and place."""
    text = "/".join([record, array, *map(str, place)])
    return ADDRESS + blake2b(text.encode(), digest_size=16).digest()


def _read(path: Path, n_bytes: int) -> bytes:
    """A file that can hold so many bytes of numbers."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        raise Damaged("is no file")
    if status.st_size > 2 * n_bytes + OVERHEAD or n_bytes > SLACK + 64 * status.st_size:
        raise Damaged(f"has {status.st_size} bytes, which cannot be {n_bytes} bytes of numbers")
    return path.read_bytes()


def _envelope(codec: str, data: bytes, n_bytes: int) -> bytes:
    """What a further compressor has wrapped: compressed numbers, which are not much larger than the numbers."""
    declared = _zstd_size(data) if codec == "zstd" else None
    if declared is None or not 16 <= declared <= 2 * n_bytes + OVERHEAD:
        raise ValueError(f"it declares {declared} bytes for {n_bytes} bytes of numbers")
    return bytes(_decompress(codec, data, declared))


def _decompress(codec: str, data: bytes, n_bytes: int) -> bytearray:
    """Decompress to a known size and never beyond it: a few bytes can claim to be very many."""
    if codec == "gzip":
        return bytearray(zlib.decompressobj(wbits=31).decompress(data, n_bytes + 1))
    if codec not in COMPRESSORS:
        return bytearray(data)
    declared = _zstd_size(data) if codec == "zstd" else _blosc_size(data)
    if declared != n_bytes:
        raise ValueError(f"it declares {declared} bytes of numbers instead of {n_bytes}")
    decompress = zstd.decompress if codec == "zstd" else blosc.decompress
    numbers: bytearray = decompress(data, bytearray(n_bytes))
    return numbers


def _blosc_size(data: bytes) -> int | None:
    """The size that a blosc header declares; None where the data are no whole blosc buffer."""
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        return None
    return int.from_bytes(data[4:8], "little")


def _zstd_size(data: bytes) -> int | None:
    """The size that a zstd frame declares, RFC 8878 section 3.1.1.1; None where it declares none."""
    if len(data) < 5 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = data[4]
    kind, single_segment = flags >> 6, flags >> 5 & 1
    at = 5 + (not single_segment) + (0, 1, 2, 4)[flags & 3]
    size = 2**kind if kind else single_segment
    return int.from_bytes(data[at : at + size], "little") + (256 if kind == 1 else 0) if size else None
