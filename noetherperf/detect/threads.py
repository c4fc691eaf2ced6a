"""How many threads torch computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["threads"]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """n threads inside; afterwards as many as before.

    Small operations want one. OpenMP's threads spin while they wait for each other, so that beside other busy processes
    each of these operations waits for a whole slice of time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
