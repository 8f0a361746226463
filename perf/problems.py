"""The random problems that operations are measured on: one parameter with a full window.

Gradient, error and values are normally distributed. Each row of each block has a random support, as if gradients were
unrelated; rows of real training overlap more (`traffic.py`). Only the windows of the first `DRAWN` blocks are drawn,
and all other blocks repeat them. This saves time, also when the window is converted to other formats. No operation can
profit from it, since the repetitions are megabytes apart.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from efcp.kernels import MAX_BLOCK_SIZE, Blocks, LowBit, SparseRows
from efcp.kernels.lowbit import encoded_pieces
from efcp.windows.base import allocate_error

__all__ = ["DTYPES", "Case", "Problem"]

DRAWN = 4
DTYPES = {  # of gradient and parameter, error, and values of the window
    "fp32/fp32/bf16": (torch.float32, torch.float32, torch.bfloat16),
    "bf16/bf16/bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp32/fp32/fp32": (torch.float32, torch.float32, torch.float32),
    "fp32/int8/bf16": (torch.float32, torch.int8, torch.bfloat16),
    "fp32/int4/bf16": (torch.float32, torch.int4, torch.bfloat16),  # type: ignore[attr-defined]
}
CODES = {torch.int8: torch.int8, torch.int4: torch.uint8}  # type: ignore[attr-defined]
"""The dtype of the codes of an error in few bits."""
DEFAULT_DTYPE = "fp32/fp32/bf16"


@dataclass(frozen=True)
class Case:
    """A point of the benchmark's grid: sizes and dtypes of a problem.

    Args:
        numel: d, elements of the parameter; a multiple of block_size.
        window: m, rows of the window.
        density: share of a block's elements that a row keeps, in (0, 1].
        block_size: B.
        dtype: one of `DTYPES`: gradient/error/values.

    Raises:
        ValueError: for values that are not allowed.
    """

    numel: int
    window: int
    density: float
    block_size: int = 4096
    dtype: str = DEFAULT_DTYPE

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must lie in [1, {MAX_BLOCK_SIZE}], got {self.block_size}")
        if self.numel < 1 or self.numel % self.block_size:
            raise ValueError(f"numel must be a positive multiple of block_size, {self.block_size}, got {self.numel}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.numel, self.block_size, self.density)

    @property
    def entries(self) -> int:
        """The number of entries in the whole window."""
        return self.blocks.count * self.window * self.blocks.kept

    @property
    def window_bytes(self) -> int:
        return self.entries * (DTYPES[self.dtype][2].itemsize + self.blocks.index_dtype.itemsize)

    @property
    def error_bytes(self) -> int:
        state = allocate_error(self.numel, DTYPES[self.dtype][1], torch.device("meta"), self.block_size)
        return sum(tensor.nbytes for tensor in state.values())

    @property
    def floors(self) -> dict[str, int]:
        """The fewest bytes that each operation has to move: everything is read or written once.

        `window_dots` can need fewer, where it skips values whose products are zero.
        """
        grad = self.numel * DTYPES[self.dtype][0].itemsize
        step = {
            "compress_": grad + 2 * self.error_bytes + self.window_bytes // self.window,
            "window_dots": self.window_bytes,
            "window_apply_": self.window_bytes + 2 * grad,
        }
        return {"norm_is_finite": grad, **step, "step": sum(step.values())}


def remove_ties_(grad: Tensor, error: Tensor, blocks: Blocks) -> None:
    """Zeroes error and grad where their sum is as large as the last element that its block keeps, but is not kept.

    Of such ties the definition keeps the lower position. Other implementations may keep any without being wrong, but
    their results would differ.
    """
    a = (error + grad).view(blocks.count, blocks.size)
    while blocks.kept < blocks.size:
        largest, at = a.abs().topk(blocks.kept + 1, dim=1)
        tied = (largest[:, -1] == largest[:, -2]).nonzero().squeeze(1)
        if len(tied) == 0:
            return
        for tensor in (a, grad.view_as(a), error.view_as(a)):
            tensor[tied, at[tied, -1]] = 0.0


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, on a device."""

    case: Case
    grad: Tensor  # (n,)
    error: Tensor | LowBit  # (n,), or n numbers in few bits
    target: Tensor  # (n,)
    values: Tensor  # (blocks, m, k)
    indices: Tensor  # (blocks, m, k)
    slot: Tensor  # (1,) int64
    weights: Tensor  # (m,) float64

    @staticmethod
    def random(case: Case, device: torch.device) -> "Problem":
        """Draws a problem, with the same numbers on every device."""
        generator = torch.Generator().manual_seed(0)
        blocks, (grad, error, value) = case.blocks, DTYPES[case.dtype]
        drawn = torch.rand(min(DRAWN, blocks.count), case.window, blocks.size, generator=generator)
        positions = drawn.topk(blocks.kept, dim=2, sorted=False).indices.sort(dim=2).values
        values = torch.randn(positions.shape, generator=generator).to(device, value)
        indices = positions.to(device, blocks.index_dtype)
        repeats = -(-blocks.count // len(positions))

        def normal(dtype: torch.dtype) -> Tensor:
            return torch.randn(case.numel, generator=generator).to(device, dtype)

        own, rest, target = normal(grad), normal(torch.float32 if error in CODES else error), normal(grad)
        if error not in CODES and grad == torch.float32:
            remove_ties_(own, rest, blocks)
        return Problem(
            case,
            own,
            _in_few_bits(rest, case.block_size, CODES[error]) if error in CODES else rest,
            target,
            values.repeat(repeats, 1, 1)[: blocks.count],
            indices.repeat(repeats, 1, 1)[: blocks.count],
            torch.tensor([3 % case.window], device=device),
            torch.randn(case.window, generator=generator, dtype=torch.float64).to(device),
        )

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def error_state(self) -> dict[str, Tensor]:
        """The error as SparseMFAC keeps it."""
        if isinstance(self.error, Tensor):
            return {"error": self.error}
        codes, scales = self.error
        draws = {"error_draws": torch.zeros(1, dtype=torch.int64, device=self.device)}
        return {"error_codes": codes, "error_scales": scales, **(draws if codes.dtype == torch.uint8 else {})}

    @property
    def rows(self) -> list[SparseRows]:
        return [SparseRows(self.values, self.indices, self.case.blocks)]

    @contextmanager
    def newest_row_kept(self) -> Iterator[None]:
        """Within the context operations may overwrite row `slot`; it is restored at the end."""
        saved = [(t, t.index_select(1, self.slot)) for t in (self.values, self.indices)]
        try:
            yield
        finally:
            for tensor, row in saved:
                tensor.index_copy_(1, self.slot, row)

    def newest_row(self) -> Tensor:
        """Row `slot` as a vector: (n,) float32."""
        row, at = (t.index_select(1, self.slot).squeeze(1) for t in (self.values, self.indices))
        dense = torch.zeros(self.case.blocks.count, self.case.block_size, device=self.device)
        return dense.scatter_(1, at.long(), row.float()).flatten()

    def gram(self) -> Tensor:
        """S = G Gᵀ: (m, m) float64."""
        count = self.case.blocks.count
        total = torch.zeros(self.case.window, self.case.window, dtype=torch.float64, device=self.device)
        for block in range(min(DRAWN, count)):
            dense = torch.zeros(self.case.window, self.case.block_size, dtype=torch.float64, device=self.device)
            dense.scatter_(1, self.indices[block].long(), self.values[block].double())
            total += (1 + (count - 1 - block) // DRAWN) * (dense @ dense.t())
        return total

    def csr(self) -> Tensor:
        """The window as an (m, n) matrix of float32 in CSR format, with 32-bit indices."""
        count, window, kept = self.values.shape
        start = torch.arange(count, dtype=torch.int32, device=self.device)[:, None] * self.case.block_size
        columns = (self.indices.permute(1, 0, 2) + start).flatten()
        rows = torch.arange(window + 1, dtype=torch.int32, device=self.device) * (count * kept)
        return _csr(rows, columns, self.values.permute(1, 0, 2).float().flatten(), (window, self.case.numel))

    def transposed_csr(self) -> Tensor:
        """The window as an (n, m) matrix of float32 in CSR format: the drawn blocks are sorted, then repeated."""
        (count, window, kept), size = self.values.shape, self.case.block_size
        drawn = min(DRAWN, count)
        start = torch.arange(drawn, device=self.device)[:, None, None] * size
        elements = (self.indices[:drawn].long() + start).flatten()
        order = elements.argsort(stable=True)
        rows = torch.arange(window, dtype=torch.int32, device=self.device)[:, None].expand(drawn, window, kept)
        entries, repeats = count * window * kept, -(-count // drawn)
        lengths = torch.bincount(elements, minlength=drawn * size).repeat(repeats)[: self.case.numel]
        return _csr(
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
            rows.flatten()[order].repeat(repeats)[:entries],
            self.values[:drawn].float().flatten()[order].repeat(repeats)[:entries],
            (self.case.numel, window),
        )


def _in_few_bits(values: Tensor, block_size: int, codes: torch.dtype) -> LowBit:
    """Rounds a vector to 8 or 4 bits, each block of the window by itself."""
    key = torch.zeros(1, dtype=torch.int64, device=values.device)
    return LowBit(*(part.flatten() for part in encoded_pieces(values.view(-1, block_size), codes, 0, key)))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)
