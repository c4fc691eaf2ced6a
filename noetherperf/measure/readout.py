"""Readout: the charges of every symmetry (measure/charges.py), from one copy of the measurement."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.measure.charges import N_MOMENTS, N_ROWS, N_SUMS, ChargeReadout, Charges, Row
from noetherperf.measure.defect import floored, mean_square, relative_defect
from noetherperf.measure.logged import logged, quantiles
from noetherperf.measure.offset import count_from_offset, propagators_of, split
from noetherperf.measure.terms import Source, Terms, find_terms
from noetherperf.measure.turning import LastStep, Moved, angular_update, effective_lr, moved
from noetherperf.rules.law import X0, Y0, Law, Shape
from noetherperf.rules.moments import Moment
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import find, nearest

if TYPE_CHECKING:
    from noetherperf.measure.balances import BalanceReadout
    from noetherperf.measure.printed import ReadoutTable
    from noetherperf.measure.table import EpsShares


class Readout(Mapping[str, ChargeReadout]):
    """All symmetries with one charge for each group after a step, by name; and in `balances`, those with matrices.

    `print(readout)` shows all of them in a table, and so does a notebook.

    Attributes:
        rule: Name of the update rule, "sgd" or "adam".
        step: Steps since measuring began.
        time: Σ lr·(1 − dampening) over these steps, or Σ lr without momentum; of the first parameter group.
        dtypes: The dtype in which each parameter is stored, by name: "bfloat16".
        balances: The symmetries whose charges are matrices (Balance), by name. All else is about the other symmetries.
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        n_groups: Sequence[int],
        table: NDArray[np.float64],
        reasons: Mapping[str, str],
        step: int,
        time: float,
        rule: str,
        balances: Mapping[str, "BalanceReadout"] | None = None,
        *,
        has_growth: bool,
        dtypes: Mapping[str, str],
    ) -> None:
        self.rule = rule
        self.dtypes = dtypes
        self.step = step
        self.time = time
        self.balances: dict[str, BalanceReadout] = dict(balances or {})
        self._has_growth = has_growth  # the rule's laws split their budget so
        self._table = table  # [N_ROWS, groups of all symmetries side by side]
        self._reasons = dict(reasons)
        stops = np.cumsum(n_groups).tolist()
        self._places = {
            symmetry.name: (symmetry, slice(stop - n, stop))
            for symmetry, n, stop in zip(symmetries, n_groups, stops, strict=True)
        }

    @property
    def together(self) -> Charges:
        """The groups of all symmetries side by side, in their order."""
        return Charges(self._table, has_growth=self._has_growth)

    @property
    def _symmetries(self) -> list[Symmetry]:
        return [symmetry for symmetry, _ in self._places.values()]

    def __getitem__(self, name: str) -> ChargeReadout:
        if name not in self._places:
            if name in self.balances:
                raise KeyError(f"{name!r} is a Balance, whose charges are matrices: readout.balances[{name!r}]")
            whole = [of for of, law in self.balances.items() if law.symmetry.diagonal().name == name]
            if whole:
                raise KeyError(
                    f"{name!r} is the diagonal of a matrix that is measured: "
                    f"readout.balances[{whole[0]!r}].charge.diagonal(dim1=1, dim2=2)"
                )
            nothing = "" if self else " (give the optimizer symmetries to measure)"
            name = find(name, self._symmetries, f"no symmetry {name!r} is measured{nothing}")
        symmetry, groups = self._places[name]
        # A copy, so that keeping one symmetry's charges does not keep the whole table in memory.
        rows, reason = self._table[:, groups].copy(), self._reasons.get(name, "")
        return ChargeReadout(symmetry, rows, reason, has_growth=self._has_growth)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Readout(step={self.step}, time={self.time:g}, symmetries=[{', '.join([*self, *self.balances])}])"

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self, rows: int | None = 20, constraints: "EpsShares | None" = None) -> "ReadoutTable":
        """All symmetries as a table with a verdict for each, worst first; printable, and HTML in a notebook.

            print(optimizer.readout())                        # the worst 20
            print(optimizer.readout().table(rows=None))       # all
            optimizer.readout().table().rows                  # as data

        The readout alone cannot tell that an eps breaks a scale law. `constraints` can.

        Args:
            rows: How many are shown; None: all. `.rows` has all of them.
            constraints: From `check_constraints` of these symmetries, with the present parameters. If an eps makes nine
                tenths of the gradient's defect, a verdict on SGD then says so.

        Raises:
            ValueError: `rows` is no number of rows.
            KeyError: A symmetry was not checked.
        """
        from noetherperf.measure.printed import ReadoutTable  # here, because stepping needs no rich
        from noetherperf.measure.table import rows as all_rows

        return ReadoutTable(all_rows(self, constraints), self.step, rows)

    def by_parameter(self, parameter: str) -> "dict[str, ChargeReadout | BalanceReadout]":
        """The symmetries that a parameter takes part in, by name: `by_parameter("blocks.0.mlp.0.weight")`.

        Args:
            parameter: Its name, as in `model.named_parameters()`.

        Returns:
            Symmetry name -> readout, in the order of this readout; then those whose charges are matrices.

        Raises:
            KeyError: No measured symmetry has it; the message has the nearest names.
        """
        symmetries = [*self._symmetries, *(law.symmetry for law in self.balances.values())]
        having = [s.name for s in symmetries if any(part.parameter == parameter for part in s.parts)]
        if not having:
            known = dict.fromkeys(part.parameter for s in symmetries for part in s.parts)
            raise KeyError(f"no measured symmetry has the parameter {parameter!r}; {nearest(parameter, known)}")
        return {name: self.balances[name] if name in self.balances else self[name] for name in having}

    def scalars(self) -> dict[str, float]:
        """A few numbers per symmetry for a logger, as a flat dict. Groups of opposite sign do not cancel in them.

        A symmetry "conv1" has these. "conv1/abs_charge" and "conv1/abs_charge_p90" are the median and the 90 % quantile
        of |charge| over groups. "conv1/residual", "conv1/rounding" and "conv1/relative_defect" are the largest absolute
        values over groups. "conv1/angular_update" and "conv1/effective_lr" are medians over groups, and left out if
        they are NaN. Quantiles leave out groups that are NaN; a largest value is then NaN.

        Names are made safe for loggers: characters other than letters, digits, spaces and `_ - . / :` become `_`. If
        two names become equal, the later one gets the suffix ".2".

        Of a Balance "attn", "attn/abs_charge" and "attn/abs_charge_p90" are of all |eigenvalues|, "attn/off_diagonal"
        is the mean over blocks, and the others are over all entries.

        Returns:
            Name -> float, with "step" and "time" first.
        """
        flat: dict[str, float] = {"step": float(self.step), "time": self.time}
        names = logged([*self, *self.balances])
        for name, balance in zip(names[len(self) :], self.balances.values(), strict=True):
            flat.update({f"{name}/{quantity}": x for quantity, x in balance.scalars().items()})
        if not self:
            return flat
        starts, stops = np.array([(groups.start, groups.stop) for _, groups in self._places.values()]).T
        charges = self.together
        sizes = charges.charge.abs().numpy()
        columns = {
            "abs_charge": quantiles(sizes, starts, stops),
            "abs_charge_p90": quantiles(sizes, starts, stops, 0.9),
        }
        for quantity in ("residual", "rounding", "relative_defect"):
            columns[quantity] = np.maximum.reduceat(getattr(charges, quantity).abs().numpy(), starts)
        for name, *values in zip(names[: len(self)], *(column.tolist() for column in columns.values()), strict=True):
            flat.update(zip((f"{name}/{quantity}" for quantity in columns), values, strict=True))
        for quantity in ("angular_update", "effective_lr"):
            of_step = quantiles(getattr(charges, quantity).numpy(), starts, stops).tolist()
            flat.update({f"{name}/{quantity}": x for name, x in zip(names, of_step, strict=False) if not math.isnan(x)})
        return flat


def _components(source: Source, law: Law) -> NDArray[np.float64]:
    """`by_source` of all states of a law."""
    return by_source(source.plan.rule.laws[law], source.measurement.states[law], propagators_of(source, law))


def by_source(shape: Shape, state: Tensor, propagators: NDArray[np.float64]) -> NDArray[np.float64]:
    """A law's numbers by source: the rows of measure/offset.py's `split`, [9, n].

    Args:
        shape: Of the law.
        state: [shape.n_rows, n], on the CPU.
        propagators: [n or 1, PROPAGATED, 2, 2].
    """

    def component(name: str) -> NDArray[np.float64] | None:
        x = shape.x(name, state)
        return None if x is None else x.numpy()

    budget = component("budget")
    assert budget is not None, "every law keeps its budget"
    kept = {name: component(name) for name in ("forced", "defect", "flow", "growth")}
    return split(propagators, (state[X0].numpy(), state[Y0].numpy()), budget, kept)


def has_growth(rule: Rule[Any]) -> bool:
    """Whether the rule's weight decay is a factor of the parameter alone, so that a norm's growth is kept."""
    return "growth" in rule.laws[Law.NORM].rows


def read(
    rule: str,
    symmetries: Sequence[Symmetry],
    sources: Sequence[Source],
    reasons: Mapping[str, str],
    step: int,
    time: float,
    dtypes: Mapping[str, str],
    balances: Mapping[str, "BalanceReadout"] | None = None,
) -> Readout:
    """Combine measurements of parts into a Readout; `reasons` has the reason of each open law, `dtypes` what each
    parameter is stored in, by name."""
    terms, n_groups = find_terms(symmetries, sources)
    with np.errstate(all="ignore"):  # a diverged training is read without warnings
        table = _table(symmetries, sources, terms, n_groups)
    splits = any(has_growth(source.plan.rule) for source in sources)
    return Readout(symmetries, n_groups, table, reasons, step, time, rule, balances, has_growth=splits, dtypes=dtypes)


def _table(
    symmetries: Sequence[Symmetry], sources: Sequence[Source], terms: Terms, n_groups: Sequence[int]
) -> NDArray[np.float64]:
    measured = np.concatenate([source.measurement.moments[:N_MOMENTS].numpy() for source in sources], axis=1)
    components = np.concatenate([_components(source, law) for source in sources for law in Law], axis=1)
    moments, sums = terms.shares(measured[:, terms.segment]), terms.shares(components[:, terms.state])
    if terms.offset.any():
        count_from_offset(sources, terms, moments, sums)
    table = np.empty((N_ROWS, terms.n_groups))
    table[:N_MOMENTS] = terms.groups(moments * terms.weight)
    table[N_MOMENTS:N_SUMS] = terms.groups(sums * terms.weight)

    translation = np.repeat([Law[symmetry.law.upper()] == Law.TRANSLATION for symmetry in symmetries], n_groups) == 1
    table[Row.CHARGE] = np.where(translation, table[Moment.SUM_P], table[Moment.SQ_P])
    table[Row.DEFECT] = np.where(translation, table[Moment.SUM_G], table[Moment.DOT_PG])
    _fill_turning(table, sources, terms, moments[Moment.SQ_P], translation)
    sq_weight = terms.weight * terms.weight
    n_elements = terms.groups(terms.n_elements)
    sq_gradient = terms.groups(moments[Moment.SQ_G])
    sq_generator = np.where(
        translation, terms.groups(sq_weight * terms.n_elements), terms.groups(sq_weight * moments[Moment.SQ_P])
    )
    sq_gradient = floored(sq_gradient, n_elements, mean_square(sq_gradient, n_elements))
    table[Row.RELATIVE_DEFECT] = relative_defect(table[Row.DEFECT], sq_gradient, sq_generator)
    return table


def _fill_turning(
    table: NDArray[np.float64],
    sources: Sequence[Source],
    terms: Terms,
    sq_p: NDArray[np.float64],
    translation: NDArray[np.bool_],
) -> None:
    """Fill in how far the last step turned each group; sq_p: |θ' + c|² of each share, c its offset."""
    segments = [moved(x.plan, x.measurement, x.last or LastStep.unknown(x.plan), law) for x in sources for law in Law]
    of_terms = np.concatenate(segments, axis=1)[:, terms.state]
    of_shares = terms.shares(of_terms)
    at = np.flatnonzero(terms.offset)
    of_shares[Moved.ALONG, at] += terms.offset[at] * of_shares[Moved.TOTAL, at]
    sums = terms.groups(of_shares)
    sq_norm = np.where(translation, np.nan, terms.groups(sq_p))
    table[Row.RELATIVE_UPDATE] = np.sqrt(sums[Moved.SQ_UPDATE] / sq_norm)
    table[Row.ANGULAR_UPDATE] = angular_update(sq_norm, sums[Moved.SQ], sums[Moved.ALONG])
    lr = of_terms[Moved.LR, terms.share]
    lowest, highest = terms.smallest(lr), -terms.smallest(-lr)
    charge = np.where(translation | (terms.smallest(terms.weight) < 0.0), np.nan, table[Row.CHARGE])
    table[Row.EFFECTIVE_LR] = effective_lr(lowest, highest, charge, sources[0].plan.rule.lr_degree)
