"""LowRankMFAC in PyTorch Lightning: `configure_optimizers` returns it and a scheduler; Lightning does the rest.

    python examples/train_lightning.py

The program trains a small network on 5,000 images of MNIST. The window keeps factors of rank 1 of the gradient of each
weight matrix.
"""

import argparse
import tempfile
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from efcp import LowRankMFAC, memory_report
from efcp.analysis.data import Split, load_data


class Classifier(pl.LightningModule):
    def __init__(self, window: int = 64, epochs: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).double().mean())

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        window = self.hparams["window"]
        optimizer = LowRankMFAC(self.parameters(), lr=1.3 / window, window=window, rank=1, damping=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


def loader(split: Split, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(split.inputs, split.labels), batch_size=64, shuffle=shuffle)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--train-size", type=int, default=3000, help="images to train on, at most 3000")
arguments = parser.parse_args()

pl.seed_everything(0)
warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory
data = load_data("mnist5k", train_size=arguments.train_size)
with tempfile.TemporaryDirectory() as folder:
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    model = Classifier(epochs=arguments.epochs)
    trainer.fit(model, loader(data.train, shuffle=True))
    accuracy = trainer.test(model, loader(data.test), verbose=False)[0]["accuracy"]
size = memory_report(trainer.optimizers[0]).per_parameter
print(f"LowRankMFAC: test accuracy {100 * accuracy:.1f}%, state of {size:.1f} bytes per parameter")
