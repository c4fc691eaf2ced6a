"""The readout of a Balance: matrices of charges and their predictions, entry by entry, and their eigenvalues."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from noetherperf.measure.cells import GramsCopy
from noetherperf.measure.charges import N_MOMENTS, OfSymmetry, Predicted
from noetherperf.measure.readout import by_source, has_growth
from noetherperf.rules.law import Law
from noetherperf.symmetry import Balance


class BalanceReadout(OfSymmetry, Predicted):
    """One Balance after a step: float64 CPU tensors, [blocks, n, n] and symmetric unless said otherwise.

    If the tensors of one parameter group once do not make the same step, because one has no gradient or another age,
    what would need each one's share of the law is NaN from then on: mostly all that is predicted. `reason` tells why.
    Measuring starts anew with the optimizer's reset_measurement().

    Attributes:
        symmetry: The measured Balance.
        name: Its name.
        closed: Whether free + forced is a prediction.
        reason: Why it is not; empty if it is.
        charge: X = W₁W₁ᵀ − W₂W₂ᵀ now, of the values as stored.
        initial: X when measuring began.
        discrete: The discrete law's prediction, exact to rounding in every entry where the symmetry holds.
        flow: The flow law's, the continuous-time dynamics.
        growth, transport: What η²uuᵀ added, and the rest, as in `Charges`. None for a rule that has none (SGD).
        defect: The symmetric part of the last step's gradient constraint, sym(W₁g₁ᵀ) − sym(W₂g₂ᵀ); zero where the
            symmetry holds.
        relative_defect: Of each block, [blocks]: the Frobenius norm of the defect over the largest value it could have,
            (|W₁|² + |W₂|²)^½ (|g₁|² + |g₂|²)^½, W taken after the step; 0 where that is 0. NaN where
            squares of the gradient leave the range of its dtype.
        residual: charge − discrete.total: defect and rounding.
        rounding: charge − discrete.budget: what rounding to the stored dtype changed.
        eigenvalues: Of X, the spectrum of imbalance, [blocks, n], ascending. All zero: perfectly balanced.
        predicted_eigenvalues: Of discrete.total, [blocks, n].
        trace: Of X, [blocks]: the sum of eigenvalues; |W₁|² − |W₂|².
        off_diagonal: The share of X that no Rescale has, [blocks]: |X off the diagonal| / |X|, Frobenius norms; 0 to 1.
    """

    symmetry: Balance

    def __init__(self, symmetry: Balance, matrices: Tensor, largest: Tensor, reason: str, *, has_growth: bool) -> None:
        self.symmetry, self.reason = symmetry, reason
        self._matrices = matrices  # of Row.INITIAL to Row.DEFECT, [11, blocks, n, n]
        self._largest = largest  # of defect, [blocks]
        self._has_growth = has_growth

    def _row(self, number: int) -> Tensor:
        return self._matrices[number - N_MOMENTS]

    @property
    def relative_defect(self) -> Tensor:
        shares = self.defect / self._largest[:, None, None]  # first, since squares may leave the range of numbers
        found = torch.where(self._largest == 0.0, 0.0, torch.linalg.matrix_norm(shares))
        beyond = self._largest.isinf() | (self._largest == 0.0) & (self.defect != 0.0).any(-1).any(-1)
        return torch.where(beyond, torch.nan, found)

    @property
    def eigenvalues(self) -> Tensor:
        return _spectrum(self.charge)

    @property
    def predicted_eigenvalues(self) -> Tensor:
        return _spectrum(self.discrete.total)

    @property
    def trace(self) -> Tensor:
        return self.charge.diagonal(dim1=-2, dim2=-1).sum(-1)

    @property
    def off_diagonal(self) -> Tensor:
        x = self.charge
        rest = x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
        norm = torch.linalg.matrix_norm(x)
        return torch.where(norm == 0.0, 0.0, torch.linalg.matrix_norm(rest) / norm)

    def scalars(self) -> dict[str, float]:
        """A few numbers for a logger; `Readout.scalars` describes them."""
        sizes = self.eigenvalues.abs()
        return {
            "abs_charge": float(sizes.nanquantile(0.5)),
            "abs_charge_p90": float(sizes.nanquantile(0.9)),
            "off_diagonal": float(self.off_diagonal.mean()),
            "residual": float(self.residual.abs().max()),
            "rounding": float(self.rounding.abs().max()),
            "relative_defect": float(self.relative_defect.max()),
        }

    def __str__(self) -> str:
        blocks, n, _ = self.charge.shape
        units = f"{self.name}: {blocks} block{'s' * (blocks != 1)} of {n} unit{'s' * (n != 1)}"
        finite = self.charge.isfinite().all(-1).all(-1)
        if not bool(finite.all()):
            return f"{units}: charges of {int((~finite).sum())} of them are not finite numbers; {self._law(finite)}"
        sizes = self.eigenvalues.abs()
        return (
            f"{units}, |eigenvalue| {float(sizes.median()):.2g} ({float(sizes.min()):.2g} … {float(sizes.max()):.2g}), "
            f"{100 * float(self.off_diagonal.mean()):.0f} % off the diagonal; {self._law(finite)}"
        )

    def _law(self, finite: Tensor) -> str:
        """What became of the law in these blocks, as a clause."""
        if not self.closed:
            return f"open: {self.reason}"
        missed = float(self.residual[finite].abs().max()) if bool(finite.any()) else math.nan
        if not math.isfinite(missed):
            return "the law predicts no finite numbers"
        return f"the law misses {missed / (float(self.charge[finite].abs().max()) or 1.0):.1g} of the largest entry"

    def __repr__(self) -> str:
        blocks, n, _ = self.charge.shape
        return f"BalanceReadout({self.name!r}, {blocks} × [{n}, {n}], closed={self.closed})"


def _spectrum(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices, [blocks, n], ascending; NaN for a matrix that is not finite."""
    finite = matrices.isfinite().all((-2, -1))[:, None, None]
    found = torch.linalg.eigvalsh(torch.where(finite, matrices, 0.0))
    return torch.where(finite[..., 0], found, torch.nan)


def read_balances(
    balances: Sequence[Balance], copies: Sequence[GramsCopy], reasons: Mapping[str, str]
) -> dict[str, BalanceReadout]:
    """The readouts of all balances, from the measurements of all devices on the CPU.

    Args:
        balances: In the order of the plans.
        copies: One for each device.
        reasons: The reason of each open law.
    """
    matrices: dict[int, Tensor] = {}
    squares: dict[int, Tensor] = {}  # |W|² and |g|², [2, blocks]
    splits = False
    for copy in copies:
        if not copy.tensors:
            continue
        plan, (state, defect, sq_g, propagators), (charge, sq_p) = copy
        splits = has_growth(plan.rule)
        for number, cell in enumerate(plan.cells):
            at = cell.entries
            rows = by_source(plan.rule.laws[Law.NORM], state[:, at], propagators[number : number + 1].numpy())
            own = torch.cat([torch.from_numpy(rows), charge[None, at], defect[None, at]])
            parts = cell.unpacked(own), torch.stack([sq_p[cell.blocks], sq_g[cell.blocks]])
            for total, part in zip((matrices, squares), parts, strict=True):
                total[cell.balance] = total[cell.balance] + part if cell.balance in total else part
    return {
        balance.name: BalanceReadout(
            balance,
            matrices[number],
            squares[number].sqrt().prod(0),
            reasons.get(balance.name, ""),
            has_growth=splits,
        )
        for number, balance in enumerate(balances)
    }
