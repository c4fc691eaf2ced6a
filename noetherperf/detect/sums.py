"""Sums of ⟨g, 1⟩ and ⟨θ, g⟩ for each index of each axis, over random parameters and batches.

θ has what is added to it wherever it is read (Flow.offset): the gain of a norm that multiplies by 1 + w is 1 + w here.

All that the search asks of the model is in them: a symmetry is a linear relation between such sums that holds for every
loss.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from noetherperf.detect.layout import Layout, grouping_of
from noetherperf.detect.parts import Axis, group_axes
from noetherperf.detect.probe import Probe
from noetherperf.detect.progress import Report, Stage
from noetherperf.detect.relations import Matrix
from noetherperf.detect.threads import threads
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["SPARE", "Sums"]

ZERO = 1e-7  # of |g_A| |ψ_A|: rounding, and what an eps leaves where activations are small; a claim is verified
DEAD = 1e-11  # of the module's root mean square, and of the largest anywhere: a gradient that is only rounding
SMALLEST = 1e-2
LEAST = 1e-4  # of the largest root mean square anywhere: no module's counts as less
N_COTANGENTS = 4
N_LOSSES = 32
SPARE = 8  # more rows than columns
LARGE = 20_000_000  # parameters: a backward pass takes long
N_LOSSES_LARGE = 8
MOST_LOSSES = 1024
WORK = 50_000_000  # parameters × losses that are spent where the first losses are too few
MEMORY = 25_000_000  # numbers that the sums may take

Numbers = Tensor | slice  # of axes among those of their length
ALL = slice(None)
_SQ_G, _SQ_P = 2, 3  # rows |g|² and |θ|², after ⟨g, 1⟩ and ⟨θ, g⟩ by law


class Sums:
    """Collects sums from a probe.

    Args:
        probe: Source of gradients.
        progress: Called with the stage and the fraction of it that is done.

    Attributes:
        shapes: Shape of each parameter.
        modules: The module that owns each parameter.
        axes: The axes whose indices may be groups.
        reached: The parameters that have a gradient.
        not_finite: Those that have one that is not finite; they count as not reached.
        large: Whether a backward pass takes so long that few are made.
    """

    def __init__(self, probe: Probe, progress: Report) -> None:
        self.probe, self._progress = probe, progress
        self.shapes = {name: tuple(p.shape) for name, p in probe.parameters.items()}
        self.modules = {name: probe.model.get_submodule(name.rpartition(".")[0]) for name in self.shapes}
        self.axes = tuple(group_axes(self.shapes))
        lengths = {axis: self.length(axis) for axis in self.axes}
        self.layout = Layout(lengths | {(name, None): 0 for name in self.shapes})
        self._axes_of: dict[str, list[int | None]] = {name: [None] for name in self.shapes}  # None: the whole tensor
        for name, axis in self.axes:
            self._axes_of[name].append(axis)
        self.reached: set[str] = set()
        self.not_finite: set[str] = set()
        n_parameters = sum(map(prod, self.shapes.values()))
        self.large = n_parameters > LARGE
        if self.large:  # their axes are long, so that few losses give enough rows
            self._shrink(2)
        first = N_LOSSES_LARGE if self.large else N_LOSSES
        self._most_losses = max(first, min(MOST_LOSSES, WORK // n_parameters, MEMORY // (4 * self.layout.size)))
        size = max(p.numel() for p in probe.parameters.values())
        self._scratch = torch.empty(size, dtype=torch.float64, device=next(iter(probe.parameters.values())).device)
        self._rows: list[Tensor] = []  # per loss: [4, size of the layout]
        self._more: list[Tensor] = []  # per loss that counts for whole tensors only: [2, size]
        order = {name: i for i, name in enumerate(self.shapes)}
        self._owners = {  # of the axes of one length: the number of their parameter
            length: torch.tensor([order[name] for name, _ in places], device="cpu")
            for length, places in self.layout.places.items()
        }
        self._n_elements = {  # of one index
            length: torch.tensor([prod(self.shapes[name]) / (length or 1) for name, _ in places], device="cpu").double()
            for length, places in self.layout.places.items()
        }
        self._told: dict[tuple[Part, int, Law], tuple[Tensor, Tensor]] = {}
        self._n_threads = torch.get_num_threads()  # of a backward pass
        self._n_batches = 0
        self.n_losses = 0
        self._collect(first)

    def length(self, axis: Axis) -> int:
        return self.shapes[axis[0]][axis[1]]

    def is_kernel(self, axis: Axis) -> bool:
        """Whether an axis holds places of a convolution's kernel, which belong to no unit."""
        return axis[1] > 1 and isinstance(self.modules[axis[0]], nn.modules.conv._ConvNd)

    def at_least(self, n_losses: int) -> bool:
        """Take more losses if there are fewer; False where that would take too long."""
        if n_losses > self._most_losses:
            return False
        if n_losses > self.n_losses:
            with threads(self._n_threads):
                self._collect(n_losses)
        return n_losses <= self.n_losses

    def _shrink(self, batch: int) -> None:
        """Draw smaller batches, unless something normalises over them."""
        norms = (m for m in self.probe.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        if self.probe.batch is not None and not any(norms):
            self.probe.batch = batch

    def _collect(self, n_losses: int) -> None:
        while self.n_losses < n_losses:
            if self._n_batches % 2 == 0 or not self.n_losses:
                self.probe.redraw()
                counted = ((name, self.probe.counted(name)) for name in self.probe.parameters)
                self._sq_p = {name: self._sums_of(name, p, p) for name, p in counted}
            before = self.n_losses
            for gradients in self.probe.gradients(N_COTANGENTS):
                self.n_losses += 1
                self._rows.append(self._row(gradients))
            if self.n_losses == before:  # nothing depends on the parameters
                break
            self._n_batches += 1
            self._progress(Stage.GRADIENTS, min(1.0, self.n_losses / n_losses))
        self._told.clear()
        nothing = torch.zeros(4, 0, self.layout.size, dtype=torch.float64, device="cpu")
        self._sums = torch.stack(self._rows, 1) if self._rows else nothing
        self._rows = list(self._sums.unbind(1))  # the same memory
        self._forget(self.not_finite)
        rms = (self.layout.table(self._sums[_SQ_G], 0)[..., 0] / self._n_elements[0]).sqrt()
        self._least = DEAD * torch.maximum(_usual(list(self.shapes), rms), SMALLEST * rms.amax(1, keepdim=True))

    def _forget(self, names: Collection[str]) -> None:
        """Take out parameters of which one gradient was not finite."""
        self.reached -= set(names)
        for vectors in (self._sums, *self._more):
            for name in names:
                for axis in self._axes_of[name]:
                    vectors[:_SQ_P, ..., self.layout.own((name, axis))] = 0.0

    def _sums_of(self, name: str, a: Tensor, b: Tensor | None = None) -> dict[int | None, Tensor]:
        """Sums of a, or of the product a b, over all axes but one, by that axis; None: the sum of all."""
        product = a if b is None else torch.mul(a, b, out=self._scratch[: a.numel()].view(a.shape))
        of_axis = list(_marginals(product))
        total = of_axis[0].sum().reshape(1)
        return {axis: total if axis is None else of_axis[axis] for axis in self._axes_of[name]}

    def _row(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The sums of one loss, [4, size of the layout]."""
        row = torch.zeros(4, self.layout.size, dtype=torch.float64, device="cpu")
        for name in self.probe.parameters:
            g = gradients.get(name)
            sum_g = self._sums_of(name, g) if g is not None else {}
            if g is not None and not bool(sum_g[None].isfinite()):
                self.not_finite.add(name)
            if name in self.not_finite:
                g = None
            if g is not None:
                self.reached.add(name)
                dot_pg, sq_g = self._sums_of(name, self.probe.counted(name), g), self._sums_of(name, g, g)
            for axis in self._axes_of[name]:
                own = row[:, self.layout.own((name, axis))]
                if g is not None:
                    own[0], own[1], own[2] = sum_g[axis], dot_pg[axis], sq_g[axis]
                own[3] = self._sq_p[name][axis]
        return row

    # ---- sums of groups, for some axes of one length: [losses, axes, groups] ----------------------------------------

    def products(self, law: Law) -> Tensor:
        """⟨g, ψ⟩ of each index, [losses, size of the layout]."""
        return self._sums[law]

    def _of(self, row: int, grouping: Part, length: int, numbers: Numbers, first: bool = False) -> Tensor:
        vectors = self._sums[row, :1] if first else self._sums[row]
        return self.layout.sums(vectors, grouping, length, numbers)

    def _sizes(self, grouping: Part, length: int, numbers: Numbers, first: bool) -> tuple[Tensor, Tensor]:
        """|g|² and whether it is more than rounding."""
        sq_g = self._of(_SQ_G, grouping, length, numbers, first)
        least = self._least[: len(sq_g), self._owners[length][numbers], None]
        return sq_g, (sq_g / self._in_group(grouping, length, numbers)).sqrt() > least

    def _in_group(self, grouping: Part, length: int, numbers: Numbers) -> Tensor:
        """The number of elements in one group, [axes, 1]."""
        return grouping.fold * self._n_elements[length][numbers, None]

    def _states(self, grouping: Part, length: int, law: Law, numbers: Numbers, first: bool) -> tuple[Tensor, Tensor]:
        """Whether there is a gradient, and whether ⟨g, ψ⟩ is zero up to rounding."""
        sq_g, alive = self._sizes(grouping, length, numbers, first)
        if law == Law.NORM:
            sq_psi = self._of(_SQ_P, grouping, length, numbers, first)
        else:
            sq_psi = self._in_group(grouping, length, numbers).expand_as(sq_g)
        value = self._of(law, grouping, length, numbers, first)
        return alive, value.abs() <= ZERO * (sq_g * sq_psi).sqrt()

    def vanish(self, grouping: Part, length: int, law: Law) -> Tensor:
        """Of which axes the sums of every group vanish although there is a gradient, [axes]."""
        return self._tell(grouping, length, law)[0]

    def idle(self, grouping: Part, length: int, law: Law) -> Tensor:
        """Of which axes the sums vanish or have no gradient, so that a relation may contain any multiple, [axes]."""
        return self._tell(grouping, length, law)[1]

    def _tell(self, grouping: Part, length: int, law: Law) -> tuple[Tensor, Tensor]:
        key = (grouping, length, law)
        if key not in self._told:
            alive, zero = self._states(grouping, length, law, ALL, first=True)
            idle = ~(alive & ~zero).any(-1).any(0)  # as a rule, one loss tells
            vanish = torch.zeros_like(idle)
            rest = idle.nonzero().flatten()
            if len(rest):
                alive, zero = self._states(grouping, length, law, rest, first=False)
                idle[rest] = ~(alive & ~zero).any(-1).any(0)
                enough = alive.any(0).sum(-1) >= min(alive.shape[-1], 4)
                vanish[rest] = enough & (zero | ~alive).all(-1).all(0)
            self._told[key] = vanish, idle
        return self._told[key]

    # ---- sums of one part -------------------------------------------------------------------------------------------

    def _place(self, part: Part) -> tuple[Part, int, Tensor]:
        place = (part.parameter, part.axis)
        length = 0 if part.axis is None else self.shapes[part.parameter][part.axis]
        return grouping_of(part), length, torch.tensor([self.layout.number[place]], device="cpu")

    def value(self, part: Part, law: Law) -> Tensor:
        """⟨g, ψ⟩ of each group, [losses, n_groups]."""
        grouping, length, number = self._place(part)
        return self._of(law, grouping, length, number)[:, 0]

    def alive(self, part: Part) -> Tensor:
        """Whether each group has a gradient that is more than rounding, [losses, n_groups]."""
        return self._sizes(*self._place(part), first=False)[1][:, 0]

    def rounding(self, part: Part) -> Tensor:
        """Whether each group ever has a gradient at all, be it rounding, [n_groups]."""
        return (self._sizes(*self._place(part), first=False)[0][:, 0] > 0).any(0)

    def vanishes(self, part: Part, law: Law) -> bool:
        """Whether the sums of every group vanish although there is a gradient."""
        grouping, length, number = self._place(part)
        return bool(self.vanish(grouping, length, law)[number])

    def is_idle(self, part: Part, law: Law) -> bool:
        """Whether a part's sums vanish or have no gradient, so that a relation may contain any multiple of it."""
        grouping, length, number = self._place(part)
        return bool(self.idle(grouping, length, law)[number])

    # ---- sums of whole tensors and slices ---------------------------------------------------------------------------

    def totals(self, parts: Sequence[Part], law: Law) -> Matrix:
        """⟨g, ψ⟩ of parts of one group, [losses, parts], where possible for more losses than there are parts."""
        wanted = len(parts) + SPARE
        if not self.at_least(wanted) and (law == Law.NORM or not self.large):
            if self.large:
                self._shrink(1)
            self.probe.redraw()
            self._n_batches = 0  # parameters are drawn anew before other sums are taken
            # Where an operation has no forward derivative, the losses are differentiated backward, one by one.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                return self.probe.tangents(parts, law, wanted, self._progress)
            self._collect_more(wanted)
        vectors = torch.cat([self._sums[law], *(row[law, None] for row in self._more)])
        columns = [
            part.gather(vectors[:, self.layout.own((part.parameter, part.axis))]).sum(-1).flatten() for part in parts
        ]
        return torch.stack(columns, 1).numpy()

    def _collect_more(self, n_losses: int) -> None:
        """Sums of more losses, of which only ⟨g, 1⟩ and ⟨θ, g⟩ are kept."""
        first, missing = len(self._more), n_losses - self.n_losses
        while (before := len(self._more)) < missing:
            if (before - first) % (2 * N_COTANGENTS) == 0:
                self.probe.redraw()
            self._more += [self._row(gradients)[:2].clone() for gradients in self.probe.gradients(N_COTANGENTS)]
            if len(self._more) == before:
                break
            self._progress(Stage.WHOLE_TENSORS, min(1.0, (len(self._more) - first) / (missing - first)))
        self._forget(self.not_finite)
        self._n_batches = 0  # parameters are drawn anew before other sums are taken


def _usual(names: Sequence[str], rms: Tensor) -> Tensor:
    """The usual size of a gradient for each loss and parameter: the largest root mean square in its module, but not
    less than LEAST of the largest anywhere. [losses, parameters]."""
    modules = [name.rpartition(".")[0] for name in names]
    numbers = {module: i for i, module in enumerate(dict.fromkeys(modules))}
    owner = torch.tensor([numbers[module] for module in modules], device="cpu").expand_as(rms)
    best = torch.zeros(len(rms), len(numbers), dtype=rms.dtype, device="cpu").scatter_reduce(1, owner, rms, "amax")
    return torch.maximum(best.gather(1, owner), LEAST * rms.amax(1, keepdim=True))


def _marginals(x: Tensor) -> Iterator[Tensor]:
    """Its sums over all axes but one, for each axis in order; each axis is summed up before the next is looked at."""
    for _ in range(x.ndim - 1):
        yield x.sum(list(range(1, x.ndim)))
        x = x.sum(0)
    yield x.reshape(-1).clone()
