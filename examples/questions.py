"""The five questions of README.md, answered for a network that learns handwritten digits.

pip install 'noetherperf[run]'
python examples/questions.py
"""

import torch
from torch import nn
from torch.nn import functional

import noetherperf as nperf
from noetherperf.recipes.digits import load
from noetherperf.recipes.models import digits_network

torch.set_num_threads(1)
data = load()  # scikit-learn's
images, labels = data.train_images, data.train_labels


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return digits_network()[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int = 2000) -> None:
    torch.manual_seed(1)
    for _ in range(n_steps):
        rows = torch.randint(len(labels), (32,))
        logits = model(images[rows].to(next(model.parameters()).dtype))
        loss = functional.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


model = make()
symmetries = digits_network()[1]  # or found: nperf.find_symmetries(model, images[:8])
lr, weight_decay = 2e-3, 0.5
optimizer = nperf.AdamW(model.named_parameters(), lr=lr, weight_decay=weight_decay, symmetries=symmetries)
with nperf.Recorder(optimizer, "runs/laws.zarr", every=10, exists="overwrite"):
    train(model, optimizer)
laws = nperf.open_record("runs/laws.zarr")

print("What is each layer's effective learning rate, and has it settled?")
settled = nperf.theory.adamw_equilibrium(1, lr, weight_decay).angle
for name in ("conv1", "conv2"):
    rate, angle = (laws[name][key][-50:].median() for key in ("effective_lr", "angular_update"))
    print(f"{name}: η/|θ| is {rate:.4f}; a step turns it by {angle:.4f} radians, and by {settled:.4f} once settled")

print("Is weight decay winning, or growth?")
for name in ("conv1", "conv2"):
    charge = laws[name]["charge"][-51:].mean("group")  # |θ|² of a filter, the last 500 steps
    net, decay = (charge[-1] - charge[0]) / 500, 2 * lr * weight_decay * charge.mean()
    winner = "growth" if net > 0 else "decay"
    print(f"{name}: decay takes {decay:.1e} a step, updates add {net + decay:.1e}: {winner} wins")

print("Are updates lost in bfloat16?")
for lr in (1e-3, 1e-5):
    model = make().bfloat16()
    optimizer = nperf.AdamW(model.named_parameters(), lr=lr, symmetries=nperf.layers(model))
    train(model, optimizer, n_steps=300)
    law = optimizer.readout()["fc1.weight"]
    print(f"lr {lr}: {abs(law.rounding / (law.discrete.budget - law.initial)).item():.0%} of fc1's change is lost")

model = make()
sgd = nperf.SGD(model.named_parameters(), lr=0.2, momentum=0.9, symmetries=nperf.neurons(model))
with nperf.Recorder(sgd, "runs/units.zarr", every=10, exists="overwrite", series=["charge", "sq_g"]):
    train(model, sgd, n_steps=1000)
units = nperf.open_record("runs/units.zarr")

print("Which units are dead, which explode?")
for name in units:
    dead = (units[name]["sq_g"][-30:] == 0).all("step")  # no gradient in the last 300 steps
    growth = (units[name]["charge"][-1] / units[name]["initial"]) ** 0.5
    print(f"{name}: {int(dead.sum())} of {dead.size} units are dead; one has grown {growth.max():.0f} times as long")

model = make()
model.relu4 = nn.GELU()  # was ReLU


def closure() -> torch.Tensor:
    return functional.cross_entropy(model(images[:128]), labels[:128])


print("Do my symmetries hold?")
print(nperf.check_constraints(model, closure, symmetries, hessian=False, progress=False))
