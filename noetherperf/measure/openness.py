"""Which laws are open: symmetries whose parts did not make the same steps, so that free + forced predicts nothing.

A law adds up its parts' charges. Terms that cancel by symmetry do so only if all parts were stepped alike: with the
same coefficients, and a gradient for all or for none. Tensors start in one class. A step that treats two tensors of a
class differently splits the class, and every symmetry with parts in different classes is open from then on.

A parameter or buffer that is written between two steps has changed in a way that no law knows: every symmetry
with a part in that tensor is open too.

A rule may know no law for some of its options (`Rule.open_reason`): every symmetry with a part in a group with such
options is open too.

A learning rate that is a tensor on a device is identified by the tensor; the host does not read its value. Nor does the
host know which steps a device skipped, so a law may be called open because of a skipped step.

Derived in docs/theory.md, section 3.
"""

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from torch import Tensor

from noetherperf.measure.agreement import Digests, Kind, Mark
from noetherperf.rules import sgd
from noetherperf.rules.law import Law
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry

UNCLAIMED = "no symmetry is claimed: free + forced leaves out the gradient's part, which defect holds"
ANEW = "reset_measurement() starts the laws anew"


class Openness:
    """Follows the steps of a model's tensors, and lists the symmetries whose laws are open, with the reason.

    Args:
        symmetries: All symmetries; those that claim nothing (Norm) are open from the start, as are those with an offset
            of which the rule knows no law.
        names: A name for each tensor.
        group_index: For each tensor the number of its parameter group.
        n_groups: The number of parameter groups.
        rule: The update rule.
        shared: Whether the tensors are sharded over ranks, which must then make the same steps.
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        names: Sequence[str],
        group_index: Sequence[int],
        n_groups: int = 1,
        *,
        rule: Rule[Any] = sgd.SGD,
        shared: bool = False,
    ) -> None:
        index = {name: i for i, name in enumerate(names)}
        self._names, self._group_index, self._n_groups, self._shared = names, group_index, n_groups, shared
        self._rule = rule
        self._members = {s.name: sorted({index[part.parameter] for part in s.parts}) for s in symmetries}
        self._laws = {s.name: Law[s.law.upper()] for s in symmetries}
        self._always = {s.name: UNCLAIMED for s in symmetries if not s.claimed}
        if not rule.offset:
            without = f"the update rule {rule.name!r} has no law of norms that count from an offset"
            counted = [s.name for s in symmetries if any(part.offset for part in s.parts)]
            self._always |= {name: without for name in counted if name not in self._always}
        self.reset()

    def reset(self, options: Sequence[Any] = ()) -> None:
        """Start anew: all tensors in one class.

        Args:
            options: Of the rule, one per parameter group; none if they are not known yet.
        """
        self._reasons: dict[str, str] = dict(self._always)
        self._changes: dict[str, str] = {}  # reasons of another kind: tensors written between steps
        self._by_rule: dict[str, str] = self._without_law(options)  # and: the rule has no law
        self._classes = [0] * len(self._names)
        self._last: Hashable = None
        self._given: tuple[Any, ...] | None = None  # the arguments of the last `after`
        self._digests = Digests(len(self._names), self._n_groups) if self._shared else None

    def copy(self) -> "Openness":
        """An independent copy."""
        new = copy.copy(self)
        new._reasons, new._by_rule, new._changes = dict(self._reasons), dict(self._by_rule), dict(self._changes)
        return new

    @property
    def reasons(self) -> dict[str, str]:
        """The symmetries whose laws are open, by name, and why."""
        kinds = (self._by_rule, self._reasons, self._changes)
        names = {name: None for kind in kinds for name in kind}
        return {name: "; ".join(kind[name] for kind in kinds if name in kind) for name in names}

    def after(
        self, step: int, options: Sequence[Any], lrs: Sequence[Tensor | None], ages: Sequence[int], missing: bytes
    ) -> "Openness":
        """The openness after one more step; this object does not change.

        Args:
            step: Its number, for the reason.
            options: Of the rule, one per parameter group.
            lrs: One per parameter group: a learning rate on the device that replaces that of the options, or None.
            ages: Of every tensor, before the step.
            missing: A byte per tensor: has it no gradient?
        """
        counts = self._rule.step_key is not None
        known, seen = self._given, _spread(ages, missing) if counts else bytes(ages)
        if known is not None and (options is known[0] and lrs is known[1] and (seen, missing) == known[2:]):
            return self  # as in the step before
        own_ages, ages = ages, _relative(ages, missing) if counts else bytes(ages)
        groups = [_Group(self._rule, *pair) for pair in zip(options, lrs, strict=True)]
        alike = [next(j for j, other in enumerate(groups) if group.acts_like(other)) for group in groups]
        pattern = (tuple(alike), ages, missing)
        without_law = {} if known is not None and options is known[0] else self._without_law(options)
        if pattern == self._last and self._digests is None and without_law.keys() <= self._by_rule.keys():
            self._given = (options, lrs, seen, missing)
            return self
        apart = self._apart(options, ages)
        new = self.copy()
        new._by_rule = {**without_law, **self._by_rule}
        if pattern != self._last:
            new._take_note(step, pattern, apart, groups)
        if self._digests is not None:
            of_all = self._apart(options, list(map(int, own_ages))) if counts else [int(age != 1) for age in apart]
            new._digests = self._digests.after(options, of_all, missing)
        return new

    def _without_law(self, options: Sequence[Any]) -> dict[str, str]:
        """The symmetries for which the rule has no law with these options, and why."""
        why = [{law: self._rule.open_reason(x, law) for law in Law} for x in options]
        if not any(reason for of_group in why for reason in of_group.values()):
            return {}
        found: dict[str, str] = {}
        for name, members in self._members.items():
            reasons = (why[self._group_index[i]][self._laws[name]] for i in members)
            if reason := next(filter(None, reasons), ""):
                found[name] = reason
        return found

    def _apart(self, options: Sequence[Any], ages: Sequence[int]) -> list[int]:
        """Per tensor, what sets its step apart because of its age, 1 if nothing does; empty: nothing does for any."""
        if ages.count(1) == len(ages):
            return []
        differ = [self._rule.ages_differ(x) for x in options]
        return [age if differ[group] else 1 for age, group in zip(ages, self._group_index, strict=True)]

    def _take_note(
        self,
        step: int,
        pattern: tuple[tuple[int, ...], Sequence[int], bytes],
        apart: Sequence[int],
        groups: "Sequence[_Group]",
    ) -> None:
        """Split the classes whose tensors a step of this pattern treats differently."""
        alike, _, missing = pattern
        self._last, self._given = pattern, None
        keys: list[Hashable] = []
        for i, group in enumerate(self._group_index):
            keys.append("missing" if missing[i] else (alike[group], apart[i] if apart else 1))
        number: dict[Hashable, int] = {}
        self._classes = [number.setdefault(pair, len(number)) for pair in zip(self._classes, keys, strict=True)]
        for name, members in self._members.items():
            if name not in self._reasons:
                other = next((i for i in members if self._classes[i] != self._classes[members[0]]), None)
                if other is not None:
                    self._reasons[name] = self._reason(step, members[0], other, groups, missing)

    def changed(self, step: int, parameters: Iterable[int], buffers: Iterable[int]) -> None:
        """Open the laws of parameters written, or with a buffer replaced, outside step() after step `step`."""
        what = {i: f"a buffer of {self._names[i]}" for i in buffers}
        what |= {i: self._names[i] for i in parameters}
        for name, members in self._members.items():
            first = next((what[i] for i in members if i in what), None)
            if first is not None:
                self._changes.setdefault(name, f"{first} was changed outside step() after step {step}; {ANEW}")

    def agree(self, names: Iterable[str]) -> None:
        """Open the laws of symmetries for which only some ranks detected a change."""
        for name in names:
            self._changes[name] = f"on some ranks a tensor of it was changed outside step(), on others not; {ANEW}"

    def marks(self, clocks: Sequence[Sequence[float]]) -> list[Mark]:
        """The marks that must be equal on all ranks if tensors are sharded; of measured tensors only.

        Args:
            clocks: Measurement.clock of each device.
        """
        if self._digests is None:
            return []
        measured = sorted({i for members in self._members.values() for i in members})
        first_of = {self._group_index[i]: self._names[i] for i in reversed(measured)}
        groups = {g: f"parameter group {g} (of {first_of.get(g, 'nothing measured')})" for g in sorted({0, *first_of})}
        marks = [Mark(Kind.STEP, "", int(clock[0])) for clock in clocks]
        marks += [Mark(Kind.OPTIONS, label, self._digests.options[g]) for g, label in groups.items()]
        for kind, digests in ((Kind.GRADIENT, self._digests.gradients), (Kind.BUFFER, self._digests.buffers)):
            marks += [Mark(kind, self._names[i], int(digests[i])) for i in measured]
        number: dict[int, int] = {}  # renumbered: unmeasured tensors may add classes
        classes = [number.setdefault(self._classes[i], len(number)) for i in measured]
        marks += [Mark(Kind.LAWS, name, name in self._reasons or name in self._by_rule) for name in self._members]
        marks.append(Mark(Kind.LAWS, "tensors' classes", crc32(repr(classes).encode())))
        marks += [Mark(Kind.CHANGED, name, name in self._changes) for name in self._members]
        return marks + [Mark(Kind.TIME, label, clock[1 + g]) for clock in clocks for g, label in groups.items()]

    def _reason(self, step: int, i: int, j: int, groups: "Sequence[_Group]", missing: bytes) -> str:
        a, b = self._names[i], self._names[j]
        if missing[i] != missing[j]:
            without, with_ = (a, b) if missing[i] else (b, a)
            return f"in step {step} {without} had no gradient and {with_} had one"
        one, two = (groups[self._group_index[k]].shown() for k in (i, j))
        fields = [f"{field} ({one[field]} and {two[field]})" for field in one if one[field] != two[field]]
        if fields:
            return f"in step {step} {a} and {b} had different {', '.join(fields)}"
        if self._rule.step_key is not None:
            return f"in step {step} {a} and {b} had made different numbers of steps before"
        return f"in step {step} only one of {a} and {b} {self._rule.first_step}"

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        digests = None if self._digests is None else self._digests.state()
        state = {"classes": list(self._classes), "reasons": dict(self._reasons), "changes": dict(self._changes)}
        return {**state, "by_rule": dict(self._by_rule), "digests": digests}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that these symmetries and tensors can have a checkpoint's state.

        Raises:
            ValueError: A field is missing or of the wrong kind, or reasons and classes contradict each other.
        """
        state = {"by_rule": {}, **state}  # earlier checkpoints lack it
        for field, kind in (("classes", list), ("reasons", dict), ("changes", dict), ("by_rule", dict)):
            if field not in state:
                raise ValueError(f"has no {field!r}")
            if not isinstance(state[field], kind):
                raise ValueError(
                    f"has {field!r} of type {type(state[field]).__name__}, which must be a {kind.__name__}"
                )
        if state.get("digests") is not None:  # of sharded parameters
            Digests.check(state["digests"], len(self._names), self._n_groups)
        classes, reasons = state["classes"], state["reasons"]
        if len(classes) != len(self._names):
            raise ValueError(f"has {len(classes)} 'classes', but there are {len(self._names)} parameters")
        n_classes = 0
        for c in classes:  # numbered in the order of their first tensors
            if type(c) is not int or not 0 <= c <= n_classes:
                raise ValueError("has 'classes' that are not numbered 0, 1, … in the order in which they come")
            n_classes = max(n_classes, c + 1)
        for field in ("reasons", "changes", "by_rule"):
            for name, reason in state[field].items():
                if not isinstance(name, str) or name not in self._members:
                    raise ValueError(f"has {field!r} for {name!r:.100}, which is none of the symmetries")
                if not isinstance(reason, str) or not reason:
                    raise ValueError(f"has {field!r} for {name!r} that are no text")
        for name, members in self._members.items():
            is_open = name in self._always or len({classes[i] for i in members}) > 1
            if is_open != (name in reasons):
                raise ValueError(
                    f"has 'classes' in which the law of {name!r} is {'open' if is_open else 'closed'}, and "
                    f"{'no reason' if is_open else 'a reason'} why it is open"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the same symmetries; tensors added since are in no symmetry."""
        classes = [int(c) for c in state["classes"]]
        self._classes = classes + [0] * (len(self._names) - len(classes))
        self._reasons = {str(name): str(reason) for name, reason in state["reasons"].items()}
        self._changes = {str(name): str(reason) for name, reason in state["changes"].items()}
        self._by_rule = {str(name): str(reason) for name, reason in state.get("by_rule", {}).items()}
        self._last = self._given = None
        if self._shared and (digests := state.get("digests")) is not None:  # else the digests of all ranks begin anew
            self._digests = Digests(len(self._names), self._n_groups, digests)


def _spread(ages: Sequence[int], missing: bytes) -> bytes:
    """How far apart the counted ages of tensors with gradients are; compared faster than `_relative`."""
    counted = np.asarray(ages)
    if 1 in missing:
        counted = counted[np.frombuffer(missing, np.uint8) == 0]
    return bytes((counted - counted[:1]).tobytes())


def _relative(ages: Sequence[int], missing: bytes) -> tuple[int, ...]:
    """Counted ages, so that they stay the same from step to step: 1 + the oldest's − each one's; 1 without gradient."""
    counted, steps = np.asarray(ages), np.frombuffer(missing, np.uint8) == 0
    oldest = counted.max(where=steps, initial=0)
    return tuple(np.where(steps, 1 + oldest - counted, 1).tolist())


class _Group(NamedTuple):
    """A parameter group in one step; lr is the tensor that replaces the one of its options, if there is one."""

    rule: Rule[Any]
    options: Any
    lr: Tensor | None

    def acts_like(self, other: "_Group") -> bool:
        """Whether two groups make the same step."""
        if self is other:
            return True
        if self.lr is not other.lr:
            return False
        a, b = (self.options, other.options)
        if self.lr is not None:
            a, b = self.rule.with_lr(a, 1.0), self.rule.with_lr(b, 1.0)
        if a == b:
            return True
        oldest = self.rule.with_row(1)
        return self.rule.row(a, oldest, ()) == self.rule.row(b, oldest, ())

    def shown(self) -> dict[str, Any]:
        """The options by name, for a message."""
        lr = self.options.lr if self.lr is None else f"the tensor {id(self.lr):#x} on {self.lr.device}"
        return {**asdict(self.options), "lr": lr}
