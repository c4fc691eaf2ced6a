"""The main job without its command line: data, network, symmetries, training loop."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from noetherperf.detect import find_symmetries
from noetherperf.measure.charges import ChargeReadout
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.experiment import MODELS
from noetherperf.recipes.main_job import train
from noetherperf.recipes.models import digits_network
from noetherperf.recipes.resnet import resnet18
from noetherperf.recipes.settings import Settings
from noetherperf.recipes.train import Loop, accuracy
from noetherperf.recipes.vgg import centre, vgg16
from noetherperf.record import open_record, relative_error
from noetherperf.symmetry import Part, Symmetry

SHORT = Settings(epochs=5, every=20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The network is too small for more, and tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_digits_are_split_evenly_and_normalised() -> None:
    data = digits.load(seed=3)
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    shares = [labels.bincount(minlength=10) / len(labels) for labels in (data.train_labels, data.test_labels)]
    torch.testing.assert_close(*shares, atol=2e-3, rtol=0)
    assert abs(data.train_images.mean().item()) < 1e-5
    assert abs(data.train_images.std(correction=0).item() - 1) < 1e-5


def test_no_digit_is_lost_or_in_both_parts() -> None:
    data = digits.load(dtype=torch.float64)
    together = torch.cat([data.train_images, data.test_images]).flatten(1)
    low, high = together.min(), together.max()
    pixels = ((together - low) / (high - low) * 16).round()  # back to the 17 grey levels
    original = torch.as_tensor(load_digits().data)
    assert sorted(pixels.tolist()) == sorted(original.tolist())


def test_the_seed_draws_the_split() -> None:
    first, again, other = digits.load(1), digits.load(1), digits.load(2)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)


def one_step(model: nn.Sequential, symmetries: list[Symmetry]) -> SGD:
    """One measured step from perturbed parameters, so that no bias is zero and no gain is one."""
    optimizer = SGD(model.named_parameters(), lr=0.01, symmetries=symmetries, backend="reference")
    data = digits.load(dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    nn.functional.cross_entropy(model(data.train_images[:50]), data.train_labels[:50]).backward()
    optimizer.reset_measurement()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("channels", "hidden"), [(16, 64), (3, 5)])
def test_the_networks_symmetries_hold(channels: int, hidden: int) -> None:
    torch.manual_seed(0)
    model, symmetries = digits_network(channels, hidden)
    for module in model.double():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-14  # scale is exact for eps = 0 only
    readout = one_step(model, symmetries).readout()
    assert {charge.symmetry.kind for charge in readout.values()} == {"translation", "scale", "rescale"}
    for name, charge in readout.items():
        assert charge.moments["sq_g"].sum() != 0, name  # there is a gradient for the constraint to hold on
        assert charge.relative_defect.abs().max() < 1e-10, name


def test_batchnorms_eps_shows_in_the_scale_symmetries_alone() -> None:
    torch.manual_seed(0)
    model, symmetries = digits_network()
    readout = one_step(model.double(), symmetries).readout()
    for name, charge in readout.items():
        broken = charge.relative_defect.abs().max() > 1e-8
        assert broken == (charge.symmetry.kind == "scale"), name


def test_every_parameter_has_a_symmetry() -> None:
    model, symmetries = digits_network()
    named = {part.parameter for symmetry in symmetries for part in symmetry.parts}
    assert named == {name for name, _ in model.named_parameters()}


def claims(symmetries: Sequence[Symmetry]) -> set[tuple[str, frozenset[Part]]]:
    """What symmetries say, whatever they are called, in whatever order and with whichever sign their parts stand."""
    found: set[tuple[str, frozenset[Part]]] = set()
    for symmetry in symmetries:
        first = min(symmetry.parts, key=lambda part: part.parameter)
        parts = frozenset(replace(part, weight=part.weight / first.weight) for part in symmetry.parts)
        found.add((symmetry.kind, parts))
    return found


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, list[Symmetry]]], int]] = {
    "digits": (lambda: digits_network(6, 9), 8),
    **{
        name: (lambda build=build: build(n_classes=5, image_size=64, width=1 / 16), 64)  # type: ignore[misc]
        for name, build in MODELS.items()
    },
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_what_is_written_by_hand_is_what_a_search_finds(name: str) -> None:
    build, size = NETWORKS[name]
    model, symmetries = build()
    assert len({symmetry.name for symmetry in symmetries}) == len(symmetries)
    found = find_symmetries(model, torch.randn(4, 1, size, size))
    assert claims(symmetries) == claims(found)
    assert {symmetry.name for symmetry in symmetries} == {symmetry.name for symmetry in found}


def test_resnet18_is_resnet18() -> None:
    """As in the paper, with the parameters of torchvision's for 1,000 classes but for a stem of 3×3."""
    model, symmetries = resnet18(n_classes=1000, in_channels=3)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 17 + 3
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 64 * 3 * (7 * 7 - 3 * 3)
    assert {name for name, _ in model.named_parameters()} == {p.parameter for s in symmetries for p in s.parts}
    kinds = [symmetry.kind for symmetry in symmetries]
    assert {kind: kinds.count(kind) for kind in kinds} == {"scale": 20, "rescale": 8 + 4, "translation": 3 + 2}
    assert resnet18(width=1 / 16, image_size=40)[0](torch.zeros(2, 1, 40, 40)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size: must be at least 8"):
        resnet18(image_size=4)


def test_a_centred_vgg_has_units_of_mean_zero_and_the_weights_it_had() -> None:
    model, _ = vgg16(batch_norm=False, width=1 / 16, image_size=32)
    weights = {name: p.clone() for name, p in model.named_parameters() if name.endswith("weight")}
    last = model.get_parameter("fc3.bias").clone()
    images = digits.load(image_size=32).train_images[:64]
    centre(model, images)
    means = []
    for module in list(model)[:-1]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, out: means.append(out.transpose(0, 1).flatten(1).mean(1)))
    model.eval()(images)
    assert len(means) == 15
    assert torch.cat(means).abs().max() < 1e-5
    for name, weight in weights.items():
        assert torch.equal(weight, model.get_parameter(name))
    assert torch.equal(last, model.get_parameter("fc3.bias"))


def test_a_loop_trains_and_tells_how_each_batch_found_it() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert math.isnan(loop.loss)
    batch = torch.eye(2), torch.tensor([1, 0])
    loss, share = loop.epoch([batch, batch])
    assert loop.n_steps == 2
    first, second = math.log(2.0), math.log1p(math.exp(-0.5))  # a step moves each weight by ±1/4
    assert loss == pytest.approx((first + second) / 2)
    assert loop.loss.item() == pytest.approx(second)
    assert share == pytest.approx(0.75)  # a tie is no answer to one of the two images, then both are right


def test_accuracy_counts_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(1.0), nn.Identity())
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(model, [(logits, labels)]) == 0.75
    assert accuracy(model, [(logits[:3], labels[:3]), (logits[3:], labels[3:])]) == 0.75  # not the mean of 1 and 0
    assert model.training


def test_a_short_training_classifies_and_is_recorded(tmp_path: Path) -> None:
    result = train(tmp_path, SHORT, progress=False)
    assert result.test_accuracy > 0.95
    assert result.train_accuracy > 0.95
    assert result.steps == 5 * 45
    record = open_record(tmp_path / "record.zarr")
    assert record.steps.tolist() == [*range(0, result.steps, 20)]
    probes = record.probes
    assert np.isnan(probes["loss"][0])  # no step, no loss yet
    assert probes["loss"][-1] < probes["loss"][1]
    assert probes["parameters"].shape == (len(record.steps), 64)
    assert (np.diff(probes["parameters"], axis=0) != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_charges_at_the_end_are_those_of_the_parameters(tmp_path: Path, dtype: str) -> None:
    result = train(tmp_path, replace(SHORT, dtype=dtype), progress=False)
    assert result.charge_error < 1e-14
    if dtype == "float64":  # what README says of it
        record = open_record(tmp_path / "record.zarr")
        for name, bound in (("fc1->fc2", 1e-13), ("fc2", 1e-11)):
            assert relative_error(record[name], "discrete").max() < bound


def test_a_wrong_charge_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charge = Symmetry.charge
    monkeypatch.setattr(Symmetry, "charge", lambda *args, **how: charge(*args, **how) * 1.0001)
    with pytest.raises(RuntimeError, match=r"measured charge of 'conv1' is 1\.0e-04 of its terms off"):
        train(tmp_path, SHORT, progress=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_that_diverges_is_recorded(tmp_path: Path, optimizer: str) -> None:
    settings = replace(SHORT, optimizer=optimizer, lr=1e30, epochs=1)
    result = train(tmp_path, settings, progress=False)
    assert math.isnan(result.loss)
    assert result.charge_error == 0.0  # both are NaN
    assert np.isnan(open_record(tmp_path / "record.zarr")["conv1"]["charge"].to_numpy()[-1]).any()


def test_a_charge_that_is_lost_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charge = Symmetry.charge
    monkeypatch.setattr(Symmetry, "charge", lambda *args, **how: charge(*args, **how) * math.inf)
    with pytest.raises(RuntimeError, match="measured charge of 'conv1' is nan of its terms off"):
        train(tmp_path, replace(SHORT, epochs=1), progress=False)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    settings = replace(SHORT, epochs=1, every=5)
    results = [
        train(tmp_path / name, replace(settings, seed=seed), progress=False)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    ]
    one, two, other = (
        open_record(tmp_path / name / "record.zarr").dataset["charge"].to_numpy() for name in ("one", "two", "other")
    )
    assert results[0].test_accuracy == results[1].test_accuracy
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_an_existing_record_is_kept_unless_asked(tmp_path: Path) -> None:
    settings = replace(SHORT, epochs=1)
    train(tmp_path, settings, progress=False)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tmp_path, settings, progress=False)
    train(tmp_path, replace(settings, every=1), exists="overwrite", progress=False)
    assert len(open_record(tmp_path / "record.zarr").steps) == 46


@pytest.mark.parametrize("name", ["epochs", "batch_size", "every"])
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
        Settings(**{name: 0})  # type: ignore[arg-type]


def test_settings_of_an_optimizer_are_its_own() -> None:
    assert Settings().options == {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": False}
    adamw = Settings(optimizer="adamw", lr=2e-3)
    assert adamw.options == {"lr": 2e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    assert {"optimizer": "adamw", "lr": 2e-3, "seed": 0}.items() <= adamw.plain.items()
    assert "momentum" not in adamw.plain
    with pytest.raises(ValueError, match="momentum: adamw has none; it has lr, betas, weight_decay"):
        Settings(optimizer="adamw", momentum=0.9)
    with pytest.raises(ValueError, match="optimizer: there is no 'lion'; there are: sgd, adam, adamw"):
        Settings(optimizer="lion")


def test_the_readmes_swap_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are executed as they stand, around a loop of one step; and those with AdamW."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## The swap\n")[2].partition("\n## ")[0]
    (swap,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)

    def one_epoch(model: nn.Module, optimizer: SGD) -> None:
        model(torch.rand(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()

    with_adamw = re.sub(r"^optimizer = .*\n# (optimizer = nperf.AdamW)", r"\1", swap, flags=re.MULTILINE)
    for lines, rule in ((swap, "sgd"), (with_adamw.replace("mine", "adamw"), "adam")):
        names: dict[str, object] = {
            "model": digits_network()[0],
            "train": one_epoch,
            "example_input": torch.rand(4, 1, 8, 8),
        }
        exec(lines, names)
        law, optimizer = names["law"], names["optimizer"]
        assert isinstance(optimizer, MeasuredOptimizer)
        assert optimizer.rule.name == rule
        assert isinstance(law, ChargeReadout)
        torch.testing.assert_close(law.charge, law.discrete.budget, rtol=1e-6, atol=0)
