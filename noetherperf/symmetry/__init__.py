"""Symmetries: which numbers of a model move together, by name, and what is conserved. Knows no tensors."""

from noetherperf.symmetry.symmetry import (
    Norm,
    Part,
    Rescale,
    Scale,
    Shape,
    Symmetry,
    Translation,
    from_json,
    layers,
    neurons,
    to_json,
    validate,
)

__all__ = [
    "Norm",
    "Part",
    "Rescale",
    "Scale",
    "Shape",
    "Symmetry",
    "Translation",
    "from_json",
    "layers",
    "neurons",
    "to_json",
    "validate",
]
