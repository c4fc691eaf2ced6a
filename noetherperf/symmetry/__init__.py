"""Symmetries: which numbers of a model move together, by name, and what is conserved. Knows no tensors."""

from noetherperf.symmetry.kinds import Norm, Rescale, Scale, Symmetry, Translation
from noetherperf.symmetry.part import Part, Shape
from noetherperf.symmetry.text import from_json, to_json
from noetherperf.symmetry.units import layers, neurons
from noetherperf.symmetry.validate import validate

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
