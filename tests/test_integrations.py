"""Training libraries, the real ones: laws hold, scalars arrive, and training goes on where it stopped."""

import copy
import os
import posixpath
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_distributed import run_world
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf.integrations import unwrap
from noetherperf.integrations.tensorboard import add_readout
from noetherperf.integrations.watch import Watch
from noetherperf.optim.adam import AdamW
from noetherperf.symmetry import Balance, Part, Rescale, Translation

EXAMPLES = Path(__file__).parents[1] / "examples"
N_EXAMPLES, BATCH = 24, 8
SYMMETRIES = [
    Rescale("hidden", inward=[Part("0.weight", axis=0), Part("0.bias", axis=0)], outward=[Part("2.weight", axis=1)]),
    Translation("softmax", [Part("2.weight", axis=1)]),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(N_EXAMPLES, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (N_EXAMPLES,), generator=generator),
    )


#: The optimizer that a test's trainings have, and its options.
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (nperf.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "AdamW": (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
CHOSEN = {"name": "SGD"}


@pytest.fixture(params=CHOICES)
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is run with each of CHOICES."""
    monkeypatch.setitem(CHOSEN, "name", request.param)


def measured(model: nn.Module, prefix: str = "", **options: Any) -> nperf.MeasuredOptimizer:
    names = ((name.removeprefix(prefix), p) for name, p in model.named_parameters())
    make, own = CHOICES[CHOSEN["name"]]
    optimizer: nperf.MeasuredOptimizer = make(names, **{"symmetries": SYMMETRIES, **own, **options})
    return optimizer


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def plain_loop(n_steps: int, per_step: int = 1, clip: float = float("inf")) -> nperf.Readout:
    """What the libraries must do: batches in order, over and over; the mean gradient of `per_step` batches a step."""
    model = network()
    optimizer = measured(model)
    batches = list(zip(*(x.split(BATCH) for x in examples()), strict=True))
    for step in range(n_steps):
        optimizer.zero_grad()
        for i in range(per_step):
            (loss_of(model, *batches[(step * per_step + i) % len(batches)]) / per_step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return optimizer.readout()


def assert_same(readout: nperf.Readout, other: nperf.Readout) -> None:
    assert readout.step == other.step
    assert readout.time == other.time
    for name, law in other.items():
        assert torch.equal(readout[name].charge, law.charge), name
        assert torch.equal(readout[name].discrete.total, law.discrete.total), name
        assert torch.equal(readout[name].flow.total, law.flow.total), name
        assert readout[name].rounding.abs().max() < 1e-13
        assert readout[name].residual.abs().max() < (1e-13 if readout.rule == "sgd" else 1.0)


def assert_same_record(path: Path, other: Path, steps: list[int]) -> None:
    one, two = nperf.open_record(path), nperf.open_record(other)
    assert one.steps.tolist() == two.steps.tolist() == steps
    for symmetry in SYMMETRIES:
        for variable in ("charge", "discrete_total", "flow_total"):
            np.testing.assert_array_equal(one[symmetry.name][variable], two[symmetry.name][variable])


# ---- what the callbacks share ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either")
def test_unwrap_finds_what_is_wrapped_twice() -> None:
    optimizer = measured(network())
    assert unwrap(optimizer) is optimizer
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer


def test_unwrap_names_what_it_was_given() -> None:
    with pytest.raises(TypeError, match=r"AdamW is no noetherperf\.MeasuredOptimizer and .*; make noetherperf\.SGD\("):
        unwrap(torch.optim.AdamW(network().parameters()))


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "often"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ValueError, match="every: must be a whole number of steps"):
        Watch(every, None)


def test_exists_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="exists: must be 'error' or 'overwrite', got 'resume'"):
        Watch(1, None, "resume")  # type: ignore[arg-type]


def test_no_optimizer_and_several_are_errors() -> None:
    model = network()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match=r"it has: Adam, Adam\. Do this"):
        Watch(1, None).start([adam, adam], 0, "Do this")
    with pytest.raises(TypeError, match="it has: none at all"):
        Watch(1, None).start([], 0, "Do this")
    with pytest.raises(ValueError, match=r"has 2 noetherperf\.MeasuredOptimizer \(SGD, Adam, SGD\)"):
        Watch(1, None).start([measured(model), adam, measured(model)], 0, "Do this")


def test_a_new_training_leaves_an_old_record_alone(tmp_path: Path) -> None:
    Watch(1, tmp_path / "record").start([measured(network())], 0, "")
    with pytest.raises(FileExistsError):
        Watch(1, tmp_path / "record").start([measured(network())], 0, "")
    Watch(1, tmp_path / "record", "overwrite").start([measured(network())], 0, "")


@pytest.mark.parametrize("end", ["", "/"])
def test_other_ranks_write_beside_the_first(tmp_path: Path, end: str) -> None:
    Watch(1, f"{tmp_path}/record{end}").start([measured(network())], 3, "")
    assert [path.name for path in tmp_path.iterdir()] == ["record.rank3"]


@pytest.mark.usefixtures("either")
def test_scalars_are_due_once() -> None:
    model = network()
    optimizer, watch = measured(model), Watch(2, None)
    assert watch.scalars() == {}
    watch.start([optimizer], 0, "")
    due = []
    for _ in range(4):
        loss_of(model, *examples()).backward()
        optimizer.step()
        due.append([bool(watch.scalars()), bool(watch.scalars())])
    assert due == [[False, False], [True, False]] * 2
    watch.stop()
    assert watch.scalars() == {}


def make_steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model, *examples()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("first", "per_batch", "logged"),
    [(1, 2, [11, 21, 31, 41]), (3, 3, [12, 21, 30, 42]), (9, 10, [19, 29, 39]), (1, 25, [26])],
)
def test_scalars_are_due_where_a_batch_makes_several_steps(first: int, per_batch: int, logged: list[int]) -> None:
    model = network()
    optimizer, watch = measured(model), Watch(10, None)
    watch.start([optimizer], 0, "")
    due = []
    for n in (first, *[per_batch] * ((logged[-1] - first) // per_batch)):
        make_steps(model, optimizer, n)
        due += [optimizer.step_count] * bool(watch.scalars())
        assert watch.scalars() == {}
    assert due == logged


def test_scalars_are_due_after_the_optimizer_was_set_back() -> None:
    model = network()
    optimizer, watch = measured(model), Watch(4, None)
    watch.start([optimizer], 0, "")
    make_steps(model, optimizer, 3)
    saved = optimizer.state_dict()
    make_steps(model, optimizer, 1)
    assert watch.scalars()
    optimizer.load_state_dict(saved)
    assert watch.scalars() == {}
    make_steps(model, optimizer, 2)
    assert watch.scalars()
    optimizer.reset_measurement()
    make_steps(model, optimizer, 3)
    assert watch.scalars() == {}


def test_a_skipped_step_makes_nothing_due() -> None:
    model = network()
    optimizer, watch = measured(model), Watch(2, None)
    watch.start([optimizer], 0, "")
    make_steps(model, optimizer, 2)
    assert watch.scalars()
    vars(optimizer)["found_inf"] = torch.ones(())  # as a gradient scaler says that the step is to be skipped
    optimizer.step()
    assert (optimizer.step_count, watch.scalars()) == (2, {})


def test_a_watch_that_stopped_leaves_the_optimizer_alone() -> None:
    optimizer, watch = measured(network()), Watch(1, None)
    watch.start([optimizer], 0, "")
    watch.stop()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def trained(watch: Watch, model: nn.Module, optimizer: nperf.MeasuredOptimizer, n: int, rank: int = 0) -> None:
    """A training from start to stop, as a library makes it."""
    watch.start([optimizer], rank, "")
    make_steps(model, optimizer, n)
    watch.stop()


def steps_in(folder: Path) -> dict[str, list[int]]:
    return {path.name: nperf.open_record(path).steps.tolist() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("exists", ["error", "overwrite"])
def test_a_training_after_another_is_recorded_beside_it(tmp_path: Path, exists: Any) -> None:
    model, watch = network(), Watch(1, tmp_path / "a", exists)
    trained(watch, model, measured(model), 2)
    optimizer = measured(model)
    trained(watch, model, optimizer, 3)
    trained(watch, model, measured(network()), 1)  # it begins as the first did, and is another training
    assert steps_in(tmp_path) == {"a": [0, 1, 2], "a.2": [0, 1, 2, 3], "a.3": [0, 1]}
    trained(watch, model, optimizer, 2)
    assert steps_in(tmp_path)["a.2"] == [0, 1, 2, 3, 4, 5]
    trained(watch, model, measured(model), 1)
    assert steps_in(tmp_path) == {"a": [0, 1, 2], "a.2": [0, 1, 2, 3, 4, 5], "a.3": [0, 1], "a.4": [0, 1]}


def test_a_training_that_made_no_step_leaves_no_record_of_its_own(tmp_path: Path) -> None:
    model, watch = network(), Watch(1, tmp_path / "a")
    trained(watch, model, measured(model), 0)
    trained(watch, model, measured(model), 2)
    assert steps_in(tmp_path) == {"a": [0, 1, 2]}


def test_a_measurement_that_was_reset_is_recorded_beside_the_first(tmp_path: Path) -> None:
    model, watch = network(), Watch(1, tmp_path / "a")
    optimizer = measured(model)
    trained(watch, model, optimizer, 2, rank=1)
    optimizer.reset_measurement()
    trained(watch, model, optimizer, 1, rank=1)
    optimizer.reset_measurement()
    make_steps(model, optimizer, 1)
    trained(watch, model, optimizer, 1, rank=1)
    assert steps_in(tmp_path) == {"a.2.rank1": [0, 1], "a.3.rank1": [1, 2], "a.rank1": [0, 1, 2]}


MATRICES = [Balance("pair", [Part("0.weight", 0), Part("0.bias", 0)], [Part("1.weight", 1)])]


def deep_linear(scale: float = 1.0) -> nn.Sequential:
    """A network with a Balance and no other symmetry."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(scale)
    return model


def test_matrices_alone_tell_which_record_is_continued(tmp_path: Path) -> None:
    model, watch = deep_linear(), Watch(1, tmp_path / "a")
    first = measured(model, symmetries=MATRICES)
    trained(watch, model, first, 2)
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    trained(watch, model, measured(model, symmetries=MATRICES), 1)
    again = deep_linear()
    resumed = measured(again, symmetries=MATRICES)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    trained(Watch(1, tmp_path / "a"), again, resumed, 2)
    assert steps_in(tmp_path) == {"a": [0, 1, 2, 3, 4], "a.2": [0, 1]}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_training_of_other_matrices_is_recorded_beside_one_of_no_step(tmp_path: Path, scale: float) -> None:
    watch = Watch(1, tmp_path / "a")
    trained(watch, deep_linear(), measured(deep_linear(), symmetries=MATRICES), 0)
    model = deep_linear(scale)
    trained(watch, model, measured(model, symmetries=MATRICES), 2)
    assert steps_in(tmp_path) == ({"a": [0, 1, 2]} if scale == 1.0 else {"a": [0], "a.2": [0, 1, 2]})


def test_of_two_trainings_that_begin_alike_each_continues_its_own_record(tmp_path: Path) -> None:
    trainings, watch = [(model, measured(model)) for model in (network(), network())], Watch(1, tmp_path / "a")
    for n_steps in (2, 1):
        for model, optimizer in trainings:
            trained(watch, model, optimizer, n_steps)
    assert steps_in(tmp_path) == {"a": [0, 1, 2, 3], "a.2": [0, 1, 2, 3]}


@pytest.mark.usefixtures("either")
def test_a_checkpoint_goes_on_with_its_own_record_in_another_process(tmp_path: Path) -> None:
    model, watch = network(), Watch(1, tmp_path / "a")
    trained(watch, model, measured(model), 2)
    optimizer = measured(model)
    trained(watch, model, optimizer, 3)
    later = Watch(1, tmp_path / "a")
    trained(later, model, optimizer, 1)
    assert steps_in(tmp_path) == {"a": [0, 1, 2], "a.2": [0, 1, 2, 3, 4]}
    trained(later, model, measured(model), 1)
    assert steps_in(tmp_path)["a.3"] == [0, 1]
    other = network()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(1.0)
    stranger = measured(other)
    make_steps(other, stranger, 1)
    with pytest.raises(ValueError, match="is of another measurement"):
        Watch(1, tmp_path / "a").start([stranger], 0, "")


def test_what_to_do_about_a_record_that_exists_is_what_a_callback_takes(tmp_path: Path) -> None:
    trained(Watch(1, tmp_path / "a"), network(), measured(network()), 0)
    with pytest.raises(FileExistsError, match=r"record: .* exists, and this is a new training; .*checkpoint") as told:
        Watch(1, tmp_path / "a").start([measured(network())], 0, "")
    assert "resume" not in str(told.value)


def test_a_readout_becomes_tags() -> None:
    written = []
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: written.append((tag, value, step)))
    readout = plain_loop(3)
    add_readout(writer, readout)
    expected = {name: value for name, value in readout.scalars().items() if name != "step"}
    assert written == [(name, value, 3) for name, value in expected.items()]
    assert "hidden/abs_charge" in expected
    written.clear()
    add_readout(writer, readout, step=40)
    assert {step for *_, step in written} == {40}


def test_histograms_are_of_groups_and_of_eigenvalues() -> None:
    written: dict[str, Any] = {}
    writer = SimpleNamespace(
        add_scalar=lambda *_: None, add_histogram=lambda tag, values, step: written.update({tag: (values, step)})
    )
    model = deep_linear()
    norm = nperf.Norm("pair?", [Part("0.weight", 0)])
    optimizer = measured(model, symmetries=[norm, *MATRICES])
    make_steps(model, optimizer, 2)
    readout = optimizer.readout()
    add_readout(writer, readout, histograms=("effective_lr",))
    assert list(written) == ["pair_/groups/effective_lr"]
    written.clear()
    add_readout(writer, readout, step=7, histograms=("charge", "defect"))
    assert list(written) == ["pair_/groups/charge", "pair_/groups/defect", "pair/eigenvalues"]
    eigenvalues, step = written["pair/eigenvalues"]
    w, b, v = (model.get_parameter(name).detach() for name in ("0.weight", "0.bias", "1.weight"))
    expected = torch.linalg.eigvalsh(w @ w.T + torch.outer(b, b) - v.T @ v)
    assert step == 7
    np.testing.assert_allclose(eigenvalues.flatten(), expected, rtol=0, atol=1e-12)


def test_scalars_have_names_that_loggers_take() -> None:
    """Those that mlflow takes: of few characters, and a path that cannot be written in a shorter way."""
    names = {
        "fc1->fc2": "fc1-_fc2",
        "fc1-_fc2.2": "fc1-_fc2.2",
        "fc1-<fc2": "fc1-_fc2.3",
        "conv[relu]": "conv_relu_.2",
        "conv_relu_": "conv_relu_",
        "conv(relu)": "conv_relu_.3",
        "a.b_c-d/e f: 0": "a.b_c-d/e f: 0",
        "größe": "größe",
        "../x": "__/x",
        "/x": "_/x",
        "x//y/./z/": "x/_/y/_/z/_",
        ".hidden/...": ".hidden/...",
        "two\nlines": "two_lines",
        "$%": "__",
    }
    model = network()
    parts = [Part("0.weight", axis=0), Part("0.bias", axis=0)]
    optimizer = nperf.SGD(model.named_parameters(), symmetries=[nperf.Norm(name, parts) for name in names])
    scalars = optimizer.readout().scalars()
    quantities = ("abs_charge", "abs_charge_p90", "residual", "rounding", "relative_defect")
    assert list(scalars) == ["step", "time", *(f"{name}/{what}" for name in names.values() for what in quantities)]
    for name in scalars:
        assert re.fullmatch(r"[/\w.\- :]*", name)
        assert posixpath.normpath(name) == name
        assert not name.startswith(("..", "/"))


def test_scalars_are_the_readouts() -> None:
    readout = plain_loop(3)
    scalars = readout.scalars()
    for name, law in readout.items():
        assert scalars[f"{name}/abs_charge"] == pytest.approx(np.median(law.charge.abs()), rel=1e-14)
        assert scalars[f"{name}/residual"] == law.residual.abs().max().item()
        assert scalars[f"{name}/rounding"] == law.rounding.abs().max().item()
        assert scalars[f"{name}/relative_defect"] == law.relative_defect.max().item()
    assert nperf.SGD(network().named_parameters()).readout().scalars() == {"step": 0.0, "time": 0.0}


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_the_scalars_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (the extra [integrations])")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    readout = plain_loop(3)
    with SummaryWriter(tmp_path) as writer:
        add_readout(writer, readout)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in readout.scalars().items():
        if name != "step":
            (event,) = events.Scalars(name)
            assert (event.step, event.value) == (3, pytest.approx(value, rel=1e-6, abs=1e-30))


# ---- PyTorch Lightning ----------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch", reason="lightning is not installed (the extra [integrations])")


def fit_lightning(
    lightning: Any,
    out: Path,
    n_steps: int,
    *callbacks: Any,
    resume: Path | None = None,
    ours: bool = True,
    dtype: torch.dtype = torch.float64,
    fused: bool | None = None,
    **options: Any,
) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network().to(dtype)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return loss_of(self.net, batch[0].to(dtype), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return measured(self, "net.", fused=fused) if ours else torch.optim.Adam(self.parameters())

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=BATCH)
    trainer = lightning.Trainer(
        max_steps=n_steps,
        accelerator="cpu",
        logger=options.pop("logger", False),
        callbacks=list(callbacks),
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(Module(), loader, ckpt_path=resume)
    return trainer


@pytest.mark.usefixtures("either")
def test_lightning_trains_and_measures_as_a_plain_loop(lightning: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.lightning import ChargeCallback

    logger = lightning.loggers.CSVLogger(tmp_path, name="", version="logs")
    callback = ChargeCallback(every=2, record=tmp_path / "record")
    trainer = fit_lightning(lightning, tmp_path, 7, callback, logger=logger)
    assert_same(trainer.optimizers[0].readout(), plain_loop(7))
    assert nperf.open_record(tmp_path / "record").steps.tolist() == [0, 2, 4, 6]
    table = np.genfromtxt(tmp_path / "logs/metrics.csv", delimiter=",", names=True, deletechars="")
    assert table["step"].tolist() == [2, 4, 6]
    expected = [plain_loop(n).scalars()["hidden/abs_charge"] for n in (2, 4, 6)]
    np.testing.assert_allclose(table["hidden/abs_charge"], expected, rtol=1e-12)


def test_lightning_accumulates_and_clips(lightning: Any, tmp_path: Path) -> None:
    trainer = fit_lightning(lightning, tmp_path, 4, accumulate_grad_batches=3)
    assert_same(trainer.optimizers[0].readout(), plain_loop(4, per_step=3))
    clipped = fit_lightning(lightning, tmp_path, 4, gradient_clip_val=1e-3).optimizers[0].readout()
    assert (clipped["hidden"].discrete.forced.abs() < 1e-4).all()
    assert clipped["hidden"].residual.abs().max() < 1e-13


def test_lightning_in_bfloat16_clips(lightning: Any, tmp_path: Path) -> None:
    trainer = fit_lightning(lightning, tmp_path, 4, gradient_clip_val=1e-3, precision="bf16-mixed", dtype=torch.float32)
    law = trainer.optimizers[0].readout()["hidden"]
    assert (law.discrete.forced.abs() < 1e-4).all()
    assert law.rounding.abs().max() < 1e-6


def test_lightning_with_a_gradient_scaler(lightning: Any, tmp_path: Path) -> None:
    """precision="16-mixed" means this plugin; asked for by that name on a CPU, Lightning would take bfloat16."""
    from lightning.pytorch.plugins import MixedPrecision

    def fit(**options: Any) -> tuple[nperf.Readout, int]:
        # The first loss is more than float16 holds, so that the first step is skipped and the scale halved.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = fit_lightning(lightning, tmp_path, 6, plugins=[plugin], dtype=torch.float32, **options)
        return trainer.optimizers[0].readout(), round(18 - np.log2(scaler.get_scale()))

    for options in ({}, {"fused": True}):
        readout, n_skipped = fit(**options)
        assert readout.step == 6 - n_skipped
        assert 1 <= n_skipped < 6
        assert readout["hidden"].discrete.forced.abs().max() > 1e-4
        assert readout["hidden"].rounding.abs().max() < 1e-5
    clipped, n_skipped = fit(gradient_clip_val=1e-3)
    assert clipped.step == 6 - n_skipped
    assert (clipped["hidden"].discrete.forced.abs() < 1e-4).all()
    assert clipped["hidden"].rounding.abs().max() < 1e-5
    with pytest.raises(RuntimeError, match=r"SGD, does not allow for gradient clipping.*'fused' optimizer"):
        fit(fused=True, gradient_clip_val=1e-3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.usefixtures("either")
def test_lightning_resumes_laws_and_record(lightning: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.lightning import ChargeCallback

    def checkpoint() -> Any:
        return lightning.callbacks.ModelCheckpoint(
            tmp_path / "checkpoints", filename="at-{step}", every_n_train_steps=3, save_top_k=-1
        )

    fit_lightning(lightning, tmp_path, 8, ChargeCallback(1, tmp_path / "whole"))
    # The first training goes on to step 5 after its checkpoint at step 3; those two rows must go when it is resumed.
    callback = ChargeCallback(1, tmp_path / "parts")
    fit_lightning(lightning, tmp_path, 5, callback, checkpoint(), enable_checkpointing=True)
    assert nperf.open_record(tmp_path / "parts").steps.tolist() == list(range(6))
    resumed: dict[str, Any] = {"resume": tmp_path / "checkpoints/at-step=3.ckpt", "enable_checkpointing": True}
    trainer = fit_lightning(lightning, tmp_path, 8, ChargeCallback(1, tmp_path / "parts"), checkpoint(), **resumed)
    assert_same(trainer.optimizers[0].readout(), plain_loop(8))
    assert_same_record(tmp_path / "parts", tmp_path / "whole", list(range(9)))


@pytest.mark.filterwarnings("ignore:The '(val|test)_dataloader' does not have many workers")
def test_lightning_fits_twice(lightning: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.lightning import ChargeCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return loss_of(self.net, *batch)

        validation_step = test_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return measured(self, "net.")

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=BATCH)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[ChargeCallback(every=1, record=tmp_path / "a")],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = Module()
    trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader, loader)
    assert steps_in(tmp_path) == {"a": [0, 1, 2, 3], "a.2": [0, 1, 2, 3, 4, 5, 6]}
    end, begin = nperf.open_record(tmp_path / "a")["hidden"], nperf.open_record(tmp_path / "a.2")["hidden"]
    np.testing.assert_allclose(end["charge"][-1], begin["charge"][0], rtol=1e-12)


def test_lightning_logs_where_a_batch_makes_several_steps(lightning: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.lightning import ChargeCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2 if i else 1):
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.net, *batch))
                optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return measured(self, "net.")

    logger = lightning.loggers.CSVLogger(tmp_path, name="", version="logs")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[ChargeCallback(every=4)],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), loader)
    table = np.genfromtxt(tmp_path / "logs/metrics.csv", delimiter=",", names=True, deletechars="")
    assert table["step"].tolist() == [5, 9]


def test_lightning_without_our_optimizer(lightning: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.lightning import ChargeCallback

    with pytest.raises(TypeError, match=r"it has: Adam\. Return noetherperf\.SGD.* from configure_optimizers\(\)"):
        fit_lightning(lightning, tmp_path, 1, ChargeCallback(), ours=False)


# ---- Hugging Face Trainer -------------------------------------------------------------------------------------------


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra [integrations])")
    return pytest.importorskip("transformers", reason="transformers is not installed (the extra [integrations])")


class Classifier(nn.Module):
    """A model of the form that a Trainer takes: keyword inputs, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, labels), logits


def hugging_face(transformers: Any, out: Path, n_steps: int, *, ours: bool = True, **options: Any) -> Any:
    model = Classifier()
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=n_steps,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": BATCH,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 2,
            **options,
        },
    )
    data = [{"x": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    optimizer = measured(model, "net.") if ours else torch.optim.Adam(model.parameters())
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


@pytest.mark.usefixtures("either")
def test_trainer_logs_and_records(transformers: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.transformers import ChargeCallback

    trainer = hugging_face(transformers, tmp_path, 7)
    trainer.add_callback(ChargeCallback(trainer, every=2, record=tmp_path / "record"))
    trainer.train()
    readout = unwrap(trainer.optimizer).readout()
    assert readout.step == 7
    assert all(law.rounding.abs().max() < 1e-13 for law in readout.values())
    record = nperf.open_record(tmp_path / "record")
    assert record.steps.tolist() == [0, 2, 4, 6]
    key = "hidden/abs_charge"
    logged = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    assert list(logged) == [2, 4, 6]
    medians = abs(record["hidden"]["charge"]).median("group").to_numpy()[1:]
    np.testing.assert_allclose(list(logged.values()), medians, rtol=1e-12)
    # Logging ours at the steps at which it logs its own takes nothing from the trainer.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]


@pytest.mark.usefixtures("either")
def test_trainer_takes_the_steps_of_a_plain_loop(transformers: Any, tmp_path: Path) -> None:
    """The Trainer shuffles, so every batch holds all examples, and sums agree to rounding."""
    trainer = hugging_face(transformers, tmp_path, 5, per_device_train_batch_size=N_EXAMPLES)
    trainer.train()
    model = network()
    optimizer = measured(model)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, *examples()).backward()
        optimizer.step()
    for name, law in optimizer.readout().items():
        torch.testing.assert_close(unwrap(trainer.optimizer).readout()[name].charge, law.charge, rtol=0, atol=1e-14)


def test_trainer_accumulates_and_clips(transformers: Any, tmp_path: Path) -> None:
    """Three batches a step, which hold all examples however the Trainer shuffles."""
    trainer = hugging_face(transformers, tmp_path, 5, gradient_accumulation_steps=3, max_grad_norm=0.1)
    trainer.train()
    readout = unwrap(trainer.optimizer).readout()
    alone = plain_loop(5, per_step=3, clip=0.1)
    assert readout.step == 5
    for name, law in alone.items():
        torch.testing.assert_close(readout[name].charge, law.charge, rtol=0, atol=1e-14)
        torch.testing.assert_close(readout[name].discrete.total, law.discrete.total, rtol=0, atol=1e-14)
    unclipped = plain_loop(5, per_step=3)["hidden"].discrete.forced
    assert (alone["hidden"].discrete.forced.abs() < 0.5 * unclipped.abs()).all()


@pytest.mark.usefixtures("either")
def test_trainer_resumes_laws_and_record(transformers: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.transformers import ChargeCallback

    readouts = {}
    for name, n_steps, resume in (
        ("whole", 8, None),
        ("parts", 5, None),
        ("parts", 8, tmp_path / "parts/checkpoint-3"),
    ):
        trainer = hugging_face(transformers, tmp_path / name, n_steps, save_strategy="steps", save_steps=3)
        trainer.add_callback(ChargeCallback(trainer, 1, tmp_path / f"{name}.zarr"))
        trainer.train(resume_from_checkpoint=resume and str(resume))
        readouts[name] = unwrap(trainer.optimizer).readout()
    assert_same(readouts["parts"], readouts["whole"])
    assert_same_record(tmp_path / "parts.zarr", tmp_path / "whole.zarr", list(range(9)))


def test_trainer_trains_twice(transformers: Any, tmp_path: Path) -> None:
    """A Trainer keeps its optimizer, which goes on measuring; a new one begins a record of its own."""
    from noetherperf.integrations.transformers import ChargeCallback

    trainer = hugging_face(transformers, tmp_path / "out", 3)
    trainer.add_callback(ChargeCallback(trainer, 1, tmp_path / "records" / "a"))
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    assert steps_in(tmp_path / "records") == {"a": [0, 1, 2, 3, 4, 5, 6]}
    trainer.optimizer = measured(trainer.model, "net.")
    trainer.train()
    assert steps_in(tmp_path / "records") == {"a": [0, 1, 2, 3, 4, 5, 6], "a.2": [0, 1, 2, 3]}


def test_trainer_without_our_optimizer(transformers: Any, tmp_path: Path) -> None:
    from noetherperf.integrations.transformers import ChargeCallback

    trainer = hugging_face(transformers, tmp_path, 1, ours=False)
    trainer.add_callback(ChargeCallback(trainer))
    with pytest.raises(TypeError, match=r"it has: AcceleratedOptimizer\. Give Trainer optimizers=\(noetherperf\.SGD"):
        trainer.train()


# ---- accelerate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (the extra [integrations])")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of another test
    accelerate.state.GradientState._reset_state()
    return accelerate


@pytest.mark.usefixtures("either")
def test_accelerate_accumulates_saves_and_loads(accelerate: Any, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    data = torch.utils.data.TensorDataset(*examples())

    def prepare() -> tuple[Any, ...]:
        model = network()
        prepared: tuple[Any, ...] = accelerator.prepare(
            model, measured(model), torch.utils.data.DataLoader(data, batch_size=BATCH)
        )
        return prepared

    def train(model: Any, optimizer: Any, loader: Any, n_epochs: int) -> None:
        for _ in range(n_epochs):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, *batch))
                    optimizer.step()
                    optimizer.zero_grad()

    model, optimizer, loader = prepare()
    train(model, optimizer, loader, 2)
    assert_same(unwrap(optimizer).readout(), plain_loop(2, per_step=3))
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    model, optimizer, loader = prepare()
    accelerator.load_state(str(tmp_path))
    assert unwrap(optimizer).step_count == 2
    train(model, optimizer, loader, 2)
    assert_same(unwrap(optimizer).readout(), plain_loop(4, per_step=3))


def shard_with_accelerate(directory: str) -> dict[str, Any]:
    """On a rank: FSDP2 as accelerate does it, which puts shards into an optimizer that it was given whole."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    PartialState(cpu=True)
    # accelerate shards on GPUs only; told that these are some, all of its code for that runs on the CPU.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=10,
            cpu_ram_efficient_loading=False,
        ),
    )
    x, y = (part.split(BATCH) for part in examples())

    def prepare() -> tuple[nn.Module, Any]:
        model = network()
        optimizer = measured(model)
        optimizer.readout()  # of the whole parameters, before they are replaced
        model, wrapped = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(nperf.distributed.MeasurementState(unwrap(wrapped)))
        return model, wrapped

    def train(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Any]:
        for step in steps:
            share = (part[step % len(x)].chunk(world)[rank] for part in (x, y))
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, *share))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        readout = unwrap(optimizer).readout()
        laws = {name: (law.charge, law.discrete.total, law.flow.total) for name, law in readout.items()}
        return {
            "step": readout.step,
            "laws": laws,
            "rounding": max(law.rounding.abs().max() for law in readout.values()),
        }

    model, optimizer = prepare()
    is_sharded = isinstance(model, FSDPModule)
    readouts = [train(model, optimizer, range(4))]
    accelerator.save_state(f"{directory}/checkpoint")
    readouts.append(train(model, optimizer, range(4, 7)))
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    model, optimizer = prepare()
    accelerator.load_state(f"{directory}/checkpoint")
    resumed = [train(model, optimizer, range(0)), train(model, optimizer, range(4, 7))]
    return {"is_sharded": is_sharded, "readouts": readouts, "resumed": resumed}


@pytest.mark.usefixtures("accelerate")
def test_accelerate_shards_saves_and_loads(tmp_path: Path) -> None:
    for found in run_world(2, shard_with_accelerate, tmp_path):
        assert found["is_sharded"]
        for readouts in (found["readouts"], found["resumed"]):
            for readout, n_steps in zip(readouts, (4, 7), strict=True):
                alone = plain_loop(n_steps, clip=0.5)
                assert readout["step"] == n_steps
                assert readout["rounding"] < 1e-13
                for name, law in alone.items():
                    for a, b in zip(
                        readout["laws"][name], (law.charge, law.discrete.total, law.flow.total), strict=True
                    ):
                        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-13)


def test_accelerate_in_mixed_precision(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = network().float()
    model, optimizer = accelerator.prepare(model, measured(model))
    x, y = examples()
    for _ in range(5):
        logits = model(x.float())
        accelerator.backward(nn.functional.cross_entropy(logits, y))
        optimizer.step()
        optimizer.zero_grad()
    readout = unwrap(optimizer).readout()
    assert readout.step == 5
    for law in readout.values():
        assert law.rounding.abs().max() < 1e-6  # parameters are float32
    assert readout["hidden"].residual.abs().max() > 1e-7  # bfloat16 gradients keep the constraint only nearly


# ---- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("tensorboard_digits", ["--epochs", "1"], ["tensorboard"]),
        ("lightning_digits", ["--steps", "12"], ["lightning"]),
        ("transformers_digits", ["--steps", "10"], ["transformers", "accelerate"]),
        ("accelerate_digits", ["--epochs", "1", "--mixed-precision", "bf16"], ["accelerate"]),
    ],
)
def test_examples_run(
    name: str, options: list[str], needs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in needs:
        pytest.importorskip(library, reason=f"{library} is not installed (the extra [integrations])")
    if "accelerate" in needs:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(tmp_path), *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    if name == "tensorboard_digits":
        assert list(tmp_path.glob("events.out.tfevents.*"))
    else:
        assert nperf.open_record(tmp_path / "record.zarr").steps.tolist() == [0, 10]


def test_every_such_example_is_run() -> None:
    (parametrize,) = test_examples_run.pytestmark  # type: ignore[attr-defined]
    assert {path.stem for path in EXAMPLES.glob("*_digits.py")} == {case[0] for case in parametrize.args[1]}
