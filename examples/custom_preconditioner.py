"""A preconditioner of your own, without editing the package: each gradient is scaled to length one.

    python examples/custom_preconditioner.py

A preconditioner gets the Gram matrix S of the window's rows, and returns the weights of the rows in the update. Here
only the newest row c has a weight, 1 / ‖c‖, so the update is c / ‖c‖. The program compares it with M-FAC on MNIST.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import trange

import efcp
from efcp.gram import Gram


@dataclass(frozen=True)
class Normalized(efcp.Preconditioner):
    """f(S) e_t = e_t / (√S_tt + ε) for the newest row t. Options are the fields of a frozen dataclass."""

    eps: float = 1e-8  # keeps the weight of a zero row finite

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        norm = gram.matrix.diagonal()[slot].sqrt()  # (1,)
        return torch.zeros_like(gram.matrix[0]).index_copy_(0, slot, 1 / (norm + self.eps))


def main() -> None:
    from efcp.analysis.data import load_data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=3000, help="images to train on, at most 3000")
    arguments = parser.parse_args()
    data = load_data("mnist5k", train_size=arguments.train_size)
    images, labels = data.train.inputs.flatten(1), data.train.labels

    for preconditioner, lr in ((Normalized(), 0.1), (efcp.MFAC(damping=1e-3), 1.3 / 32)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = efcp.EFCP(model.parameters(), lr, efcp.TopK(density=0.02), preconditioner, window=32)
        for _ in trange(arguments.epochs, desc=type(preconditioner).__name__, unit="epoch"):
            for batch in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracy = (model(data.test.inputs.flatten(1)).argmax(1) == data.test.labels).double().mean().item()
        print(f"{preconditioner}: test accuracy {100 * accuracy:.1f}%")


if __name__ == "__main__":
    main()
