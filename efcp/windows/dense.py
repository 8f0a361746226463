"""The dense window: gradients are kept as they are. State of a parameter: rows (m, n), in its dtype."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efcp.kernels import accumulation_dtype
from efcp.windows.base import Compressor, Separate, SingleWindow, Window


@dataclass(frozen=True)
class Identity(Compressor):
    """Compresses nothing: dense M-FAC (arXiv 2107.03356) and dense GGT (arXiv 1806.02958)."""

    names = ("rows",)

    def allocate(self, param: Tensor, window: int) -> dict[str, Tensor]:
        return {"rows": torch.zeros(window, param.numel(), dtype=param.dtype, device=param.device)}

    def rows_name(self, param: Tensor) -> str:
        return "rows"

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> Window:
        return Separate([DenseWindow(state["rows"]) for state in states])


@dataclass(frozen=True)
class DenseWindow(SingleWindow):
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> Tensor:
        newest = torch.where(finite, grad, 0.0)
        self.rows.index_copy_(0, slot, newest.to(self.rows.dtype).unsqueeze(0))
        dtype = accumulation_dtype(self.rows.dtype)
        dots = torch.zeros(len(self.rows), dtype=torch.float64, device=grad.device)
        for columns in self._parts():
            dots += torch.mv(self.rows[:, columns].to(dtype), newest[columns].to(dtype))
        return dots

    def clear(self, slot: Tensor) -> None:
        self.rows.index_fill_(0, slot, 0.0)

    def apply_(self, target: Tensor, weights: Tensor, scale: Tensor) -> None:
        dtype = accumulation_dtype(self.rows.dtype)
        weights, scale = weights.to(dtype), scale.to(dtype)
        for columns in self._parts():
            total = torch.addmv(target[columns].to(dtype) * scale, self.rows[:, columns].to(dtype).t(), weights)
            target[columns].copy_(total)

    def _parts(self) -> Iterator[slice]:
        """Columns in parts, so that no temporary grows with the parameter, and sums over many are exact enough."""
        window, numel = self.rows.shape
        step = max(4096, (1 << 22) // window)
        return (slice(first, first + step) for first in range(0, numel, step))
