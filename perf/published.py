"""The published algorithm of sparse M-FAC in PyTorch, to compare with `efcp` (arXiv 2306.06098, algorithm 1).

The differences:

| | published | `efcp` |
|---|---|---|
| window | row-major: values and indices (m, K), K = blocks · k | block-major (blocks, m, k) |
| compression | about ten passes over vectors of d elements | one |
| error feedback | forgets what rounding to the window's dtype loses | keeps it |
| update | c/λ − Gᵀ(mλI + S)⁻¹Gc/λ, with c as a dense vector | Gᵀ m(mλI + S)⁻¹ e_t |
| algebra | a factorisation each step, O(m³) | follows the replaced row, O(m²) |

The published update is a difference, which loses digits where λ is small against ‖c‖²/m. Indices are relative to their
block in 16 bits, as published. PyTorch gathers and scatters by 64-bit indices, so a few rows are widened at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PublishedMFAC", "RowMajorWindow"]

PART = 1 << 22  # entries whose indices are widened together


@dataclass(frozen=True)
class RowMajorWindow:
    """The last m compressed gradients of d elements.

    Args:
        values: (m, K) floating point.
        indices: (m, K) integer, position within the block.
        blocks: number of blocks, each of block_size elements.
    """

    values: Tensor
    indices: Tensor
    blocks: int
    block_size: int

    @staticmethod
    def of(values: Tensor, indices: Tensor, block_size: int) -> "RowMajorWindow":
        """Converts a block-major window, (blocks, m, k)."""
        rows, positions = (t.permute(1, 0, 2).flatten(1).contiguous() for t in (values, indices))
        return RowMajorWindow(rows, positions, len(values), block_size)

    def compress_(self, grad: Tensor, error: Tensor, slot: int) -> Tensor:
        """error ← error + grad; then its Top-k in each block move to row `slot` and become zero in the error.

        Args:
            grad, error: (d,); the error is updated in place.

        Returns:
            The row as a dense vector, c: (d,) in the error's dtype.
        """
        a = error.add_(grad).view(-1, self.block_size)
        kept = self.values.shape[1] // self.blocks
        index = a.abs().topk(kept, dim=1, sorted=False).indices
        self.values[slot] = a.gather(1, index).flatten().to(self.values.dtype)
        self.indices[slot] = index.flatten().to(self.indices.dtype)
        dense = torch.zeros_like(a).scatter_(1, index, self.values[slot].view_as(index).to(a.dtype))
        a.scatter_(1, index, 0.0)
        return dense.flatten()

    def dots(self, dense: Tensor) -> Tensor:
        """Inner products of all rows with a vector (d,): (m,) in its dtype."""
        return torch.cat([(dense[index] * values).sum(1) for values, index in self._parts()])

    def add_(self, dense: Tensor, weights: Tensor) -> Tensor:
        """dense ← dense + Σᵢ weightsᵢ Gᵢ for a vector (d,) and weights (m,) of its dtype."""
        first = 0
        for values, index in self._parts():
            terms = values * weights[first : first + len(values), None]
            dense.index_add_(0, index.flatten(), terms.flatten().to(dense.dtype))
            first += len(values)
        return dense

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the values of a few rows at a time, with their positions in a vector of d elements."""
        entries = self.values.shape[1]
        kept = entries // self.blocks
        start = torch.arange(self.blocks, device=self.values.device).repeat_interleave(kept) * self.block_size
        step = max(1, PART // entries)
        for first in range(0, len(self.values), step):
            yield self.values[first : first + step], self.indices[first : first + step] + start


class PublishedMFAC:
    """The published optimizer, for one float32 parameter.

    Args:
        param, error: (d,) float32, both updated in place; `param.grad` is the gradient.
        window: the compressed gradients of `param`.
        gram: S = G Gᵀ of the rows that are in the window, (m, m).
        damping: λ > 0.
        lr: learning rate.
    """

    def __init__(
        self, param: Tensor, error: Tensor, window: RowMajorWindow, gram: Tensor, damping: float, lr: float
    ) -> None:
        self.param, self.error, self.window, self.gram = param, error, window, gram.float()
        self.damping, self.lr = damping, lr
        self.taken = 0

    @torch.no_grad()
    def step(self) -> None:
        grad, S, slot = self.param.grad, self.gram, self.taken % len(self.gram)
        assert grad is not None
        self.taken += 1
        c = self.window.compress_(grad, self.error, slot)
        dots = self.window.dots(c)
        S[slot], S[:, slot] = dots, dots
        A = S + len(S) * self.damping * torch.eye(len(S), device=S.device)
        solved = torch.cholesky_solve(dots[:, None] / self.damping, torch.linalg.cholesky(A))
        update = self.window.add_(c / self.damping, -solved.squeeze(1))
        self.param.add_(update, alpha=-self.lr)
