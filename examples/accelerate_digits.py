"""The digits under accelerate, with gradients accumulated over batches and, if asked for, in mixed precision.

pip install 'noetherperf[run,integrations]'
python examples/accelerate_digits.py --out runs/accelerate --mixed-precision bf16
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import noetherperf as nperf
from noetherperf.integrations import unwrap
from noetherperf.recipes.digits import load
from noetherperf.recipes.models import digits_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=args.mixed_precision)
    data = load()
    model, symmetries = digits_network(channels=4, hidden=16)
    model, optimizer, loader = accelerator.prepare(
        model,
        nperf.SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, symmetries=symmetries),
        DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=64, shuffle=True),
    )
    measured = unwrap(optimizer)
    with nperf.Recorder(measured, args.out / "record.zarr", every=10, exists="overwrite"):
        for _ in range(args.epochs):
            for images, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(functional.cross_entropy(model(images), labels))
                    optimizer.step()
                    optimizer.zero_grad()
    for name, law in measured.readout().items():
        accelerator.print(f"{name:14} residual {law.residual.abs().max():.1e}  rounding {law.rounding.abs().max():.1e}")


if __name__ == "__main__":
    main()
