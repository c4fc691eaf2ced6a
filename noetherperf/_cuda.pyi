"""Types of the compiled CUDA module (csrc/bind_cuda.cpp)."""

from collections.abc import Mapping, Sequence

ANY: int
architectures: str

class Engine:
    def __init__(
        self,
        addresses: Mapping[str, int],
        *,
        n_tensors: int,
        n_spans: int,
        n_groups: int,
        n_components: int,
        n_driving: int,
        n_ages: int,
        n_numbers: int,
        law_numbers: Sequence[int],
        n_state_rows: Sequence[int],
        moments_stride: int,
        states_stride: Sequence[int],
    ) -> None: ...
    def launch(
        self,
        launches: Sequence[tuple[int, int, int, int]],
        inputs: Mapping[str, int],
        *,
        scaled: bool,
        measuring: bool,
        stream: int,
        first: bool = True,
        second: bool = True,
    ) -> None: ...

def n_devices() -> int: ...
