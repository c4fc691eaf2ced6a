"""Chunks: how numbers become the bytes of one file, and how far such bytes are trusted.

A chunk is little-endian numbers, compressed by zstd, then a CRC32C. After the compressed data comes a skippable frame,
which decompressors pass over, with a digest of the chunk's address: (record, array, place). So neither a changed bit
nor a chunk that was moved is read as a number.

Sizes in a file may be wrong or made up. Nothing is allocated before they agree with the size of the file.
"""

import math
import stat
import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import blosc, zstd
from numpy.typing import NDArray

COMPRESSORS = ("zstd", "gzip", "blosc")  # the last two for records that other tools have rewritten
CODECS = ("bytes", *COMPRESSORS, "crc32c")  # of arrays of numbers; none of them executes anything
SLACK = 2**26  # bytes that may be allocated although no file accounts for them
RATIO = 2**15  # an upper bound of zstd's compression ratio
ADDRESS = struct.pack("<II", 0x184D2A50, 16)  # header of a skippable frame of 16 bytes

Order = Literal["<", ">"]  # of the bytes in a number: little-endian, big-endian


class Damaged(ValueError):
    """The data on disk is not what a recorder wrote; the message says what is wrong."""


def address(record: str, array: str, place: Sequence[int]) -> bytes:
    """The skippable frame that ties a chunk to its record, array and place."""
    text = "/".join([record, array, *map(str, place)])
    return ADDRESS + blake2b(text.encode(), digest_size=16).digest()


def encode(values: NDArray[Any], codecs: Sequence[str], order: Order, frame: bytes) -> bytes:
    """One chunk's file.

    Args:
        values: The numbers.
        codecs: In the order of writing.
        order: Byte order.
        frame: The chunk's address; empty for a record without identity.
    """
    values = values.astype(values.dtype.newbyteorder(order), copy=False)
    data: bytes = zstd.compress(values, 0) if "zstd" in codecs else values.tobytes()
    if "crc32c" in codecs:
        if "zstd" in codecs:
            data += frame
        data += struct.pack("<I", crc32c(data))
    return data


def load(
    path: Path, shape: tuple[int, ...], dtype: str, codecs: Sequence[str], order: Order, frame: bytes
) -> NDArray[Any]:
    """One chunk's numbers, from its file.

    Args:
        path: The file.
        shape: Of the chunk.
        dtype: Of the numbers, each of 8 bytes.
        codecs, order, frame: As in `encode`.

    Raises:
        Damaged: The file is not what was written there.
        OSError: There is no file, or the disk fails.
    """
    n_bytes = 8 * math.prod(shape)
    data = _read(path, n_bytes)
    if "crc32c" in codecs:
        data, checksum = data[:-4], data[-4:]
        if struct.pack("<I", crc32c(data)) != checksum:
            raise Damaged("does not match its checksum")
        if frame and data[-24:-16] == ADDRESS and data[-24:] != frame:
            raise Damaged("is the chunk of another place, array or record")
    try:
        numbers = _decompress(codecs[1] if codecs[1:] else "", data, n_bytes)
    except (RuntimeError, ValueError, zlib.error) as error:
        raise Damaged(f"cannot be decompressed ({error})") from error
    if len(numbers) != n_bytes:
        raise Damaged(f"has {len(numbers)} bytes of numbers instead of {n_bytes}")
    values = np.frombuffer(numbers, dtype=np.dtype(dtype).newbyteorder(order))
    return values.astype(dtype, copy=False).reshape(shape)


def _read(path: Path, n_bytes: int) -> bytes:
    """A file that can hold so many bytes of numbers."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        raise Damaged("is no file")
    if status.st_size > 2 * n_bytes + 4096 or n_bytes > SLACK + 64 * status.st_size:
        raise Damaged(f"has {status.st_size} bytes, which cannot be {n_bytes} bytes of numbers")
    return path.read_bytes()


def _decompress(codec: str, data: bytes, n_bytes: int) -> bytearray:
    """Decompress to a known size and never beyond it: a few bytes can claim to be very many."""
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
