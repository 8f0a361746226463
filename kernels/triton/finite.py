"""`norm_is_finite` in Triton: the sum of all squares, in one launch that reads the gradients once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import gradient_addresses
from efcp.kernels.blocks import Blocks
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.triton.gpu import launch_kernel
from efcp.kernels.triton.launch import DTYPES, find_block, launch_at, triton_accumulation_dtype

SIZE = 8192  # elements that a program reads
NUM_WARPS = 8


@triton.jit
def _squares_kernel(table, parameters, squares, GRAD: tl.constexpr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """squares[block] = sum of the squares of the block's elements."""
    program = tl.program_id(0).to(tl.int64)
    row, block, length, _, _, aligned = find_block(table, parameters, program, SIZE)
    grad = tl.load(row).to(tl.pointer_type(GRAD)) + block * SIZE
    position = tl.arange(0, SIZE)
    if (length == SIZE) & aligned:
        x = tl.load(tl.multiple_of(grad, 16) + position).to(DTYPE)  # stream
        square = tl.sum(x * x, 0)
    else:
        x = tl.load(grad + position, mask=position < length, other=0.0).to(DTYPE)
        square = tl.sum(x * x, 0)
    tl.store(squares + program, square)


def norm_is_finite(grads: Sequence[Tensor]) -> Tensor:
    found = gradient_addresses(grads)
    dtype, device = grads[0].dtype, grads[0].device
    group = launch_at(device, [Blocks(grad.numel(), SIZE, 1.0) for grad in grads], found)
    squares = torch.empty(group.blocks, dtype=accumulation_dtype(dtype), device=device)
    if group.blocks > 0:
        launch_kernel(
            _squares_kernel, (group.blocks,), squares,
            group.table, group.parameters, squares, GRAD=DTYPES[dtype], DTYPE=triton_accumulation_dtype(dtype),
            SIZE=SIZE, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return squares.sum() < float("inf")  # fewer launches than isfinite
