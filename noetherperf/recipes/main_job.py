"""The main job: a small network learns digits, and every charge is recorded."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.recipes.session import Exists, Session
from noetherperf.recipes.settings import Settings
from noetherperf.recipes.train import Batch, Loop, Result, accuracy, charge_error, make_optimizer

__all__ = ["train"]


def train(
    folder: Path | str, settings: Settings | None = None, *, exists: Exists = "error", progress: bool = True
) -> Result:
    """Train the network of `digits_network` on the digits and record all its charges.

    Sets torch's global seed. It can be stopped and resumed, as `Session` says.

    Args:
        folder: Folder of the record, record.zarr, and of the checkpoint.
        settings: Settings of the run; by default `Settings()`.
        exists: What to do if there is a run already: "error", "resume" or "overwrite".
        progress: Show progress with loss and accuracy.

    Returns:
        Result of the whole run; seconds and steps count this call only.

    Raises:
        FileExistsError: There is a run in the folder, and `exists` is "error".
        ValueError: A setting is out of its range, the backend is unknown or does not serve the device, or the run to be
            resumed had other settings.
        RuntimeError: The backend cannot run on this machine.
    """
    settings = settings or Settings()
    session = Session(folder, {"dataset": "digits", "model": "small"}, settings, exists)
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)
    data = digits.load(settings.seed, device=settings.device, dtype=dtype)
    model, symmetries = digits_network()
    model.to(settings.device, dtype)
    optimizer = make_optimizer(model, symmetries, settings)
    loop = Loop(model, optimizer)
    head = model.get_parameter("fc2.weight")
    probes = {
        "loss": lambda: loop.loss,
        "parameters": lambda: head[0],  # one parameter of each group of the symmetry "fc2"
    }
    n_images = len(data.train_labels)

    def batches(_: int) -> Iterator[Batch]:
        for rows in torch.randperm(n_images).split(settings.batch_size):
            yield data.train_images[rows], data.train_labels[rows]

    start = time.perf_counter()
    n_batches = math.ceil(n_images / settings.batch_size)
    mean_loss, _ = session.train(loop, batches, n_batches, probes=probes, shown=progress)
    seconds = time.perf_counter() - start
    return Result(
        train_accuracy=accuracy(model, [(data.train_images, data.train_labels)]),
        test_accuracy=accuracy(model, [(data.test_images, data.test_labels)]),
        loss=mean_loss,
        seconds=seconds,
        steps=loop.n_steps,
        backend=optimizer.backend,
        charge_error=charge_error(optimizer),
    )
