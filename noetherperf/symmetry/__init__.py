"""Symmetries: which parameters of a model move together, by name, and what is conserved. Depends on no other room.

part      Part: the groups that one parameter contributes
kinds     Translation, Scale, Rescale, Norm: parts with signs, and the charge
balance   Balance: the kind whose charges are matrices
validate  symmetries against a model's names and shapes
text      JSON
units     Norms of every unit or tensor of a model
explain   a symmetry in words and formulas
"""

from noetherperf.symmetry.balance import Balance, balances_in, with_groups
from noetherperf.symmetry.kinds import Norm, Quantity, Rescale, Scale, Symmetry, Translation
from noetherperf.symmetry.part import Part, Shape
from noetherperf.symmetry.text import from_json, to_json
from noetherperf.symmetry.units import layers, neurons
from noetherperf.symmetry.validate import validate

__all__ = [
    "Balance",
    "Norm",
    "Part",
    "Quantity",
    "Rescale",
    "Scale",
    "Shape",
    "Symmetry",
    "Translation",
    "balances_in",
    "from_json",
    "layers",
    "neurons",
    "to_json",
    "validate",
    "with_groups",
]
