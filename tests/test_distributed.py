"""Many ranks: what they measure together is what one process measures, however the parameters are cut.

Ranks are processes on the CPU that talk over gloo. One world of them runs all its cases and writes down what each rank
saw; the comparison with one process, which needs no ranks, is made here.
"""

import copy
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy

import noetherperf as nperf
from noetherperf import Norm, Part, Rescale, Translation, distributed, layers
from noetherperf.optim.adam import AdamW

# torch.distributed's tensors, meshes and wrappers take half a second to import, and only ranks need them: they are
# imported where they are used, and once for all ranks in the process that these are forked from.
PRELOAD = [
    "noetherperf",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
]

N_IN, N_OUT, N_BATCH, N_STEPS = 8, 3, 16, 6
N_CHECKPOINT = 8  # hidden units: tensor parallelism needs as many on each rank
TOLERANCE = 1e-13  # of sums that are of the order of 1, after N_STEPS steps in float64

Values = dict[str, Tensor]


def make_net(n_hidden: int) -> nn.Sequential:
    torch.manual_seed(1)
    modules = OrderedDict(
        norm=nn.LayerNorm(N_IN), fc1=nn.Linear(N_IN, n_hidden), relu=nn.ReLU(), fc2=nn.Linear(n_hidden, N_OUT)
    )
    return nn.Sequential(modules).double()


def make_symmetries(net: nn.Module) -> list[nperf.Symmetry]:
    """Every way to sum: by rows, by columns, whole, sliced and folded across the places where shards are cut."""
    return [
        Rescale("fc1->fc2", inward=[Part("fc1.weight", 0), Part("fc1.bias", 0)], outward=[Part("fc2.weight", 1)]),
        Rescale("norm->fc1", inward=[Part("norm.weight", 0), Part("norm.bias", 0)], outward=[Part("fc1.weight", 1)]),
        Translation("classes", [Part("fc2.weight", 1)]),
        Translation("classes, biases", [Part("fc2.bias", None, weight=2.0)]),
        Norm("folded rows", [Part("fc1.weight", 0, start=1, stop=5, fold=2)]),
        Norm("folded columns", [Part("fc1.weight", 1, start=1, stop=7, fold=3, offset=0.5)]),
        *layers(net),
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N_BATCH, N_IN, generator=generator, dtype=torch.float64)
    return x, torch.randint(N_OUT, (N_BATCH,), generator=generator)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    share: tuple[int, int] = (0, 1),
    clip: bool = False,
    no_sync: Callable[[], Any] = nullcontext,
    step_context: Callable[[], Any] = nullcontext,
) -> None:
    """Steps on share i of n of each batch, in two halves where all but the last backward pass is not synchronised."""
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 if step < 3 else 0.02
        optimizer.zero_grad()
        x, y = (part.chunk(share[1])[share[0]] for part in batch(step))
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        for half, (x_half, y_half) in enumerate(halves):
            with no_sync() if half == 0 else nullcontext():
                (cross_entropy(net(x_half), y_half) / len(halves)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with step_context():
            optimizer.step()


def values_of(readout: nperf.Readout) -> Values:
    """All that a readout says, flat."""
    values = {"step": torch.tensor(float(readout.step)), "time": torch.tensor(readout.time)}
    for name, law in readout.items():
        for field in ("charge", "initial", "defect", "relative_defect"):
            values[f"{name}: {field}"] = getattr(law, field)
        for kind in ("discrete", "flow"):
            for field in ("free", "forced", "defect"):
                values[f"{name}: {kind}.{field}"] = getattr(getattr(law, kind), field)
        for field, moment in law.moments.items():
            values[f"{name}: {field}"] = moment
        values[f"{name}: rounding"] = law.rounding
        for field in ("relative_update", "angular_update"):
            values[f"{name}: {field}"] = getattr(law, field).nan_to_num(-1.0)
        values[f"{name}: closed"] = torch.tensor(law.closed)
    return values


def without_step(values: Values) -> Values:
    """What a checkpoint holds: how its last step was made is known to the optimizer that made it."""
    return {name: x for name, x in values.items() if "_update" not in name}


def difference(a: Values, b: Values, tolerance: float = TOLERANCE) -> str:
    """Where two readouts differ, empty if nowhere; absolute, as all sums here are of the order of 1 or smaller."""
    if list(a) != list(b):
        return f"{list(a)} is not {list(b)}"
    for name, x in a.items():
        # A cosine is as exact as what cancels in it, and that is relative to the gradient.
        allowed = 1e-9 if "relative_defect" in name else tolerance
        if x.shape != b[name].shape or not (x.double() - b[name].double()).abs().max() <= allowed:
            return f"{name}: {x} is not {b[name]}"
    return ""


# ---- the cases ------------------------------------------------------------------------------------------------------


class Distributed(NamedTuple):
    """A net over ranks, which share i of n of each batch is this rank's, and how not to synchronise gradients."""

    net: nn.Module
    share: tuple[int, int]
    no_sync: Callable[[], Any] = nullcontext


def ddp(net: nn.Module, **options: Any) -> Distributed:
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(net, **options)
    return Distributed(wrapped, share(), wrapped.no_sync)


def ddp_bucket_view(net: nn.Module) -> Distributed:
    return ddp(net, gradient_as_bucket_view=True)


def ddp_unused(net: nn.Module) -> Distributed:
    net.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    return ddp(net, find_unused_parameters=True)


def fsdp(net: nn.Module, **options: Any) -> Distributed:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.get_submodule("fc1"), **options)
    fully_shard(net, **options)
    return Distributed(net, share())


def fsdp_columns(net: nn.Module) -> Distributed:
    from torch.distributed.tensor import Shard

    return fsdp(net, shard_placement_fn=lambda p: Shard(1) if p.shape[1:] == (N_IN,) else None)


def fsdp_no_sync(net: nn.Module) -> Distributed:
    from contextlib import contextmanager

    @contextmanager
    def no_sync() -> Any:
        net.set_requires_gradient_sync(False)  # type: ignore[operator]
        yield
        net.set_requires_gradient_sync(True)  # type: ignore[operator]

    return fsdp(net)._replace(no_sync=no_sync)


def hsdp(net: nn.Module) -> Distributed:
    return fsdp(net, mesh=mesh_2d("replicate", "shard"))


def tensor_parallel(net: nn.Module) -> Distributed:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(net, mesh_1d(), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return Distributed(net, (0, 1))


def sequence_parallel(net: nn.Module) -> Distributed:
    """Gradients of the normalisation are sums not yet taken: torch leaves them to the optimizer."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = mesh_1d()
    parallelize_module(
        net,
        mesh,
        {
            "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True),
            "norm": SequenceParallel(sequence_dim=0),
            "fc1": ColwiseParallel(input_layouts=Shard(0)),
            "fc2": RowwiseParallel(),
        },
    )
    return Distributed(net, (0, 1))


def fsdp_and_tensor_parallel(net: nn.Module) -> Distributed:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_2d("data", "model")
    parallelize_module(net, mesh["model"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    return Distributed(net, (mesh["data"].get_local_rank(), 2))


class Case(NamedTuple):
    world: int
    distribute: Callable[[nn.Module], Distributed]
    hyper: dict[str, Any]
    n_hidden: int = 5  # over two ranks 3 and 2 rows, over four 2, 2, 1 and none
    clip: bool = False
    all_reduces: int = 2  # of one readout: whether ranks made the same steps, and the sums


MOMENTUM: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05}
NESTEROV: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}
DAMPENED: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05, "dampening": 0.5}
PLAIN: dict[str, Any] = {"weight_decay": 0.05}
#: Of AdamW. With a large ε, gradients that differ by rounding alone make steps that do.
ADAMW: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.05}
AMSGRAD: dict[str, Any] = {**ADAMW, "amsgrad": True}

CASES = {
    "DDP": Case(2, ddp, MOMENTUM, all_reduces=0),
    "DDP, gradient_as_bucket_view": Case(2, ddp_bucket_view, NESTEROV, all_reduces=0),
    "DDP, find_unused_parameters": Case(2, ddp_unused, DAMPENED, all_reduces=0),
    "FSDP": Case(2, fsdp, MOMENTUM),
    "FSDP, no momentum": Case(2, fsdp, PLAIN),
    "FSDP, Shard(1)": Case(2, fsdp_columns, DAMPENED, clip=True),
    "FSDP, accumulating": Case(2, fsdp_no_sync, NESTEROV),
    "tensor parallel": Case(2, tensor_parallel, NESTEROV, n_hidden=8),
    "sequence parallel": Case(2, sequence_parallel, MOMENTUM, n_hidden=8),
    "DDP, AdamW": Case(2, ddp, ADAMW, all_reduces=0),
    "FSDP, AdamW": Case(2, fsdp, AMSGRAD, clip=True),
    "tensor parallel, AdamW": Case(2, tensor_parallel, ADAMW, n_hidden=8),
    "sequence parallel, AdamW": Case(2, sequence_parallel, ADAMW, n_hidden=8),
    "DDP, 4 ranks": Case(4, ddp, MOMENTUM, all_reduces=0),
    "tensor parallel, 4 ranks": Case(4, tensor_parallel, NESTEROV, n_hidden=8),
    "FSDP, empty shards": Case(4, fsdp, MOMENTUM, clip=True),
    "FSDP, Shard(1), 4 ranks": Case(4, fsdp_columns, NESTEROV),
    "FSDP, AdamW, empty shards": Case(4, fsdp, AMSGRAD),
    "HSDP": Case(4, hsdp, DAMPENED, clip=True, all_reduces=3),
    "FSDP and tensor parallel": Case(4, fsdp_and_tensor_parallel, MOMENTUM, n_hidden=10, all_reduces=5),
}


# ---- inside a rank --------------------------------------------------------------------------------------------------


def share() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def mesh_1d() -> Any:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def mesh_2d(*names: str) -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def class_of(hyper: dict[str, Any]) -> Any:
    return AdamW if "betas" in hyper else nperf.SGD


def optimizer_of(net: nn.Module, hyper: dict[str, Any]) -> Any:
    return class_of(hyper)(net.named_parameters(), symmetries=make_symmetries(make_net(5)), **hyper)


def run_case(case: Case) -> dict[str, Any]:
    """A case's readouts before, amid and after training, and how often it communicated for them."""
    from torch.distributed.tensor.debug import CommDebugMode

    net = make_net(case.n_hidden)
    over = case.distribute(net)
    optimizer = optimizer_of(net, case.hyper)
    readouts = [values_of(optimizer.readout())]
    in_steps, in_readout = CommDebugMode(), CommDebugMode()
    for steps in (range(1), range(1, N_STEPS)):
        train(over.net, optimizer, steps, share=over.share, clip=case.clip, no_sync=over.no_sync)
        readouts.append(values_of(optimizer.readout()))
    with in_steps:
        optimizer.step()
    with in_readout:
        readouts.append(values_of(optimizer.readout()))
    return {
        "readouts": readouts,
        "in steps": in_steps.get_total_counts(),
        "in readout": in_readout.get_total_counts(),
    }


def run_cases(directory: str) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    return {name: run_case(case) for name, case in CASES.items() if case.world == world}


#: How a checkpoint's net is cut in a world of so many ranks.
IN_WORLD = {2: tensor_parallel, 4: fsdp}
#: What it was trained with.
SAVED = {"SGD": NESTEROV, "AdamW": AMSGRAD}


def save_checkpoint(directory: str) -> dict[str, Any]:
    """Train a few steps and save; the checkpoint is what another world goes on from."""
    from torch.distributed.checkpoint.state_dict_saver import save

    found = {}
    for name, hyper in SAVED.items():
        net = make_net(N_CHECKPOINT)
        over = IN_WORLD[torch.distributed.get_world_size()](net)
        optimizer = optimizer_of(net, hyper)
        train(net, optimizer, range(N_STEPS // 2), share=over.share)
        save(state_to_save(net, optimizer), checkpoint_id=Path(directory) / name)
        found[name] = values_of(optimizer.readout())
    return found


def state_to_save(net: nn.Module, optimizer: nperf.SGD) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(net, optimizer)
    measurement = distributed.get_measurement_state_dict(optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "measurement": measurement}


def go_on(name: str, net: nn.Module, directory: str | Path, *, share: Any = (0, 1), **loading: Any) -> list[Values]:
    """Load the checkpoint and train on: the readouts then and at the end."""
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    optimizer = optimizer_of(net, SAVED[name])
    state = state_to_save(net, optimizer)
    load(state, checkpoint_id=Path(directory) / name, **loading)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    distributed.set_measurement_state_dict(optimizer, state["measurement"])
    readouts = [values_of(optimizer.readout())]
    train(net, optimizer, range(N_STEPS // 2, N_STEPS), share=share)
    return [*readouts, values_of(optimizer.readout())]


def load_checkpoint(directory: str) -> dict[str, Any]:
    found = {}
    for name in SAVED:
        net = make_net(N_CHECKPOINT)
        over = IN_WORLD[torch.distributed.get_world_size()](net)
        found[name] = go_on(name, net, directory, share=over.share)
    return found


def mix_precision(directory: str) -> dict[str, Any]:
    return {
        "step unscales": scaled_training({**NESTEROV, "fused": True}),
        "scaler unscales": scaled_training(NESTEROV),
        "AdamW, step unscales": scaled_training({**AMSGRAD, "fused": True}),
    }


def scaled_training(hyper: dict[str, Any]) -> dict[str, Any]:
    """Gradients from bfloat16, master weights in float32, and a scaler that a rank's overflow makes skip a step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    net = make_net(5).float()
    over = fsdp(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = optimizer_of(net, hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(N_STEPS):
        optimizer.zero_grad()
        x, y = (part.chunk(2)[over.share[0]] for part in batch(step))
        scaler.scale(cross_entropy(net(x.float()).float(), y)).backward()
        if step == 2 and torch.distributed.get_rank() == 1:
            net.get_parameter("fc1.weight").grad.to_local()[0, 0] = torch.inf  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
    whole = {name: p.full_tensor() for name, p in net.named_parameters()}  # type: ignore[attr-defined]
    counts = {int(slot["step"]) for slot in optimizer.state.values() if "step" in slot}
    return {
        "readout": values_of(optimizer.readout()),
        "whole": whole,
        "steps": {optimizer.step_count, *counts},
    }


def step_like_torch(directory: str) -> dict[str, Any]:
    """Without symmetries, beside torch's own on the same shards: how parameters and state differ."""
    found: dict[str, Any] = {}
    for hyper in (NESTEROV, AMSGRAD):
        ours = class_of(hyper)
        nets = [make_net(5), make_net(5)]
        overs = list(map(fsdp, nets))
        optimizers = [
            ours(nets[0].named_parameters(), **hyper),
            getattr(torch.optim, ours.__name__)(nets[1].parameters(), **hyper),
        ]
        for over, optimizer in zip(overs, optimizers, strict=True):
            train(over.net, optimizer, range(N_STEPS), share=over.share)
        differences = found[ours.__name__] = {}
        for pair in zip(*(net.parameters() for net in nets), strict=True):
            slots = [{"p": p, **o.state[p]} for o, p in zip(optimizers, pair, strict=True)]
            for key in slots[1]:
                a, b = (slot[key].full_tensor() if hasattr(slot[key], "full_tensor") else slot[key] for slot in slots)
                differences.setdefault(key, []).append((a - b).abs().max().item())
    return found


def probed(net: nn.Module) -> tuple[torch.optim.Optimizer, nperf.Probe]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    return optimizer, nperf.Probe(optimizer, make_symmetries(make_net(5)), net.named_parameters())


def probe_from_outside(directory: str) -> dict[str, Any]:
    """Torch's own optimizer, with a Probe and a parameter that is written between two steps."""
    from torch.distributed.tensor.debug import CommDebugMode

    net = make_net(5)
    over = fsdp(net)
    optimizer, probe = probed(net)
    train(over.net, optimizer, range(3), share=over.share)
    readouts = [values_of(probe.readout())]
    double_weight(net, optimizer)
    probe.load_state_dict(copy.deepcopy(probe.state_dict()))
    train(over.net, optimizer, range(3, N_STEPS), share=over.share)
    with CommDebugMode() as in_steps:
        optimizer.step()
    readout = probe.readout()
    reasons = {name: law.reason for name, law in readout.items()}
    return {
        "readouts": [*readouts, values_of(readout)],
        "reasons": reasons,
        "in steps": in_steps.get_total_counts(),
    }


def record(directory: str) -> dict[str, Any]:
    net = make_net(5)
    over = fsdp(net)
    optimizer = optimizer_of(net, MOMENTUM)
    path = Path(directory) / f"{torch.distributed.get_rank()}.zarr"
    with nperf.Recorder(optimizer, path, every=2):
        train(net, optimizer, range(N_STEPS), share=over.share)
    recorded = nperf.open_record(path)
    return {"charge": torch.from_numpy(recorded.dataset["charge"].to_numpy()), "steps": recorded.steps.tolist()}


def write_outside(directory: str) -> dict[str, Any]:
    """Tensors that others write between two steps: whole ones on every rank, then what is on one rank alone."""
    found: dict[str, Any] = {}
    for distribute in (fsdp, fsdp_columns, tensor_parallel):
        net = make_net(N_CHECKPOINT)
        over = distribute(net)
        optimizer = optimizer_of(net, NESTEROV)
        readouts = []
        for steps, change in OUTSIDE:
            train(over.net, optimizer, steps, share=over.share)
            change(net, optimizer)
            readouts.append(optimizer.readout())
        shard: Any = net.get_parameter("fc1.bias")
        shard._local_tensor = shard.to_local().detach().clone()  # which is no change
        readouts.append(optimizer.readout())
        with torch.no_grad():
            if torch.distributed.get_rank() == 0:
                shard.to_local().mul_(0.5)
        alone = optimizer.readout()
        optimizer.step()
        found[distribute.__name__] = {
            "values": [values_of(readout) for readout in readouts],
            "reasons": [{name: law.reason for name, law in readout.items()} for readout in (*readouts, alone)],
            "whole": shard.full_tensor().detach(),
            "end": values_of(optimizer.readout()),
            "saved": optimizer.state_dict()["measurement"]["openness"],
        }
    return found


def write_to_replicas(directory: str) -> dict[str, Any]:
    """What one rank alone has written, of two replicas of two shards; and the same on all."""
    net = make_net(N_CHECKPOINT)
    over = hsdp(net)
    optimizer = optimizer_of(net, MOMENTUM)
    train(over.net, optimizer, range(2), share=over.share)
    shards: list[Any] = [net.get_parameter(name) for name in ("fc1.bias", "fc2.bias")]
    with torch.no_grad():
        shards[0].to_local().mul_(0.5 if torch.distributed.get_rank() == 3 else 1.0)
        if torch.distributed.get_rank() == 3:
            shards[1].to_local().mul_(0.5)
    return {name: law.reason for name, law in optimizer.readout().items()}


@torch.no_grad()
def double_weight(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.get_parameter("fc1.weight").mul_(2.0)


@torch.no_grad()
def zero_buffer(net: nn.Module, optimizer: nperf.SGD) -> None:
    optimizer.state[net.get_parameter("fc2.weight")]["momentum_buffer"].zero_()


def leave(net: nn.Module, optimizer: nperf.SGD) -> None:
    """Change nothing."""


#: Before the first step measuring starts anew; later the laws are open.
OUTSIDE = [
    (range(0), leave),
    (range(0), double_weight),
    (range(2), leave),
    (range(2, 4), zero_buffer),
    (range(4, 5), double_weight),
    (range(5, 6), leave),
]


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def make_mistakes(directory: str) -> dict[str, Any]:
    """What ranks are told that do not do as they should."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {}

    net = make_net(5)
    over = fsdp(net)
    optimizer = optimizer_of(net, MOMENTUM)
    train(net, optimizer, range(2), share=over.share)
    before = {name: p.full_tensor() for name, p in net.named_parameters()}  # type: ignore[attr-defined]
    weight: Any = net.get_parameter("fc1.weight")
    grad, weight.grad = weight.grad, torch.ones(5, N_IN, dtype=torch.float64)
    found["plain gradient"] = raised(optimizer.step)
    weight.grad = grad
    buffer = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(5, N_IN, dtype=torch.float64)
    found["plain buffer"] = raised(optimizer.step)
    optimizer.state[weight]["momentum_buffer"] = buffer
    after = {name: p.full_tensor() for name, p in net.named_parameters()}  # type: ignore[attr-defined]
    found["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)

    shard = weight.to_local().detach()
    weight._local_tensor = shard.clone()
    optimizer.step()
    found["followed"] = not torch.equal(weight.to_local(), shard)

    if rank == 0:
        optimizer.step()
    found["another step"] = raised(optimizer.readout)

    net = make_net(5)
    fsdp(net)
    symmetries = layers(make_net(5))
    order = symmetries if rank == 0 else symmetries[::-1]
    found["another order"] = raised(nperf.SGD(net.named_parameters(), symmetries=order).readout)

    fewer = symmetries if rank == 0 else symmetries[:-1]
    found["fewer"] = raised(nperf.SGD(net.named_parameters(), symmetries=fewer).readout)

    flat = FullyShardedDataParallel(make_net(5), device_id=torch.device("cpu"), use_orig_params=True)
    found["FSDP1"] = raised(lambda: nperf.SGD(flat.named_parameters(), symmetries=symmetries))
    unmeasured = nperf.SGD(flat.named_parameters(), lr=0.1)
    before = {name: p.clone() for name, p in flat.named_parameters() if p.numel()}
    train(flat, unmeasured, range(1), share=share())
    found["stepped"] = not any(torch.equal(before[name], p) for name, p in flat.named_parameters() if p.numel())

    mesh = mesh_1d()
    part = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    found["partial"] = raised(lambda: nperf.SGD([("w", part)], symmetries=[Norm("w", [Part("w", 0)])]))
    elsewhere = nn.Parameter(distribute_tensor(torch.ones(4), DeviceMesh("cpu", [0]), [Replicate()]))
    found["elsewhere"] = raised(lambda: nperf.SGD([("w", elsewhere)], symmetries=[Norm("w", [Part("w", 0)])]))
    return found


def cut_by_zero(directory: str) -> dict[str, Any]:
    """ZeroRedundancyOptimizer around ours and torch's, over a checkpoint; its error, and what that advises."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    nets = [make_net(5) for _ in range(4)]
    kinds = ((nperf.SGD, MOMENTUM), (torch.optim.SGD, MOMENTUM), (AdamW, AMSGRAD), (torch.optim.AdamW, AMSGRAD))
    for net, (optimizer_class, hyper) in zip(nets, kinds, strict=True):
        over = ddp(net)
        optimizer: Any = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=optimizer_class, **hyper)
        train(over.net, optimizer, range(3), share=over.share)
        optimizer.consolidate_state_dict(to=0)
        state = [optimizer.state_dict() if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(state, src=0)
        optimizer.load_state_dict(state[0])
        train(over.net, optimizer, range(3, N_STEPS), share=over.share)
    net = make_net(5)
    options = {"optimizer_class": nperf.SGD, "symmetries": make_symmetries(net), **MOMENTUM}
    error = raised(lambda: ZeroRedundancyOptimizer(net.parameters(), **options))
    over = fsdp(net)
    advised = optimizer_of(net, MOMENTUM)
    train(over.net, advised, range(N_STEPS), share=over.share)
    parameters = [[*net.parameters()] for net in nets]
    pairs = [pair for i in (0, 2) for pair in zip(parameters[i], parameters[i + 1], strict=True)]
    return {
        "differences": [(a - b).abs().max().item() for a, b in pairs],
        "error": error,
        "advised": values_of(advised.readout()),
    }


class Unlike(NamedTuple):
    """What the last rank does otherwise in a step, before it or instead of it, and what every rank is told."""

    change: Callable[[nn.Module, nperf.SGD], None]
    message: str
    distribute: Callable[[nn.Module], Distributed] = fsdp
    hyper: dict[str, Any] = MOMENTUM


def set_option(name: str, value: Any, group: int = 0) -> Callable[[nn.Module, nperf.SGD], None]:
    def change(net: nn.Module, optimizer: nperf.SGD) -> None:
        optimizer.param_groups[group][name] = value

    return change


def lose_gradient(net: nn.Module, optimizer: nperf.SGD) -> None:
    net.get_parameter("fc2.weight").grad = None


def lose_bias_gradient(net: nn.Module, optimizer: nperf.SGD) -> None:
    net.get_parameter("fc2.bias").grad = None


def lose_buffer(net: nn.Module, optimizer: nperf.SGD) -> None:
    del optimizer.state[net.get_parameter("fc2.weight")]["momentum_buffer"]


def lose_count(net: nn.Module, optimizer: nperf.SGD) -> None:
    optimizer.state[net.get_parameter("fc2.weight")]["step"].zero_()


def overflow(net: nn.Module, optimizer: nperf.SGD) -> None:
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]


def step_twice(net: nn.Module, optimizer: nperf.SGD) -> None:
    optimizer.step()


def advance_clock(row: int, by: float) -> Callable[[nn.Module, nperf.SGD], None]:
    """What only a device knows: learning rates that lie there, and the steps that it skips."""

    def change(net: nn.Module, optimizer: nperf.SGD) -> None:
        optimizer._prepare()[0].measurement.clock[row] += by

    return change


OPTIONS_OF = "the options of parameter group 0 (of norm.weight) "
UNLIKE = {
    "lr": Unlike(set_option("lr", 0.05), OPTIONS_OF),
    "lr, in the ninth digit": Unlike(set_option("lr", 0.1 + 1e-9), OPTIONS_OF),
    "momentum": Unlike(set_option("momentum", 0.8), OPTIONS_OF),
    "weight decay": Unlike(set_option("weight_decay", 0.0), OPTIONS_OF),
    "maximize": Unlike(set_option("maximize", True), OPTIONS_OF),
    "lr, tensor parallel": Unlike(set_option("lr", 0.05), OPTIONS_OF, tensor_parallel),
    "gradient": Unlike(lose_gradient, "fc2.weight had a gradient on some ranks"),
    "gradient of a replica": Unlike(lose_bias_gradient, "fc2.bias had a gradient on some ranks", tensor_parallel),
    "buffer": Unlike(lose_buffer, "fc2.weight wrote its momentum_buffer for the first time", hyper=DAMPENED),
    "count of steps": Unlike(lose_count, "fc2.weight had made another number of steps before", hyper=ADAMW),
    "betas": Unlike(set_option("betas", (0.8, 0.9)), f"{OPTIONS_OF}(lr, betas, eps, weight_decay", hyper=ADAMW),
    "skipped": Unlike(overflow, "they are not after the same step"),
    "skipped on a device": Unlike(advance_clock(0, -1.0), "they are not after the same step"),
    "lr on a device": Unlike(advance_clock(1, 1e-6), "the learning rates of parameter group 0 (of norm.weight), on a"),
    "lr on a device, not finite": Unlike(advance_clock(1, float("nan")), "the learning rates of parameter group 0"),
    "twice": Unlike(step_twice, "they are not after the same step"),
}
#: In a mesh of two dimensions the last rank is told of by replicas, and by those across.
UNLIKE_4 = {
    "lr, HSDP": Unlike(set_option("lr", 0.05), OPTIONS_OF, hsdp),
    "gradient, HSDP": Unlike(lose_gradient, "fc2.weight had a gradient on some ranks", hsdp),
    "skipped, HSDP": Unlike(overflow, "they are not after the same step", hsdp),
    "lr, two meshes": Unlike(set_option("lr", 0.05), OPTIONS_OF, fsdp_and_tensor_parallel),
}
UNLIKE_IN = {2: UNLIKE, 4: UNLIKE_4}
NOT_ALIKE = "RuntimeError: the ranks do not read the same measurement: "


def step_unlike(directory: str) -> dict[str, Any]:
    """Each mistake in one step, made good in the next; then what is read, saved, loaded and begun anew."""
    rank, world = share()
    found: dict[str, Any] = {}
    for name, mistake in UNLIKE_IN[world].items():
        net = make_net(N_CHECKPOINT)
        over = mistake.distribute(net)
        optimizer = optimizer_of(net, mistake.hyper)
        train(over.net, optimizer, range(2), share=over.share)
        good = copy.deepcopy(optimizer.state_dict())
        options = dict(optimizer.param_groups[0])

        def mistaken(net: nn.Module = net, optimizer: nperf.SGD = optimizer, mistake: Unlike = mistake) -> Any:
            if rank == world - 1:
                mistake.change(net, optimizer)
            return nullcontext()

        train(over.net, optimizer, range(2, 3), share=over.share, step_context=mistaken)
        optimizer.param_groups[0].update(options)
        optimizer.__dict__.pop("found_inf", None)
        train(over.net, optimizer, range(3, 4), share=over.share)
        told = [raised(optimizer.readout), raised(lambda o=optimizer: distributed.get_measurement_state_dict(o))]  # type: ignore[misc]
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2).double()))]})  # nothing is forgotten
        told.append(raised(optimizer.readout))
        optimizer.reset_measurement()
        told.append(raised(optimizer.readout))
        again = optimizer_of(net, mistake.hyper)
        again.load_state_dict(good)
        train(over.net, again, range(2, 4), share=over.share)
        told.append(raised(again.readout))
        found[name] = told
    return found


def step_alike(directory: str) -> dict[str, Any]:
    """All that may differ between ranks, or change from step to step on all of them."""
    rank, _ = share()
    net = make_net(N_CHECKPOINT)
    fsdp(net)
    net.get_parameter("norm.bias").requires_grad_(False)
    net.register_parameter("own", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    biases = [(name, p) for name, p in net.named_parameters() if name.endswith("bias")]
    weights = [(name, p) for name, p in net.named_parameters() if name.endswith("weight")]
    own = [("own", net.get_parameter("own"))]
    groups = [{"params": weights}, {"params": biases, "lr": torch.tensor(0.05)}, {"params": own, "lr": 0.1 * rank}]
    optimizer = nperf.SGD(groups, lr=0.1, symmetries=make_symmetries(make_net(5)), **DAMPENED)
    told, copied = [], optimizer
    for step in range(N_STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1) * (1.0 + rank * 2e-16)  # another processor's last digit
        optimizer.param_groups[1]["momentum"] = 0.9 if step % 2 else 0.0
        optimizer.zero_grad()
        x, y = batch(step)
        cross_entropy(net(x), y).backward()
        if step < 2:
            net.get_parameter("fc2.weight").grad = None
        if rank == 0:
            net.get_parameter("own").grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        if rank == 1 and step == 2:  # engines are made anew, and measure on
            weight: Any = net.get_parameter("fc1.weight")
            weight._local_tensor = weight.to_local().detach().clone()
        optimizer.zero_grad()  # torch cannot copy a DTensor's gradient
        if rank == 1 and step == 3:
            copy.deepcopy(optimizer)
        optimizer._prepare()[0].measurement.clock[1] *= 1.0 + rank * 4e-16  # as that of another processor
        told.append(raised(optimizer.readout))
        if step == 3:
            copied = copy.deepcopy(optimizer)
    state = optimizer.state_dict()
    if rank == 0:
        optimizer = copy.deepcopy(optimizer)
    told += [raised(optimizer.readout), raised(copied.readout)]
    optimizer.load_state_dict(state)
    optimizer.step()
    return {"told": [*told, raised(optimizer.readout)], "steps": optimizer.step_count}


def wait_in_vain(directory: str) -> dict[str, Any]:
    """One rank reads, the other does not; in a world of its own, for torch takes equal meshes for one."""
    impatient = torch.distributed.new_group(timeout=timedelta(seconds=1))
    net = make_net(5)
    fsdp(net, mesh=DeviceMesh.from_group(impatient, "cpu"))
    optimizer = optimizer_of(net, MOMENTUM)
    return {"readout": raised(optimizer.readout) if torch.distributed.get_rank() == 0 else "not asked for"}


def rank_main(rank: int, world: int, job: Callable[[str], dict[str, Any]], directory: str, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(job(directory), f"{store}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# ---- outside --------------------------------------------------------------------------------------------------------


def run_world(world: int, job: Callable[[str], dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """What a job gives on each rank of a world."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    store = directory / f"{job.__name__}-{world}"
    start_processes(rank_main, args=(world, job, str(directory), str(store)), nprocs=world, start_method="forkserver")
    return [torch.load(f"{store}.{rank}") for rank in range(world)]


def run_alone(case: Case) -> list[Values]:
    net = make_net(case.n_hidden)
    optimizer = optimizer_of(net, case.hyper)
    readouts = [values_of(optimizer.readout())]
    for steps in (range(1), range(1, N_STEPS)):
        train(net, optimizer, steps, clip=case.clip)
        readouts.append(values_of(optimizer.readout()))
    optimizer.step()
    readouts.append(values_of(optimizer.readout()))
    return readouts


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_measure_what_one_process_does(world: int, tmp_path: Path) -> None:
    ranks = run_world(world, run_cases, tmp_path)
    faults = []
    for name, case in CASES.items():
        if case.world != world:
            continue
        alone = run_alone(case)
        for rank, found in enumerate(ranks):
            for moment, (ours, theirs, first) in enumerate(
                zip(found[name]["readouts"], alone, ranks[0][name]["readouts"], strict=True)
            ):
                if fault := difference(ours, theirs) or difference(ours, first, tolerance=0.0):
                    faults.append(f"{name}, rank {rank}, readout {moment}: {fault}")
            if found[name]["in readout"] != case.all_reduces:
                faults.append(f"{name}, rank {rank}: {found[name]['in readout']} collectives in a readout")
            if found[name]["in steps"] != 0 and case.distribute is not sequence_parallel:
                faults.append(f"{name}, rank {rank}: {found[name]['in steps']} collectives in a step")
    assert faults == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 4)])
def test_a_checkpoint_goes_on_in_another_world(saving: int, loading: int, tmp_path: Path) -> None:
    """Ranks save; fewer or more, cut otherwise, and one process load, and all is as if nothing had been."""
    saved = run_world(saving, save_checkpoint, tmp_path)
    loaded = run_world(loading, load_checkpoint, tmp_path)
    for name, hyper in SAVED.items():
        net = make_net(N_CHECKPOINT)
        optimizer = optimizer_of(net, hyper)
        train(net, optimizer, range(N_STEPS // 2))
        amid = values_of(optimizer.readout())
        train(net, optimizer, range(N_STEPS // 2, N_STEPS))
        end = values_of(optimizer.readout())
        assert [difference(found[name], amid) for found in saved] == [""] * saving, name
        alone = go_on(name, make_net(N_CHECKPOINT), tmp_path, no_dist=True)
        for at_load, at_end in (*(found[name] for found in loaded), alone):
            assert difference(without_step(at_load), without_step(saved[0][name]), tolerance=0.0) == "", name
            assert difference(at_end, end) == "", name


def test_without_symmetries_it_steps_like_torch(tmp_path: Path) -> None:
    for found in run_world(2, step_like_torch, tmp_path):
        assert list(found["SGD"]) == ["p", "momentum_buffer"]
        assert list(found["AdamW"]) == ["p", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        for differences in (*found["SGD"].values(), *found["AdamW"].values()):
            assert len(differences) == len(list(make_net(5).parameters()))
            assert max(differences) <= 1e-14


def test_a_probe_measures_over_ranks_what_one_process_does(tmp_path: Path) -> None:
    net = make_net(5)
    optimizer, probe = probed(net)
    train(net, optimizer, range(3))
    readouts = [values_of(probe.readout())]
    double_weight(net, optimizer)
    probe.load_state_dict(copy.deepcopy(probe.state_dict()))
    train(net, optimizer, range(3, N_STEPS))
    optimizer.step()
    readout = probe.readout()
    readouts.append(values_of(readout))
    assert "fc1.weight was changed outside step() after step 3" in readout["fc1->fc2"].reason
    for found in run_world(2, probe_from_outside, tmp_path):
        assert [difference(a, b, 1e-11) for a, b in zip(found["readouts"], readouts, strict=True)] == ["", ""]
        assert found["reasons"] == {name: law.reason for name, law in readout.items()}
        assert found["in steps"] == 0


def test_what_is_written_between_steps_is_noticed_by_all_ranks(tmp_path: Path) -> None:
    """As by one process; and what one rank alone has written, all of them are told of."""
    net = make_net(N_CHECKPOINT)
    optimizer = optimizer_of(net, NESTEROV)
    alone = []
    for steps, change in OUTSIDE:
        train(net, optimizer, steps)
        change(net, optimizer)
        alone.append(optimizer.readout())
    assert [alone[i]["fc1->fc2"].closed for i in range(6)] == [True, True, True, False, False, False]
    assert alone[-1]["norm->fc1"].reason.startswith("fc1.weight was changed outside step() after step 5")
    alone.append(alone[-1])
    reasons = [{name: law.reason for name, law in readout.items()} for readout in alone]
    on_some = "; on some ranks a tensor of it was changed outside step(), on others not; reset_measurement() starts the"
    reasons.append({**reasons[-1], "fc1.bias": f"{reasons[-1]['fc1.bias']}{on_some} laws anew"})
    ranks = run_world(2, write_outside, tmp_path)
    for found in ranks:
        for way, seen in found.items():
            for i, (values, one) in enumerate(zip(seen["values"], alone, strict=True)):
                assert difference(values, values_of(one)) == "", (way, i)
            assert seen["reasons"] == reasons, way
            assert (seen["end"]["fc1.bias: charge"] - seen["whole"].square().sum()).abs() <= TOLERANCE
            for name in alone[-1]:
                assert seen["end"][f"{name}: rounding"].abs().max() <= TOLERANCE, (way, name)
            assert seen["saved"] == ranks[0][way]["saved"]


def test_what_one_replica_has_written_is_noticed_by_all(tmp_path: Path) -> None:
    ranks = run_world(4, write_to_replicas, tmp_path)
    for reasons in ranks:
        assert "fc1.bias was changed outside step() after step 2" in reasons["fc1->fc2"]
        assert "on some ranks a tensor of it was changed outside step()" in reasons["classes, biases"]
        assert reasons == ranks[0]
        assert reasons["classes"] == ""


def test_every_rank_has_a_record(tmp_path: Path) -> None:
    first, second = run_world(2, record, tmp_path)
    net = make_net(5)
    optimizer = optimizer_of(net, MOMENTUM)
    train(net, optimizer, range(N_STEPS))
    charges = torch.cat([law.charge for law in optimizer.readout().values()])
    assert first["steps"] == second["steps"] == list(range(0, N_STEPS + 1, 2))
    assert torch.equal(first["charge"], second["charge"])
    torch.testing.assert_close(first["charge"][-1], charges, rtol=0.0, atol=TOLERANCE)


def test_mixed_precision_and_a_scaler_over_ranks(tmp_path: Path) -> None:
    ways = [way for found in run_world(2, mix_precision, tmp_path) for way in found.values()]
    assert len(ways) == 6
    for found in ways:
        readout = found["readout"]
        assert found["steps"] == {N_STEPS - 1}
        for name, p in found["whole"].items():
            assert p.dtype == torch.float32
            sq = p.double().square().sum()
            assert (readout[f"{name}: charge"] - sq).abs() <= 1e-14 * sq
            assert 0 < readout[f"{name}: rounding"].abs().max() <= 1e-6 * sq


def test_mistakes_are_told_on_every_rank(tmp_path: Path) -> None:
    expected = {
        "plain gradient": "TypeError: fc1.weight: the gradient (a plain tensor) must be on the mesh of its parameter",
        "plain buffer": "RuntimeError: fc1.weight: its momentum_buffer (a plain tensor) must be placed as",
        "another step": f"{NOT_ALIKE}they are not after the same step",
        "another order": f"{NOT_ALIKE}they measure other symmetries",
        "fewer": f"{NOT_ALIKE}they measure other symmetries",
        "FSDP1": "FullyShardedDataParallel has flattened it",
        "partial": "ValueError: w: a parameter cannot be a partial sum",
    }
    ranks = run_world(2, make_mistakes, tmp_path)
    for found in ranks:
        for mistake, message in expected.items():
            assert message in found[mistake], mistake
        assert found["unchanged"]
        assert found["followed"]
        assert found["stepped"]
    assert [found["elsewhere"].partition(",")[0] for found in ranks] == [
        "nothing",
        "ValueError: w: this rank is not on its mesh",
    ]


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    """Without symmetries it is a drop-in there too; with them the error says what to do, and that works."""
    net = make_net(5)
    alone = optimizer_of(net, MOMENTUM)
    train(net, alone, range(N_STEPS))
    for found in run_world(2, cut_by_zero, tmp_path):
        assert len(found["differences"]) == 2 * len(list(net.parameters()))
        assert max(found["differences"]) <= 1e-14
        assert found["error"].startswith("ValueError: symmetries name parameters")
        assert "give it no symmetries, or shard with torch.distributed.fsdp.fully_shard" in found["error"]
        assert difference(found["advised"], values_of(alone.readout())) == ""


@pytest.mark.parametrize("world", [2, 4])
def test_steps_that_were_not_alike_are_told_on_every_rank(world: int, tmp_path: Path) -> None:
    """Until measuring starts anew or goes on from before."""
    for found in run_world(world, step_unlike, tmp_path):
        assert list(found) == list(UNLIKE_IN[world])
        for name, (read, saved, grown, anew, loaded) in found.items():
            assert read.startswith(NOT_ALIKE + UNLIKE_IN[world][name].message), name
            assert (saved, grown, anew, loaded) == (read, read, "nothing", "nothing"), name


def test_steps_that_were_alike_raise_nothing(tmp_path: Path) -> None:
    for found in run_world(2, step_alike, tmp_path):
        assert found["told"] == ["nothing"] * (N_STEPS + 3)
        assert found["steps"] == N_STEPS + 1


def test_a_rank_that_reads_alone_waits_and_fails(tmp_path: Path) -> None:
    first, _ = run_world(2, wait_in_vain, tmp_path)
    assert "Timed out" in first["readout"]
