"""Matrix products in the precision of their numbers, whatever the process has set.

Torch rounds the factors of float32 products to TF32 or bfloat16 where a setting of the process lets it
(torch.set_float32_matmul_precision, torch.backends.…fp32_precision). Autocast would too, but leaves products alone that
are written in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # their types leave this setting out

#: Torch's setting for products on a type of device.
_SETTINGS: dict[str, Any] = {"cpu": _BACKENDS.mkldnn.matmul, "cuda": _BACKENDS.cuda.matmul}

#: Its values that round no factor.
_EXACT = ("none", "ieee")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context whose matrix products on a type of device do not round their factors.

    A setting that rounds is set aside, and put back in the end; as a rule there is none, and nothing is set. Meanwhile
    it is set aside for all threads: what they multiply is not rounded either, and if they change this very setting, the
    change is lost.

    Args:
        device: Its type counts, not its number.
    """
    setting = _SETTINGS.get(device.type)
    if setting is None or (given := setting.fp32_precision) in _EXACT:
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # which follows torch.backends.fp32_precision
        if setting.fp32_precision != given:
            setting.fp32_precision = given
