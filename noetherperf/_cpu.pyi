"""Types of the compiled CPU module (csrc/bind_cpu.cpp, csrc/bind_tensors.cpp)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

class Engine:
    def __init__(
        self,
        tensors: np.ndarray,
        dims: np.ndarray,
        views: np.ndarray,
        tiles: np.ndarray,
        spans: np.ndarray,
        components: np.ndarray,
        driving: np.ndarray,
        law_numbers: Sequence[int],
        n_numbers: int,
        workspace: int,
        moments: int,
        moments_stride: int,
        states: Sequence[int],
        states_stride: Sequence[int],
        propagators: int,
        isa: str,
        rule: str,
    ) -> None: ...
    def step(
        self,
        addresses: np.ndarray,
        row_of: np.ndarray,
        rows: np.ndarray,
        groups: np.ndarray,
        n_threads: int,
        unscale: float = 1.0,
    ) -> None: ...
    def measure(self, addresses: np.ndarray, n_threads: int) -> None: ...
    @property
    def isa(self) -> str: ...

class Readable:
    def __init__(
        self, tensor_type: type[Tensor], usual: type[Tensor], plain: list[Tensor], negated: list[Tensor]
    ) -> None: ...
    @property
    def is_quick(self) -> bool: ...

class TensorReader:
    def __init__(self, n: int, tensor_type: type[Tensor], readable: Readable) -> None: ...
    def read(self, tensors: list[Tensor | None], addresses: np.ndarray, column: int) -> list[int]: ...
    def remember(self, i: int, tensor: Tensor) -> None: ...

class Gatherer:
    def __init__(self, params: list[Tensor], tensor_type: type[Tensor]) -> None: ...
    def attributes(self, params: list[Tensor], name: str) -> tuple[list[Any], bytes]: ...
    def items(self, state: dict[Tensor, Any], name: str) -> tuple[list[Any], bytes]: ...

class Watch:
    def __init__(self, which: Sequence[int], tensor_type: type[Tensor], kept: bool) -> None: ...
    def look(self, tensors: Sequence[Tensor | None]) -> list[int]: ...
    def know(self, i: int, tensor: Tensor | None) -> None: ...
    def expect(self, missing: bytes) -> None: ...

class Glance:
    def __init__(
        self,
        params: list[Tensor],
        sizes: Sequence[int],
        gatherer: Gatherer,
        readers: list[TensorReader],
        watches: list[Watch | None],
        keys: list[str],
        counts: Watch | None,
        count_key: str | None,
        addresses: np.ndarray,
    ) -> None: ...
    def look(self, groups: list[Any], state: dict[Tensor, Any]) -> list[Tensor | None] | None: ...

def isas() -> list[str]: ...
def rules() -> dict[str, dict[str, Any]]: ...
def self_check(isa: str, mix_up: str = "") -> str: ...
def layouts() -> dict[str, dict[str, tuple[int, int] | int]]: ...
def memory_floor(streams: Sequence[int], n_written: int, n: int, n_threads: int) -> None: ...
