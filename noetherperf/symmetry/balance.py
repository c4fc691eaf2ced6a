"""Balance: the symmetry of units that are read linearly, whose charges are matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from noetherperf.common.untrusted import shown
from noetherperf.symmetry.kinds import KINDS, Symmetry, TwoSided
from noetherperf.symmetry.part import Part

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Balance", "balances_in", "with_groups"]


@dataclass(frozen=True, init=False, repr=False)
class Balance(TwoSided):
    """Any invertible mix of units that are read linearly changes nothing, if their readers undo it.

        f(M W₁, W₂ M⁻¹) = f(W₁, W₂) for every invertible M [n, n]

    W₁ [n, …] are the parameters into n units, W₂ [n, …] those out of them, both with one row for each unit. There is a
    generator for each entry of a matrix E, the direction in which M = 1 + sE starts:

        generator ψ = (E W₁, −Eᵀ W₂)        constraint W₁ g₁ᵀ = (W₂ g₂ᵀ)ᵀ       charge X = W₁W₁ᵀ − W₂W₂ᵀ

    The constraint holds in every entry, on every batch. Its symmetric part conserves X, which is symmetric: n(n + 1)/2
    laws. The literature calls X *balancedness* or *imbalance*. A Rescale of the same parts conserves the diagonal of X.
    The antisymmetric part, of rotations, has a constraint and no charge.

    The symmetry holds

    - for a linear pair W₂W₁x: between two linear layers with nothing in between, in LoRA's B A;
    - for each attention head, between queries and keys, and between values and output;
    - not through rotary positions, a norm of queries or keys, or a nonlinearity: these leave a Rescale at most.

    A bias is one more column, [W b]. Under grouped queries, the query heads of one key head are one part with `fold`.

        Balance("layer 0: q, k", [Part("q.weight", 0), Part("q.bias", 0)], [Part("k.weight", 0), Part("k.bias", 0)],
                size=head_size)

    Args:
        name: Its key in readout().balances; None: the name of its parts ("attn.q<->k").
        inward: Parameters into the units: their groups are the units. Weights must be 1.
        outward: Parameters out of the units. Weights must be 1 here; they are negated in `parts`.
        size: n, how many neighbouring units form a block, such as a head. Only the units of one block mix with each
            other. None: all units are one block.

    Raises:
        TypeError: name is no str, inward or outward is no sequence of Part, or size is no integer.
        ValueError: name, inward or outward is empty, size is below 1, a weight is not 1, or a part has an offset.

    Source: Arora, Cohen & Hazan (2018), arXiv:1802.06509; Du, Hu & Lee (2018), arXiv:1806.00900. For attention, any
    optimizer, and discrete steps: this project; docs/balance.md.
    """

    size: int | None
    kind = "balance"
    options = ("size",)

    def __init__(
        self, name: str | None, inward: Iterable[Part], outward: Iterable[Part], *, size: int | None = None
    ) -> None:
        super().__init__(name, inward, outward)
        for part in (*self.inward, *self.outward):
            if part.weight != 1.0:
                raise ValueError(
                    f"Balance: {part!r} has a weight other than 1, but units that are read linearly have weight 1; for "
                    "units of another degree of homogeneity use a Rescale"
                )
            if part.offset != 0.0:
                raise ValueError(
                    f"Balance: {part!r} has an offset, with which products of units have no law; use a Rescale of the "
                    "same parts"
                )
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"Balance: size must be an integer or None, got {shown(size)}")
        if size is not None and size < 1:
            raise ValueError(f"Balance: size must be at least 1, got {size}")
        object.__setattr__(self, "size", size)

    def check_groups(self, n_groups: int) -> None:
        if n_groups % (self.size or 1):
            raise ValueError(
                f"its parts have {n_groups} units, which are no whole number of blocks of size {self.size}; size is "
                "the number of units that mix with each other, such as a head's"
            )

    def units(self, part: Part, x: "Tensor") -> "Tensor":
        """A tensor of a part's shape as [blocks, n, rest]: for each unit all elements into it or out of it."""
        rows = part.grouped(x)
        units: Tensor = rows.unflatten(0, (-1, self.size or len(rows)))
        return units

    def charge(self, parameters: "Mapping[str, Tensor]", *, magnitude: bool = False) -> "Tensor":
        """The charges of these parameters in plain torch: W₁W₁ᵀ − W₂W₂ᵀ.

        Args:
            parameters: Tensors by name, such as dict(model.named_parameters()).
            magnitude: Sum the terms' magnitudes instead, the scale of the charge's rounding error.

        Returns:
            [blocks, n, n], float64, on the parameters' device.

        Raises:
            KeyError: A part names a parameter that is missing.
        """
        import torch

        shares = []
        for part in self.parts:
            units = self.units(part, parameters[part.parameter].detach().double())
            units = units.abs() if magnitude else units
            shares.append((1.0 if magnitude else part.weight) * (units @ units.mT))
        return torch.stack(shares).sum(0)


KINDS[Balance.kind] = Balance


def balances_in(symmetries: Iterable[Symmetry]) -> list[Balance]:
    """Those whose charges are matrices."""
    return [symmetry for symmetry in symmetries if isinstance(symmetry, Balance)]


def with_groups(symmetries: Iterable[Symmetry]) -> list[Symmetry]:
    """Those that have one charge for each group."""
    return [symmetry for symmetry in symmetries if not isinstance(symmetry, Balance)]
