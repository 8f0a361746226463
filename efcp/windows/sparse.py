"""The sparse window: of each gradient blockwise Top-k is kept, and error feedback hands the rest to the next one.

State of a parameter, with its blocks as `efcp.kernels.blocks` describes them:

    error    (n,)             what has been left out of the window so far; absent without error feedback
    values   (blocks, m, k)   rows of the window
    indices  (blocks, m, k)   their positions within the block

With few bits (`efcp.kernels.lowbit`, each block by itself) the error is kept as error_codes and error_scales, and in 4
bits there is a counter error_draws, (1,) int64: the key of the random numbers of the next step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import check_content, is_number, require, require_integer
from efcp.kernels import Blocks, LowBit, Momenta, SparseRows, Update
from efcp.shards import Layout
from efcp.windows.base import Compressor, Window, allocate_error, choose_dtypes, error_of
from efcp.windows.dense import Identity

MOST = 4  # times the density: what blocks that have to be small may keep
CHECKED = 1 << 18  # entries of the window that are looked at together when a state is loaded


@dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the entries of largest magnitude in each block of a parameter (EFCP, arXiv 2306.06098, section 4.1).

    Args:
        density: the share of entries kept, in (0, 1]: ceil(density · L) of a block of L.
        block_size: elements of a block, from 1 to 32768.
        value_dtype: dtype of the kept entries: torch.bfloat16 or torch.float32; float16 could overflow.
        error_dtype: dtype of the error: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, with
            a scale for 64 or 128 elements, or fewer at the end of a block. None takes float64 for float64 parameters
            and float32 for all others.
        error_feedback: add what was not kept of a gradient to the next one.
        aligned: cut the parameters of one process into the same blocks as those that are divided over several, and give
            their state the same shapes, so that both are the same algorithm and read each other's checkpoints. Blocks
            then lie within a row (an entry of the first dimension), and are as near to `block_size` as its length
            allows; vectors are kept whole. None: parameters that are divided, and no others.

    Raises:
        ValueError: for values that are not allowed; and, naming the parameter, where rows of an aligned one can only be
            cut into blocks so small that one entry of each is more than four times the density.
    """

    density: float = 0.01
    block_size: int = 4096
    value_dtype: torch.dtype = torch.bfloat16
    error_dtype: torch.dtype | None = None
    error_feedback: bool = True
    aligned: bool | None = None

    def __post_init__(self) -> None:
        require(is_number(self.density) and 0 < self.density <= 1, "density", "lie in (0, 1]", self.density)
        require_integer("block_size", self.block_size, 1, kernels.MAX_BLOCK_SIZE)
        choose_dtypes(self)
        require(isinstance(self.error_feedback, bool), "error_feedback", "be True or False", self.error_feedback)
        require(self.aligned in (None, True), "aligned", "be True or None", self.aligned)

    def of_parts(self, layout: Layout) -> Compressor:
        if len(layout.shape) < 2:
            return Identity()
        aligned = replace(self, block_size=layout.block_size(self.block_size, kernels.MAX_BLOCK_SIZE), aligned=None)
        size = aligned.block_size
        least, allowed = 1 / (MOST * size), MOST * self.density * size
        require(
            not math.prod(layout.shape) or aligned._blocks(size).kept <= allowed,
            "density",
            f"be at least {least:.2g} for shape {layout.shape}, of which blocks have {size} elements",
            self.density,
        )
        return aligned

    def unit(self, name: str) -> int | None:
        return self.block_size if name in ("values", "indices", "error_codes", "error_scales") else None

    def allocate(self, param: Tensor, window_size: int) -> dict[str, Tensor]:
        blocks, device = self._blocks(param.numel()), param.device
        shape = (blocks.count, window_size, blocks.kept)
        positions = torch.arange(blocks.kept, dtype=blocks.index_dtype, device=device)  # distinct, as in rows to come
        state = {
            "values": torch.zeros(shape, dtype=self.value_dtype, device=device),
            "indices": positions.expand(shape).contiguous(),
        }
        if self.error_feedback:
            dtype = self.error_dtype or kernels.accumulation_dtype(param.dtype)
            state |= allocate_error(param.numel(), dtype, device, blocks.size)
        return state

    def row_names(self, param: Tensor) -> tuple[str, ...]:
        return "values", "indices"

    def check(self, where: str, state: dict[str, Any], param: Tensor) -> None:
        super().check(where, state, param)
        blocks, window_size = self._blocks(param.numel()), state["values"].shape[1]
        for part in blocks.parts(max(1, CHECKED // (window_size * blocks.kept)) * blocks.size):
            index = state["indices"][part.blocks, :, : part.kept].long()
            check_content(
                where,
                "indices",
                (index[..., 0] >= 0).all() & (index[..., -1] < part.length).all() & (index.diff() > 0).all(),
                "ascend in each row, and lie within their blocks",
            )
        values, indices = (state[name][blocks.full :, :, blocks.kept_in_tail :] for name in ("values", "indices"))
        padding = (values == 0) & (indices >= 0) & (indices.long() < blocks.size)
        check_content(where, "padding", padding.all(), "have values 0, and positions in a block")

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> "SparseWindow":
        rows = [self._rows(state, param) for state, param in zip(states, params, strict=True)]
        errors = [error for state in states if (error := error_of(state)) is not None]
        return SparseWindow(rows, errors, [state["error_draws"] for state in states if "error_draws" in state])

    def error(self, state: dict[str, Any]) -> Tensor | None:
        error = error_of(state)
        if not isinstance(error, LowBit):
            return error
        parts = kernels.decoded_blocks(error, self._blocks(state["numel"]))
        return torch.cat([error.scales[:0], *(part.flatten() for part in parts)])

    def _rows(self, state: dict[str, Tensor], param: Tensor) -> SparseRows:
        values, indices, blocks = state["values"], state["indices"], self._blocks(param.numel())
        shape = values.shape
        require(shape[::2] == (blocks.count, blocks.kept), "density and block_size", "stay what they were", self)
        require(values.dtype is self.value_dtype, "value_dtype", "stay what it was", self.value_dtype)
        kept = "error" in state or "error_codes" in state
        require(kept == self.error_feedback, "error_feedback", "stay what it was", self.error_feedback)
        require(indices.shape == shape, "the shape of indices", "be that of values", indices.shape)
        return SparseRows(values, indices, blocks)

    def _blocks(self, numel: int) -> Blocks:
        return _blocks(numel, self.block_size, self.density)


_blocks = lru_cache(maxsize=4096)(Blocks)  # most parameters are as large in every step


@dataclass(frozen=True)
class SparseWindow(Window):
    rows: list[SparseRows]
    errors: list[Tensor | LowBit]  # none without error feedback
    draws: list[Tensor]  # only where errors are in 4 bits

    def __len__(self) -> int:
        return self.rows[0].values.shape[1]

    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        self.push_unchecked(grads, slot)
        self.settle(grads, slot, finite)

    def push_unchecked(self, grads: Sequence[Tensor | None], slot: Tensor) -> Tensor:
        finite = kernels.compress_(grads, self.errors, self.rows, slot, self.draws)
        if drawn := [draws for draws, grad in zip(self.draws, grads, strict=False) if grad is not None]:
            torch._foreach_add_(drawn, 1)
        return finite

    def settle(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        kernels.undo_compress_(grads, self.errors, self.rows, slot, finite, self.draws)

    def dots(self, slot: Tensor, momenta: Momenta = ()) -> Tensor:
        return kernels.window_dots(self.rows, slot, momenta)

    def apply_(self, targets: Sequence[Tensor | None], momenta: Momenta, update: Update) -> None:
        chosen = [target for target in targets if target is not None]
        if len(chosen) == len(targets):
            kernels.window_apply_(chosen, momenta, self.rows, update)
        elif chosen:
            some = [number for number, target in enumerate(targets) if target is not None]
            buffers, rows = [momenta[number] for number in some if momenta], [self.rows[number] for number in some]
            kernels.window_apply_(chosen, buffers, rows, update)
