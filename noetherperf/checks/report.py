"""The result of check_constraints: defects per stage and group, the verdict, and how it is printed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from noetherperf.checks.exact import Stage
from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable, as_text
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import find

__all__ = ["Constraints"]

CONSTRAINTS = ("gradient", "hessian")

_WHERE: dict[Stage, str] = {
    "as_is": "as the model is",
    "float64": "in float64",
    "no_eps": "in float64, eps → 0",
}


class Constraints(Mapping[str, xr.Dataset]):
    """How well the constraints of each symmetry hold: a mapping from its name to an xarray Dataset.

    A Dataset has the dimensions `stage` and `group`, and in float64 the variables

        gradient           ⟨g, ψ_A⟩, with its sign          gradient_relative   its absolute value, relative
        hessian            |H ψ_A + C_A g|                  hessian_relative    relative       (with hessian=True)

    Stages separate the causes of a defect. All have the same parameters, batch and probes:

        as_is              the model as it is
        float64            in float64: what this removes was rounding
        no_eps             also with the eps of every normalisation near 0: what this removes was eps; the rest breaks
                           the symmetry

    `print` shows a table of the worst groups; `noetherperf.plots.constraints` draws them all.

    Attributes:
        symmetries: All that were checked.
        stages: All that were evaluated.
        losses: The value of the closure at each stage.
        tolerance: Largest relative defect at the last stage with which a symmetry holds.
        epsilons: Every eps of the model by its place: {"norm1.eps": 1e-05}.
        eps: Their value in stage no_eps.
        unused: Parameters on which the loss does not depend. Constraints on these alone say nothing.
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
        if name not in self._data:
            name = find(name, self.symmetries, f"no symmetry {name!r} was checked")
        return self._data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def worst(self, name: str, constraint: str, stage: Stage) -> float:
        """The largest relative defect over the groups of a symmetry.

        Args:
            name: The symmetry's.
            constraint: "gradient" or "hessian".
            stage: "as_is", "float64" or "no_eps", one of `stages`.

        Returns:
            From 0 to 1; NaN if that of a group is NaN.
        """
        return float(np.max(self[name][f"{constraint}_relative"].sel(stage=stage).to_numpy(), initial=0.0))

    def eps_share(self, name: str, constraint: str) -> float:
        """The share of the worst group's defect, as the model is, that eps causes.

        From stage to stage, the absolute value of the defect falls: first by what rounding makes, then by what eps
        makes. The share is what eps makes, over the sum of these two and the rest.

        Args:
            name: The symmetry's.
            constraint: "gradient" or "hessian".

        Returns:
            From 0 to 1; NaN where it is not known.
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
        """Whether the constraints of the symmetry with this name are within the tolerance at the last stage."""
        return all(self.worst(name, constraint, self.stages[-1]) <= self.tolerance for constraint in self.constraints)

    @property
    def failed(self) -> tuple[str, ...]:
        """The symmetries that do not hold. A Norm claims nothing, so it cannot fail."""
        return tuple(s.name for s in self.symmetries if s.claimed and not self.holds(s.name))

    def to_dict(self) -> dict[str, Any]:
        """All content as plain data for JSON; arrays by stage, as lists over groups."""
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
        """Which symmetries hold and which do not, the values of eps, and the parameters that the loss ignores."""
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
        return f"{as_text(self.table(), 100)}\n{self.summary()}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"
