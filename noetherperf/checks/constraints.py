"""Gradient and Hessian constraints: what a symmetry implies for a loss at one point, checked on one batch.

A symmetry is a flow of the parameters that does not change the loss (docs/theory.md, section 1), with generator ψ_A for
a group A:

    translation        θ → θ + s c 1_A          ψ_A = c 1_A
    scale, rescale     θ_j → e^{c_j s} θ_j      ψ_A = C_A θ,   C_A = diag(c_j), zero outside A

c_j is the signed weight of the part with element j. It is 1 for a scale. For a unit that is homogeneous of degree k it
is +1 into the unit and −k out of it. Where two parts meet (the diagonal of a recurrent weight), it is the sum of both.
θ_j has its part's offset, as in the gain 1 + w. A relation of many writers and readers has the same form. A Balance has
a generator for each entry of a matrix (groups.py), with its own C_A g. Differentiate L(θ(s)) = L(θ) with respect to s
at s = 0, then to θ:

    gradient           ⟨g, ψ_A⟩ = 0
    Hessian            H ψ_A + C_A g = 0        (C_A g is absent for a translation: its ψ does not depend on θ)

For the plain kinds these are H 1_A = 0, H θ_A = −g_A and H(θ_A1 − θ_A2) + g_A1 − g_A2 = 0. The Hessian constraint of
each group is a vector r_A over all parameters of the model. One Hessian-vector product per group would be expensive.
But H is symmetric, so one product H x with a random vector x gives the projection of every group's r_A at once:

    ⟨x, r_A⟩ = ⟨H x, ψ_A⟩ + ⟨C_A x, g⟩,      x ~ N(0, 1),      E ⟨x, r_A⟩² = |r_A|²

If the constraint holds, every projection is zero up to rounding. If it does not hold, none is, with probability one. So
this is an exact test. Of |r_A| it is an estimate: with m probes its square has a relative standard deviation of √(2/m).
`exact=True` also computes the product of every group.

A relative defect is the defect over the largest value that it could have, by Cauchy and Schwarz:

    gradient   |⟨g, ψ_A⟩| / (|g_A| |ψ_A|)       Hessian   |r_A| / (|H_A| |ψ_A| + |C_A g|)

|H_A| is the Frobenius norm of H's columns in A, estimated by the same probes. |g_A| and |H_A| have the floor of
measure/defect.py, with the average over the whole model.

Source: Kunin et al. (2021), arXiv:2012.04728, for weights of ±1; weights, the projection and the scales derived here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from noetherperf.checks.closure import check_same, evaluate
from noetherperf.checks.derivatives import Point, Vector, check_symmetric, square
from noetherperf.checks.exact import EPS, Stage, refuse_lazy
from noetherperf.checks.groups import Groups, groups_of
from noetherperf.checks.report import Constraints
from noetherperf.checks.workbench import Workbench
from noetherperf.common.progress import progress as show_progress
from noetherperf.measure.defect import Numbers, floored, quotient, relative_defect
from noetherperf.symmetry import Symmetry, validate

__all__ = ["check_constraints"]

TOLERANCE = 1e-9


def check_constraints(
    model: nn.Module,
    closure: Callable[[], Tensor],
    symmetries: Sequence[Symmetry],
    *,
    hessian: bool = True,
    exact: bool = False,
    probes: int = 4,
    float64: bool = True,
    eps: float = EPS,
    tolerance: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Constraints:
    """Check the gradient and Hessian constraints of symmetries on one batch, per group.

        ⟨g, ψ_A⟩ = 0          H ψ_A + C_A g = 0          (docs/theory.md, section 1)

    The model's parameters, gradients, buffers, mode and the random states of torch, numpy and Python stay exactly as
    they are. Each evaluation starts from the same state, so dropout keeps its mask. Attention uses torch's math kernel,
    since the fused ones have no second derivative.

    Args:
        model: Any model; frozen parameters are checked, too.
        closure: Returns the scalar loss of the model on one fixed batch: `lambda: cross_entropy(model(x), y)`. It does
            not call backward(). Its inputs may have any floating dtype. In float64 stages they are widened with the
            model.
        symmetries: With names from `model.named_parameters()`. A Norm is measured, and claims nothing.
        hessian: Check the Hessian constraints, too: `probes` Hessian-vector products at each stage.
        exact: Make one more Hessian-vector product per group. |H ψ_A + C_A g| is then no estimate.
        probes: Random projections of the Hessian constraints, at least 2.
        float64: Evaluate also in float64, and in float64 with eps → 0. False: evaluate only the model as it is.
        eps: What replaces the eps of every normalisation in the last stage.
        tolerance: Largest relative defect with which a symmetry holds. If the last stage is in float64, the default is
            1e-9: above all rounding, and below every broken symmetry. Otherwise it is √ε of the coarsest dtype.
        seed: Seed of the random projections.
        progress: Show progress on stderr. None: only if stderr is a terminal.

    Returns:
        Constraints: float64 arrays [stage, group] for each symmetry.

    Raises:
        TypeError: The closure is not callable, or symmetries hold something else.
        ValueError: Symmetries do not fit the model, or an option is out of range. Or the closure's value is not a
            finite scalar, depends on none of the parameters, or differs at the second evaluation. Or the closure runs
            backward itself, cannot be evaluated in float64, or cannot be differentiated twice.
    """
    refuse_lazy(model)
    shapes = {name: parameter.shape for name, parameter in _differentiable(model).items()}
    symmetries = validate(symmetries, shapes)
    if not callable(closure):
        raise TypeError(f"closure must be callable and return the loss, got {closure!r}; write lambda: loss_of(model)")
    if probes < 2:
        raise ValueError(f"probes must be at least 2, so that the Hessian's symmetry can be checked, got {probes!r}")
    for option, value in (("eps", eps), ("tolerance", 1.0 if tolerance is None else tolerance)):
        if not value > 0:
            raise ValueError(f"{option} must be positive, got {value!r}")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if tolerance is None:
        wide = float64 or dtypes == {torch.float64}
        tolerance = TOLERANCE if wide else math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))

    groups = [groups_of(symmetry, shapes) for symmetry in symmetries]
    stages: tuple[Stage, ...] = ("as_is", "float64", "no_eps") if float64 else ("as_is",)
    n_products = (probes + exact * sum(one.n_groups for one in groups)) * hessian
    defects: dict[Stage, list[_Defects]] = {}
    losses: dict[Stage, float] = {}
    done = itertools.count(1)
    with (
        Workbench(model, eps) as bench,
        show_progress("checking", len(stages) * n_products, "Hessian-vector product", shown=progress) as report,
    ):
        with bench.stage("as_is"):
            first = evaluate(closure, "as_is").detach()
        for stage in stages:
            with bench.stage(stage):
                loss = evaluate(closure, stage)
                if stage == "as_is":
                    check_same(first, loss)
                point = Point(_differentiable(model), loss, twice=hessian)
                losses[stage] = loss.item()
                defects[stage] = [_Defects(one, point) for one in groups]
                last: tuple[Vector, Vector] | None = None
                for x in point.probes(probes * hessian, seed):
                    product = point.product(x)
                    if last is not None:
                        check_symmetric(*last, x, product)
                    last = x, product
                    usual = point.mean_square(product)
                    for one in defects[stage]:
                        one.project(x, product, usual)
                    report(next(done))
                for one in defects[stage] if exact and hessian else ():
                    for _ in one.each_group():
                        report(next(done))
    return Constraints(
        symmetries,
        {one.symmetry.name: _dataset([defects[stage][i] for stage in stages], stages) for i, one in enumerate(groups)},
        losses=losses,
        tolerance=tolerance,
        epsilons={epsilon.place: epsilon.value for epsilon in bench.epsilons},
        eps=eps,
        unused=point.unused,
    )


class _Defects:
    """The defects of one symmetry at one point, gathered probe by probe; all [n groups]."""

    def __init__(self, groups: Groups, point: Point) -> None:
        self._groups, self._point = groups, point
        translation = groups.symmetry.law == "translation"
        self._base = point.ones if translation else _counted(point, groups.symmetry)  # ψ_A = C_A base
        self._drift = point.nothing if translation else point.gradient  # ∂ψ_A/∂θ g = C_A drift
        self._n_elements = groups.sq_norm(point.ones)
        self._sq_generator = groups.sq_generator(self._base)
        self._sq_columns, self._sq_projections = np.zeros((2, groups.n_groups))
        self._n_probes = 0
        self._norms: list[float] = []

        self.gradient = groups.along(point.gradient, self._base)
        sq_gradient = self._sq_norm(point.gradient, point.mean_square(point.gradient))
        self.gradient_relative = relative_defect(self.gradient, sq_gradient, self._sq_generator)

    def _sq_norm(self, vector: Vector, usual: float) -> Numbers:
        """|vector_A|², floored by the mean square of the whole vector."""
        return floored(self._groups.sq_norm(vector), self._n_elements, usual)

    @np.errstate(all="ignore")  # what is not finite is reported as it is
    def project(self, x: Vector, product: Vector, usual: float) -> None:
        """Take in one probe x, H x, and the mean square of H x."""
        projection = self._groups.along(product, self._base) + self._groups.along(self._drift, x)
        self._sq_projections += projection * projection
        self._sq_columns += self._sq_norm(product, usual)
        self._n_probes += 1

    def each_group(self) -> Iterator[None]:
        """Make the Hessian-vector product of every group, one at a time."""
        for group in range(self._groups.n_groups):
            direction = self._point.zeros()
            self._groups.add_generator(direction, group, self._base)
            residual = {name: values.clone() for name, values in self._point.product(direction).items()}
            self._groups.add_drift(residual, group, self._drift)
            self._norms.append(math.sqrt(square(residual)))
            yield

    @property
    def hessian(self) -> Numbers | None:
        """|H ψ_A + C_A g|: from the products of the groups if they were made, else estimated by the probes."""
        if not self._n_probes:
            return None
        if self._norms:
            return np.array(self._norms)
        return np.asarray(np.sqrt(self._sq_projections / self._n_probes))

    @property
    @np.errstate(all="ignore")
    def hessian_relative(self) -> Numbers | None:
        """The same in units of the largest it could be."""
        if self.hessian is None:
            return None
        columns = np.sqrt(self._sq_columns / self._n_probes)
        drift = np.sqrt(self._groups.sq_drift(self._drift))
        return quotient(self.hessian, columns * np.sqrt(self._sq_generator) + drift)


def _counted(point: Point, symmetry: Symmetry) -> Vector:
    """θ with the offsets of a symmetry's parts."""
    offsets = {part.parameter: part.offset for part in symmetry.parts if part.offset}
    return {**point.values, **{name: point.values[name] + offset for name, offset in offsets.items()}}


def _dataset(defects: Sequence[_Defects], stages: Sequence[Stage]) -> xr.Dataset:
    variables = ("gradient", "gradient_relative", "hessian", "hessian_relative")
    columns = {variable: [getattr(one, variable) for one in defects] for variable in variables}
    return xr.Dataset(
        {
            variable: (("stage", "group"), np.stack(values))
            for variable, values in columns.items()
            if values[0] is not None
        },
        coords={"stage": list(stages)},
    )


def _differentiable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
