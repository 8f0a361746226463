"""A compressor of your own, without editing the package: from each matrix it keeps the rows with the largest norms.

    python examples/custom_compressor.py

In a linear layer, a row holds the weights of one neuron. One position is stored for a whole row, while TopK stores one
for each entry. What is not kept goes into the error, which is added to the next gradient. The program compares both
compressors on MNIST at the same density.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import trange

import efcp


@dataclass(frozen=True)
class TopRows(efcp.Compressor):
    """Keeps the rows with the largest norms: a share `density` of them, rounded up.

    Options are the fields of a frozen dataclass. They become options of the param groups.
    """

    density: float

    def allocate(self, param: Tensor, window_size: int) -> dict[str, Tensor]:
        rows = len(param) if param.dim() > 0 else 1
        columns, kept = param.numel() // rows, math.ceil(self.density * rows)
        return {
            "values": torch.zeros(window_size, kept, columns, dtype=param.dtype, device=param.device),
            "positions": torch.zeros(window_size, kept, dtype=torch.int64, device=param.device),
            "error": torch.zeros(rows, columns, dtype=param.dtype, device=param.device),
        }

    def row_names(self, param: Tensor) -> tuple[str, ...]:
        return "values", "positions"

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> efcp.Window:
        return efcp.Separate([TopRowsWindow(state["values"], state["positions"], state["error"]) for state in states])


@dataclass(frozen=True)
class TopRowsWindow(efcp.SingleWindow):
    """The last m gradients of a parameter of R × C elements. The tensors are the state, changed in place."""

    values: Tensor  # (m, k, C)
    positions: Tensor  # (m, k)
    error: Tensor  # (R, C)

    def __len__(self) -> int:
        return len(self.values)

    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> None:
        total = self.error + torch.where(finite, grad, 0.0).view_as(self.error)
        positions = total.norm(dim=1).topk(self.positions.shape[1]).indices
        kept = torch.where(finite, total[positions], 0.0)  # a step with an Inf or NaN leaves a row of zeros
        self.values.index_copy_(0, slot, kept.unsqueeze(0))
        self.positions.index_copy_(0, slot, positions.unsqueeze(0))
        self.error.copy_(total.index_add_(0, positions, kept, alpha=-1))

    def clear(self, slot: Tensor) -> None:
        self.values.index_fill_(0, slot, 0.0)

    def dots(self, slot: Tensor) -> Tensor:
        newest = torch.zeros_like(self.error, dtype=torch.float64)
        newest.index_copy_(0, self.positions[slot].squeeze(0), self.values[slot].squeeze(0).double())
        return (self.values.double() * newest[self.positions]).sum((1, 2))

    def apply_(self, target: Tensor, weights: Tensor, factor: Tensor) -> None:
        weighted = self.values.to(target.dtype) * weights.to(target.dtype)[:, None, None]
        target.mul_(factor).view_as(self.error).index_add_(0, self.positions.flatten(), weighted.flatten(0, 1))


def main() -> None:
    from efcp.analysis.data import load_data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=3000, help="images to train on, at most 3000")
    arguments = parser.parse_args()
    data = load_data("mnist5k", train_size=arguments.train_size)
    images, labels = data.train.inputs.flatten(1), data.train.labels

    for compressor in (TopRows(density=0.05), efcp.TopK(density=0.05)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = efcp.EFCP(model.parameters(), 1.3 / 32, compressor, efcp.MFAC(damping=1e-3), window=32)
        for _ in trange(arguments.epochs, desc=type(compressor).__name__, unit="epoch"):
            for batch in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracy = (model(data.test.inputs.flatten(1)).argmax(1) == data.test.labels).double().mean().item()
        size = efcp.memory_report(optimizer).per_parameter
        print(f"{compressor}: test accuracy {100 * accuracy:.1f}%, state of {size:.1f} bytes per parameter")


if __name__ == "__main__":
    main()
