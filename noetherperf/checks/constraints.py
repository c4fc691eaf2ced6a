"""Gradient and Hessian constraints: what a symmetry asks of a loss at one point, checked on one batch.

A symmetry is a flow of the parameters that leaves the loss alone (docs/theory.md, section 1), with generator ψ_A for a
group A:

    translation        θ → θ + s c 1_A          ψ_A = c 1_A
    scale, rescale     θ_j → e^{c_j s} θ_j      ψ_A = C_A θ,   C_A = diag(c_j), zero outside A

c_j is the weight of the part that element j is in, with its sign: 1 for a scale, +1 into and −k out of a unit that is
homogeneous of degree k, the sum of both where two parts meet (the diagonal of a recurrent weight); a joint relation of
many writers and readers is no different. Differentiate L(θ(s)) = L(θ) by s at s = 0, then by θ:

    gradient           ⟨g, ψ_A⟩ = 0
    Hessian            H ψ_A + C_A g = 0        (C_A g is absent for a translation: its ψ does not depend on θ)

which for the plain kinds read H 1_A = 0, H θ_A = −g_A and H(θ_A1 − θ_A2) + g_A1 − g_A2 = 0. The Hessian constraint is
one vector r_A over all parameters of the model for every group. A Hessian-vector product a group would be dear; but H
is symmetric, so one product H x with a random vector x gives the projection of every group's r_A at once:

    ⟨x, r_A⟩ = ⟨H x, ψ_A⟩ + ⟨C_A x, g⟩,      x ~ N(0, 1),      E ⟨x, r_A⟩² = |r_A|²

Where the constraint holds, every projection is zero to rounding; where it does not, none is, with probability one. So
as a test this is exact, and as a measure of |r_A| it is an estimate: with m probes its square has a relative standard
deviation of √(2/m). `exact=True` makes the product of every group instead.

Defects are told relative to the largest they could be by Cauchy and Schwarz:

    gradient   |⟨g, ψ_A⟩| / (|g_A| |ψ_A|)       Hessian   |r_A| / (|H_A| |ψ_A| + |C_A g|)

|H_A| being the Frobenius norm of H's columns in A, estimated by the same probes. What a symmetry cancels altogether, as
BatchNorm does a bias before it, has g_A = 0 but for rounding, and the quotient would be one rounding error by another:
so |g_A| and |H_A| count as no less than a thousandth of what a group of that size has on average in the whole model.

Source: Kunin et al. (2021), arXiv:2012.04728, for weights of ±1; weights, the projection and the scales derived here.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from noetherperf.checks.exact import Stage, Workbench
from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable
from noetherperf.measure.readout import FLOOR
from noetherperf.symmetry import Symmetry, validate

__all__ = ["Constraints", "check_constraints"]

CONSTRAINTS = ("gradient", "hessian")
TOLERANCE = 1e-9
MAX_LOSS_CHANGE = 100  # machine epsilons: more between two evaluations is another loss, not the order of some sums

Vector = Mapping[str, Tensor]  # one tensor for each parameter of the model


class Constraints(Mapping[str, xr.Dataset]):
    """How well the constraints of each symmetry hold: a mapping from its name to an xarray Dataset.

    A Dataset has the dimensions `stage` and `group`, and in float64 the variables
        gradient           ⟨g, ψ_A⟩, with its sign          gradient_relative   its absolute value, relative
        hessian            |H ψ_A + C_A g|                  hessian_relative    relative       (with hessian=True)

    Stages tell where a defect comes from; all are at the same parameters, on the same batch and with the same probes:
        as_is              the model as it is
        float64            in float64: what this takes away was rounding
        no_eps             and with the eps of every normalisation near zero: what this takes away was eps; what is left
                           breaks the symmetry

    `print` shows a table of the worst groups; `noetherperf.plots.constraints` draws them all.

    Attributes:
        symmetries: What was checked.
        stages: Those that were evaluated.
        losses: The closure's value at each stage.
        tolerance: Largest relative defect at the last stage with which a symmetry holds.
        epsilons: Where an eps was found, and its value: {"norm1.eps": 1e-05}.
        eps: What replaced them in stage no_eps.
        unused: Parameters that the loss does not depend on; constraints that have only those are empty.
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        data: Mapping[str, xr.Dataset],
        *,
        losses: Mapping[Stage, float],
        tolerance: float,
        epsilons: Mapping[str, float],
        eps: float,
        unused: Sequence[str],
    ) -> None:
        self.symmetries = tuple(symmetries)
        self._data = dict(data)
        self.stages: tuple[Stage, ...] = tuple(losses)
        self.losses = dict(losses)
        self.tolerance = tolerance
        self.epsilons = dict(epsilons)
        self.eps = eps
        self.unused = tuple(unused)

    def __getitem__(self, name: str) -> xr.Dataset:
        try:
            return self._data[name]
        except KeyError:
            known = ", ".join(self._data) or "none"
            raise KeyError(f"no symmetry {name!r} was checked; there are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def worst(self, name: str, constraint: str, stage: Stage) -> float:
        """The largest relative defect over a symmetry's groups; NaN if there is one, for that is worse."""
        return float(np.max(self[name][f"{constraint}_relative"].sel(stage=stage).to_numpy(), initial=0.0))

    def eps_share(self, name: str, constraint: str) -> float:
        """How much of the worst group's defect, as the model is, goes away with eps; 0 to 1, NaN where unknown.

        The defect's absolute value falls from stage to stage by what rounding, then eps, had put there; the share is of
        the sum of both and what is left.
        """
        if "no_eps" not in self.stages or not self.epsilons:
            return math.nan
        data = self[name]
        if not data.sizes["group"]:
            return math.nan
        worst = int(data[f"{constraint}_relative"].sel(stage="as_is").argmax("group"))
        as_is, wide, left = np.abs(data[constraint].isel(group=worst).sel(stage=list(self.stages)).to_numpy()).tolist()
        rounding, eps = max(0.0, as_is - wide), max(0.0, wide - left)
        return float(eps / total) if (total := rounding + eps + left) else math.nan

    @property
    def constraints(self) -> tuple[str, ...]:
        """What was checked: gradient, and hessian unless it was left out."""
        return tuple(c for c in CONSTRAINTS if all(c in data for data in self._data.values()))

    def holds(self, name: str) -> bool:
        """Whether a symmetry's constraints are within the tolerance at the last stage."""
        return all(self.worst(name, constraint, self.stages[-1]) <= self.tolerance for constraint in self.constraints)

    @property
    def failed(self) -> tuple[str, ...]:
        """The symmetries that do not hold; those that claim nothing (Norm) cannot fail."""
        return tuple(s.name for s in self.symmetries if s.claimed and not self.holds(s.name))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON; arrays by stage, as lists over groups."""
        checked = [
            {
                "symmetry": symmetry.to_dict(),
                "holds": self.holds(symmetry.name) if symmetry.claimed else None,
                "defects": {
                    str(variable): {stage: values.sel(stage=stage).to_numpy().tolist() for stage in self.stages}
                    for variable, values in self[symmetry.name].items()
                },
            }
            for symmetry in self.symmetries
        ]
        return {
            "tolerance": self.tolerance,
            "losses": self.losses,
            "epsilons": self.epsilons,
            "eps": self.eps,
            "unused": list(self.unused),
            "failed": list(self.failed),
            "symmetries": checked,
        }

    def table(self) -> ReportTable:
        """The worst group of every symmetry, a row for each constraint and a column for each stage."""
        headings = {"as_is": "as is", "float64": "float64", "no_eps": "eps → 0"}
        table = ReportTable("Largest relative defect of the gradient and Hessian constraints")
        table.add_column("symmetry", folds=True)
        table.add_column("kind")
        table.add_column("groups", justify="right")
        table.add_column("constraint")
        for stage in self.stages:
            table.add_column(headings[stage], justify="right")
        table.add_column("by eps", justify="right")
        table.add_column("")
        for symmetry in self.symmetries:
            head = [symmetry.name, symmetry.kind, str(self[symmetry.name].sizes["group"])]
            for constraint in self.constraints:
                share = self.eps_share(symmetry.name, constraint)
                last = self.worst(symmetry.name, constraint, self.stages[-1])
                verdict = "holds" if last <= self.tolerance else "FAILS"
                table.add_row(
                    *head,
                    constraint,
                    *(f"{self.worst(symmetry.name, constraint, stage):.1e}" for stage in self.stages),
                    "–" if math.isnan(share) else f"{share:.0%}",
                    verdict if symmetry.claimed else "no claim",
                )
                head = ["", "", ""]
        return table

    def summary(self) -> str:
        """What holds and what does not, which eps there were, and what the loss does not depend on."""
        n_claimed = sum(symmetry.claimed for symmetry in self.symmetries)
        lines = [
            f"{n_claimed - len(self.failed)} of {n_claimed} symmetries hold "
            f"(relative defects ≤ {self.tolerance:.0e} {_WHERE[self.stages[-1]]})"
        ]
        if self.failed:
            lines.append(f"these do not: {', '.join(map(printable, self.failed))}")
        if self.epsilons and "no_eps" in self.stages:
            values = ", ".join(f"{value:.0e}" for value in sorted(set(self.epsilons.values())))
            lines.append(f"eps: {values} in {_plural(len(self.epsilons), 'module')}, {self.eps:.0e} instead at eps → 0")
        if self.unused:
            lines.append(
                f"the loss does not depend on {', '.join(map(printable, self.unused))}: nothing was checked there"
            )
        return "\n".join(lines)

    def __rich__(self) -> ReportTable:
        return self.table()

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return f"{console.file.getvalue().rstrip()}\n{self.summary()}"


_WHERE: dict[Stage, str] = {
    "as_is": "as the model is",
    "float64": "in float64",
    "no_eps": "in float64, eps → 0",
}


def check_constraints(
    model: nn.Module,
    closure: Callable[[], Tensor],
    symmetries: Sequence[Symmetry],
    *,
    hessian: bool = True,
    exact: bool = False,
    probes: int = 4,
    float64: bool = True,
    eps: float = 1e-14,
    tolerance: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Constraints:
    """Check the gradient and Hessian constraints of symmetries on one batch, per group.

        ⟨g, ψ_A⟩ = 0          H ψ_A + C_A g = 0          (the module's docstring derives them)

    The model's parameters, gradients, buffers, mode and the random states of torch, numpy and Python are left exactly
    as they were. Each evaluation starts from the same state, so dropout keeps its mask; attention takes torch's math
    kernel, since the fused ones have no second derivative.

    Args:
        model: Any model; parameters that are frozen are checked too.
        closure: Returns the scalar loss of the model on one fixed batch: `lambda: cross_entropy(model(x), y)`. It does
            not call backward(). Its inputs may be of any floating dtype; they are widened with the model.
        symmetries: Over the names of `model.named_parameters()`; a Norm is measured, and claims nothing.
        hessian: Check the Hessian constraints as well: `probes` Hessian-vector products at each stage.
        exact: Make one more Hessian-vector product for every group, so that |H ψ_A + C_A g| is no estimate.
        probes: Random projections of the Hessian constraints, at least 2.
        float64: Evaluate also in float64, and there with eps → 0; without it only as the model is.
        eps: What replaces the eps of every normalisation in the last stage.
        tolerance: Largest relative defect with which a symmetry holds. Default 1e-9 where the last stage is in float64,
            which rounding does not reach and no broken symmetry stays below; else √ε of the coarsest dtype.
        seed: Of the probes.
        progress: Show a bar on a terminal.

    Returns:
        Constraints: float64 arrays [stage, group] for each symmetry.

    Raises:
        TypeError: The closure is not callable, or symmetries hold something else.
        ValueError: Symmetries do not fit the model; the closure's value is no finite scalar, depends on none of the
            parameters, or is another the second time; the closure runs backward itself, cannot be evaluated in float64
            or not differentiated twice; an option is out of range.
    """
    shapes = {name: parameter.shape for name, parameter in _differentiable(model)}
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

    groups = [_Groups(symmetry, shapes) for symmetry in symmetries]
    stages: tuple[Stage, ...] = ("as_is", "float64", "no_eps") if float64 else ("as_is",)
    n_products = (probes + exact * sum(one.n_groups for one in groups)) * hessian
    defects: dict[Stage, list[_Defects]] = {}
    losses: dict[Stage, float] = {}
    console = Console(stderr=True)
    with (
        Workbench(model, eps) as bench,
        Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar,
    ):
        task = bar.add_task("Hessian-vector products", total=len(stages) * n_products)
        with bench.stage("as_is"):
            first = _evaluate(closure, "as_is").detach()
        for stage in stages:
            with bench.stage(stage):
                loss = _evaluate(closure, stage)
                if stage == "as_is":
                    _check_same(first, loss)
                point = _Point(dict(_differentiable(model)), loss, twice=hessian)
                losses[stage] = loss.item()
                defects[stage] = [_Defects(one, point) for one in groups]
                last: tuple[Vector, Vector] | None = None
                for x in point.probes(probes * hessian, seed):
                    product = point.product(x)
                    if last is not None:
                        _check_symmetric(*last, x, product)
                    last = x, product
                    sq_product = _square(product)
                    for one in defects[stage]:
                        one.project(x, product, sq_product)
                    bar.advance(task)
                for one in defects[stage] if exact and hessian else ():
                    for _ in one.each_group():
                        bar.advance(task)
    return Constraints(
        symmetries,
        {one.symmetry.name: _dataset([defects[stage][i] for stage in stages], stages) for i, one in enumerate(groups)},
        losses=losses,
        tolerance=tolerance,
        epsilons={epsilon.place: epsilon.value for epsilon in bench.epsilons},
        eps=eps,
        unused=point.unused,
    )


class _Groups:
    """One symmetry's groups in a model of these shapes: sums over them, and their places in a vector."""

    def __init__(self, symmetry: Symmetry, shapes: Mapping[str, torch.Size]) -> None:
        self.symmetry = symmetry
        self.n_groups = symmetry.parts[0].n_groups(shapes[symmetry.parts[0].parameter])

    def total(self, power: int, a: Vector, b: Vector) -> Tensor:
        """Σ_parts c^power ⟨a, b⟩ of every group, [n groups], float64 on the CPU."""
        return torch.stack(
            [
                part.weight**power
                * (part.grouped(a[part.parameter]).double() * part.grouped(b[part.parameter])).sum(1).cpu()
                for part in self.symmetry.parts
            ]
        ).sum(0)

    def add(self, to: Vector, group: int, values: Vector) -> None:
        """Add C_A · values to a vector, in place."""
        for part in self.symmetry.parts:
            target, source = to[part.parameter], values[part.parameter]
            if part.axis is None:
                target += part.weight * source
            else:
                indices = part.gather(torch.arange(target.shape[part.axis], device=target.device))[group]
                target.index_add_(part.axis, indices, part.weight * source.index_select(part.axis, indices))


class _Point:
    """Gradient and Hessian-vector products of a loss with respect to parameters, at the values they have now."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], loss: Tensor, *, twice: bool) -> None:
        self._names, self._parameters = list(parameters), list(parameters.values())
        # The seed asks for a gradient as well, so that what cannot be differentiated twice leaves its mark in any case.
        seed = torch.ones_like(loss).requires_grad_(twice)
        with _explained(twice):
            grads = torch.autograd.grad(loss, self._parameters, seed, create_graph=twice, allow_unused=True)
            _check_graph(grads)
        self.unused = tuple(name for name, g in zip(self._names, grads, strict=True) if g is None)
        if len(self.unused) == len(grads):
            raise ValueError("the closure's loss depends on none of the model's parameters; is it of another model?")
        self._grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, grads, strict=True)]
        self.values = self._vector(p.detach() for p in self._parameters)
        self.gradient = self._vector(g.detach() for g in self._grads)
        self.sq_gradient = _square(self.gradient)
        self.ones, self.nothing = self._constant(1.0), self._constant(0.0)
        self.n_elements = sum(p.numel() for p in self._parameters)

    def _vector(self, tensors: Iterable[Tensor]) -> Vector:
        return dict(zip(self._names, tensors, strict=True))

    def _constant(self, value: float) -> Vector:
        """A vector of one number that takes no memory."""
        return self._vector(p.detach().new_full((), value).expand(p.shape) for p in self._parameters)

    def zeros(self) -> Vector:
        """A vector to write into."""
        return self._vector(torch.zeros_like(p) for p in self._parameters)

    def probes(self, n: int, seed: int) -> Iterator[Vector]:
        """Vectors of independent normal numbers, the same for every stage."""
        random = torch.Generator("cpu").manual_seed(seed)
        for _ in range(n):
            yield self._vector(
                torch.randn(p.shape, generator=random, dtype=torch.float64, device="cpu").to(p.device, p.dtype)
                for p in self._parameters
            )

    def product(self, x: Vector) -> Vector:
        """H x."""
        outputs = [(g, x[name]) for name, g in zip(self._names, self._grads, strict=True) if g.requires_grad]
        if not outputs:  # the loss is linear
            return self.nothing
        grads, directions = zip(*outputs, strict=True)
        with _explained(twice=True):
            products = torch.autograd.grad(grads, self._parameters, directions, retain_graph=True, allow_unused=True)
        return self._vector(
            torch.zeros_like(p) if product is None else product
            for p, product in zip(self._parameters, products, strict=True)
        )


class _Defects:
    """The defects of one symmetry at one point, gathered probe by probe; all [n groups]."""

    def __init__(self, groups: _Groups, point: _Point) -> None:
        self._groups, self._point = groups, point
        translation = groups.symmetry.law == "translation"
        self._base = point.ones if translation else point.values  # ψ_A = C_A base
        self._drift = point.nothing if translation else point.gradient  # ∂ψ_A/∂θ g = C_A drift
        self._share = groups.total(0, point.ones, point.ones) / point.n_elements
        self._generator = groups.total(2, self._base, self._base).sqrt()
        self._sq_columns, self._sq_projections = torch.zeros(2, groups.n_groups, dtype=torch.float64, device="cpu")
        self._n_probes = 0
        self._norms: list[float] = []

        self.gradient = groups.total(1, point.gradient, self._base)
        own_gradient = self._norm(point.gradient, point.sq_gradient).sqrt()
        self.gradient_relative = _quotient(self.gradient.abs(), own_gradient * self._generator)

    def _norm(self, vector: Vector, everything: float) -> Tensor:
        """|vector_A|², at least FLOOR² times what a group of that size has on average, of |vector|²."""
        return self._groups.total(0, vector, vector).clamp(min=FLOOR**2 * everything * self._share)

    def project(self, x: Vector, product: Vector, sq_product: float) -> None:
        """Take in one probe x, H x and |H x|²."""
        projection = self._groups.total(1, product, self._base) + self._groups.total(1, x, self._drift)
        self._sq_projections += projection.square()
        self._sq_columns += self._norm(product, sq_product)
        self._n_probes += 1

    def each_group(self) -> Iterator[None]:
        """Make the Hessian-vector product of every group, one at a time."""
        for group in range(self._groups.n_groups):
            direction = self._point.zeros()
            self._groups.add(direction, group, self._base)
            residual = {name: values.clone() for name, values in self._point.product(direction).items()}
            self._groups.add(residual, group, self._drift)
            self._norms.append(math.sqrt(_square(residual)))
            yield

    @property
    def hessian(self) -> Tensor | None:
        """|H ψ_A + C_A g|, of the groups' own products if they were made, else estimated by the probes."""
        if not self._n_probes:
            return None
        if self._norms:
            return torch.tensor(self._norms, dtype=torch.float64, device="cpu")
        return torch.sqrt(self._sq_projections / self._n_probes)

    @property
    def hessian_relative(self) -> Tensor | None:
        """The same by the largest it could be."""
        if self.hessian is None:
            return None
        columns = (self._sq_columns / self._n_probes).sqrt()
        drift = self._groups.total(2, self._drift, self._drift).sqrt()
        return _quotient(self.hessian, columns * self._generator + drift)


def _square(vector: Vector) -> float:
    """|vector|², over all parameters."""
    return _dot(vector, vector)


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((a[name].double() * b[name]).sum()) for name in a)


def _quotient(defect: Tensor, largest: Tensor) -> Tensor:
    """defect / largest, 0 where both are."""
    return torch.where(defect == 0.0, 0.0, defect / largest)


def _dataset(defects: Sequence[_Defects], stages: Sequence[Stage]) -> xr.Dataset:
    variables = ("gradient", "gradient_relative", "hessian", "hessian_relative")
    columns = {variable: [getattr(one, variable) for one in defects] for variable in variables}
    return xr.Dataset(
        {
            variable: (("stage", "group"), torch.stack(values).numpy())
            for variable, values in columns.items()
            if values[0] is not None
        },
        coords={"stage": list(stages)},
    )


def _differentiable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run the model once on an example first")
        if parameter.is_floating_point():
            yield name, parameter


def _evaluate(closure: Callable[[], Any], stage: Stage) -> Tensor:
    """The closure's loss, or an error that says what is wrong with it."""
    try:
        loss = closure()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if stage == "as_is":
            raise
        raise ValueError(
            f"the closure runs as the model is, but not in float64: {_first_line(error)}; something in it insists on "
            "another dtype; float64=False checks the model only as it is"
        ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the closure must return the loss as a tensor, got {type(loss).__name__}; is a return missing?"
        )
    if loss.numel() != 1:
        raise ValueError(f"the closure must return one number, got shape {tuple(loss.shape)}; reduce it with mean()")
    if not loss.requires_grad:
        raise ValueError(
            "the closure's loss has no gradient: it was detached, computed under no_grad, or is of no parameter"
        )
    if not loss.isfinite():
        raise ValueError(f"the closure's loss is {loss.item()}, and has no derivatives to check")
    if stage != "as_is" and loss.dtype != torch.float64:
        raise ValueError(
            f"the closure's loss is {loss.dtype} although model and inputs are in float64: something in it casts where "
            "it cannot be seen; float64=False checks the model only as it is"
        )
    return loss


def _check_same(first: Tensor, second: Tensor) -> None:
    a, b = first.item(), second.item()
    if abs(a - b) > MAX_LOSS_CHANGE * torch.finfo(first.dtype).eps * abs(a):
        raise ValueError(
            f"the closure is not deterministic: it returned {a:.9g} and then {b:.9g}, from the same parameters, "
            "buffers and random state; take one batch outside the closure, and no random numbers of your own generator"
        )


def _check_symmetric(x: Vector, hx: Vector, y: Vector, hy: Vector) -> None:
    """⟨y, H x⟩ = ⟨x, H y⟩ of two probes; it costs nothing, and a wrong second derivative is not likely to pass."""
    difference = abs(_dot(y, hx) - _dot(x, hy))
    largest = math.sqrt(_square(x) * _square(hy)) + math.sqrt(_square(y) * _square(hx))
    epsilon = max(torch.finfo(values.dtype).eps for values in x.values())
    if difference > math.sqrt(epsilon) * largest:
        raise ValueError(
            "the second derivatives are none of one function: ⟨y, H x⟩ and ⟨x, H y⟩ differ by "
            f"{difference / largest:.0e} of the largest they could be; either the closure detaches something, or an "
            "operation in it is wrong when it is differentiated twice (torch.autograd.gradgradcheck tells); "
            "hessian=False checks the gradient only"
        )


@contextmanager
def _explained(twice: bool) -> Iterator[None]:
    """Say of autograd's errors what they mean here."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "second time" in str(error):
            reason = "the closure must return the loss and not call backward() on it"
        elif twice:
            reason = (
                f"the loss cannot be differentiated twice: {_first_line(error)}; attention that calls a fused kernel "
                "itself needs the math one (attn_implementation='eager' or SDPBackend.MATH), a compiled model is to be "
                "given uncompiled, activations are to be kept, not checkpointed; hessian=False checks the gradient only"
            )
        else:
            reason = f"the loss cannot be differentiated: {_first_line(error)}"
        raise ValueError(reason) from error


def _check_graph(grads: Iterable[Tensor | None]) -> None:
    """Raise what autograd raises only on the way to a parameter, and elsewhere leaves out in silence."""
    found = {g.grad_fn for g in grads if g is not None and g.grad_fn is not None}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("an autograd.Function in it is marked once_differentiable")
        new = {following for following, _ in node.next_functions if following is not None} - found
        found |= new
        waiting += new


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"
