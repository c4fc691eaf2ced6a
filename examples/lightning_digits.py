"""The digits under PyTorch Lightning: charges in its loggers and in a record.

pip install 'noetherperf[run,integrations]'
python examples/lightning_digits.py --out runs/lightning
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import noetherperf as nperf
from noetherperf.integrations.lightning import ChargeCallback
from noetherperf.recipes.digits import load
from noetherperf.recipes.models import digits_network


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        network, self.symmetries = digits_network(channels=4, hidden=16)
        for name, layer in network.named_children():  # so that parameters have the names that the symmetries use
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.children():
            images = layer(images)
        return images

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return nperf.SGD(self.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, symmetries=self.symmetries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    data = load()
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=128, shuffle=True)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=CSVLogger(args.out, name="logs"),
        callbacks=[ChargeCallback(every=10, record=args.out / "record.zarr", exists="overwrite")],
        default_root_dir=args.out,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), loader)
    print(nperf.open_record(args.out / "record.zarr")["fc1->fc2"])


if __name__ == "__main__":
    main()
