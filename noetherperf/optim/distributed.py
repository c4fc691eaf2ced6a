"""Many ranks, on torch's own distributed engine: shards in, summed measurements out.

Parameters that are plain tensors (one process, DistributedDataParallel) are replicated: every rank measures all of
them, and this file does nothing. Parameters that are DTensors (`fully_shard`, `parallelize_module`, meshes of both) may
be sharded: a rank steps and measures its shards, and no step communicates for the measurement. A readout adds up
measurements over the ranks that a tensor is sharded over, and over no others, so that replicas count once.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard
from zlib import crc32

import torch
from torch import Tensor

from noetherperf.measure.agreement import Kind, Mark, explain, numbers, summary
from noetherperf.measure.cells import GramPlan, GramsCopy
from noetherperf.measure.plan import Measurement, Plan
from noetherperf.measure.shards import Cut, Indices, Shards
from noetherperf.optim import checkpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["MeasurementState", "get_measurement_state_dict", "set_measurement_state_dict"]


def is_distributed(x: object) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor. The module is not imported here, since only its users have DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    module = sys.modules.get("torch.distributed")
    n: int = module.get_rank() if module is not None and module.is_available() and module.is_initialized() else 0
    return n


# ---- shards in ------------------------------------------------------------------------------------------------------


def check_whole(labels: Sequence[str], params: Sequence[Tensor]) -> None:
    """Check that each parameter's place in the whole model is known.

    Raises:
        ValueError: FullyShardedDataParallel (FSDP1) has flattened a parameter.
    """
    for label, p in zip(labels, params, strict=True):
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"{label}: FullyShardedDataParallel has flattened it and cut it anywhere, so that no symmetry of it "
                "can be measured; shard with torch.distributed.fsdp.fully_shard (FSDP2), or give no symmetries"
            )


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """The part of a tensor in this rank's memory: a DTensor's shard, any other tensor itself."""
    if not is_distributed(x):
        return x
    shard: Tensor = x.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # a collective may still be in flight


def moved(params: Sequence[Tensor], shards: Sequence[Tensor]) -> bool:
    """Whether any parameter's shard has moved in memory."""
    return any(local(p).data_ptr() != x.data_ptr() for p, x in zip(params, shards, strict=True))


def local_gradient(label: str, p: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient's shard, with its parameter's placements.

    A gradient may have other placements than its parameter: sequence parallelism leaves a normalisation's gradient as a
    partial sum (Partial). It is then redistributed to the parameter's placements, as torch's optimizers do.

    Raises:
        TypeError: Only one of the two is a DTensor, or they are on different meshes.
    """
    if grad is None or not (is_distributed(p) or is_distributed(grad)):
        return grad
    if not (is_distributed(p) and is_distributed(grad)) or p.device_mesh != grad.device_mesh:
        raise TypeError(
            f"{label}: the gradient ({_placed(grad)}) must be on the mesh of its parameter ({_placed(p)}); convert it "
            "before step(), as torch.distributed.tensor.distribute_tensor does"
        )
    if grad.placements != p.placements:
        with torch.no_grad():
            return local(grad.redistribute(placements=p.placements))
    return local(grad)


def local_buffer(label: str, key: str, p: Tensor, buffer: Tensor | None) -> Tensor | None:
    """The shard of a buffer (torch's state holds it under this key), placed like its parameter's.

    Raises:
        RuntimeError: The buffer has other placements than the parameter.
    """
    if buffer is None or not (is_distributed(p) or is_distributed(buffer)):
        return buffer
    if _placed(p) != _placed(buffer):
        raise RuntimeError(
            f"{label}: its {key} ({_placed(buffer)}) must be placed as the parameter ({_placed(p)}); load it "
            "with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes it"
        )
    return local(buffer)


def _placed(x: Tensor) -> str:
    return f"{x.placements} on {x.device_mesh}" if is_distributed(x) else "a plain tensor"


def _indices(label: str, p: Tensor) -> Indices:
    """The indices of a parameter's elements on this rank."""
    if not is_distributed(p):
        return [torch.arange(n, device="cpu") for n in p.shape or (1,)]
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, shape = p.device_mesh, p.shape or (1,)
    if mesh.get_coordinate() is None:
        raise ValueError(f"{label}: this rank is not on its mesh, {mesh}; leave it to the optimizers of those that are")
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{label}: a parameter cannot be a partial sum ({_placed(p)}); redistribute it first")
    indices = []
    for axis, n in enumerate(shape):
        whole = torch.arange(n, device=local(p).device).view([n if other == axis else 1 for other in range(len(shape))])
        along = [x if getattr(x, "dim", None) == axis else Replicate() for x in p.placements]
        indices.append(local(distribute_tensor(whole, mesh, along, src_data_rank=None)).flatten().cpu())
    here = tuple(local(p).shape) or (1,)
    if here != tuple(map(len, indices)):
        raise ValueError(
            f"{label}: its shard has shape {here}, but {_placed(p)} gives a tensor of shape {tuple(p.shape)} a shard "
            f"of shape {tuple(map(len, indices))}; shard it as torch.distributed.tensor.distribute_tensor does"
        )
    return indices


# ---- summed measurements out ----------------------------------------------------------------------------------------


class Ranks:
    """The parameters of one device, and how they are sharded over the ranks.

    Args:
        plan: Of the whole parameters.
        labels, params: Their labels, and the parameters.

    Attributes:
        whole: That plan.
        plan: The plan of this rank's shards: the same one if no parameter is a DTensor.
        groups: The process groups of the meshes with sharded parameters, including replicas, and their device types.
        mark: A mark of what is measured.
        indices, cuts: Of each parameter, the indices of its shard, and the ranks that it is cut over; None if no
            parameter is a DTensor.

    Raises:
        ValueError: A parameter is on a mesh without this rank, or has unknown placements.
    """

    def __init__(self, plan: Plan, labels: Sequence[str], params: Sequence[Tensor]) -> None:
        self.whole = self.plan = plan
        self._shards: Shards | None = None
        self.indices: list[Indices] | None = None
        self.cuts: list[Cut] | None = None
        self.groups: dict[tuple[int, ...], tuple[ProcessGroup, str]] = {}
        self.mark = Mark(Kind.LAYOUT, "", crc32(repr(plan.parts).encode()))
        if any(map(is_distributed, params)):
            self.indices, self.cuts = list(map(_indices, labels, params)), list(map(self._cut, params))
            self._shards = Shards(plan, self.indices, self.cuts)
            self.plan = self._shards.local

    def _cut(self, p: Tensor) -> Cut:
        if not is_distributed(p):
            return ()
        from torch.distributed import get_process_group_ranks

        mesh = p.device_mesh
        groups = [(x, mesh.get_group(dim)) for dim, x in enumerate(p.placements) if mesh.size(dim) > 1]
        lines = [(hasattr(x, "dim"), tuple(get_process_group_ranks(group)), group) for x, group in groups]
        if any(is_cut for is_cut, _, _ in lines):
            for _, ranks, group in lines:
                self.groups.setdefault(ranks, (group, mesh.device_type))
        return tuple(ranks for is_cut, ranks, _ in lines if is_cut)

    def gather(self, measurement: Measurement) -> Measurement:
        """The measurement of the whole parameters, from every rank's own: one all-reduce for each cut.

        With sharded parameters it is a collective, and returns a copy on the CPU; else it returns the measurement
        itself. Call check_alike first: ranks that measure different things would deadlock, or add up unrelated sums.

        Args:
            measurement: This rank's.
        """
        if self._shards is None:
            return measurement
        here = measurement.cpu()
        total = [torch.zeros((), dtype=torch.float64, device="cpu")] * 4
        for cut in self._shards.cuts:
            partial = self._shards.partial(here, cut)
            sums = [partial.moments, *partial.states, partial.propagators]
            if self.whole.n_segments > 0:
                sums = self._add_up(sums, cut)
            total = [old + new for old, new in zip(total, sums, strict=True)]
        return Measurement.of([*total, here.clock])

    @property
    def has_first(self) -> list[bool] | None:
        """Per parameter, whether this rank has its first element; None if no parameter is a DTensor."""
        return None if self._shards is None else self._shards.has_first

    def gather_grams(self, copy: GramsCopy, whole: GramPlan) -> GramsCopy:
        """The products of the whole parameters, as `gather` gathers their sums."""
        if self._shards is None or not copy.tensors:
            return copy
        here = copy.cpu()
        sums: list[Tensor] = []
        for cut in dict.fromkeys(cell.cut for cell in copy.plan.cells):
            of_cut = self._add_up(here.partial(whole, cut), cut)
            sums = [old + new for old, new in zip(sums, of_cut, strict=True)] if sums else of_cut
        return here.gathered(whole, sums)

    def _add_up(self, sums: Sequence[Tensor], cut: Cut) -> list[Tensor]:
        """Add up every rank's sums over the ranks of a cut."""
        from torch.distributed import all_reduce

        flat = torch.cat([x.flatten() for x in sums])
        for ranks in cut:
            group, device = self.groups[ranks]
            flat = flat.to(device)
            all_reduce(flat, group=group)
        totals = flat.cpu().split([x.numel() for x in sums])
        return [values.view(x.shape) for values, x in zip(totals, sums, strict=True)]

    def scatter(self, whole: Measurement) -> Measurement:
        """This rank's part of a measurement of the whole parameters, to continue from; without communication."""
        return whole if self._shards is None else self._shards.scatter(whole)


def check_alike(devices: Sequence[Ranks], marks: Sequence[Mark]) -> list[str]:
    """Raise on every rank if the ranks that share parameters have different marks.

    With sharded parameters it is a collective: one small all-reduce for each process group of their meshes, including
    replicas, and more only if something differs, to name it. It precedes all other collectives, whose sizes depend on
    what is measured.

    Args:
        devices: This rank's devices.
        marks: This rank's marks, without those of its devices.

    Returns:
        The symmetries that were changed on some ranks only (Kind.CHANGED).

    Raises:
        RuntimeError: The marks differ; the message names the differences.
    """
    groups = {ranks: group for device in devices for ranks, group in device.groups.items()}
    own = [*(device.mark for device in devices), *marks]
    differing = _differing(summary(own), groups)
    if differing and differing[0].kind != Kind.LAYOUT:
        differing = _differing(own, groups)
    if any(mark.kind != Kind.CHANGED for mark in differing):
        raise RuntimeError(explain(differing, devices[0].whole.rule))
    return [mark.of for mark in differing]


def _differing(marks: Sequence[Mark], groups: Mapping[tuple[int, ...], "tuple[ProcessGroup, str]"]) -> list[Mark]:
    """The marks that differ between ranks; every rank gets the same answer.

    Groups are the lines of a grid of ranks. n numbers are equal if and only if n Σx² = (Σx)². Numbers that are not
    equal are replaced by NaN, which the next groups' sums carry to the other lines of the grid.
    """
    from torch.distributed import all_reduce

    own = numbers(marks)
    rounding = torch.tensor([[mark.kind == Kind.TIME] for mark in marks], dtype=torch.float64, device="cpu")
    rounding *= 4.0 * torch.finfo(torch.float64).eps  # of a sum, for each of its terms
    for ranks, (group, device) in groups.items():
        n = len(ranks)
        sums = torch.stack([own, own.square()]).to(device)
        all_reduce(sums, group=group)
        total, squares = sums.cpu()
        alike = n * squares - total.square() <= n * rounding * n * squares
        own = torch.where(alike, own, torch.nan)
    return [mark for mark, is_nan in zip(marks, own.isnan().any(dim=1).tolist(), strict=True) if is_nan]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Checkpointed(Protocol):
    """The methods that these functions need; every noetherperf.MeasuredOptimizer has them."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_measurement(self, measured: Mapping[str, Any] | None) -> None: ...


def get_measurement_state_dict(optimizer: Checkpointed) -> dict[str, Any]:
    """An optimizer's measurement for torch.distributed.checkpoint, as get_optimizer_state_dict returns its state.

    It is the measurement of the whole parameters: the same on every rank and for every world size. So another world
    size can load it. With sharded parameters this is a collective. To load, first call this function with the present
    optimizer. Let torch.distributed.checkpoint.load fill the result, and pass it to set_measurement_state_dict.

    Args:
        optimizer: noetherperf.MeasuredOptimizer with symmetries.

    Returns:
        {"tensors": float64 tensors of fixed shapes, "about": JSON text}.

    Raises:
        ValueError: It measures no symmetries.
        RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
    """
    measured = optimizer.state_dict().get("measurement")
    if measured is None:
        raise ValueError("the optimizer measures nothing: it was given no symmetries; make it with symmetries=...")
    return checkpoint.pack(measured)


def set_measurement_state_dict(optimizer: Checkpointed, state_dict: Mapping[str, Any]) -> None:
    """Continue from the result of get_measurement_state_dict, without communication.

    Call it after loading the optimizer's own state (set_optimizer_state_dict, set_state_dict). That state has no
    measurement, so loading it starts the measurement anew.

    Args:
        optimizer: noetherperf.MeasuredOptimizer with the same symmetries; its parameters may be sharded otherwise.
        state_dict: The result of get_measurement_state_dict.

    Raises:
        ValueError: It was measured with other symmetries, or is damaged. Raised before anything is changed.
    """
    optimizer.load_measurement(checkpoint.unpack(state_dict))


class MeasurementState:
    """An optimizer's measurement as an object with state_dict and load_state_dict, which checkpoints can hold.

        accelerator.register_for_checkpointing(nperf.distributed.MeasurementState(optimizer))

    Some libraries keep only the buffers and hyperparameters of an optimizer in their checkpoints of sharded training,
    as torch.distributed.checkpoint does. They load these before any other objects. This object adds the measurement.

    Args:
        optimizer: noetherperf.MeasuredOptimizer or Probe, with symmetries.
    """

    def __init__(self, optimizer: Checkpointed) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """get_measurement_state_dict of the optimizer. With sharded parameters this is a collective."""
        return get_measurement_state_dict(self._optimizer)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """set_measurement_state_dict of the optimizer."""
        set_measurement_state_dict(self._optimizer, state_dict)
