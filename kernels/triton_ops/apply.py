"""`window_apply_` in Triton: weighted sum of all rows of the window, added to the parameter in place.

One program owns a block and adds row after row to an accumulator in global memory. The indices of a row are distinct,
and a barrier separates the rows, so that plain loads and stores suffice: no atomics, and a fixed order of summation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.blocks import Blocks
from efcp.kernels.reference import accumulation_dtype

MAX_COLUMNS = 2048  # entries of a row that a program treats at once


def configuration(kept: int) -> tuple[int, int]:
    """(COLUMNS, num_warps) for rows of `kept` entries in a block."""
    columns = min(triton.next_power_of_2(kept), MAX_COLUMNS)
    return columns, max(1, min(8, columns // 64))


@triton.jit
def _apply_kernel(target, values, indices, weights, scale, total, numel, window, full_blocks, full_kept, tail_kept,
                  SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    start = block * SIZE
    kept = tl.where(block < full_blocks, full_kept, tail_kept)
    for row in range(0, window):
        weight = tl.load(weights + row)
        entries = (block * window + row) * full_kept
        for first in range(0, kept, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = column < kept
            index = tl.load(indices + entries + column, mask=mask, other=0).to(tl.int32)
            value = tl.load(values + entries + column, mask=mask, other=0.0).to(weight.dtype)
            cell = total + start + index
            tl.store(cell, tl.load(cell, mask=mask, other=0.0) + weight * value, mask=mask)
        tl.debug_barrier()
    factor = tl.load(scale)
    for first in range(0, SIZE, COLUMNS):
        position = first + tl.arange(0, COLUMNS)
        mask = (position < SIZE) & (start + position < numel)
        old = tl.load(target + start + position, mask=mask, other=0.0).to(factor.dtype)
        new = factor * old + tl.load(total + start + position, mask=mask, other=0.0)
        tl.store(target + start + position, new.to(target.dtype.element_ty), mask=mask)


def window_apply_(
    target: Tensor, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor, blocks: Blocks
) -> None:
    if blocks.count == 0:
        return
    dtype = accumulation_dtype(target.dtype)
    total = torch.zeros(blocks.numel, dtype=dtype, device=target.device)
    columns, num_warps = configuration(blocks.kept)
    with torch.cuda.device_of(target):
        _apply_kernel[(blocks.count,)](
            target, values, indices, weights.to(dtype), scale.to(dtype), total, blocks.numel, values.shape[1],
            blocks.full, blocks.kept, blocks.kept_in_tail, SIZE=blocks.size, COLUMNS=columns, num_warps=num_warps,
        )  # fmt: skip
