"""Stops in the middle of training, resumes in a new process, and ends with the same bits as uninterrupted training.

    python examples/resume.py

A checkpoint holds the model, the optimizer, the scheduler and the state of the random number generator. The program
starts itself three times: for the whole training, for the first half, and for the second half from the checkpoint.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from tqdm import trange

from efcp import SparseMFAC
from efcp.analysis.data import load_data


def train(arguments: argparse.Namespace) -> None:
    """Trains from the checkpoint `arguments.start`, if any, up to `arguments.epochs`, and saves a checkpoint."""
    data = load_data("mnist5k", train_size=arguments.train_size).train
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = SparseMFAC(model.parameters(), lr=1.3 / 32, window=32, density=0.02, damping=1e-3, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    first = 0
    if arguments.start:
        checkpoint = torch.load(arguments.start, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        torch.set_rng_state(checkpoint["random"])
        first = checkpoint["epochs"]

    for _ in trange(first, arguments.epochs, desc=f"epochs {first + 1} to {arguments.epochs}"):
        for batch in torch.randperm(len(data.labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
            optimizer.step()
        scheduler.step()

    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "epochs": arguments.epochs,
    }
    torch.save(checkpoint, arguments.save)


def compare(arguments: argparse.Namespace) -> None:
    """Trains in one piece and in two halves, and compares all tensors of the final checkpoints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(epochs: int, save: Path, *others: str) -> None:
            """Trains in a process of its own."""
            options = ["--epochs", str(epochs), "--train-size", str(arguments.train_size), "--save", str(save)]
            subprocess.run([sys.executable, __file__, *options, *others], check=True)

        run(arguments.epochs, folder / "whole.pt")
        run(arguments.epochs // 2, folder / "half.pt")
        run(arguments.epochs, folder / "resumed.pt", "--start", str(folder / "half.pt"))
        whole, half, resumed = (tensors(torch.load(folder / f"{part}.pt")) for part in ("whole", "half", "resumed"))

    same = sum(torch.equal(whole[key], resumed[key]) for key in whole)
    early = sum(torch.equal(whole[key], half[key]) for key in whole)
    print(f"resumed: {same} of {len(whole)} tensors are as in the whole training, bit for bit")
    print(f"when it stopped: {early} of {len(whole)}")


def tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists, by their paths."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: leaf for key, value in items for name, leaf in tensors(value, f"{path}/{key}").items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=3000, help="images to train on, at most 3000")
    parser.add_argument("--save", help="train here, up to --epochs, and save a checkpoint there")
    parser.add_argument("--start", help="the checkpoint to start from")
    arguments = parser.parse_args()
    if arguments.save:
        train(arguments)
    else:
        compare(arguments)
