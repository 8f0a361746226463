"""`window_dots` in Triton: batched inner products of all rows of the window with the newest one.

A first launch writes the newest row densely; in a second each program streams some rows of a block, gathers their
counterparts from it and leaves one partial sum a row and block, in float64. These are added in a fixed order, without
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.blocks import Blocks

TILE = 2048  # entries of the window in flight in a program


def configuration(kept: int) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, num_warps): a tile of ROWS rows × COLUMNS entries of each."""
    columns = min(triton.next_power_of_2(kept), TILE)
    return TILE // columns, columns, 4


@triton.jit
def _spread_kernel(values, indices, slot, dense, window, full_blocks, full_kept, tail_kept,
                   SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """dense[block · SIZE + index] = value, for the entries of row `slot`."""
    block = tl.program_id(0).to(tl.int64)
    kept = tl.where(block < full_blocks, full_kept, tail_kept)
    row = (block * window + tl.load(slot)) * full_kept
    for first in range(0, kept, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        index = tl.load(indices + row + column, mask=column < kept, other=0).to(tl.int32)
        value = tl.load(values + row + column, mask=column < kept, other=0.0)
        tl.store(dense + block * SIZE + index, value, mask=column < kept)


@triton.jit
def _dots_kernel(values, indices, dense, partial, window, full_blocks, full_kept, tail_kept,
                 SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """partial[row, block] = inner product of the row's entries in the block with `dense`."""
    block = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    kept = tl.where(block < full_blocks, full_kept, tail_kept)
    entries = (block * window + rows.to(tl.int64)) * full_kept
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, kept, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (rows < window)[:, None] & (column < kept)[None, :]
        index = tl.load(indices + entries[:, None] + column[None, :], mask=mask, other=0).to(tl.int32)
        value = tl.load(values + entries[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float64)
        newest = tl.load(dense + block * SIZE + index, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(value * newest, 1)
    tl.store(partial + rows.to(tl.int64) * tl.num_programs(0) + block, total, mask=rows < window)


def window_dots(values: Tensor, indices: Tensor, slot: Tensor, blocks: Blocks) -> Tensor:
    window = values.shape[1]
    dense = torch.zeros(blocks.numel, dtype=values.dtype, device=values.device)
    partial = torch.zeros(window, blocks.count, dtype=torch.float64, device=values.device)
    if blocks.count > 0:
        rows, columns, num_warps = configuration(blocks.kept)
        layout = (window, blocks.full, blocks.kept, blocks.kept_in_tail)
        with torch.cuda.device_of(values):
            _spread_kernel[(blocks.count,)](
                values, indices, slot, dense, *layout, SIZE=blocks.size, COLUMNS=columns, num_warps=num_warps
            )
            _dots_kernel[(blocks.count, triton.cdiv(window, rows))](
                values, indices, dense, partial, *layout, SIZE=blocks.size, ROWS=rows, COLUMNS=columns,
                num_warps=num_warps,
            )  # fmt: skip
    return partial.sum(1)
