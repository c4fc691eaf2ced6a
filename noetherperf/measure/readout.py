"""Readout: charges, predictions and residuals of every symmetry, from one copy of the measurement.

Free, forced, defect and rounding are derived in docs/theory.md, section 3. Growth, transport and a step's angle are
derived in docs/theory.md, section 7.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


@dataclass(frozen=True)
class Prediction:
    """A law's prediction of a charge, by source; float64 [n groups] each.

    Attributes:
        free: What the initial charge alone has become, with a momentum buffer that was warm at the start. It decays, or
            oscillates.
        forced: What steps of finite size have added, by |u|² (discrete law), or by |g|² or |θ̇|² (flow law). Zero for a
            translation. With an offset it also has what decay leaves, because decay draws θ to 0, and not θ + offset.
        defect: What came in because the gradient constraint did not hold, and what other code changed between steps.
            Zero if the symmetry holds and no other code changed anything. Always zero in the flow law.
        budget: free + forced + defect. In the discrete law it is an identity of the update, up to rounding, for any set
            of parameters. It is accumulated separately, because its parts may be large and cancel.
    """

    free: Tensor
    forced: Tensor
    defect: Tensor
    budget: Tensor

    @property
    def total(self) -> Tensor:
        """free + forced: the law's prediction if the symmetry holds."""
        return self.budget - self.defect


N_MOMENTS = len(Moment)


class _Row(IntEnum):
    """Rows of a readout's table after its first rows, the moments."""

    INITIAL = N_MOMENTS
    FREE = N_MOMENTS + 1
    FORCED = N_MOMENTS + 2
    DEFECT_SOURCE = N_MOMENTS + 3
    BUDGET = N_MOMENTS + 4
    FLOW_FREE = N_MOMENTS + 5
    FLOW_FORCED = N_MOMENTS + 6
    GROWTH = N_MOMENTS + 7
    TRANSPORT = N_MOMENTS + 8
    CHARGE = N_MOMENTS + 9
    DEFECT = N_MOMENTS + 10
    RELATIVE_DEFECT = N_MOMENTS + 11
    RELATIVE_UPDATE = N_MOMENTS + 12
    ANGULAR_UPDATE = N_MOMENTS + 13
    EFFECTIVE_LR = N_MOMENTS + 14


N_SUMS = _Row.CHARGE  # rows that are sums over segments; derived rows follow
N_ROWS = N_MOMENTS + len(_Row)


class Charges:
    """Charges after a step: float64 CPU tensors [n groups], of one symmetry or of all side by side.

    Attributes:
        charge: Q now, of the values as stored: Σ c⟨θ, 1⟩ for a translation, and Σ c|θ|² otherwise. Here and below, θ
            counts with its part's offset.
        initial: Q when measuring began.
        discrete: The discrete law's prediction, exact to rounding where the symmetry holds.
        flow: The flow law's prediction, from the continuous-time dynamics of the paper.
        growth: What the squares of the updates added to the charge, whatever the law. With weight decay θ' = r θ − η u
            and R the product of all r² (of all r, for a translation), charge = R initial + growth + transport +
            rounding;

                growth      r² growth + η² |u|²;                0 for a translation
                transport   r² transport − 2ηr Σ c⟨θ, u⟩;       r transport − η Σ c⟨u, 1⟩ for a translation

            The growth of a rescale is that of its inward parts minus that of its outward parts. It is None for a rule
            whose decay passes through the momentum buffer (SGD). Such a rule has no r, and discrete.forced is exactly
            what |u|² drove.
        transport: What the overlap of the updates with the generator added, and what other code changed between steps.
            None if growth is None.
        defect: The last step's gradient constraint, Σ c⟨g, 1⟩ or Σ c⟨g, θ⟩; zero where the symmetry holds.
        relative_defect: |defect| / (|g_A| |ψ_A|), ψ the generator (c or cθ, θ taken after the step); 0 where g is 0.
            |g_A| counts as no less than a thousandth of the average |g| of a group of that size, over all that is
            measured (measure/defect.py explains why).
        relative_update: η|u| / |θ| of the last step, θ taken after it. The parameters of all parts are one vector θ,
            without coefficients. Each part has its own η. A part without a gradient did not move.
        angular_update: The angle in radians by which the last step turned that vector, as computed (not as rounded to
            the stored dtype). NaN where θ was nearly zero: |θ| or |θ'| a thousandth of the other.
        effective_lr: The last step's learning rate for a loss that does not depend on the length of θ. It is η/Q for
            SGD, whose update falls as 1/|θ|, and η/√Q for Adam; Q is the charge. NaN for a rescale, and if parts have
            different η.
            It is NaN for a translation, and so are relative_update and angular_update. All three are also NaN while the
            last step is not known: before the first step, after loading, after other code changed parameters, and while
            a device has skipped every step since options changed.
        moments: sum_p, sq_p, sum_g, sq_g, dot_pg, sq_u of the last step, summed over parts with their coefficients.
        residual: charge − discrete.total, which is defect and rounding.
        rounding: charge − discrete.budget: what rounding to the stored dtype changed.
    """

    def __init__(self, rows: NDArray[np.float64], *, has_growth: bool) -> None:
        self._rows = rows  # [N_ROWS, n groups]
        self._has_growth = has_growth

    def _row(self, number: int) -> Tensor:
        return torch.from_numpy(self._rows[number])

    @property
    def charge(self) -> Tensor:
        return self._row(_Row.CHARGE)

    @property
    def initial(self) -> Tensor:
        return self._row(_Row.INITIAL)

    @property
    def discrete(self) -> Prediction:
        return Prediction(*map(self._row, (_Row.FREE, _Row.FORCED, _Row.DEFECT_SOURCE, _Row.BUDGET)))

    @property
    def flow(self) -> Prediction:
        free, forced = map(self._row, (_Row.FLOW_FREE, _Row.FLOW_FORCED))
        return Prediction(free, forced, torch.zeros_like(free), free + forced)

    @property
    def growth(self) -> Tensor | None:
        return self._row(_Row.GROWTH) if self._has_growth else None

    @property
    def transport(self) -> Tensor | None:
        return self._row(_Row.TRANSPORT) if self._has_growth else None

    @property
    def defect(self) -> Tensor:
        return self._row(_Row.DEFECT)

    @property
    def relative_defect(self) -> Tensor:
        return self._row(_Row.RELATIVE_DEFECT)

    @property
    def relative_update(self) -> Tensor:
        return self._row(_Row.RELATIVE_UPDATE)

    @property
    def angular_update(self) -> Tensor:
        return self._row(_Row.ANGULAR_UPDATE)

    @property
    def effective_lr(self) -> Tensor:
        return self._row(_Row.EFFECTIVE_LR)

    @property
    def moments(self) -> dict[str, Tensor]:
        return {moment.name.lower(): self._row(moment) for moment in Moment}

    @property
    def residual(self) -> Tensor:
        return self.charge - self.discrete.total

    @property
    def rounding(self) -> Tensor:
        return self.charge - self.discrete.budget


class ChargeReadout(Charges):
    """One symmetry after a step: its charges (see `Charges`), and whether its law is closed.

    Attributes:
        symmetry: The measured symmetry.
        name: Its name.
        closed: Whether free + forced is a prediction.
        reason: Why it is not; empty if it is.
    """

    def __init__(self, symmetry: Symmetry, rows: NDArray[np.float64], reason: str, *, has_growth: bool) -> None:
        super().__init__(rows, has_growth=has_growth)
        self.symmetry, self.reason = symmetry, reason

    @property
    def name(self) -> str:
        return self.symmetry.name

    @property
    def closed(self) -> bool:
        return not self.reason

    def __repr__(self) -> str:
        return f"ChargeReadout({self.name!r}, charge={self.charge}, closed={self.closed})"


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

    def by_parameter(self, parameter: str) -> dict[str, ChargeReadout]:
        """The symmetries that a parameter takes part in, by name: `by_parameter("blocks.0.mlp.0.weight")`.

        Args:
            parameter: Its name, as in `model.named_parameters()`.

        Returns:
            Symmetry name -> readout, in the order of this readout.

        Raises:
            KeyError: No measured symmetry has it; the message has the nearest names.
        """
        having = {s.name: s for s in self._symmetries if any(part.parameter == parameter for part in s.parts)}
        if not having:
            known = dict.fromkeys(part.parameter for s in self._symmetries for part in s.parts)
            raise KeyError(f"no measured symmetry has the parameter {parameter!r}; {nearest(parameter, known)}")
        return {name: self[name] for name in having}

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
    table[_Row.CHARGE] = np.where(translation, table[Moment.SUM_P], table[Moment.SQ_P])
    table[_Row.DEFECT] = np.where(translation, table[Moment.SUM_G], table[Moment.DOT_PG])
    _fill_turning(table, sources, terms, moments[Moment.SQ_P], translation)
    sq_weight = terms.weight * terms.weight
    n_elements = terms.groups(terms.n_elements)
    sq_gradient = terms.groups(moments[Moment.SQ_G])
    sq_generator = np.where(
        translation, terms.groups(sq_weight * terms.n_elements), terms.groups(sq_weight * moments[Moment.SQ_P])
    )
    sq_gradient = floored(sq_gradient, n_elements, mean_square(sq_gradient, n_elements))
    table[_Row.RELATIVE_DEFECT] = relative_defect(table[_Row.DEFECT], sq_gradient, sq_generator)
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
    table[_Row.RELATIVE_UPDATE] = np.sqrt(sums[Moved.SQ_UPDATE] / sq_norm)
    table[_Row.ANGULAR_UPDATE] = angular_update(sq_norm, sums[Moved.SQ], sums[Moved.ALONG])
    lr = of_terms[Moved.LR, terms.share]
    lowest, highest = terms.smallest(lr), -terms.smallest(-lr)
    charge = np.where(translation | (terms.smallest(terms.weight) < 0.0), np.nan, table[_Row.CHARGE])
    table[_Row.EFFECTIVE_LR] = effective_lr(lowest, highest, charge, sources[0].plan.rule.lr_degree)
