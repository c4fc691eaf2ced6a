"""Arrays of numbers on disk in the format of zarr (version 3): their metadata, and reading and writing by chunks.

Only the format is zarr's: zarr and xarray read what is written here. The library itself is not used. Training must not
depend on it: it works in an event loop and a thread pool, which are busy while a signal handler runs and gone at the
end of a process, and it obeys the user's configuration. Nor must a reader: it believes what a file declares and
allocates it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from noetherperf.record.chunks import BLOSC, CHAINS, CODECS, RATIO, SLACK, Coding, Damaged, address
from noetherperf.record.files import replace_file

FILL = {"int64": -1, "float32": math.nan, "float64": math.nan}  # for missing numbers: no valid step, no number
LARGEST = 2**62  # of a number in metadata


class Array(NamedTuple):
    """One array: its metadata, and where its chunks are.

    Attributes:
        folder: Its directory, whose name is the array's.
        record: Identity of its record, the first part of its chunks' addresses; "" if the record has none.
        dtype: "int64", "float32" or "float64".
        shape: Of the whole array, as committed.
        chunk: Shape of a chunk.
        dims: Name of each dimension.
        codecs: In the order of writing: "transpose", "bytes", compressors, "crc32c"; all but "bytes" may be absent.
        big_endian: Byte order of the numbers.
        separator: Between a chunk's indices in its file name.
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
            Damaged: They do not describe an array of numbers, or use features that no recorder writes.
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
        if not plain or metadata.get("data_type") not in tuple(FILL):
            raise Damaged(f"its array {folder.name} is of another kind than numbers")
        shape, chunk = numbers("shape", 0), numbers("chunk_grid.configuration.chunk_shape", 1)
        dims = field("dimension_names", list)
        named = all(isinstance(name, str) for name in dims) and len(set(dims)) == len(dims)
        if not (named and len(shape) == len(chunk) == len(dims) > 0):
            raise Damaged(f"its array {folder.name} has shape, chunks and dimension names that do not agree")
        if chunk[0] > max(1024, shape[0]) or any(c > max(16, n) for c, n in zip(chunk[1:], shape[1:], strict=True)):
            raise Damaged(f"its array {folder.name} of shape {shape} has chunks of shape {chunk}, far larger than it")
        if metadata["chunk_grid"].get("name") != "regular" or metadata.get("storage_transformers"):
            raise Damaged(f"its array {folder.name} is stored in a way that no recorder writes")
        names, configurations = _codecs(folder.name, field("codecs", list), len(shape))
        encoding, configuration = field("chunk_key_encoding", dict), configurations["bytes"]
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
        """Content of the array's `zarr.json`."""
        configurations = {
            "transpose": {"order": [1, 0]},
            "bytes": {"endian": "big" if self.big_endian else "little"},
            "blosc": {**BLOSC, "typesize": self._coding.itemsize},
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
        """An array of missing numbers."""
        return np.full(shape, FILL[self.dtype], dtype=self.dtype)

    @property
    def blank_bytes(self) -> int:
        """Size of the file of a chunk without numbers."""
        return len(self._coding.encode(self.blank(self.chunk), self._frame([0] * len(self.chunk))))

    @property
    def n_chunks(self) -> int:
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def read(self, box: Sequence[range] | None = None) -> tuple[NDArray[Any], list[str]]:
        """Numbers from disk; NaN (−1 in an int64 array) where a chunk is missing or damaged.

        Args:
            box: Range to read of each dimension, with a positive step; by default all. Chunks without any of these
                numbers are not read.

        Returns:
            The numbers; and for each chunk that could not be read, its place in the array and the reason.

        Raises:
            Damaged: The declared shape is far larger than the files on disk can hold.
        """
        box = [range(n) for n in self.shape] if box is None else box
        touched = [
            range(r.start // c, -(-r.stop // c)) if len(r) else range(0) for r, c in zip(box, self.chunk, strict=True)
        ]
        n_bytes, n_chunks = self._coding.itemsize * math.prod(map(len, box)), math.prod(map(len, touched))
        if n_bytes > SLACK or n_chunks > 1024:
            sizes = self._sizes()
            if n_bytes > SLACK + sum(sizes) or n_chunks > 1024 + 2 * len(sizes):
                raise Damaged(f"its array {self.folder.name} has shape {self.shape}, far more than is on disk")
        found, lost = self.blank([len(r) for r in box]), []
        for place in itertools.product(*touched):
            corner = [i * c for i, c in zip(place, self.chunk, strict=True)]
            wanted = [_within(r, at, at + c) for r, at, c in zip(box, corner, self.chunk, strict=True)]
            if not all(map(len, wanted)):
                continue
            try:
                values = self._chunk(place)
            except (Damaged, OSError) as error:
                why = "is missing" if isinstance(error, FileNotFoundError) else str(error)
                rows = ", ".join(f"{name} {r[0]}:{r[-1] + 1}" for name, r in zip(self.dims, wanted, strict=True))
                lost.append(f"[{rows}] {why}")
                continue
            source = tuple(slice(r[0] - at, r[-1] + 1 - at, r.step) for r, at in zip(wanted, corner, strict=True))
            first = [b.index(r[0]) for r, b in zip(wanted, box, strict=True)]
            found[tuple(slice(i, i + len(r)) for i, r in zip(first, wanted, strict=True))] = values[source]
        return found, lost

    def write(self, start: int, block: NDArray[Any]) -> "Array":
        """Write rows from `start` on; the array ends with them. Earlier rows stay. A block may be wider than the array.

        Returns:
            The array with its new shape. The caller writes the metadata.

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
            replace_file(path, self._coding.encode(chunk, self._frame(place)))
        return now

    def _path(self, place: Sequence[int]) -> Path:
        return self.folder / self.separator.join(["c", *map(str, place)])

    def _sizes(self) -> list[int]:
        """Upper bound of the bytes of numbers in each of its files."""
        chunk = self._coding.itemsize * math.prod(self.chunk)
        files = (file for file in self.folder.rglob("*") if file.name != "zarr.json" and file.is_file())
        return [min(chunk, RATIO * file.stat().st_size) for file in files]

    @property
    def _coding(self) -> Coding:
        return Coding(self.dtype, self.codecs, ">" if self.big_endian else "<")

    def _frame(self, place: Sequence[int]) -> bytes:
        return address(self.record, self.folder.name, place) if self.record else b""

    def _chunk(self, place: Sequence[int]) -> NDArray[Any]:
        """One chunk's numbers.

        Raises:
            Damaged: The file is not what was written there.
            OSError: There is no file, or the disk fails.
        """
        return self._coding.load(self._path(place), self.chunk, self._frame(place))


def _codecs(array: str, codecs: list[Any], n_dims: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and configurations of an array's codecs.

    Raises:
        Damaged: No recorder writes them.
    """
    if not all(isinstance(codec, dict) and codec.get("name") in CODECS for codec in codecs):
        raise Damaged(f"its array {array} asks for a codec other than {', '.join(CODECS)}")
    configurations = {codec["name"]: codec.get("configuration") for codec in codecs}
    names = tuple(codec["name"] for codec in codecs)
    chains = {(*t, "bytes", *c, *s) for t in [(), ("transpose",)] for c in CHAINS for s in [(), ("crc32c",)]}
    if names not in chains:
        raise Damaged(f"its array {array} has its codecs in an order that no recorder writes")
    if "transpose" in names and (n_dims != 2 or configurations["transpose"] != {"order": [1, 0]}):
        raise Damaged(f"its array {array} has its dimensions in an order that no recorder writes")
    return names, configurations


def _within(r: range, start: int, stop: int) -> range:
    """The numbers of a range with a positive step that are in [start, stop)."""
    return r[max(0, -(-(start - r.start) // r.step)) : max(0, -(-(stop - r.start) // r.step))]
