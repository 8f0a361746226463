"""The dense window: gradients are kept as they are. State of a parameter: rows (m, n), in its dtype."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import require
from efcp.gram import is_on_cpu
from efcp.kernels import accumulation_dtype
from efcp.windows.base import Compressor, Window
from efcp.windows.batched import BatchableWindow, Batched, replace_rows

PART = 1 << 22  # entries of the window in a temporary


@dataclass(frozen=True)
class Identity(Compressor):
    """Compresses nothing: dense M-FAC (arXiv 2107.03356) and dense GGT (arXiv 1806.02958)."""

    def allocate(self, param: Tensor, window_size: int) -> dict[str, Tensor]:
        return {"rows": torch.zeros(window_size, param.numel(), dtype=param.dtype, device=param.device)}

    def row_names(self, param: Tensor) -> tuple[str, ...]:
        return ("rows",)

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> Window:
        pairs = zip(states, params, strict=True)
        return Batched([DenseWindow(check_rows(state["rows"], param)) for state, param in pairs])


def check_rows(rows: Tensor, param: Tensor) -> Tensor:
    """The rows, (m, n). Raises ValueError unless n is the number of the parameter's elements."""
    require(rows.shape[1] == param.numel(), "the size of a parameter", f"stay {rows.shape[1]}", param.numel())
    return rows


@dataclass(frozen=True)
class DenseWindow(BatchableWindow):
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> None:
        newest = torch.where(finite, grad, 0.0)
        self.rows.index_copy_(0, slot, newest.to(self.rows.dtype).unsqueeze(0))

    def clear(self, slot: Tensor) -> None:
        self.rows.index_fill_(0, slot, 0.0)

    def dots(self, slot: Tensor) -> Tensor:
        one = self.rows[int(slot)] if is_on_cpu(slot) else self.rows.index_select(0, slot).squeeze(0)
        return self.products(one)

    def products(self, vector: Tensor) -> Tensor:
        return kernels.dense_dots(self.rows, vector)

    def squares(self, weights: Tensor) -> Tensor:
        dtype = accumulation_dtype(self.rows.dtype)
        total = torch.empty(self.rows.shape[1], dtype=dtype, device=self.rows.device)
        for columns in self._parts():
            total[columns] = self.rows[:, columns].to(dtype).square().t() @ weights.to(dtype)
        return total

    def apply_(self, target: Tensor, weights: Tensor, factor: Tensor) -> None:
        dtype = accumulation_dtype(target.dtype)
        weights, factor = weights.to(dtype), factor.to(dtype)
        for columns in self._parts():
            total = torch.addmv(target[columns].to(dtype) * factor, self.rows[:, columns].to(dtype).t(), weights)
            target[columns].copy_(total)

    def _parts(self) -> Iterator[slice]:
        """Columns in parts, so that no temporary grows with the parameter."""
        window_size, numel = self.rows.shape
        step = max(4096, PART // window_size)
        return (slice(first, first + step) for first in range(0, numel, step))

    # ---- several, with their rows side by side

    @property
    def kind(self) -> Hashable:
        return DenseWindow, self.rows.dtype

    @property
    def numel(self) -> int:
        return self.rows.shape[1]

    @property
    def row_numel(self) -> int:
        return self.rows.shape[1]

    @classmethod
    def push_all(cls, windows: Sequence["DenseWindow"], grads: Sequence[Tensor], slot: Tensor, finite: Tensor) -> None:
        newest = torch.where(finite, torch.cat(list(grads)), 0.0)
        replace_rows([w.rows for w in windows], slot, newest.split([w.numel for w in windows]))

    @classmethod
    def dots_all(cls, windows: Sequence["DenseWindow"], slot: Tensor, vectors: Tensor | None) -> Tensor:
        rows = cls._side_by_side(windows, torch.float64)
        newest = rows.index_select(0, slot).squeeze(0)
        return torch.stack([rows @ vector for vector in (newest, vectors) if vector is not None])

    @classmethod
    def add_rows_(cls, windows: Sequence["DenseWindow"], total: Tensor, weights: Tensor) -> None:
        total.addmv_(cls._side_by_side(windows, weights.dtype).t(), weights)

    @staticmethod
    def _side_by_side(windows: Sequence["DenseWindow"], dtype: torch.dtype) -> Tensor:
        rows = windows[0].rows if len(windows) == 1 else torch.cat([w.rows for w in windows], 1)
        return rows.to(dtype)  # (m, N)
