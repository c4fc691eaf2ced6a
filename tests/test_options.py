"""Options that are no numbers: an error that names the option, before anything changes, whenever they are set."""

import copy
from typing import Any

import pytest
import torch
from training import ADAMW, SGD, SYMMETRIES, Kind, assert_same_readout, loss_of, make_net, train

import noetherperf as nperf

NUMBERS = [(SGD, ("lr", "momentum", "dampening", "weight_decay")), (ADAMW, ("lr", "eps", "weight_decay"))]
TWO = torch.tensor([0.1, 0.2])
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "{} must be a number, not None"),
    "text": ("0.1", TypeError, "{} must be a number, not '0.1'"),
    "list": ([0.1], TypeError, r"{} must be a number, not \[0.1\]"),
    "complex": (torch.tensor(1j), TypeError, r"{} must be a number, not tensor"),
    "two": (TWO, ValueError, "Tensor {} must be 1-element"),
    "none of them": (torch.empty(0), ValueError, "Tensor {} must be 1-element"),
}
BETAS: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "betas must be two numbers, not None"),
    "one": ((0.9,), ValueError, "betas must be two numbers, not 1"),
    "text": (("x", 0.9), TypeError, r"betas\[0\] must be a number, not 'x'"),
    # Torch has these words, and compares the tensor with 1 before it comes to them.
    "two": ((TWO, TWO), ValueError, r"Tensor betas\[0\] must be 1-element"),
    "none of them": ((torch.tensor(0.9), torch.empty(0)), ValueError, r"Tensor betas\[1\] must be 1-element"),
}
CASES = [
    pytest.param(kind, name, value, error, message.format(name), id=f"{kind.ours.__name__}-{name}-{case}")
    for kind, names in NUMBERS
    for name in names
    for case, (value, error, message) in BAD.items()
] + [pytest.param(ADAMW, "betas", *bad, id=f"AdamW-betas-{case}") for case, bad in BETAS.items()]
each_case = pytest.mark.parametrize(("kind", "name", "value", "error", "message"), CASES)


@each_case
def test_at_the_construction(kind: Kind, name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        kind.mine(make_net("cpu"), "reference", **{name: value})


@each_case
def test_set_late(kind: Kind, name: str, value: object, error: type[Exception], message: str) -> None:
    net = make_net("cpu")
    optimizer = kind.mine(net, "reference", **kind.options)
    train(net, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(net, 2).backward()
    before, state = copy.deepcopy(list(net.parameters())), copy.deepcopy(optimizer.state_dict()["state"])
    measured, group = optimizer.readout(), optimizer.param_groups[0]
    good, group[name] = group[name], value
    with pytest.raises(error, match=f"^{message}"):
        optimizer.step()
    group[name] = good
    assert all(map(torch.equal, before, net.parameters()))
    for slot, kept in zip(optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert slot.keys() == kept.keys()
        assert all(torch.equal(slot[key], kept[key]) for key in kept)
    assert_same_readout(optimizer.readout(), measured)
    other = make_net("cpu")
    undisturbed = kind.mine(other, "reference", **kind.options)
    train(other, undisturbed, range(3))
    optimizer.step()
    assert_same_readout(optimizer.readout(), undisturbed.readout())


@pytest.mark.parametrize(("value", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["carry", "decay"])
def test_by_hand_for_a_probe(name: str, value: Any, error: type[Exception], message: str) -> None:
    net = make_net("cpu")
    optimizer = SGD.torchs(net, lr=0.1)
    for given in (value, lambda group: value):
        if given is None:  # not given
            continue
        with pytest.raises(error, match=f"^{message.format(name)}"):
            by_hand: dict[str, Any] = {name: given}
            nperf.Probe(optimizer, SYMMETRIES, net.named_parameters(), **by_hand)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(("kind", "name"), [(SGD, "momentum"), (ADAMW, "eps")], ids=["SGD", "AdamW"])
def test_set_late_in_an_optimizer_with_a_probe(kind: Kind, name: str) -> None:
    """The Probe refuses before the step that torch's optimizer would break off half way."""
    net = make_net("cpu")
    optimizer = kind.torchs(net, **kind.options)
    probe = nperf.Probe(optimizer, SYMMETRIES, net.named_parameters())
    train(net, optimizer, range(2))
    before, measured, group = copy.deepcopy(list(net.parameters())), probe.readout(), optimizer.param_groups[0]
    good, group[name] = group[name], None
    with pytest.raises(TypeError, match=f"^{name} must be a number, not None"):
        optimizer.step()
    group[name] = good
    assert all(map(torch.equal, before, net.parameters()))
    assert_same_readout(probe.readout(), measured)


def test_what_is_no_class_is_not_known() -> None:
    net = make_net("cpu")
    with pytest.raises(ValueError, match=r"^like=\[1\] is not known; it must be one of"):
        nperf.Probe(SGD.torchs(net, lr=0.1), SYMMETRIES, net.named_parameters(), like=[1])  # type: ignore[arg-type]
