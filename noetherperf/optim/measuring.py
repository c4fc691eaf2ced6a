"""Measuring: an optimizer's measurement over its steps, with changes made outside step() and over ranks."""

import itertools
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from noetherperf.engines import Call, OnDevice, carry_out
from noetherperf.measure.cells import GramPlan, GramsCopy
from noetherperf.measure.openness import Openness
from noetherperf.measure.plan import Measurement
from noetherperf.measure.turning import LastStep
from noetherperf.optim.buffers import Buffers, Made
from noetherperf.optim.checkpoint import Saved
from noetherperf.optim.counts import Counts
from noetherperf.optim.distributed import Ranks, check_alike
from noetherperf.optim.following import Group, Parameters, check_symmetries
from noetherperf.optim.last_step import LastOptions
from noetherperf.optim.meters import Meter, make_meters
from noetherperf.optim.options import GroupOptions
from noetherperf.optim.repeats import Repeats
from noetherperf.optim.watched import Watched
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry


class Carried(NamedTuple):
    """The measurement that new meters continue."""

    tensors: list[list[Tensor]]  # of each meter
    openness: dict[str, Any]


class Copies(NamedTuple):
    """Copies of all meters' measurements after one step; they can be read without the optimizer's lock."""

    ranks: list[Ranks]
    measurements: list[Measurement]  # where the meters are
    grams: list[GramsCopy]
    wholes: list[GramPlan]  # of whole parameters
    openness: Openness
    began: bool
    id: str
    home: int  # the meter that has the first parameter group
    step: int  # including those that a device may have skipped
    n_corrections: int
    last: LastOptions | None  # None: nothing is known of the last step
    members: list[list[int]]  # of each meter
    group_of: Sequence[int]  # of each parameter
    dtypes: Mapping[str, str]  # of each parameter that has a name

    def agree(self) -> list[str]:
        """Compare the ranks: a collective if parameters are sharded, otherwise nothing.

        Returns:
            The symmetries with a tensor that was changed outside step() on some ranks only.

        Raises:
            RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
        """
        if not any(ranks.groups for ranks in self.ranks):
            return []
        marks = self.openness.marks([measurement.clock.tolist() for measurement in self.measurements])
        changed = check_alike(self.ranks, marks)
        self.openness.agree(changed)
        return changed

    def last_steps(self, rule: Rule[Any], step: int) -> list[LastStep]:
        """How each meter's tensors made the last step; step: steps made, without those that a device skipped."""
        if self.last is None:
            return [LastStep.unknown(ranks.whole) for ranks in self.ranks]
        return [self.last.read(rule, members, self.group_of, step) for members in self.members]

    def gather_grams(self) -> list[GramsCopy]:
        """Each meter's products of the whole parameters; as `gather`."""
        return [
            ranks.gather_grams(x, whole) for ranks, x, whole in zip(self.ranks, self.grams, self.wholes, strict=True)
        ]

    def gather(self) -> list[Measurement]:
        """Each meter's measurement of the whole parameters, after `agree`; a collective if parameters are sharded."""
        return [ranks.gather(x) for ranks, x in zip(self.ranks, self.measurements, strict=True)]


class Measuring:
    """An optimizer's measurement, from its beginning to the last step. The optimizer's lock guards it.

    Attributes:
        rule: The update rule.
        options: The parameter groups', as the rule reads them.
        symmetries: The measured symmetries.
        parameters: The parameters for which the meters were last made.
        counts: Their counts of steps; None if the rule does not count.
        meters: Step and measure them; None if they must be made (anew).
        openness: Which laws are open.
        began: Whether anything has been measured.
        step_count: Steps since then, including those that a device may have skipped.
        last: The last step's options; None before the first step since measuring began or was loaded.
        id: A new one whenever measuring starts anew.
        may_be_fresh: Whether a device may have skipped a step for which a buffer was made.
        watched: The measured tensors; None before there is something to compare with.
        repeats: Recognises steps like the last one.
        can_repeat: Whether gradients and buffers are the parameters' own.
    """

    parameters: Parameters
    counts: Counts | None
    openness: Openness
    began: bool
    step_count: int
    last: LastOptions | None
    id: str
    can_repeat: ClassVar[bool] = True

    def __init__(self, rule: Rule[Any], symmetries: tuple[Symmetry, ...], groups: Sequence[Group]) -> None:
        self.rule, self.symmetries = rule, symmetries
        self.options = GroupOptions(rule)
        self._follow(groups)
        self.meters: list[Meter] | None = None
        self.may_be_fresh = False
        self.repeats = Repeats()
        self.restart()

    # ---- from where to where ----------------------------------------------------------------------------------------

    def _follow(self, groups: Sequence[Group]) -> Parameters:
        """Follow the parameters that the groups hold now."""
        parameters, key = Parameters(groups), self.rule.step_key
        self.__dict__.update(parameters=parameters, counts=None if key is None else Counts(key, parameters))
        return parameters

    def restart(self) -> None:
        """Forget what was measured; measuring begins at the next step or readout."""
        self.began = False
        self.step_count = 0
        self.last = None
        self._n_corrections = 0  # how often the step count was corrected for skipped steps
        self.id = uuid.uuid4().hex
        self._carried: Carried | None = None
        self.watched: Watched | None = None

    def replace(self, groups: Sequence[Group]) -> None:
        """Measure the parameters that the groups hold now, as torch's optimizers step them; accelerate shards this way.

        Raises:
            ValueError: The symmetries do not fit the new ones.
        """
        check_symmetries(self.symmetries, groups)
        self.may_be_fresh = False
        self._drop()

    def set_up(self, groups: Sequence[Group], backend: str) -> list[Meter]:
        """Make the meters for the present parameters of these groups."""
        parameters = self._follow(groups)
        carried = self._carried
        meters = make_meters(
            self.rule, parameters, self.symmetries, backend, [] if carried is None else carried.tensors
        )
        openness = Openness(
            self.symmetries,
            parameters.labels,
            parameters.group_of,
            parameters.n_groups,
            rule=self.rule,
            shared=parameters.sharded,
        )
        if carried is not None:
            openness.load_state_dict(carried.openness)
        if self.watched is not None:
            self.watched.know_moved(parameters.here)
        # At once, because an interrupt between would lose what was carried, which the meters' measurements now hold.
        self.__dict__.update(openness=openness, meters=meters, _carried=None)
        return meters

    def set_down(self) -> None:
        """Drop the meters and keep the measurement, so that new meters for changed parameters can continue it."""
        if self.meters is not None:
            tensors = [[x.clone() for x in meter.tensors()] for meter in self.meters]
            self._carried = Carried(tensors, self.openness.state_dict())
            self.meters = None

    def _drop(self) -> None:
        """Drop the meters and the measurement."""
        self.meters = None
        self.restart()

    def resume(self, saved: Saved | None, meters: Sequence[Meter]) -> None:
        """Continue from a checkpoint; None: measuring starts anew.

        Args:
            saved: The checkpoint, as read for these meters.
            meters: The present ones; they must be made anew.
        """
        carried = None
        if saved is not None and self.symmetries:
            tensors = [
                [x.clone() for x in (*meter.ranks.scatter(whole).tensors(), *meter.scatter_grams(grams))]
                for meter, whole, grams in zip(meters, saved.wholes, saved.grams, strict=True)
            ]
            carried = Carried(tensors, saved.openness)
        self._drop()
        if saved is not None and carried is not None:
            self.began, self.step_count, self.id = saved.began, saved.steps, saved.id or self.id
            self._carried = carried

    def state(self) -> dict[str, Any]:
        """The state of a copy, without the parameter groups."""
        carried = self._carried
        if self.meters is not None:
            copies = [meter.copy() for meter in self.meters]
            tensors = [[*measurement.tensors(), *grams.tensors] for measurement, grams in copies]
            carried = Carried(tensors, self.openness.state_dict())
        fields = {name: getattr(self, name) for name in ("symmetries", "began", "step_count", "last", "id")}
        return {**fields, "carried": None if carried is None else tuple(carried)}

    @classmethod
    def of_state(cls, rule: Rule[Any], state: dict[str, Any], groups: Sequence[Group]) -> "Measuring":
        """The measuring of a copy."""
        new = cls(rule, state["symmetries"], groups)
        new.began, new.step_count, new.id = state["began"], state["step_count"], state["id"]
        new.last = state.get("last")  # optimizers pickled before do not have it
        new._carried = None if state["carried"] is None else Carried(*state["carried"])
        return new

    # ---- a step, and what others write between two of them ----------------------------------------------------------

    def begin(self, meters: Sequence[Meter], buffers: Buffers) -> None:
        """Measure the parameters and buffers as they are: where the laws start."""
        for meter in meters:
            own = self._to_measure(meter, buffers)
            meter.engine.measure(own)
            meter.measurement.start(meter.ranks.plan, _warm(meter, own))
            meter.grams.start(_carried(meter, own))
        self.openness.reset(self.options.options)
        self.began = True
        if self.symmetries:
            self._watch(meters, buffers)

    def _to_measure(self, meter: Meter, buffers: Buffers) -> list[Sequence[Tensor | None]]:
        """A meter's buffers for measuring the present state: in the place of the first what a tensor carries."""
        own = list(map(meter.pick, buffers.here))
        if not own:
            return own
        carried = list(own[0])
        for i in meter.measured:
            place = meter.members[i]
            carried[i] = self._carried_by(place, tuple(of_all[i] for of_all in own), buffers.age(place))
        return [carried, *own[1:]]

    def _carried_by(self, place: int, buffers: tuple[Tensor | None, ...], age: int) -> Tensor | None:
        """What parameter `place`, with these buffers and of this age, carries into its next step."""
        return self.rule.carried(buffers, self.options.options[self.parameters.group_of[place]], age)

    def _watch(self, meters: Sequence[Meter], buffers: Buffers) -> None:
        """Watch all measured tensors from their present state on."""
        measured = sorted({meter.members[i] for meter in meters for i in meter.measured})
        self.watched = Watched(measured, self.parameters.all, self.parameters.here, buffers)

    def written(self, buffers: Buffers) -> set[int] | None:
        """The measured tensors that other code has written since the last step; None if nothing is known of them."""
        if not self.began or self.watched is None:
            return None
        return set(itertools.chain(*self.watched.changed(buffers)))

    def know_buffers(self, buffers: Buffers) -> None:
        """Buffers that other code has written, as it should: they are as they are."""
        if self.watched is not None:
            self.watched.know_buffers(buffers)

    def catch_up(self, meters: Sequence[Meter], buffers: Buffers) -> None:
        """Begin to measure, or record changes made outside step() since."""
        if not self.began:
            self.begin(meters, buffers)
        elif self.watched is None:
            if self.symmetries:  # loaded, or a copy: there is nothing yet to compare with
                self._watch(meters, buffers)
        else:
            parameters, others = self.watched.changed(buffers)
            if not parameters and not others:
                return
            if self.step_count == 0:  # no law has begun to run
                self.restart()
                self.begin(meters, buffers)
                return
            which = {*parameters, *others}
            self._follow_changes(meters, which, buffers)
            self.openness.changed(self.step_count, parameters, others)
            self.last = self.last and self.last.with_changed(which)
            self.watched.know(which, buffers)

    def _follow_changes(self, meters: Sequence[Meter], which: set[int], buffers: Buffers) -> None:
        """Measure tensors changed outside step(), and continue the laws from there."""
        for meter in meters:
            changed = [i in which for i in meter.members]
            if any(changed):
                own, moments = self._to_measure(meter, buffers), meter.measurement.moments
                before, measured = moments.clone(), moments.clone()
                # At once, because an interrupt between would lose the moments from which the laws continue.
                carry_out(
                    [
                        *meter.engine.prepare_to_measure(own),
                        partial(measured.copy_, moments),
                        partial(moments.copy_, before),
                    ]
                )
                new = meter.measurement.followed(meter.ranks.plan, measured, _warm(meter, own), changed)
                pairs = zip(meter.measurement.tensors(), new.tensors(), strict=True)
                calls: list[Call] = [partial(x.copy_, y) for x, y in pairs]
                carry_out(calls + meter.grams.followed(_carried(meter, own), changed))

    def stepped(
        self,
        options: Sequence[Any],
        on_device: OnDevice,
        made: Made,
        missing: bytes,
        buffers: Buffers | None,
    ) -> list[Call]:
        """The calls that record a step.

        Args:
            options, on_device: As Meter.prepare has them.
            made: What the step makes in torch's state.
            missing: 1 if a parameter has no gradient.
            buffers: Including those that the step makes; None if it makes none.
        """
        step, openness, last = self.step_count + 1, self.openness, self.last
        copies: list[Call] = []
        if self.symmetries:
            openness = openness.after(step, options, on_device.lrs, made.ages, missing)
            last, copies = LastOptions.after(last, step, options, on_device, missing)
        may_be_fresh = self.may_be_fresh or (on_device.found_inf is not None and 0 in made.new)
        calls: list[Call] = [
            partial(self.__dict__.update, step_count=step, may_be_fresh=may_be_fresh, openness=openness, last=last),
            *copies,
            *self.raise_counters(missing),
        ]
        if self.watched is not None and buffers is not None:
            calls += self.watched.made(made.new, buffers)
        return calls

    def raise_counters(self, missing: bytes) -> list[Call]:
        """The calls that raise the version counters of all parameters but the missing ones: autograd does not see the
        engines' writes, but must detect changes of tensors saved for backward."""
        written = self.parameters.all
        if 1 in missing:
            written = [p for p, no in zip(written, missing, strict=True) if not no]
        calls: list[Call] = [partial(torch._C._increment_version, written)]
        return calls if self.watched is None else [*calls, self.watched.expected(missing)]

    def correct(self, copies: Copies, step: int) -> None:
        """Correct the step count to the device's, `step` at the time of the copies, unless corrected since."""
        if self._n_corrections == copies.n_corrections:
            self.step_count -= copies.step - step
            self._n_corrections += 1

    def drop_fresh(self, lock: AbstractContextManager[object], state: Mapping[Tensor, Any]) -> None:
        """Remove buffers whose first step a device skipped, as the host would not have made them; waits for the device.

        Args:
            lock: The optimizer's; it is acquired here when needed.
            state: Torch's.
        """
        while self.may_be_fresh:
            with lock:
                meters, step = self.meters or [], self.step_count
                copies = [x.clone() if isinstance(x := meter.engine.ages, Tensor) else x for meter in meters]
            ages = [x.tolist() if isinstance(x, Tensor) else x for x in copies]  # waits without the lock
            with lock:
                if self.step_count != step or (self.meters or []) != meters:  # another thread has stepped since
                    continue
                for meter, of_meter in zip(meters, ages, strict=True):
                    for i in itertools.compress(meter.members, (age == 0 for age in of_meter)):
                        for key in self.rule.buffers:
                            state.get(self.parameters.all[i], {}).pop(key, None)
                        if self.watched is not None:
                            self.watched.know_no_buffers(i)
                self.may_be_fresh = False

    def copy(self, meters: Sequence[Meter]) -> Copies:
        """Copy the measurement."""
        last = self.last and self.last.copied([meter.stream for meter in meters])  # first: the copies wait for it
        copies = [meter.copy() for meter in meters]
        return Copies(
            [meter.ranks for meter in meters],
            [measurement for measurement, _ in copies],
            [grams for _, grams in copies],
            [meter.gram_plan for meter in meters],
            self.openness.copy(),
            self.began,
            self.id,
            next((i for i, meter in enumerate(meters) if 0 in meter.groups), 0),
            self.step_count,
            self._n_corrections,
            last,
            [meter.members for meter in meters],
            self.parameters.group_of,
            self.parameters.dtypes,
        )


def _carried(meter: Meter, buffers: Sequence[Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
    """Per tensor of a meter, what a law's y₀ is of, if it carries any, in the place of the rule's first buffer."""
    return buffers[0] if buffers else [None] * len(meter.members)


def _warm(meter: Meter, buffers: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """Per tensor of a meter, whether it carries that."""
    return [v is not None for v in _carried(meter, buffers)]
