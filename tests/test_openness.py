"""Laws of AdamW that are open, with the reason; and measurements that only their own update rule goes on with."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import noetherperf as nperf
from noetherperf import distributed
from noetherperf.optim.adam import Adam, AdamW

SYMMETRIES = (
    nperf.Rescale(
        "hidden", inward=[nperf.Part("0.weight", 0), nperf.Part("0.bias", 0)], outward=[nperf.Part("2.weight", 1)]
    ),
    nperf.Translation("columns", [nperf.Part("2.weight", 1)]),
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for batch in range(n):
        generator = torch.Generator().manual_seed(batch)
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), torch.randint(3, (8,), generator=generator)).backward()
        optimizer.step()


def assert_budget(readout: nperf.Readout) -> None:
    """The budget is an identity, whether the law is open or not."""
    for law in readout.values():
        terms = law.initial.abs() + sum(x.abs() for x in (law.discrete.free, law.discrete.forced, law.discrete.defect))
        assert (law.rounding.abs() <= 1e-13 * terms).all(), law.name


def in_groups(net: nn.Module, **of_weights: Any) -> AdamW:
    """Biases in a parameter group of their own, as usual."""
    named = dict(net.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named.items() if p.ndim > 1], **of_weights},
        {"params": [(name, p) for name, p in named.items() if p.ndim == 1]},
    ]
    return AdamW(groups, lr=0.01, weight_decay=0.1, symmetries=SYMMETRIES)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("lr", 0.02, "lr (0.02 and 0.01)"),
        ("weight_decay", 0.0, "weight_decay (0.0 and 0.1)"),
        ("betas", (0.8, 0.999), "beta1 (0.8 and 0.9)"),
        ("betas", (0.9, 0.99), "beta2 (0.99 and 0.999)"),
        ("eps", 1e-4, "eps (0.0001 and 1e-08)"),
        ("amsgrad", True, "amsgrad (True and False)"),
        ("maximize", True, "maximize (True and False)"),
    ],
)
def test_a_symmetry_across_groups_with_other_options_is_open(option: str, value: object, shown: str) -> None:
    net = network()
    optimizer = in_groups(net, **{option: value})
    steps(net, optimizer, 3)
    readout = optimizer.readout()
    assert readout["hidden"].reason == f"in step 1 0.weight and 0.bias had different {shown}"
    assert readout["columns"].closed
    assert_budget(readout)


def test_groups_with_the_same_options_are_one() -> None:
    net = network()
    optimizer = in_groups(net)
    for group in optimizer.param_groups:
        group["maximize"] = True
    steps(net, optimizer, 3)
    assert all(law.closed for law in optimizer.readout().values())
    optimizer.param_groups[1]["lr"] = 0.005
    steps(net, optimizer, 1)
    assert optimizer.readout()["hidden"].reason == "in step 4 0.weight and 0.bias had different lr (0.01 and 0.005)"


def test_coupled_decay_has_no_law() -> None:
    net = network()
    optimizer = Adam(net.named_parameters(), symmetries=SYMMETRIES)
    steps(net, optimizer, 2)
    assert all(law.closed for law in optimizer.readout().values())
    optimizer.param_groups[0]["weight_decay"] = 0.1
    steps(net, optimizer, 1)
    readout = optimizer.readout()
    for law in readout.values():
        assert law.reason.startswith(
            "the weight decay (0.1) is added to the gradient and divided with it, which no law"
        )
    assert_budget(readout)


def measured_by(make: Any) -> Any:
    net = network()
    optimizer = make(net.named_parameters(), symmetries=SYMMETRIES)
    steps(net, optimizer, 3)
    return optimizer


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(nperf.SGD, AdamW), (Adam, nperf.SGD)])
def test_a_measurement_of_another_rule_is_refused(saved_by: Any, loaded_by: Any) -> None:
    saved, optimizer = measured_by(saved_by), measured_by(loaded_by)
    names = saved.rule.name, optimizer.rule.name
    says = re.escape(f"it was measured with the update rule {names[0]!r}, and this optimizer's is {names[1]!r}")
    before = copy.deepcopy(optimizer.state_dict()["measurement"])
    with pytest.raises(ValueError, match=says):
        optimizer.load_measurement(saved.state_dict()["measurement"])
    with pytest.raises(ValueError, match=says):
        distributed.set_measurement_state_dict(optimizer, distributed.get_measurement_state_dict(saved))
    with pytest.raises(ValueError, match="it is the checkpoint of another kind of optimizer"):
        optimizer.load_state_dict(saved.state_dict())
    after = optimizer.state_dict()["measurement"]
    assert after["id"] == before["id"]
    for one, two in zip(after["tensors"], before["tensors"], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_measurement_without_the_name_of_its_rule_is_of_sgd() -> None:
    saved = measured_by(nperf.SGD).state_dict()["measurement"]
    assert saved.pop("rule") == "sgd"
    del saved["openness"]["by_rule"]
    optimizer = measured_by(nperf.SGD)
    optimizer.load_measurement(saved)
    assert optimizer.measurement_id == saved["id"]
    with pytest.raises(ValueError, match="measured with the update rule 'sgd'"):
        measured_by(AdamW).load_measurement(saved)
