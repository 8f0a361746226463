"""`average_` in Triton: gradients and momenta are read once, momenta written once, and their squares summed on the way.

It gives the bits that the definition gives: multiplications and additions are not fused, divisions rounded correctly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Momenta, average_addresses
from efcp.kernels.blocks import Blocks
from efcp.kernels.lowbit import LowBit
from efcp.kernels.triton.gpu import launch_kernel, warp_size
from efcp.kernels.triton.launch import DTYPES, find_block, launch_at, stored_dtype, triton_accumulation_dtype
from efcp.kernels.triton.lowbit import to_8_bits

SIZE = 4096  # numbers of a program
THREADS = 256  # of a program; for each, 16 bytes of codes
PER_ROW = tl.constexpr(64)  # numbers, with a scale if in 8 bits


@triton.jit
def _averaged(old, scale, grad, writes, beta, rest, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr):
    """What is stored of rows of numbers, and their scales; and the sum of the squares of what is there then."""
    old = old.to(DTYPE)
    if MOMENTUM == tl.int8:
        old = old * scale[:, None]
    new = old * beta + grad.to(DTYPE) * rest
    if MOMENTUM == tl.int8:
        code, scale = to_8_bits(new)
        new, stored = code * scale[:, None], code.to(tl.int8)
    else:
        stored = new.to(MOMENTUM)
        new = stored.to(DTYPE)
    square = tl.where(writes, new, old).to(tl.float64)
    return stored, scale, tl.sum(tl.sum(square * square, 1), 0)


@triton.jit
def _average_kernel(table, parameters, finite, squares, beta: tl.float64, rest: tl.float64,
                    MOMENTUM: tl.constexpr, GRAD: tl.constexpr, DTYPE: tl.constexpr,
                    SIZE: tl.constexpr):  # fmt: skip
    """squares[block] = sum of the squares of its numbers."""
    ROWS: tl.constexpr = SIZE // PER_ROW
    program = tl.program_id(0).to(tl.int64)
    row, block, length, _, _, aligned = find_block(table, parameters, program, SIZE)
    momentum = tl.load(row).to(tl.pointer_type(MOMENTUM)) + block * SIZE
    address = tl.load(row + 1)
    grad = address.to(tl.pointer_type(GRAD)) + block * SIZE
    writes = (tl.load(finite) != 0) & (address != 0)
    number = tl.arange(0, ROWS)
    scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block * ROWS + number
    position = number[:, None] * PER_ROW + tl.arange(0, PER_ROW)[None, :]
    beta, rest = beta.to(DTYPE), rest.to(DTYPE)
    if (length == SIZE) & aligned:
        momentum, grad = tl.multiple_of(momentum, 16), tl.multiple_of(grad, 16)
        old = tl.load(momentum + position)  # stream
        scale = tl.load(scales) if MOMENTUM == tl.int8 else 0  # not None, which functions of Triton 3.4 cannot return
        g = tl.load(grad + position, mask=writes, other=0.0)  # stream
        new, scale, square = _averaged(old, scale, g, writes, beta, rest, MOMENTUM, DTYPE)
        tl.store(momentum + position, new, mask=writes)  # stream
        if MOMENTUM == tl.int8:
            tl.store(scales, scale, mask=writes)
        tl.store(squares + program, square)
    else:
        inside, first = position < length, number * PER_ROW < length
        old = tl.load(momentum + position, mask=inside, other=0)
        scale = tl.load(scales, mask=first, other=0.0) if MOMENTUM == tl.int8 else 0
        g = tl.load(grad + position, mask=inside & writes, other=0.0)
        new, scale, square = _averaged(old, scale, g, writes, beta, rest, MOMENTUM, DTYPE)
        tl.store(momentum + position, new, mask=inside & writes)
        if MOMENTUM == tl.int8:
            tl.store(scales, scale, mask=first & writes)
        tl.store(squares + program, square)


def average_(momenta: Momenta, grads: Sequence[Tensor | None], beta: float, finite: Tensor) -> Tensor:
    found = average_addresses(momenta, grads, finite)
    device, own = finite.device, stored_dtype(momenta)
    assert own is not None  # there is at least one
    grad = next((grad.dtype for grad in grads if grad is not None), torch.float32)
    numels = [(momentum.codes if isinstance(momentum, LowBit) else momentum).numel() for momentum in momenta]
    x, scales, y = found
    group = launch_at(device, [Blocks(numel, SIZE, 1.0) for numel in numels], x, y, scales=scales)
    squares = torch.empty(group.blocks, dtype=torch.float64, device=device)
    if group.blocks > 0:
        launch_kernel(
            _average_kernel, (group.blocks,), squares,
            group.table, group.parameters, finite.view(torch.uint8), squares, float(beta), 1.0 - beta,
            MOMENTUM=DTYPES[own], GRAD=DTYPES[grad], DTYPE=triton_accumulation_dtype(own), SIZE=SIZE,
            num_warps=THREADS // warp_size(device), enable_fp_fusion=False,
        )  # fmt: skip
    return squares.sum()
