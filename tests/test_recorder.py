"""Records: what is written comes back labelled, whatever kills, resumes, fills the disk or names a symmetry."""

import copy
import errno
import fcntl
import gc
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import noetherperf as nperf
import noetherperf.record.identity
import noetherperf.record.layout
import noetherperf.record.writer
from noetherperf.optim.adam import AdamW
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.record import Recorder, open_record, relative_error
from noetherperf.record import lock as locking
from noetherperf.record.layout import FIRST_SERIES
from noetherperf.record.lock import Lock
from noetherperf.record.series import DEFAULT, SAMPLES
from noetherperf.rules import sgd
from noetherperf.rules.moments import Moment
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Norm, Part, Rescale, Scale, Symmetry, Translation

SYMMETRIES = (
    Translation("head", [Part("fc.weight", axis=1)]),
    Scale("features.3 / γ", [Part("conv.weight", axis=0)]),
    Rescale("fc1->fc2", inward=[Part("fc1.weight", axis=0)], outward=[Part("fc2.weight", axis=1)]),
)
N_GROUPS = (4, 1, 3)
PLAIN = ("defect", "relative_defect", "growth", "transport", "angular_update", "effective_lr")  # of a readout


class FakeSGD(torch.optim.Optimizer):
    """Charges that are known functions of the step, behind torch's own hooks."""

    backend = "fake"
    rule: ClassVar[Rule[Any]] = sgd.SGD

    def __init__(self, symmetries: tuple[Symmetry, ...] = SYMMETRIES, n_groups: tuple[int, ...] = N_GROUPS) -> None:
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-3, "nesterov": False}
        super().__init__([torch.nn.Parameter(torch.ones(2))], {**options, "maximize": False})
        self.symmetries = symmetries
        self.n_groups = n_groups
        self.step_count = 0
        self.measurement_id = "first"
        self.n_readouts = 0
        self.offset = 0.0
        self.lock = threading.RLock()

    def step(self, closure: Any = None) -> Any:
        with self.lock:
            self.step_count += 1

    def paused(self) -> Any:
        return self.lock

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step_count = state_dict["step_count"]

    def value(self, variable: int, symmetry: int) -> torch.Tensor:
        groups = torch.arange(self.n_groups[symmetry], dtype=torch.float64)
        return self.offset + self.step_count + 1000 * variable + 100 * symmetry + groups / 8

    def readout(self) -> Any:
        self.n_readouts += 1
        return Readings(
            {symmetry.name: self.reading(index, symmetry) for index, symmetry in enumerate(self.symmetries)},
            step=self.step_count,
            time=self.step_count * 0.1,
        )

    def reading(self, index: int, symmetry: Symmetry) -> Any:
        of = {name: self.value(variable, index) for variable, name in enumerate(FIRST_SERIES)}
        free, forced, defect = (of[f"discrete_{name}"] for name in ("free", "forced", "defect"))
        budget = free + forced + defect
        return SimpleNamespace(
            symmetry=symmetry,
            charge=of["charge"],
            initial=self.offset + torch.arange(self.n_groups[index], dtype=torch.float64),
            discrete=SimpleNamespace(free=free, forced=forced, defect=defect, budget=budget, total=free + forced),
            flow=SimpleNamespace(free=of["flow_free"], forced=of["flow_forced"]),
            residual=of["charge"] - free - forced,
            rounding=of["charge"] - budget,
            moments={moment.name.lower(): of[moment.name.lower()] for moment in Moment},
            relative_update=of["angular_update"] / 2,
            **{name: of[name] for name in FIRST_SERIES if name in PLAIN},
            closed=index != 1,
            reason="" if index != 1 else f"open at step {self.step_count}",
        )


class Readings(dict[str, Any]):
    def __init__(self, charges: dict[str, Any], step: int, time: float) -> None:
        super().__init__(charges)
        self.step, self.time = step, time
        self.balances: dict[str, Any] = {}


def fake(*args: Any) -> Any:
    return FakeSGD(*args)


def train(optimizer: Any, n_steps: int) -> None:
    for _ in range(n_steps):
        optimizer.step()


def recorded(path: Path, n_steps: int, **options: Any) -> Path:
    with Recorder(fake(), path, **options) as recorder:
        train(recorder._optimizer, n_steps)
    return path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row goes to disk at once."""
    monkeypatch.setattr(noetherperf.record.writer, "FLUSH_SECONDS", 0.0)


def contents(path: Path) -> dict[str, Any]:
    """All that two records of the same training have in common."""
    values: dict[str, Any] = xr.open_zarr(path, chunks=None).load().to_dict()
    for identity in ("record", "writer", "measurement"):
        del values["attrs"][identity]
    return values


def every_byte(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted([path, *path.rglob("*")]) if file.is_file()}


class LateSGD(FakeSGD):
    """Learns only in readout() which of the steps it counted were skipped, as if a GPU had to be asked."""

    def __init__(self, skipped: set[int]) -> None:
        super().__init__()
        self.skipped, self.n_calls, self.n_skipped = skipped, 0, 0

    def step(self, closure: Any = None) -> Any:
        # Not super().step(), around which torch may run the hooks too.
        with self.lock:
            self.step_count += 1
        self.n_calls += 1
        self.n_skipped += self.n_calls in self.skipped

    def readout(self) -> Any:
        self.step_count -= self.n_skipped
        self.n_skipped = 0
        return super().readout()


@pytest.mark.parametrize("user_reads", [False, True])
def test_steps_that_turn_out_to_have_been_skipped(tmp_path: Path, user_reads: bool) -> None:
    optimizer: Any = LateSGD({1, 2, 6, 7, 13, 14, 15})
    with Recorder(optimizer, tmp_path / "a.zarr", every=3):
        for _ in range(20):
            optimizer.step()
            if user_reads:
                optimizer.readout()
    record = open_record(tmp_path / "a.zarr")
    assert record.steps.tolist() == [0, 3, 6, 9, 12]
    if not user_reads:
        # At the start, before the first step, and at each number that may be a row's.
        assert optimizer.n_readouts == 11
    np.testing.assert_array_equal(record["head"].charge[:, 0], float(record["head"].initial[0]) + record.steps)


def test_rows_come_back_labelled(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.zarr", 25, every=10)
    record = open_record(path)
    assert record.steps.tolist() == [0, 10, 20]
    assert np.allclose(record.times, [0.0, 1.0, 2.0])
    assert record.symmetries == SYMMETRIES
    assert list(record) == [symmetry.name for symmetry in SYMMETRIES]
    for index, symmetry in enumerate(SYMMETRIES):
        data = record[symmetry.name]
        assert dict(data.sizes) == {"step": 3, "group": N_GROUPS[index]}
        groups = np.arange(N_GROUPS[index]) / 8
        of = {
            name: np.array([[0.0], [10.0], [20.0]]) + 1000 * variable + 100 * index + groups
            for variable, name in enumerate(FIRST_SERIES)
        }
        total, flow = of["discrete_free"] + of["discrete_forced"], of["flow_free"] + of["flow_forced"]
        of["discrete_budget"] = total + of["discrete_defect"]
        of |= {"discrete_total": total, "flow_total": flow, "relative_update": of["angular_update"] / 2}
        of |= {"residual": of["charge"] - total, "rounding": of["charge"] - of["discrete_budget"]}
        of["flow_residual"] = of["charge"] - flow
        initial = np.arange(N_GROUPS[index])
        of |= {f"{law}_decay": of[f"{law}_free"] - initial for law in ("discrete", "flow")}
        of["decayed"] = of["discrete_budget"] - initial - of["growth"] - of["transport"]
        assert {*data} == {*record.series, "initial"}
        for name in record.series:
            rtol = 2.0**-14 if name in SAMPLES else 0.0
            np.testing.assert_allclose(data[name], of[name], rtol=rtol, atol=0.0, err_msg=name)
            assert data[name].dtype == np.float64
        np.testing.assert_array_equal(data.initial, np.arange(N_GROUPS[index]))
    assert record["head"].attrs == {"name": "head", "kind": "translation", "closed": True, "reason": ""}
    # as last seen
    assert (record["features.3 / γ"].attrs["closed"], record["features.3 / γ"].attrs["reason"]) == (
        False,
        "open at step 20",
    )
    np.testing.assert_array_equal(record.hyperparameters.lr, np.full((3, 1), 0.1))
    assert record.attrs["backend"] == "fake"
    assert torch.__version__.startswith(record.attrs["versions"]["torch"].partition("+")[0])


def test_derived_variables(tmp_path: Path) -> None:
    data = open_record(recorded(tmp_path / "a", 3))["fc1->fc2"]
    np.testing.assert_array_equal(data.discrete_total, data.discrete_budget - data.discrete_defect)
    np.testing.assert_array_equal(data.flow_total, data.flow_free + data.flow_forced)
    np.testing.assert_array_equal(data.residual, data.charge - data.discrete_total)
    np.testing.assert_array_equal(data.rounding, data.charge - data.discrete_budget)
    laws: tuple[Literal["flow", "discrete"], ...] = ("flow", "discrete")
    for law in laws:
        total = data[f"{law}_free"] + data[f"{law}_forced"]
        np.testing.assert_allclose(relative_error(data, law), abs(data.charge - total) / abs(total))  # terms outweigh
    parts = data.discrete_free + data.discrete_forced + data.discrete_defect
    np.testing.assert_allclose(relative_error(data, "budget"), abs(data.charge - parts) / parts)


def as_format_1(path: Path, *missing: str) -> Path:
    """As the first versions wrote it, some of them without these arrays."""
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["noetherperf_record"] = 1
    for name in ("series", "logged"):
        del root["attributes"][name]
    for name in ("logged", *missing):
        del root["consolidated_metadata"]["metadata"][name]
        shutil.rmtree(path / name)
    (path / "zarr.json").write_text(json.dumps(root))
    return path


def test_a_record_of_before_has_no_budget_of_its_own(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3, series=FIRST_SERIES, dtype="float64")
    as_format_1(path, "discrete_budget")
    data = open_record(path)["fc1->fc2"]
    parts = data.discrete_free + data.discrete_forced + data.discrete_defect
    np.testing.assert_array_equal(data.discrete_budget, parts)
    np.testing.assert_array_equal(data.rounding, data.charge - parts)


def test_a_record_of_before_has_no_angles(tmp_path: Path) -> None:
    missing = ("growth", "transport", "angular_update", "effective_lr")
    path = as_format_1(recorded(tmp_path / "a", 3, series=FIRST_SERIES, dtype="float64"), *missing)
    data = open_record(path)["fc1->fc2"]
    assert not {*missing} & {*data}
    optimizer = fake()
    train(optimizer, 3)
    with Recorder(optimizer, path, exists="resume"):
        train(optimizer, 2)
    assert open_record(path).steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert not {*missing} & {*open_record(path)["fc1->fc2"]}


def test_relative_error_where_charges_vanish() -> None:
    dims = ("step", "group")
    data = xr.Dataset(
        {
            "charge": (dims, [[0.0, 1e-9, 2.0, np.nan]]),
            "flow_free": (dims, [[0.0, 1.0, 1.0, 1.0]]),
            "flow_forced": (dims, [[0.0, -1.0, 0.0, 1.0]]),
        }
    )
    np.testing.assert_allclose(relative_error(data, "flow"), [[0.0, 5e-10, 0.5, np.nan]])


def test_a_readout_only_where_a_row_is_due(tmp_path: Path) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a", every=7):
        train(optimizer, 70)
    assert optimizer.n_readouts == 1 + 1 + 10  # one more before the first step, for what was loaded since


def test_closed_recorder_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    optimizer = fake()
    recorder = Recorder(optimizer, tmp_path / "a")
    train(optimizer, 2)
    recorder.close()
    recorder.close()
    train(optimizer, 2)
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2]
    assert optimizer.n_readouts == 4


def test_rows_are_written_when_training_raises(tmp_path: Path) -> None:
    optimizer = fake()
    with pytest.raises(KeyboardInterrupt), Recorder(optimizer, tmp_path / "a"):
        train(optimizer, 5)
        raise KeyboardInterrupt
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))


def test_plain_tools_read_it(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 5, probes={"loss": lambda: 0.5, "w": lambda: torch.ones(3)})
    plain = xr.open_zarr(path, chunks=None)
    assert dict(plain.charge.sizes) == {"step": 6, "group": sum(N_GROUPS)}
    assert {"step", "time", "symmetry", "position"} <= set(plain.coords)
    head = plain.charge.where(plain.symmetry == 2, drop=True)
    np.testing.assert_array_equal(head, open_record(path)["fc1->fc2"].charge)
    for consolidated in (True, False):
        group = zarr.open_group(path, mode="r", use_consolidated=consolidated)
        charge = group["charge"]
        assert isinstance(charge, zarr.Array)
        np.testing.assert_array_equal(np.asarray(charge[:]), plain.charge)
    xr.testing.assert_identical(open_record(path).dataset.load(), plain.load())


def test_any_part_of_a_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_GROUPS", 3)
    lazy = open_record(recorded(tmp_path / "a", 40)).dataset
    charge = xr.open_zarr(tmp_path / "a", chunks=None).charge.load()
    for rows in (slice(None), slice(3, 30, 4), slice(30, 3, -7), 17, -1, [0, 39, 16], slice(5, 5)):
        for groups in (slice(None), slice(None, None, -1), 3, [7, 0], slice(2, 7, 3)):
            xr.testing.assert_identical(lazy.charge[rows, groups], charge[rows, groups])
    with pytest.raises(IndexError):
        lazy.charge[41].load()


def test_a_copy_by_plain_tools_is_a_record(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xr.open_zarr(path, chunks=None).to_zarr(tmp_path / "b")
        open_record(path).dataset.to_zarr(tmp_path / "c")
    for copied in ("b", "c"):
        np.testing.assert_array_equal(open_record(tmp_path / copied)["head"].charge, open_record(path)["head"].charge)
    (tmp_path / "a").rename(tmp_path / "d")
    assert open_record(shutil.copytree(tmp_path / "d", tmp_path / "e")).steps.tolist() == list(range(6))


def as_of_before(path: Path) -> None:
    """Without checksums and names, as zarr itself wrote records, and with three hyperparameters, whatever the rule."""
    group = zarr.open_group(path, mode="r")
    new_arrays = ("dampening", "nesterov", "maximize", "logged")
    values = {
        name: (np.asarray(array[:]), array.chunks, array.metadata.dimension_names)  # type: ignore[union-attr]
        for name, array in group.arrays()
        if name not in new_arrays
    }
    new = ("record", "writer", "measurement", "rule", "hyperparameters", "series", "logged")
    attributes = {name: value for name, value in group.attrs.items() if name not in new} | {"noetherperf_record": 1}
    shutil.rmtree(path)
    group = zarr.create_group(path, attributes=attributes, zarr_format=3)
    for name, (data, chunks, dims) in values.items():
        array = group.create_array(name, shape=data.shape, chunks=chunks, dtype=data.dtype, dimension_names=dims)
        array[:] = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(group.store)


def test_records_without_checksums_are_read_and_resumed(tmp_path: Path) -> None:
    optimizer = fake()
    path = tmp_path / "a"
    with Recorder(optimizer, path, series=FIRST_SERIES, dtype="float64"):
        train(optimizer, 3)
    as_of_before(path)
    assert "crc32c" not in (path / "zarr.json").read_text()
    assert open_record(path)["head"].charge[:, 0].values.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert open_record(path).rule == "sgd"
    assert set(open_record(path).hyperparameters) == {"lr", "momentum", "weight_decay"}
    optimizer.measurement_id = "another, since checkpoints of then had none"
    with Recorder(optimizer, path, exists="resume"):
        train(optimizer, 3)
    assert open_record(path)["head"].charge[:, 0].values.tolist() == list(range(7))
    np.testing.assert_array_equal(open_record(path).hyperparameters.momentum, np.full((7, 1), 0.9))
    np.testing.assert_array_equal(xr.open_zarr(path, chunks=None).charge[:, 0], range(7))
    other = fake()
    other.offset = 1.0
    with pytest.raises(ValueError, match="another measurement"):
        Recorder(other, path, exists="resume")


def trained_by(optimizer_of: Any, path: Path, **options: Any) -> Any:
    """A small net and its optimizer, 3 recorded steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    named = list(net.named_parameters())
    groups = [{"params": named[:2], "lr": 0.02}, {"params": named[2:]}]
    symmetries = [Translation("columns", [Part("1.weight", 1)]), Norm("rows", [Part("0.weight", 0)])]
    optimizer = optimizer_of(groups, symmetries=symmetries)
    with Recorder(optimizer, path, **options):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(5, 3).double()).logsumexp(1).sum().backward()
            optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_of", "rule", "expected"),
    [
        (
            partial(AdamW, lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1),
            "adam",
            {
                "beta1": 0.8,
                "beta2": 0.95,
                "eps": 1e-7,
                "weight_decay": 0.1,
                "amsgrad": 0,
                "maximize": 0,
                "decoupled": 1,
            },
        ),
        (
            partial(nperf.SGD, lr=0.01, momentum=0.9, nesterov=True),
            "sgd",
            {"momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": 1, "maximize": 0},
        ),
    ],
)
def test_a_record_names_its_rule_and_has_its_options(
    tmp_path: Path, optimizer_of: Any, rule: str, expected: dict[str, float]
) -> None:
    optimizer = trained_by(optimizer_of, tmp_path / "a")
    record = open_record(tmp_path / "a")
    assert record.rule == optimizer.readout().rule == rule
    assert set(record.hyperparameters) == {"lr", *expected}
    np.testing.assert_array_equal(record.hyperparameters.lr, np.tile([0.02, 0.01], (4, 1)))
    for name, value in expected.items():
        np.testing.assert_array_equal(record.hyperparameters[name], np.full((4, 2), value), err_msg=name)
    for name, law in optimizer.readout().items():
        last = record[name].isel(step=-1)
        np.testing.assert_array_equal(last.charge, law.charge)
        np.testing.assert_array_equal(last.discrete_budget, law.discrete.budget)
        assert float(abs(last.rounding).max()) < 1e-14


def test_a_record_is_resumed_by_its_own_rule_only(tmp_path: Path) -> None:
    optimizer = trained_by(AdamW, tmp_path / "a")
    with Recorder(optimizer, tmp_path / "a", exists="resume"):
        optimizer.step()
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="records the update rule 'adam', and this optimizer's is 'sgd'"):
        trained_by(nperf.SGD, tmp_path / "a", exists="resume")


def test_nothing_but_numbers_and_json(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 5, probes={"loss": lambda: 1.0})
    for _, array in zarr.open_group(path, mode="r").arrays():
        assert array.dtype.kind in "fi"
    assert {file.name for file in path.rglob("*") if file.is_file() and "c" not in file.relative_to(path).parts} == {
        "zarr.json"
    }


def test_probes(tmp_path: Path) -> None:
    optimizer = fake()
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    probes: dict[str, Callable[[], Any]] = {
        "loss": lambda: torch.tensor(optimizer.step_count / 2, requires_grad=True),
        "train/accuracy → %": lambda: optimizer.step_count,
        "parameters": lambda: weight[:2],
    }
    with Recorder(optimizer, tmp_path / "a", probes=probes):
        for step in range(1, 4):
            weight.data.fill_(step)  # rows hold copies, not views of what training overwrites
            optimizer.step()
    found = open_record(tmp_path / "a").probes
    assert list(found) == list(probes)
    assert found["loss"].values.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert found["train/accuracy → %"].values.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found["parameters"].values.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_probes_that_cannot_be_recorded(tmp_path: Path) -> None:
    wrong: Any
    for wrong in ("0.5", None, [1.0, "x"]):
        with pytest.raises(ValueError, match=r"probes: 'w' returned .*, which is neither number nor vector"):
            Recorder(fake(), tmp_path / "text", probes={"w": partial(lambda value: value, wrong)})
    assert not (tmp_path / "text").exists()
    with pytest.raises(ValueError, match=r"'w' returned shape \(2, 2\).*flatten"):
        Recorder(fake(), tmp_path / "a", probes={"w": lambda: torch.ones(2, 2)})
    assert not (tmp_path / "a").exists()
    optimizer = fake()
    with (
        Recorder(optimizer, tmp_path / "b", probes={"w": lambda: torch.ones(1 + optimizer.step_count)}),
        pytest.raises(ValueError, match=r"'w' returned shape \(2,\) after \(1,\)"),
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: .* at least 1, got 0"),
        ({"every": 1.5}, "every"),
        ({"exists": "append"}, "exists: .*'append'"),
    ],
)
def test_options_of_no_use(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(fake(), tmp_path / "a", **options)


def test_an_optimizer_without_readout(tmp_path: Path) -> None:
    plain: Any = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="SGD measures no charges"):
        Recorder(plain, tmp_path / "a")


def test_nan_and_inf_come_back(tmp_path: Path) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        for offset in (np.nan, np.inf, -np.inf):
            optimizer.offset = offset
            optimizer.step()
    charge = open_record(tmp_path / "a")["head"].charge
    np.testing.assert_array_equal(charge[1:], np.array([[np.nan], [np.inf], [-np.inf]]) * np.ones(4))


def test_no_symmetries(tmp_path: Path, eager: None) -> None:
    optimizer = fake((), ())
    with Recorder(optimizer, tmp_path / "a", probes={"loss": lambda: 0.5}):
        train(optimizer, 3)
    with Recorder(optimizer, tmp_path / "a", exists="resume", probes={"loss": lambda: 0.5}):
        train(optimizer, 2)
    record = open_record(tmp_path / "a")
    assert record.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(record) == 0
    assert record.probes["loss"].values.tolist() == [0.5] * 6
    assert xr.open_zarr(tmp_path / "a", chunks=None).charge.shape == (6, 0)


@pytest.mark.parametrize(
    "name", ["..", "a/b", "/", " ", "fc1->fc2 → γ", ".hidden", "zarr.json", "c", "x" * 300, "a\nb", "\\"]
)
def test_any_name(tmp_path: Path, name: str) -> None:
    symmetries = (Norm("plain", [Part("w", axis=None)]), Norm(name, [Part("w", axis=0)]))
    optimizer = fake(symmetries, (1, 2))
    with Recorder(optimizer, tmp_path / "a", probes={name: lambda: 2.0}):
        train(optimizer, 2)
    record = open_record(tmp_path / "a")
    assert record[name].attrs["name"] == name
    assert record[name].charge[2].values.tolist() == [102.0, 102.125]
    assert record.probes[name].values.tolist() == [2.0] * 3
    with pytest.raises(KeyError, match="no symmetry 'other'"):
        record["other"]


def test_more_rows_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)  # chunks of 16 rows, the least
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_GROUPS", 3)
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a") as recorder:
        for _ in range(50):
            optimizer.step()
            assert len(recorder._writer._waiting) < 16
    record = open_record(tmp_path / "a")
    assert record.steps.tolist() == list(range(51))
    np.testing.assert_array_equal(record["head"].charge[:, 1], np.arange(51) + 0.125)
    np.testing.assert_array_equal(record["fc1->fc2"].charge[:, 2], np.arange(51) + 200.25)


def test_changed_and_added_parameter_groups(tmp_path: Path, eager: None) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        optimizer.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.25})
        optimizer.step()
    lr = open_record(tmp_path / "a").hyperparameters.lr
    np.testing.assert_array_equal(lr, [[0.1, np.nan], [0.5, np.nan], [0.5, 0.25]])


def test_parameter_groups_added_beyond_a_chunk(tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        train(optimizer, 20)
        for n in range(20):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": n / 8})
        train(optimizer, 20)
    lr = open_record(tmp_path / "a").hyperparameters.lr  # a missing chunk would be told
    assert lr.shape == (41, 21)
    assert np.isnan(lr[:21, 1:]).all()
    np.testing.assert_array_equal(lr[21:, 1:], np.tile(np.arange(20) / 8, (20, 1)))


# --- paths that exist


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3)
    before = every_byte(path)
    with pytest.raises(FileExistsError, match=r"exists='resume'.*exists='overwrite'"):
        Recorder(fake(), path)
    assert every_byte(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 9)
    recorded(path, 2, exists="overwrite")
    assert open_record(path).steps.tolist() == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def _file(path: Path) -> None:
    path.write_text("mine")


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _other_zarr(path: Path) -> None:
    zarr.create_group(path)


def _damaged(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"attributes": {"noetherperf')


def _record_with_company(path: Path) -> None:
    recorded(path, 1)
    (path / "thesis.tex").write_text("mine")


@pytest.mark.parametrize("make", [_file, _directory, _other_zarr, _damaged, _record_with_company])
def test_overwrite_deletes_records_only(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "a"
    make(path)
    before = every_byte(path)
    with pytest.raises(FileExistsError, match="overwrite"):
        Recorder(fake(), path, exists="overwrite")
    assert every_byte(path) == before


def test_an_empty_directory_holds_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert open_record(recorded(tmp_path / "a", 1)).steps.tolist() == [0, 1]


@pytest.mark.parametrize("exists", ["overwrite", "resume"])
def test_a_free_path_needs_no_permission(tmp_path: Path, exists: str) -> None:
    assert open_record(recorded(tmp_path / "new" / "a", 1, exists=exists)).steps.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "no record at"),
        (_file, ValueError, "no noetherperf record"),
        (_directory, ValueError, "no noetherperf record"),
        (_other_zarr, ValueError, "no noetherperf record"),
        (_damaged, ValueError, "damaged"),
    ],
)
def test_what_is_no_record(tmp_path: Path, make: Any, error: type[Exception], message: str) -> None:
    make(tmp_path / "a")
    with pytest.raises(error, match=message):
        open_record(tmp_path / "a")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 1)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["noetherperf_record"] = 99
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ValueError, match="format 99"):
        open_record(path)


def test_a_missing_chunk_of_steps_is_damage(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3)
    for chunk in (path / "step" / "c").iterdir():
        chunk.unlink()
    with pytest.raises(ValueError, match="damaged"):
        open_record(path)


# --- resume


@pytest.mark.parametrize("every", [1, 3])
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, every: int, eager: None) -> None:
    whole = contents(recorded(tmp_path / "whole", 40, every=every))
    path, optimizer = tmp_path / "a", fake()
    with Recorder(optimizer, path, every=every):
        train(optimizer, 17)
        checkpoint = optimizer.state_dict()
        train(optimizer, 8)
    for n_steps in (9, 23):  # both from the older checkpoint: steps 18 to 25 were recorded already
        optimizer = fake()
        optimizer.load_state_dict(checkpoint)
        with Recorder(optimizer, path, every=every, exists="resume"):
            train(optimizer, n_steps)
    resumed = contents(path)
    np.testing.assert_equal(resumed, whole)


def test_resume_at_the_end_and_with_nothing_to_add(tmp_path: Path) -> None:
    path, optimizer = tmp_path / "a", fake()
    for _ in range(3):
        with Recorder(optimizer, path, exists="resume"):
            train(optimizer, 2)
    with Recorder(optimizer, path, exists="resume"):
        pass
    assert open_record(path).steps.tolist() == list(range(7))


def test_taking_a_checkpoint_flushes(tmp_path: Path) -> None:
    optimizer = fake()
    recorder = Recorder(optimizer, tmp_path / "a")
    train(optimizer, 5)
    assert open_record(tmp_path / "a").steps.tolist() == [0]
    optimizer.state_dict()
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))
    recorder.close()


def test_a_checkpoint_loaded_while_recording(tmp_path: Path, eager: None) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        train(optimizer, 4)
        checkpoint = optimizer.state_dict()
        train(optimizer, 5)
        optimizer.load_state_dict(checkpoint)
        train(optimizer, 2)
    assert open_record(tmp_path / "a").steps.tolist() == list(range(7))
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a", exists="resume"):  # the checkpoint comes after the recorder
        optimizer.load_state_dict(checkpoint)
        train(optimizer, 1)
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))


def test_a_skipped_step_is_no_row(tmp_path: Path) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        train(optimizer, 2)
        optimizer.step_count -= 1  # as if the step that follows were skipped
        optimizer.step()
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2]


def test_another_measurement_is_not_mixed_in(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3)
    before = every_byte(path)
    other = fake()
    other.measurement_id, other.offset = "other", 1.0
    with pytest.raises(ValueError, match=r"another measurement.*checkpoint"):
        Recorder(other, path, exists="resume")
    with pytest.raises(ValueError, match="other symmetries"):
        Recorder(fake(SYMMETRIES[:2], N_GROUPS[:2]), path, exists="resume")
    with pytest.raises(ValueError, match="other numbers of groups"):
        Recorder(fake(SYMMETRIES, (4, 1, 2)), path, exists="resume")
    with pytest.raises(ValueError, match="other probes"):
        Recorder(fake(), path, exists="resume", probes={"loss": lambda: 0.0})
    assert every_byte(path) == before


def test_a_probe_of_another_length_is_not_mixed_in(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3, probes={"w": lambda: torch.ones(2)})
    with pytest.raises(ValueError, match=r"'w' returned shape \(3,\).*shape \(2,\)"):
        Recorder(fake(), path, exists="resume", probes={"w": lambda: torch.ones(3)})


def test_a_measurement_begun_anew_is_told(tmp_path: Path) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        train(optimizer, 3)
        optimizer.measurement_id, optimizer.step_count, optimizer.offset = "second", 0, 1.0
        with pytest.raises(ValueError, match="another measurement"):
            optimizer.step()
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]


# --- the optimizer itself


class Training:
    """A multilayer perceptron on random data, with a checkpoint that holds all there is."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.head = torch.nn.Linear(8, 3)
        self.model = torch.nn.Sequential(OrderedDict(fc1=torch.nn.Linear(6, 8), relu=torch.nn.ReLU(), fc2=self.head))
        self.loss = torch.tensor(torch.nan)
        self.optimizer = SGD(
            self.model.named_parameters(),
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-3,
            symmetries=[
                Translation("head", [Part("fc2.weight", axis=1)]),
                Rescale(
                    "fc1->fc2",
                    inward=[Part("fc1.weight", axis=0), Part("fc1.bias", axis=0)],
                    outward=[Part("fc2.weight", axis=1)],
                ),
            ],
            backend="reference",
        )

    def recorder(self, path: Path, **options: Any) -> Recorder:
        probes: dict[str, Callable[[], Any]] = {
            "loss": lambda: self.loss,
            "parameters": lambda: self.head.weight[0],
        }
        return Recorder(self.optimizer, path, probes=probes, **options)

    def train(self, n_steps: int) -> None:
        for _ in range(n_steps):
            draw = torch.Generator().manual_seed(self.optimizer.step_count)
            images, labels = torch.randn(16, 6, generator=draw), torch.randint(3, (16,), generator=draw)
            self.optimizer.zero_grad()
            self.loss = torch.nn.functional.cross_entropy(self.model(images), labels)
            self.loss.backward()
            self.optimizer.step()

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))


def test_the_record_is_the_readout(tmp_path: Path) -> None:
    training, readouts, losses = Training(), [], []
    with training.recorder(tmp_path / "a", series="all", dtype="float64"):
        readouts.append(training.optimizer.readout())
        for _ in range(12):
            training.train(1)
            readouts.append(training.optimizer.readout())
            losses.append(training.loss.item())
    record = open_record(tmp_path / "a")
    assert record.steps.tolist() == [readout.step for readout in readouts]
    assert record.times.tolist() == [readout.time for readout in readouts]
    np.testing.assert_array_equal(record.probes["loss"], np.array([np.nan, *losses], dtype=np.float32))
    for name, data in record.items():
        for row, readout in enumerate(readouts):
            law = readout[name]
            expected = {
                "charge": law.charge,
                "discrete_total": law.discrete.total,
                "discrete_defect": law.discrete.defect,
                "flow_total": law.flow.total,
                "residual": law.residual,
                "defect": law.defect,
                "relative_defect": law.relative_defect,
                "growth": torch.full_like(law.charge, torch.nan),
                "angular_update": law.angular_update,
                "effective_lr": law.effective_lr,
                **law.moments,
            }
            for variable, values in expected.items():
                np.testing.assert_array_equal(data[variable][row], values, err_msg=variable)
        assert relative_error(data, "discrete").max() < 1e-4
        assert (data.charge[0] != data.charge[-1]).any()


def test_a_resumed_training_records_the_same(tmp_path: Path) -> None:
    whole = Training()
    with whole.recorder(tmp_path / "whole"):
        whole.train(20)
    first = Training()
    with first.recorder(tmp_path / "a"):
        first.train(8)
        checkpoint = first.checkpoint()
        assert open_record(tmp_path / "a").steps.tolist() == list(range(9))  # no row is behind the checkpoint
        first.train(5)
    second = Training()
    second.load(checkpoint)
    with second.recorder(tmp_path / "a", exists="resume"):
        second.train(12)
    np.testing.assert_equal(contents(tmp_path / "a"), contents(tmp_path / "whole"))


def test_reset_measurement_needs_a_new_record(tmp_path: Path) -> None:
    training = Training()
    with training.recorder(tmp_path / "a"):
        training.train(3)
        training.optimizer.reset_measurement()
        with pytest.raises(ValueError, match="another measurement"):
            training.train(1)
    with pytest.raises(ValueError, match="another measurement"):
        training.recorder(tmp_path / "a", exists="resume")
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]


def rescale_weights(training: Training) -> None:
    """As if the weights of another training were loaded."""
    with torch.no_grad():
        for p in training.model.parameters():
            p.mul_(3.0)


def reset(training: Training) -> None:
    rescale_weights(training)
    training.optimizer.reset_measurement()


def drop_measurement(training: Training) -> None:
    rescale_weights(training)
    training.optimizer.load_measurement(None)


def load_another_run(training: Training) -> None:
    """At the same step."""
    other = Training()
    rescale_weights(other)
    other.train(training.optimizer.step_count)
    training.load(other.checkpoint())


def load_torch_checkpoint(training: Training) -> None:
    rescale_weights(training)
    state = training.optimizer.state_dict()
    del state["measurement"]
    training.optimizer.load_state_dict(state)


BEGIN_ANEW = [reset, drop_measurement, load_another_run, load_torch_checkpoint]


@pytest.mark.parametrize("begin_anew", BEGIN_ANEW)
def test_a_record_that_has_only_begun_begins_anew(tmp_path: Path, begin_anew: Callable[[Training], None]) -> None:
    """As pretrained weights are loaded after the recorder was made."""
    training, twin = Training(), Training()
    with Recorder(training.optimizer, tmp_path / "a"):
        begin_anew(training)
        training.train(3)
    begin_anew(twin)
    with Recorder(twin.optimizer, tmp_path / "b"):
        twin.train(3)
    np.testing.assert_equal(contents(tmp_path / "a"), contents(tmp_path / "b"))
    assert open_record(tmp_path / "a").attrs["measurement"] == training.optimizer.measurement_id
    readout = training.optimizer.readout()
    for name, data in open_record(tmp_path / "a").items():
        np.testing.assert_array_equal(data.initial, readout[name].initial)
        np.testing.assert_array_equal(data.charge[0], data.initial)


@pytest.mark.parametrize("begin_anew", BEGIN_ANEW)
def test_a_probe_that_fails_as_a_record_begins_anew(tmp_path: Path, begin_anew: Callable[[Training], None]) -> None:
    """The step fails, and the record begins anew with the next one: it never mixes two measurements."""
    training = Training()
    values = iter([torch.tensor(0.0), torch.zeros(1, 1), *torch.arange(9.0)])  # the second is no vector
    with Recorder(training.optimizer, tmp_path / "a", probes={"one": lambda: next(values)}):
        begin_anew(training)
        with pytest.raises(ValueError, match="probes: 'one'"):
            training.train(1)
        training.train(2)
    record, readout = open_record(tmp_path / "a"), training.optimizer.readout()
    assert record.attrs["measurement"] == training.optimizer.measurement_id
    assert record.steps[0] == 0
    for name, data in record.items():
        np.testing.assert_array_equal(data.initial, readout[name].initial)
        np.testing.assert_array_equal(data.charge[0], data.initial)


def test_a_measurement_that_begins_within_the_step(tmp_path: Path) -> None:
    """The record begins with the next row, and with what the laws start from."""
    training = Training()
    with training.recorder(tmp_path / "a", every=2):

        def closure() -> torch.Tensor:
            if training.optimizer.step_count == 0:
                reset(training)
            return torch.zeros(())

        training.optimizer.step(closure)
        training.train(2)
    record = open_record(tmp_path / "a")
    assert record.steps.tolist() == [2]
    np.testing.assert_array_equal(record["head"].initial, training.optimizer.readout()["head"].initial)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
@pytest.mark.parametrize("begin_anew", BEGIN_ANEW)
def test_a_record_of_one_measurement(tmp_path: Path, begin_anew: Callable[[Training], None], n_steps: int) -> None:
    training = Training()
    with training.recorder(tmp_path / "a"):
        training.train(n_steps)
        begin_anew(training)
        before = [p.clone() for p in training.model.parameters()]
        for _ in range(2):  # whoever goes on all the same is told again
            with pytest.raises(ValueError, match="another measurement"):
                training.train(1)
        if begin_anew != load_another_run:  # of a measurement from its beginning, no step is made
            assert all(map(torch.equal, before, training.model.parameters()))
        with pytest.raises(ValueError, match="another measurement"):  # and the first recorder is left as it is
            training.recorder(tmp_path / "a", exists="resume")
    with pytest.raises(ValueError, match="another measurement"):
        training.recorder(tmp_path / "a", exists="resume")
    assert open_record(tmp_path / "a").steps.tolist() == list(range(n_steps + 1))


def test_a_new_measurement_of_the_same_charges_is_another(tmp_path: Path) -> None:
    """The charges that both began with are no sign: all translations' are zero where biases are."""
    training = Training()
    with training.recorder(tmp_path / "a"):
        checkpoint = training.checkpoint()
        training.train(3)
        training.load(checkpoint)
        training.optimizer.reset_measurement()
        with pytest.raises(ValueError, match="another measurement"):
            training.train(1)
    other = Training()  # the same initial charges
    other.train(2)
    with pytest.raises(ValueError, match="another measurement"):
        other.recorder(tmp_path / "a", exists="resume")


def test_a_run_that_begins_again_as_it_began_resumes(tmp_path: Path) -> None:
    """It was killed before its first checkpoint. Its rows are written anew, those of the killed run go."""
    first, again, whole = Training(), Training(), Training()
    with first.recorder(tmp_path / "a"):
        first.train(4)
    again.optimizer.param_groups[0]["lr"] = 0.01
    with again.recorder(tmp_path / "a", exists="resume"):
        again.train(2)
    whole.optimizer.param_groups[0]["lr"] = 0.01
    with whole.recorder(tmp_path / "b"):
        whole.train(2)
    np.testing.assert_equal(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_a_checkpoint_loaded_after_the_recorder_resumes(tmp_path: Path) -> None:
    first, second = Training(), Training()
    with first.recorder(tmp_path / "a"):
        first.train(4)
        checkpoint = first.checkpoint()
        first.train(3)
    with second.recorder(tmp_path / "a", exists="resume"):
        second.load(checkpoint)
        second.train(1)
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))
    third, another = Training(), Training()
    with third.recorder(tmp_path / "a", exists="resume"):
        third.optimizer.load_state_dict(another.checkpoint()["optimizer"])  # of another measurement
        with pytest.raises(ValueError, match="another measurement"):
            rescale_and_step(third.optimizer)
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))


def rescale_and_step(optimizer: MeasuredOptimizer) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(2.0)
                p.grad = torch.ones_like(p)
    optimizer.reset_measurement()
    optimizer.step()


def test_other_numbers_of_groups_need_a_new_record(tmp_path: Path) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a"):
        optimizer.measurement_id, optimizer.n_groups = "second", (4, 1, 2)
        with pytest.raises(ValueError, match="another measurement"):
            optimizer.step()
    assert open_record(tmp_path / "a").steps.tolist() == [0]


def test_a_copy_of_the_optimizer_is_not_recorded_and_resumes(tmp_path: Path) -> None:
    training = Training()
    with training.recorder(tmp_path / "a"):
        training.train(2)
        copied = copy.deepcopy((training.model, training.optimizer))
        rescale_and_step(copied[1])
        training.train(1)
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]
    with Recorder(
        copy.deepcopy(training.optimizer),
        tmp_path / "a",
        exists="resume",
        probes={"loss": float, "parameters": lambda: [0.0] * 8},
    ):
        pass


def test_set_back_by_one_step(tmp_path: Path) -> None:
    """The step that is made again is no skipped one."""
    training, twin = Training(), Training()
    with training.recorder(tmp_path / "a"):
        training.train(3)
        checkpoint = training.checkpoint()
        training.train(1)
        training.load(checkpoint)
        training.optimizer.param_groups[0]["lr"] = 0.01
        training.train(1)
    with twin.recorder(tmp_path / "b"):
        twin.train(3)
        twin.optimizer.param_groups[0]["lr"] = 0.01
        twin.train(1)
    np.testing.assert_equal(contents(tmp_path / "a"), contents(tmp_path / "b"))


class Counting(SGD):
    """Remembers after which steps it was read out."""

    read_at: list[int]

    def readout(self) -> Any:
        self.read_at.append(self.step_count)
        return super().readout()


@pytest.mark.parametrize("event", ["back", "reset", "other"])
def test_all_ranks_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    """Where parameters are sharded, a readout is a collective."""
    read_at, checkpoint = [], None
    for rank in (0, 1):
        monkeypatch.setattr(noetherperf.record.identity, "rank", lambda rank=rank: rank)
        training = Training()
        training.optimizer.__class__, training.optimizer.read_at = Counting, []  # type: ignore[attr-defined]
        with training.recorder(tmp_path / str(rank), every=3):
            training.train(4)
            checkpoint = checkpoint or training.checkpoint()  # rank 0's
            training.train(4)
            with suppress(ValueError):
                if event == "back":
                    training.load(checkpoint)
                elif event == "reset":
                    reset(training)
                else:
                    load_another_run(training)
                training.train(5)
        read_at.append(training.optimizer.read_at)  # type: ignore[attr-defined]
    assert read_at[0] == read_at[1]
    assert len(read_at[0]) > 3


def test_records_of_later_ranks_are_known_by_their_charges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They load rank 0's checkpoint, whose measurement has rank 0's name."""
    monkeypatch.setattr(noetherperf.record.identity, "rank", lambda: 1)
    rank_0, rank_1 = Training(), Training()
    rank_0.train(2)
    with rank_1.recorder(tmp_path / "a"):
        rank_1.train(4)
        rank_1.load(rank_0.checkpoint())
        rank_1.train(1)
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]
    with rank_0.recorder(tmp_path / "a", exists="resume"):
        rank_0.train(2)
    other = Training()
    rescale_weights(other)
    with pytest.raises(ValueError, match="another measurement"):
        other.recorder(tmp_path / "a", exists="resume")


# --- two Recorders, one record


def test_a_cell_run_again_overwrites(tmp_path: Path) -> None:
    """The new Recorder wins; the old one says once that its record is gone, if it is used at all."""
    path, old, new = tmp_path / "a", fake(), fake()
    first = Recorder(old, path)
    train(old, 3)
    second = Recorder(new, path, exists="overwrite")
    new.offset = 500.0
    train(new, 2)
    second.flush()
    before = every_byte(path)
    first.flush()  # nothing to say: its rows went with its record
    train(old, 2)
    with pytest.warns(RuntimeWarning, match="another Recorder has taken its place") as told:
        old.state_dict()
        train(old, 200)
        first.close()
    assert len(told) == 1
    assert every_byte(path) == before
    train(new, 1)
    second.close()
    record = open_record(path)
    assert record.steps.tolist() == [0, 1, 2, 3]
    assert record["head"].charge[:, 0].values.tolist() == [0.0, 501.0, 502.0, 503.0]


@pytest.mark.parametrize("alias", ["same", "link", "relative"])
def test_a_cell_run_again_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    """No row is lost, by whatever path."""
    path, optimizer = tmp_path / "a", fake()
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    first = Recorder(optimizer, path)
    train(optimizer, 3)
    with pytest.warns(RuntimeWarning, match="another Recorder of this process") as told:
        second = Recorder(
            optimizer, {"same": path, "link": tmp_path / "link", "relative": Path("a")}[alias], exists="resume"
        )
    assert len(told) == 1
    train(optimizer, 3)
    first.close()
    optimizer.step()
    second.close()
    assert open_record(path).steps.tolist() == list(range(8))


def test_a_record_that_was_moved_or_deleted_is_not_made_again(tmp_path: Path) -> None:
    optimizer = fake()
    recorder = Recorder(optimizer, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    train(optimizer, 3)
    with pytest.warns(RuntimeWarning, match="there is no record"):
        recorder.flush()
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").rename(tmp_path / "a")
    recorder.close()
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2, 3]


def test_a_recorder_cannot_be_copied(tmp_path: Path) -> None:
    with Recorder(fake(), tmp_path / "a") as recorder:
        for of in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a Recorder cannot be copied"):
                of(recorder)


# --- paths and settings


@pytest.mark.parametrize(
    "name",
    [
        "lr::0.1.zarr",
        "a b",
        "a#b?c=d",
        "a%20b",
        "a\nb",
        "x" * 255,
        "\udcff\udcfe",
        "a/",
        "ü",
        "-",
        "s3:",
        "a*b[c]",
        "{x}",
    ],
)
def test_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = f"{tmp_path}/{name}"
    before = recorded(path, 2)  # type: ignore[arg-type]
    assert open_record(path).steps.tolist() == [0, 1, 2]
    assert open_record(path)["head"].charge[2].values.tolist() == [2.0, 2.125, 2.25, 2.375]
    optimizer = fake()
    monkeypatch.chdir(tmp_path)
    with Recorder(optimizer, f"./{name}", exists="overwrite"):
        monkeypatch.chdir("/")
        train(optimizer, 3)
    assert open_record(before).steps.tolist() == [0, 1, 2, 3]
    assert open_record(os.fsencode(path)).steps.tolist() == [0, 1, 2, 3]  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 1


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recorded("~/runs/a", 1)  # type: ignore[arg-type]
    assert open_record(Path("~/runs/a")).path == tmp_path / "runs" / "a"
    for use in (open_record, lambda path: recorded(path, 1)):
        with pytest.raises(ValueError, match="path: '~nobody-of-this-name/a' cannot be followed"):
            use("~nobody-of-this-name/a")


@pytest.mark.parametrize(
    "url",
    [
        "s3://b/a.zarr",
        "gs://b/a",
        "file:///tmp/a",
        "memory://a",
        "HTTPS://x.org/a",
        "simplecache::s3://b/a",
        Path("s3://b/a"),
    ],
)
def test_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str | Path) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (open_record, lambda path: Recorder(fake(), path)):
        with pytest.raises(ValueError, match=r"path: .* is a URL, .* local directories only"):
            use(url)
    with pytest.raises(ValueError, match="path: is empty"):
        Recorder(fake(), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"default_zarr_format": 2},
        {"array.write_empty_chunks": True},
        {"array.order": "F"},
        {"async.concurrency": 1, "threading.max_workers": 1},
        {"codecs.zstd": "nowhere.Codec", "codec_pipeline.path": "nowhere.Pipeline"},
    ],
)
def test_zarr_settings_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    with zarr.config.set(settings):
        path = recorded(tmp_path / "a", 3)
        values = {name: data.load() for name, data in open_record(path).items()}
    np.testing.assert_equal(contents(path), contents(recorded(tmp_path / "b", 3)))
    assert values["head"].charge[:, 0].values.tolist() == [0.0, 1.0, 2.0, 3.0]


# --- ends of processes


def script(path: Path, end: str) -> subprocess.CompletedProcess[str]:
    """A training of five steps that ends without close()."""
    code = f"""
import gc, os, signal, sys, threading, pathlib, test_recorder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background of a shell ignores it
optimizer = test_recorder.fake()
recorder = test_recorder.Recorder(optimizer, pathlib.Path({str(path)!r}))
test_recorder.train(optimizer, 5)
{end}
"""
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=60,
    )


ENDS = {
    "normal": ("", 0),
    "exit": ("sys.exit(3)", 3),
    "exception": ("raise KeyError('a mistake')", 1),
    "interrupt": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    "exit in a thread's company": ("threading.Thread(target=threading.Event().wait, daemon=True).start()", 0),
    "exit in a function": (
        "def main():\n    global optimizer, recorder\n    del optimizer\n    sys.exit(3)\nmain()",
        3,
    ),
    "in a forked child": ("if os.fork() == 0:\n    sys.exit(0)\nos.wait()", 0),
    "exit handler": ("import atexit; atexit.register(lambda: test_recorder.train(optimizer, 2))", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_rows_are_written_at_the_end_of_a_process(tmp_path: Path, end: str) -> None:
    done = script(tmp_path / "a", ENDS[end][0])
    assert done.returncode == ENDS[end][1], done.stderr
    assert ("Error" in done.stderr) == (end == "exception")
    steps = list(range(8 if end == "exit handler" else 6))
    assert open_record(tmp_path / "a").steps.tolist() == steps


def test_a_forked_process_writes_nothing(tmp_path: Path) -> None:
    end = """
if os.fork() == 0:
    import warnings
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.offset = 900.0
        test_recorder.train(optimizer, 3)
        recorder.close()
    assert [str(w.message) for w in told if "forked" in str(w.message)] and len(told) == 1, told
    os._exit(0)
assert os.wait()[1] == 0
test_recorder.train(optimizer, 2)
"""
    done = script(tmp_path / "a", end)
    assert done.returncode == 0, done.stderr
    record = open_record(tmp_path / "a")
    assert record["head"].charge[:, 0].values.tolist() == record.steps.tolist() == list(range(8))


def test_rows_are_written_when_the_recorder_is_gone(tmp_path: Path) -> None:
    optimizer = fake()
    Recorder(optimizer, tmp_path / "a")
    train(optimizer, 5)
    del optimizer
    gc.collect()
    assert open_record(tmp_path / "a").steps.tolist() == list(range(6))


# --- threads and signals


def test_flush_from_other_threads(tmp_path: Path) -> None:
    optimizer, errors, stop = fake(), list[BaseException](), threading.Event()
    recorder = Recorder(optimizer, tmp_path / "a")

    def flush() -> None:
        while not stop.is_set():
            try:
                recorder.flush()
                optimizer.state_dict()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=flush) for _ in range(2)]
    for thread in threads:
        thread.start()
    for goal in (150, 250):
        train(optimizer, goal - optimizer.step_count)
        optimizer.step_count -= 50  # set back while others write
    stop.set()
    for thread in threads:
        thread.join()
    train(optimizer, 20)
    recorder.close()
    assert not errors
    record = open_record(tmp_path / "a")
    assert record.steps.tolist() == list(range(221))
    np.testing.assert_array_equal(record["head"].charge[:, 0], record.steps)


@pytest.mark.parametrize("exists", ["resume", "overwrite"])
def test_a_second_recorder_made_while_another_thread_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: Any
) -> None:
    """However long it takes, the steps of that time are in neither's gap."""
    optimizer, began, replace, path = fake(), threading.Event(), Path.replace, tmp_path / "a"

    def step() -> None:
        began.wait()
        for _ in range(20):
            train(optimizer, 1)
            time.sleep(0.002)

    def slow(self: Path, target: Any) -> Path:
        if target in (path, path / "zarr.json"):
            began.set()
            steps.join(0.02)  # if they can be made now, they are
        return replace(self, target)

    first, steps = Recorder(optimizer, path), threading.Thread(target=step)
    train(optimizer, 3)
    steps.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        monkeypatch.setattr(Path, "replace", slow)
        second = Recorder(optimizer, path, exists=exists)
        monkeypatch.undo()
        steps.join()
        first.close()
    second.close()
    assert open_record(path).steps.tolist() == list(range(0 if exists == "resume" else 3, 24))


def test_two_threads_that_step_put_no_step_there_twice(tmp_path: Path) -> None:
    optimizer, meeting = fake(), threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(10)

    optimizer.register_step_pre_hook(meet)
    optimizer.register_step_post_hook(meet)  # both have stepped when the recorder looks
    recorder = Recorder(optimizer, tmp_path / "a")
    threads = [threading.Thread(target=train, args=(optimizer, 30)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    steps = open_record(tmp_path / "a").steps.tolist()
    assert steps[-1] == 60
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("action", ["flush", "state_dict", "close", "steps", "resume", "overwrite"])
def test_a_signal_handler_amid_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """At each of the first writes: it returns at once, and no row is lost."""
    optimizer = fake()
    recorder = Recorder(optimizer, tmp_path / "a")
    refused = []

    def handler(*_: Any) -> None:
        match action:
            case "flush":
                recorder.flush()
            case "state_dict":
                optimizer.state_dict()
            case "close":
                recorder.close()
            case "steps":
                train(optimizer, 2)
                recorder.flush()
            case exists:
                with pytest.raises(BlockingIOError, match=r"this process is writing .* at this moment"):
                    Recorder(optimizer, tmp_path / "a", exists=exists)  # type: ignore[arg-type]
                refused.append(exists)

    n_calls, replace = 0, Path.replace

    def interrupted(self: Path, target: Any) -> Path:
        nonlocal n_calls
        n_calls += 1
        if n_calls in (1, 2, 20):
            signal.raise_signal(signal.SIGUSR1)
        return replace(self, target)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        train(optimizer, 3)
        monkeypatch.setattr(Path, "replace", interrupted)
        recorder.flush()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert n_calls > 20
    n_steps = 3 + 6 * (action == "steps")
    assert open_record(tmp_path / "a").steps.tolist() == list(range(n_steps + 1))
    assert len(refused) == (3 if action in ("resume", "overwrite") else 0)
    if action == "close":
        key = (tmp_path / "a" / "initial" / "zarr.json").stat()
        assert (key.st_dev, key.st_ino) not in locking._held
    recorder.close()


def test_memory_does_not_grow_with_the_rows_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a") as recorder:
        sizes = []
        for _ in range(3):
            train(optimizer, 160)
            recorder.flush()
            sizes.append(
                len(pickle.dumps({k: v for k, v in vars(recorder._writer).items() if k not in ("_mutex", "_lock")}))
            )
    assert max(sizes) - min(sizes) < 200, sizes


# --- interruptions


class Interrupted(BaseException):
    """A process that ends here, as far as the disk can tell."""


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Lets all writes after the next n fail: every file of a record reaches its place by Path.replace."""
    gc.collect()  # recorders that earlier tests have left open write now, and not in between
    calls = {"left": 10**9}
    error: list[BaseException] = []

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] < 0:
                raise error[0]
            return original(*args, **kwargs)

        return guarded

    def arm(n: int, what: BaseException) -> None:
        calls["left"] = n
        error[:] = [what]

    monkeypatch.setattr(Path, "replace", guard(Path.replace))
    return arm


def gone(recorder: Recorder) -> None:
    """Its process has ended: it writes no more, and holds nothing."""
    recorder._writer.forget()
    recorder.close()


def n_writes_of_a_flush() -> int:
    """Metadata and a chunk of each array, metadata of the logged values, of which there are none, then the commit."""
    return 2 * (len(DEFAULT) + 2 + len(fields(sgd.Hyper))) + 1 + 1


def places_of_an_end() -> Iterator[Any]:
    """Before each write of a flush, and after the last; all but the first, the last and one amid are slow tests."""
    last = n_writes_of_a_flush()
    for n in range(last + 1):
        yield pytest.param(n, marks=[] if n in (0, 1, 2, 7, last - 2, last - 1, last) else pytest.mark.slow)


@pytest.mark.parametrize("n", list(places_of_an_end()))
def test_an_end_between_any_two_writes(tmp_path: Path, n: int, fail_at: Callable[[int, BaseException], None]) -> None:
    """Rows are there all or not at all, and the run goes on from there."""
    path, optimizer = tmp_path / "a", fake()
    recorder = Recorder(optimizer, path)
    train(optimizer, 5)
    recorder.flush()
    train(optimizer, 5)
    fail_at(n, Interrupted())
    if n < n_writes_of_a_flush():
        with pytest.raises(Interrupted):
            recorder.flush()
    else:
        recorder.flush()
    fail_at(10**9, Interrupted())
    committed = 10 if n == n_writes_of_a_flush() else 5
    record = open_record(path)
    assert record.steps.tolist() == list(range(committed + 1))
    assert record["head"].charge.shape == (committed + 1, 4)
    assert not np.isnan(record["head"].charge).any()

    gone(recorder)
    optimizer = fake()
    train(optimizer, 4)
    with Recorder(optimizer, path, exists="resume"):
        train(optimizer, 6)
    np.testing.assert_equal(contents(path), contents(recorded(tmp_path / "whole", 10)))


@pytest.mark.parametrize("n", range(0, n_writes_of_a_flush(), 6))
def test_an_end_while_rows_are_dropped(tmp_path: Path, n: int, fail_at: Callable[[int, BaseException], None]) -> None:
    path = recorded(tmp_path / "a", 40)
    optimizer = fake()
    train(optimizer, 20)
    recorder = Recorder(optimizer, path, exists="resume")
    train(optimizer, 3)
    fail_at(n, Interrupted())
    with pytest.raises(Interrupted):
        recorder.flush()
    fail_at(10**9, Interrupted())
    steps = open_record(path).steps.tolist()
    assert steps == list(range(41 if n == 0 else 21))
    np.testing.assert_array_equal(open_record(path)["head"].charge[:, 0], steps)


def test_a_disk_that_fails_and_comes_back(tmp_path: Path, fail_at: Callable[[int, BaseException], None]) -> None:
    path, optimizer = tmp_path / "a", fake()
    recorder = Recorder(optimizer, path)
    train(optimizer, 3)
    for n in (0, 3, 10, n_writes_of_a_flush() - 1):
        fail_at(n, OSError(28, "No space left on device"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(optimizer, 1)
            recorder.flush()
        assert [warning.category for warning in told] == ([RuntimeWarning] if n == 0 else [])
        if told:
            assert str(path) in str(told[0].message)
            assert "No space left on device" in str(told[0].message)
        assert open_record(path).steps.tolist() == [0]
    fail_at(10**9, OSError())
    train(optimizer, 1)
    recorder.close()
    np.testing.assert_equal(contents(path), contents(recorded(tmp_path / "whole", 8)))


def test_a_disk_that_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: Any) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    path, optimizer = tmp_path / "a", fake()
    fail_at(10**9, OSError())
    recorder = Recorder(optimizer, path)
    fail_at(0, OSError(5, "Input/output error"))
    with pytest.warns(RuntimeWarning, match="Input/output error") as told:
        train(optimizer, 200)
        recorder.close()
    assert len(told) == 1
    assert len(recorder._writer._waiting) == 64  # bounded memory
    assert open_record(path).steps.tolist() == [0]


def test_a_disk_that_fails_at_the_start_is_an_error(tmp_path: Path, fail_at: Any) -> None:
    fail_at(0, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        Recorder(fake(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that records to tmp_path / "a", with a forked child beside it, as data loaders have."""
    code = f"""
import os, sys, time, pathlib, test_recorder
path = pathlib.Path({str(tmp_path / "a")!r})
recorder = test_recorder.Recorder(test_recorder.fake(), path)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
recorder.close()
print("closed", flush=True)
sys.stdin.readline()
"""
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process
        process.kill()
        os.kill(child, signal.SIGKILL)


def assert_others_may_not_write(path: Path) -> None:
    before = every_byte(path)
    for exists in ("resume", "overwrite"):
        with pytest.raises(BlockingIOError, match=f"another process is writing to the record {str(path)!r}; end it or"):
            Recorder(fake(), path, exists=exists)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half-made beside it
    assert every_byte(path) == before


def test_one_process_at_a_time_writes(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    assert other_process.stdin is not None
    assert other_process.stdout is not None
    assert_others_may_not_write(tmp_path / "a")
    print(file=other_process.stdin, flush=True)
    assert other_process.stdout.readline() == "closed\n"
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a", exists="resume"), Recorder(fake(), tmp_path / "b"):
        train(optimizer, 2)
    assert open_record(tmp_path / "a").steps.tolist() == [0, 1, 2]


def test_a_killed_process_holds_nothing(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    """Even if a child of it lives on."""
    assert_others_may_not_write(tmp_path / "a")
    other_process.kill()
    other_process.wait()
    Recorder(fake(), tmp_path / "a", exists="overwrite").close()


@pytest.mark.parametrize("exists", ["resume", "overwrite"])
def test_a_lock_outlives_the_recorder_that_was_replaced(tmp_path: Path, exists: Any) -> None:
    """The record is held until the last Recorder is closed, or gone."""
    first = fake()
    recorder = Recorder(first, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = Recorder(fake(), tmp_path / "a", exists=exists)
    recorder.close()
    key = (tmp_path / "a" / "initial" / "zarr.json").stat()
    assert locking._held[key.st_dev, key.st_ino].count == 1
    second.close()
    assert (key.st_dev, key.st_ino) not in locking._held
    recorder = Recorder(first, tmp_path / "b")
    key = (tmp_path / "b" / "initial" / "zarr.json").stat()
    assert locking._held[key.st_dev, key.st_ino].count == 1
    del recorder, first
    gc.collect()
    assert (key.st_dev, key.st_ino) not in locking._held


def test_file_systems_without_locks_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locking, "flock", refuse)
    assert open_record(recorded(tmp_path / "a", 2)).steps.tolist() == [0, 1, 2]


def access(file: int) -> int:
    return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE


def flock_as_over_nfs(file: int, operation: int) -> None:
    if access(file) == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fcntl.flock(file, operation)


@pytest.mark.parametrize(
    ("flock", "mode"), [(fcntl.flock, os.O_RDONLY), (flock_as_over_nfs, os.O_RDWR)], ids=["local", "NFS"]
)
def test_only_over_nfs_a_lock_needs_a_file_open_to_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Any, mode: int
) -> None:
    """A file system with such a file cannot be made read-only."""
    monkeypatch.setattr(locking, "flock", flock)
    path = tmp_path / "file"
    path.touch()
    with Lock(path) as lock, path.open("r+") as other:
        assert lock._held is not None
        assert access(lock._held._file) == mode
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def train_until_killed(path: Path, checkpoint: Path) -> None:
    """What the killed processes do: resume from the last checkpoint, and go on for ever."""
    noetherperf.record.writer.FLUSH_SECONDS = 0.0
    noetherperf.record.layout.CHUNK_VALUES = 8
    optimizer = fake()
    if checkpoint.exists():
        optimizer.step_count = int(checkpoint.read_text())
    with Recorder(optimizer, path, exists="resume"):
        while True:
            train(optimizer, 3)
            new = checkpoint.with_suffix(".new")
            new.write_text(str(optimizer.state_dict()["step_count"]))
            new.replace(checkpoint)


def kill_many(path: Path, n_kills: int) -> None:
    """Fork one training process after another; kill two as they start, the others after a new checkpoint, at random.

    Forking from a process that imported everything, but started no thread, saves importing it for each.
    """
    dice = random.Random(0)
    checkpoint = path.with_name("checkpoint")
    for kill in range(n_kills):
        checkpoint_before = checkpoint.read_text() if checkpoint.exists() else ""
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                train_until_killed(path, checkpoint)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(1)
        while kill >= 2 and (checkpoint.read_text() if checkpoint.exists() else "") == checkpoint_before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit("a training process ended by itself")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = f"import test_recorder, pathlib; test_recorder.kill_many(pathlib.Path({str(path)!r}), 6)"
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": search}, timeout=120)
    record = open_record(path)
    n_steps = len(record.steps) - 1
    assert n_steps >= int((tmp_path / "checkpoint").read_text()) > 10
    np.testing.assert_equal(contents(path), contents(recorded(tmp_path / "whole", n_steps)))


def test_an_empty_directory_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    monkeypatch.chdir(own)
    before = own.stat()
    Recorder(fake(), ".").close()
    assert (own.stat().st_ino, own.stat().st_mode) == (before.st_ino, before.st_mode)
    assert Path.cwd() == own
    assert open_record(".").steps.tolist() == [0]
    assert not [entry for entry in own.iterdir() if entry.name.startswith(".")]
