"""Types of the compiled CUDA module (csrc/bind_cuda.cpp)."""

from collections.abc import Mapping, Sequence

ANY: int
N_TRANSITIONS: int
architectures: str

class Engine:
    def __init__(
        self,
        addresses: Mapping[str, int],
        *,
        n_tensors: int,
        n_spans: int,
        n_groups: int,
        moments_stride: int,
        states_stride: Sequence[int],
    ) -> None: ...
    def find_transitions(self, inputs: Mapping[str, int], *, stream: int) -> None: ...
    def launch(
        self,
        launches: Sequence[tuple[int, int, int, int]],
        inputs: Mapping[str, int],
        *,
        scaled: bool,
        measuring: bool,
        stream: int,
    ) -> None: ...

def n_devices() -> int: ...
