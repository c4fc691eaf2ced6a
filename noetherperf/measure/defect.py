"""The relative defect: how much a gradient violates a symmetry's constraint, relative to the largest possible one.

    |⟨g, ψ_A⟩| / (|g_A| |ψ_A|)

for a group A with generator ψ_A. By Cauchy and Schwarz it lies between 0, where the symmetry holds, and 1.

A normalisation may cancel a parameter altogether, as BatchNorm cancels the bias before it. Then g_A is zero but for
rounding, and the quotient divides one rounding error by another. So |g_A|² counts as no less than

    FLOOR² n_A ⟨g²⟩

with n_A the number of elements in A, and ⟨g²⟩ the mean square of one element of the whole gradient.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOOR", "Numbers", "floored", "mean_square", "quotient", "relative_defect"]

Numbers = NDArray[np.float64]

FLOOR = 1e-3  # of the root mean square: a gradient below it may be rounding and nothing else


def mean_square(sq_norms: Numbers, n_elements: Numbers) -> float:
    """⟨g²⟩ = Σ |g_i|² / Σ n_i over the pieces i of a gradient; pieces that are not finite are left out.

    Args:
        sq_norms: |g_i|², [n pieces].
        n_elements: n_i, [n pieces].

    Returns:
        Mean square of one element; 0 where there is none.
    """
    finite = np.isfinite(sq_norms)
    counted = n_elements[finite].sum()
    return float(sq_norms[finite].sum() / counted) if counted else 0.0


def floored(sq_norm: Numbers, n_elements: Numbers, usual: float) -> Numbers:
    """|g_A|², but no less than FLOOR² n_A · usual, [n groups]; usual is a `mean_square`. NaN stays NaN."""
    return np.maximum(sq_norm, FLOOR**2 * usual * n_elements)


@np.errstate(all="ignore")  # what is not finite is reported as it is
def quotient(defect: Numbers, largest: Numbers) -> Numbers:
    """|defect| / largest, [n groups]; 0 where the largest is 0, NaN where one of them is."""
    return np.where(largest == 0.0, 0.0, np.abs(defect) / largest)


@np.errstate(all="ignore")
def relative_defect(defect: Numbers, sq_gradient: Numbers, sq_generator: Numbers) -> Numbers:
    """|⟨g, ψ_A⟩| / (|g_A| |ψ_A|), [n groups].

    Args:
        defect: ⟨g, ψ_A⟩, [n groups].
        sq_gradient: |g_A|², `floored`, [n groups].
        sq_generator: |ψ_A|², [n groups].
    """
    return quotient(defect, np.sqrt(sq_gradient * sq_generator))
