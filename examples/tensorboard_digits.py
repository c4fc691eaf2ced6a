"""The digits in a plain loop, with every symmetry's scalars in TensorBoard.

pip install 'noetherperf[run,integrations]'
python examples/tensorboard_digits.py --out runs/tensorboard
tensorboard --logdir runs/tensorboard
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import noetherperf as nperf
from noetherperf.integrations.tensorboard import add_readout
from noetherperf.recipes.digits import load
from noetherperf.recipes.models import digits_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tensorboard"))
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = load()
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=128, shuffle=True)
    model, symmetries = digits_network(channels=4, hidden=16)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, symmetries=symmetries)
    with SummaryWriter(args.out) as writer:
        for _ in range(args.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
            writer.add_scalar("loss", loss.item(), optimizer.step_count)
            add_readout(writer, optimizer.readout())


if __name__ == "__main__":
    main()
