"""`add_lowbit_` and `store_lowbit_` in Triton, for numbers in 8 and 4 bits, many vectors in one launch each.

Other kernels take from here how numbers are rounded and read.

They give the bits that the definition gives: multiplications and additions are not fused, divisions rounded correctly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import check_lowbit
from efcp.kernels.blocks import Blocks
from efcp.kernels.lowbit import MIX, SMALLEST_SCALE, LowBit
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel, warp_size
from efcp.kernels.triton.launch import DTYPES, Launch, find_block, launch_at, triton_accumulation_dtype

SIZE = 4096  # numbers of a program
THREADS = 256  # of a program; for each, 16 bytes of codes in 8 bits
ROUND = tl.constexpr(1.5 * 2.0**23)  # added to a float32, it leaves no place for fractions: rounds to even
SMALLEST = tl.constexpr(SMALLEST_SCALE)
FIRST_SHIFT, FIRST_FACTOR = tl.constexpr(MIX[0][0]), tl.constexpr(MIX[0][1])
SECOND_SHIFT, SECOND_FACTOR = tl.constexpr(MIX[1][0]), tl.constexpr(MIX[1][1])


@triton.jit
def scaled(x, LARGEST: tl.constexpr):
    """Blocks of float32, one a row, divided by their scales: (numbers of magnitude at most LARGEST or so, scales)."""
    scale = tl.div_rn(tl.max(tl.abs(x), 1), LARGEST * 1.0)
    scale = tl.where(scale >= SMALLEST, scale, 0.0)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
    return x * inverse[:, None], scale


@triton.jit
def to_8_bits(x):
    """Blocks of float32, one a row, in 8 bits: (codes as float32, scales)."""
    number, scale = scaled(x, 127)
    return tl.minimum(tl.maximum((number + ROUND) - ROUND, -127.0), 127.0), scale


@triton.jit
def _hash(number):
    """`hashed` of the definition, of uint32."""
    number = (number ^ (number >> FIRST_SHIFT)) * FIRST_FACTOR
    number = (number ^ (number >> SECOND_SHIFT)) * SECOND_FACTOR
    return number ^ (number >> 16)


@triton.jit
def to_4_bits(x, key, first, ROWS: tl.constexpr):
    """Blocks of float32, one a row, in 4 bits, rounded at random: (bytes, scales). The first number is at `first`."""
    number, scale = scaled(x, 7)
    position = tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    position = first.to(tl.uint32) + position.to(tl.uint32)
    random = (_hash(position ^ _hash(key.to(tl.uint32) ^ _hash((key >> 32).to(tl.uint32)))) >> 8).to(tl.int32)
    down = tl.floor(number)
    code = down + tl.where(random.to(tl.float32) * 2.0**-24 < number - down, 1.0, 0.0)
    code = tl.minimum(tl.maximum(code, -7.0), 7.0).to(tl.int32) + 8
    low, high = tl.split(tl.reshape(code, (ROWS, 64, 2)))
    return (low | (high << 4)).to(tl.uint8), scale


@triton.jit
def _store_kernel(table, parameters, finite, VALUES: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr):
    PER_ROW: tl.constexpr = 64 if BITS == 8 else 128  # numbers; a row is a block, with a scale
    ROWS: tl.constexpr = SIZE // PER_ROW
    WIDTH: tl.constexpr = 64  # bytes of a row
    program = tl.program_id(0).to(tl.int64)
    row, block, length, _, _, aligned = find_block(table, parameters, program, SIZE)
    finite = tl.load(finite) != 0
    values = tl.load(row).to(tl.pointer_type(VALUES)) + block * SIZE
    codes = tl.load(row + 1).to(tl.pointer_type(tl.int8 if BITS == 8 else tl.uint8)) + block * (ROWS * WIDTH)
    number = tl.arange(0, ROWS)
    scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block * ROWS + number
    position = number[:, None] * PER_ROW + tl.arange(0, PER_ROW)[None, :]
    byte = number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if (length == SIZE) & aligned:
        x = tl.load(tl.multiple_of(values, 16) + position).to(tl.float32)  # stream
        if BITS == 8:
            code, scale = to_8_bits(x)
            code = code.to(tl.int8)
        else:
            code, scale = to_4_bits(x, tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int64))), block * SIZE, ROWS)
        tl.store(tl.multiple_of(codes, 16) + byte, code, mask=finite)  # stream
        tl.store(scales, scale, mask=finite)
    else:
        x = tl.load(values + position, mask=position < length, other=0.0).to(tl.float32)
        if BITS == 8:
            code, scale = to_8_bits(x)
            code = code.to(tl.int8)
        else:
            code, scale = to_4_bits(x, tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int64))), block * SIZE, ROWS)
        tl.store(codes + byte, code, mask=(byte * (PER_ROW // WIDTH) < length) & finite)
        tl.store(scales, scale, mask=(number * PER_ROW < length) & finite)


@triton.jit
def numbers_of(code, scale, BITS: tl.constexpr):
    """Rows of numbers, of one scale each, as float32."""
    if BITS == 8:
        number = code.to(tl.float32)
    else:
        number = tl.interleave((code & 15).to(tl.float32), (code >> 4).to(tl.float32)) - 8.0
    return number * scale[:, None]


@triton.jit
def _add_kernel(table, parameters, TARGET: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    PER_ROW: tl.constexpr = 64 if BITS == 8 else 128  # numbers; a row is a block, with a scale
    ROWS: tl.constexpr = SIZE // PER_ROW
    WIDTH: tl.constexpr = 64  # bytes of a row
    program = tl.program_id(0).to(tl.int64)
    row, block, length, _, _, aligned = find_block(table, parameters, program, SIZE)
    target = tl.load(row).to(tl.pointer_type(TARGET)) + block * SIZE
    codes = tl.load(row + 1).to(tl.pointer_type(tl.int8 if BITS == 8 else tl.uint8)) + block * (ROWS * WIDTH)
    number = tl.arange(0, ROWS)
    scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block * ROWS + number
    position = number[:, None] * PER_ROW + tl.arange(0, PER_ROW)[None, :]
    byte = number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if (length == SIZE) & aligned:
        # With the hint a thread reads the codes of those numbers that it adds to, and no more at a time.
        codes = tl.multiple_of(codes, 16 * BITS // TARGET.primitive_bitwidth)
        x = numbers_of(tl.load(codes + byte), tl.load(scales), BITS)
        target = tl.multiple_of(target, 16)
        old = tl.load(target + position).to(DTYPE)  # stream
        tl.store(target + position, (old + x.to(DTYPE)).to(TARGET))  # stream
    else:
        inside = position < length
        code = tl.load(codes + byte, mask=byte * (PER_ROW // WIDTH) < length, other=0)
        x = numbers_of(code, tl.load(scales, mask=number * PER_ROW < length, other=0.0), BITS)
        old = tl.load(target + position, mask=inside, other=0.0).to(DTYPE)
        tl.store(target + position, (old + x.to(DTYPE)).to(TARGET), mask=inside)


def _group(found: Sequence[list[int]], values: Sequence[Tensor]) -> Launch:
    x, codes, scales, keys = found
    layouts = [Blocks(value.numel(), SIZE, 1.0) for value in values]
    return launch_at(values[0].device, layouts, x, codes, scales=scales, keys=keys)


def _options(numbers: Sequence[LowBit]) -> dict[str, Any]:
    return {"BITS": 8 if numbers[0].codes.dtype is torch.int8 else 4, "SIZE": SIZE, "enable_fp_fusion": False}


def add_lowbit_(targets: Sequence[Tensor], numbers: Sequence[LowBit]) -> None:
    group = _group(check_lowbit(targets, numbers), targets)
    dtype, device = targets[0].dtype, targets[0].device
    if group.blocks > 0:
        options = _options(numbers) | at_most_registers(96, device)  # else some are spilled
        launch_kernel(
            _add_kernel, (group.blocks,), targets[0],
            group.table, group.parameters, TARGET=DTYPES[dtype], DTYPE=triton_accumulation_dtype(dtype),
            num_warps=THREADS // warp_size(device), **options,
        )  # fmt: skip


def store_lowbit_(
    numbers: Sequence[LowBit], values: Sequence[Tensor], finite: Tensor, keys: Sequence[Tensor] = ()
) -> None:
    group = _group(check_lowbit(values, numbers, finite, keys), values)
    options = _options(numbers)
    if group.blocks > 0:
        launch_kernel(
            _store_kernel, (group.blocks,), values[0],
            group.table, group.parameters, finite.view(torch.uint8), VALUES=DTYPES[values[0].dtype],
            **options, num_warps=THREADS * options["BITS"] // 8 // warp_size(values[0].device),
        )  # fmt: skip
