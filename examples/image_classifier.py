"""A small CNN on 5,000 images of MNIST: SparseMFAC replaces AdamW, and the rest of the training loop stays the same.

    python examples/image_classifier.py

Prints the test accuracy of both after the same number of epochs, and the memory that their state takes.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import efcp
from efcp.analysis.data import load_data

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--train-size", type=int, default=3000, help="images to train on, at most 3000")
arguments = parser.parse_args()

data = load_data("mnist5k", train_size=arguments.train_size)


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Trains with a learning rate that falls to zero, and returns the test accuracy in per cent."""
    loader = DataLoader(TensorDataset(data.train.inputs, data.train.labels), batch_size=64, shuffle=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))
    for epoch in range(arguments.epochs):
        progress = tqdm(loader, desc=f"{type(optimizer).__name__}, epoch {epoch + 1}")
        for images, labels in progress:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        return 100 * (model(data.test.inputs).argmax(1) == data.test.labels).double().mean().item()


for name in ("AdamW", "SparseMFAC"):
    model = new_model()
    if name == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        # A good start is lr = 1.3 / window and damping = 1e-3.
        optimizer = efcp.SparseMFAC(model.parameters(), lr=1.3 / 32, window=32, density=0.02, damping=1e-3)
    accuracy = train(model, optimizer)
    size = efcp.memory_report(optimizer).per_parameter
    print(f"{name}: test accuracy {accuracy:.1f}%, state of {size:.1f} bytes per parameter")
