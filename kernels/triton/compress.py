"""`compress_` in Triton: blockwise Top-k selection with error feedback; one program handles one block.

Gradient and error are read once, into registers, and the error is written once. The bits of |a|, read as integers, have
the same order as |a|. So the k-th largest magnitude, the threshold, is found bit by bit from the highest: a bit is set
if at least k elements reach the threshold with this bit. The search ends early when exactly k elements do. Prefix sums
then number the selected elements, which are written in ascending order. Among elements equal to the threshold, those at
the lowest positions are taken.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import check_numbers
from efcp.kernels.blocks import SparseRows
from efcp.kernels.triton.launch import (
    DTYPES,
    Launch,
    at_most_registers,
    find_block,
    launch_of,
    triton_accumulation_dtype,
    warp_size,
)
from efcp.kernels.triton.tuning import Configuration, choose


def configurations(size: int, bytes: int, width: int, warp: int) -> list[Configuration]:
    """The configurations for blocks of `size` elements of `bytes` each. The first one is the default.

    A chunk is what all threads read with one access each, of `width` elements. Prefix sums are taken over one chunk at
    a time, which leaves most registers to the block. A thread makes four accesses for a block, or more where that would
    need too many threads. Beyond 128 bytes a thread, only the first RESIDENT chunks stay in registers; the others are
    read again in every pass.
    """
    size = max(warp * width, triton.next_power_of_2(size))
    if size * bytes > 512 * 128:
        # Without the option the assembler spills registers to raise occupancy, which is of no use here.
        return [_configuration(size, bytes, width, warp, 256) | at_most_registers(255)]
    default = max(warp, min(512, size // (4 * width)))
    return [
        _configuration(size, bytes, width, warp, threads)
        for threads in (default, 2 * default, default // 2)
        if warp <= threads <= 512 and threads * 128 >= size * bytes and threads * width <= size
    ]


def _configuration(size: int, bytes: int, width: int, warp: int, threads: int) -> Configuration:
    chunk = threads * width
    resident = min(size // chunk, 192 // (width * bytes))
    return {"CHUNKS": size // chunk, "CHUNK": chunk, "RESIDENT": resident, "num_warps": threads // warp}


@triton.jit
def _sum(grad, error, finite, chunk, length,
         CHUNK: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """a = e + g for one chunk of a block. Beyond the block's end it is NaN, for which every comparison is false."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    if MASKED:
        a = tl.load(grad + position, mask=position < length, other=0.0).to(DTYPE)
        if error is not None:
            a = tl.load(error + position, mask=position < length, other=0.0).to(DTYPE) + a
        return tl.where(position < length, tl.where(finite, a, 0.0), float("nan"))
    a = tl.load(grad + position).to(DTYPE)  # stream
    if error is not None:
        a = tl.load(error + position).to(DTYPE) + a  # stream
    return tl.where(finite, a, 0.0)


@triton.jit
def _reaching(a, bits, grad, error, finite, length,
              CHUNKS: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """How many elements reach the magnitude with these bits. `a` holds the first chunks; the others are read again."""
    threshold = bits.to(DTYPE, bitcast=True)
    count = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(len(a)):
        count += (tl.abs(a[chunk]) >= threshold).to(tl.int32)
    for chunk in tl.range(len(a), CHUNKS, loop_unroll_factor=1 if MASKED else 4):  # for enough reads in flight
        other = _sum(grad, error, finite, chunk, length, CHUNK, MASKED, DTYPE)
        count += (tl.abs(other) >= threshold).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _write(a, threshold, ties, before, chunk, length, error, values, indices, finite,
           CHUNK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Writes a chunk's error, and those of its elements that are selected.

    `before` counts elements of earlier chunks: in its lower 16 bits those above the threshold, in its upper 16 bits
    those equal to it. Of the latter, only the first `ties` are selected. Returns `before` for the next chunk.
    """
    magnitude = tl.abs(a)
    flags = (magnitude > threshold).to(tl.uint32) + ((magnitude == threshold).to(tl.uint32) << 16)
    counts = before + tl.cumsum(flags, 0)
    tied = counts >> 16
    chosen = (magnitude > threshold) | ((magnitude == threshold) & (tied <= ties))
    rank = (counts & 0xFFFF) + tl.minimum(tied, ties) - 1
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    stored = a.to(values.dtype.element_ty)
    # These hints are not true. They make each thread store the elements that it has loaded; without them, Triton would
    # move all elements through shared memory first. No store becomes wider, since the mask is for single elements.
    place = tl.multiple_of(tl.max_contiguous(values + rank, WIDTH), 16)
    tl.store(place, stored, mask=chosen)
    place = tl.multiple_of(tl.max_contiguous(indices + rank, WIDTH), 16)
    tl.store(place, position.to(indices.dtype.element_ty), mask=chosen)
    if error is not None:
        rest = tl.where(chosen, a - stored.to(a.dtype), a).to(error.dtype.element_ty)
        if MASKED:
            tl.store(error + position, rest, mask=(position < length) & finite)
        else:
            tl.store(error + position, rest, mask=finite)  # stream
    return before + tl.sum(flags, 0)


@triton.jit
def _compress_block(grad, error, values, indices, finite, length, kept,
                    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr,
                    MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    a = ()
    for chunk in tl.static_range(RESIDENT):
        a = a + (_sum(grad, error, finite, chunk, length, CHUNK, MASKED, DTYPE),)  # type: ignore[assignment]  # noqa: RUF005

    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    threshold = tl.full((), 0, INT)
    bit = tl.full((), 1, INT) << (INT.primitive_bitwidth - 2)
    count = length
    while (bit > 0) & (count != kept):
        reached = _reaching(a, threshold | bit, grad, error, finite, length, CHUNKS, CHUNK, MASKED, DTYPE)
        if reached >= kept:
            threshold |= bit
            count = reached
        bit = bit >> 1
    above = _reaching(a, threshold + 1, grad, error, finite, length, CHUNKS, CHUNK, MASKED, DTYPE)

    least, ties = threshold.to(DTYPE, bitcast=True), (kept - above).to(tl.uint32)
    before = tl.full((), 0, tl.uint32)
    for chunk in tl.static_range(RESIDENT):
        before = _write(a[chunk], least, ties, before, chunk, length, error, values, indices, finite,
                        CHUNK, WIDTH, MASKED)  # fmt: skip
    for chunk in range(RESIDENT, CHUNKS):
        other = _sum(grad, error, finite, chunk, length, CHUNK, MASKED, DTYPE)
        before = _write(other, least, ties, before, chunk, length, error, values, indices, finite,
                        CHUNK, WIDTH, MASKED)  # fmt: skip


@triton.jit
def _compress_kernel(parameters, owners, slot, finite, window_size,
                     GRAD: tl.constexpr, ERROR: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr,
                     DTYPE: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
                     RESIDENT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, block, length, kept, stride, aligned = find_block(parameters, owners, program, SIZE)
    entries = (block * window_size + tl.load(slot)) * stride
    values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + entries
    indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + entries
    address = tl.load(row)
    if address == 0:  # the parameter has no gradient
        for first in range(0, kept, CHUNK):
            column = first + tl.arange(0, CHUNK)
            tl.store(values + column, tl.zeros((CHUNK,), VALUES), mask=column < kept)
        return
    finite = tl.load(finite) != 0
    grad = address.to(tl.pointer_type(GRAD)) + block * SIZE
    error = None
    if ERROR is not None:
        error = tl.load(row + 1).to(tl.pointer_type(ERROR)) + block * SIZE
    if (length == CHUNKS * CHUNK) & aligned:
        grad = tl.multiple_of(grad, 16)
        if ERROR is not None:
            error = tl.multiple_of(error, 16)
        _compress_block(grad, error, values, indices, finite, length, kept,
                        CHUNKS, CHUNK, RESIDENT, WIDTH, False, DTYPE)  # fmt: skip
    else:  # few blocks; masks need more registers, so fewer chunks stay in them
        _compress_block(grad, error, values, indices, finite, length, kept,
                        CHUNKS, CHUNK, RESIDENT // 2, WIDTH, True, DTYPE)  # fmt: skip


def compress_(
    grads: Sequence[Tensor | None], errors: Sequence[Tensor], rows: Sequence[SparseRows], slot: Tensor, finite: Tensor
) -> None:
    table = launch_of(rows, grads=grads, errors=errors)
    check_numbers(rows[0].values, slot=slot, finite=finite)
    if table.blocks == 0:
        return
    dtype = next((grad.dtype for grad in grads if grad is not None), torch.float32)
    error_dtype = errors[0].dtype if errors else None
    values, indices, blocks = rows[0]
    accumulated = triton_accumulation_dtype(dtype)
    width = 16 // min(dtype.itemsize, (error_dtype or dtype).itemsize)  # elements of an access of 128 bits

    def launch(table: Launch, configuration: Configuration) -> None:
        with torch.cuda.device_of(slot):
            _compress_kernel[(table.blocks,)](
                table.parameters, table.owners, slot, finite.view(torch.uint8), values.shape[1],
                GRAD=DTYPES[dtype], ERROR=None if error_dtype is None else DTYPES[error_dtype],
                VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype], DTYPE=accumulated,
                SIZE=blocks.block_size, WIDTH=width, **configuration,
            )  # fmt: skip

    def trial(example: SparseRows) -> Callable[[Configuration], None]:
        grad = torch.randn(example.blocks.numel, device=slot.device).to(dtype)
        error = [torch.zeros_like(grad, dtype=error_dtype)] if errors else []
        return lambda configuration: launch(launch_of([example], grads=[grad], errors=error), configuration)

    candidates = configurations(blocks.block_size, accumulated.primitive_bitwidth // 8, width, warp_size())
    launch(table, choose("compress_", rows, (dtype, error_dtype), candidates, trial))
