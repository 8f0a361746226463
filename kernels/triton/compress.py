"""`compress_` in Triton: blockwise Top-k selection with error feedback; one program handles one block.

Gradient and error are read once, into registers, and the error is written once. The squares of the gradient are summed
on the way: a block where their sum is not finite is left out. The bits of |a|, read as integers, have
the same order as |a|. So the k-th largest magnitude, the threshold, is found bit by bit from the highest: a bit is set
if at least k elements reach the threshold with this bit. The search ends early when exactly k elements do. Prefix sums
then number the selected elements, which are written in ascending order. Among elements equal to the threshold, those at
the lowest positions are taken.

`undo_compress_` has a launch of its own in each step, which ends at once unless the step is to be undone.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Errors, check_numbers
from efcp.kernels.blocks import SparseRows
from efcp.kernels.lowbit import allocate_lowbit
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel, warp_size
from efcp.kernels.triton.launch import (
    DTYPES,
    Launch,
    find_block,
    launch_of,
    stored_dtype,
    triton_accumulation_dtype,
)
from efcp.kernels.triton.lowbit import numbers_of, to_4_bits, to_8_bits
from efcp.kernels.triton.tuning import Configuration, choose

UNDO_CHUNK = 128  # elements of a block that `undo_compress_` treats at a time
BEFORE_3_8 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)


def configurations(size: int, bytes: int, width: int, bits: int, device: torch.device) -> list[Configuration]:
    """The configurations for blocks of `size` elements of `bytes` each on a device. The first one is the default.

    `bits` are those of the error; 0 for floating point. A chunk is what all threads read with one access each, of
    `width` elements. Prefix sums are taken over one chunk at a time, which leaves most registers to the block. A thread
    makes four accesses for a block, or more where that would need too many threads. Beyond 128 bytes a thread, only the
    first RESIDENT chunks stay in registers; the others are read again in every pass.
    """
    warp = warp_size(device)
    size = max(warp * width, triton.next_power_of_2(size))
    # Compilers before that of Triton 3.8 do not get by with 128 where a thread has many elements in few bits.
    limit = 144 if BEFORE_3_8 and bits and width > 4 else 128
    # Without the limits of registers the assembler spills some to raise occupancy, which is of no use here.
    if size * bytes > 512 * 128:
        return [_configuration(size, bytes, width, warp, 256) | at_most_registers(255, device)]
    default = max(warp, min(512, size // (4 * width)))
    return [
        _configuration(size, bytes, width, warp, threads) | at_most_registers(limit, device)
        for threads in (default, 2 * default, default // 2)
        if warp <= threads <= 512 and threads * 128 >= size * bytes and threads * width <= size
    ]


def _configuration(size: int, bytes: int, width: int, warp: int, threads: int) -> Configuration:
    chunk = threads * width
    resident = min(size // chunk, 192 // (width * bytes))
    return {"CHUNKS": size // chunk, "CHUNK": chunk, "RESIDENT": resident, "num_warps": threads // warp}


@triton.jit
def _bytes(chunk, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """Of the error in few bits of a chunk, whose rows have a scale each: (numbers of the rows, places of the bytes)."""
    ROWS: tl.constexpr = CHUNK * BITS // (64 * 8)
    row = chunk * ROWS + tl.arange(0, ROWS)
    return row, row[:, None] * 64 + tl.arange(0, 64)[None, :]


@triton.jit
def _decoded(error, scales, chunk, length, CHUNK: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr):
    """The error in few bits of a chunk, as float32."""
    row, byte = _bytes(chunk, CHUNK, BITS)
    if MASKED:
        code = tl.load(error + byte, mask=byte * (8 // BITS) < length, other=0)
        scale = tl.load(scales + row, mask=row * (64 * 8 // BITS) < length, other=0.0)
    else:
        code = tl.load(error + byte)
        scale = tl.load(scales + row)
    return tl.reshape(numbers_of(code, scale, BITS), (CHUNK,))


@triton.jit
def _encode(rest, error, scales, key, first, chunk, length, where,
            CHUNK: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Writes the error of a chunk in few bits, if `where` is true. `first` is the position of the block."""
    PER_ROW: tl.constexpr = 64 * 8 // BITS
    row, byte = _bytes(chunk, CHUNK, BITS)
    if MASKED:
        rest = tl.where(chunk * CHUNK + tl.arange(0, CHUNK) < length, rest, 0.0)
    x = tl.reshape(rest.to(tl.float32), (CHUNK // PER_ROW, PER_ROW))
    if BITS == 8:
        code, scale = to_8_bits(x)
        code = code.to(tl.int8)
    else:
        code, scale = to_4_bits(x, key, first + chunk * CHUNK, CHUNK // PER_ROW)
    if MASKED:
        tl.store(error + byte, code, mask=(byte * (8 // BITS) < length) & where)
        tl.store(scales + row, scale, mask=(row * PER_ROW < length) & where)
    else:
        tl.store(error + byte, code, mask=where)
        tl.store(scales + row, scale, mask=where)


@triton.jit
def _gradient(grad, chunk, length, CHUNK: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of one chunk of a block; zero beyond the block's end."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    if MASKED:
        return tl.load(grad + position, mask=position < length, other=0.0).to(DTYPE)
    return tl.load(grad + position).to(DTYPE)  # stream


@triton.jit
def _error(error, scales, chunk, length,
           CHUNK: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The error of one chunk of a block."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    if BITS != 0:
        return _decoded(error, scales, chunk, length, CHUNK, BITS, MASKED).to(DTYPE)
    if MASKED:
        return tl.load(error + position, mask=position < length, other=0.0).to(DTYPE)
    return tl.load(error + position).to(DTYPE)  # stream


@triton.jit
def _sum(g, error, scales, chunk, length,
         CHUNK: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """a = e + g for one chunk of a block."""
    if error is not None:
        g = _error(error, scales, chunk, length, CHUNK, BITS, MASKED, DTYPE) + g
    return g


@triton.jit
def _compared(a, finite, chunk, length, CHUNK: tl.constexpr, MASKED: tl.constexpr):
    """Zeros where not finite. Beyond the block's end NaN, for which every comparison is false."""
    a = tl.where(finite, a, 0.0)
    if MASKED:
        a = tl.where(chunk * CHUNK + tl.arange(0, CHUNK) < length, a, float("nan"))
    return a


@triton.jit
def _reaching(a, number, grad, error, scales, finite, length,
              CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """How many elements reach a magnitude, the bits of `number`. `a` holds the first chunks; others are read again."""
    threshold = number.to(DTYPE, bitcast=True)
    count = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(len(a)):
        count += (tl.abs(a[chunk]) >= threshold).to(tl.int32)
    for chunk in tl.range(
        len(a), CHUNKS, loop_unroll_factor=1 if MASKED else 4 if BITS == 0 else 8
    ):  # for enough reads in flight
        g = _gradient(grad, chunk, length, CHUNK, MASKED, DTYPE)
        other = _sum(g, error, scales, chunk, length, CHUNK, BITS, MASKED, DTYPE)
        other = _compared(other, finite, chunk, length, CHUNK, MASKED)
        count += (tl.abs(other) >= threshold).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _apart(x, WIDTH: tl.constexpr):
    """A thread has WIDTH neighbouring elements of x: a tuple of WIDTH tensors, with one of these each."""
    pieces = (x,)
    for level in tl.static_range(4):
        if WIDTH >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                even, odd = tl.split(tl.reshape(pieces[i], (pieces[i].numel // 2, 2)))
                halves = halves + (even, odd)  # type: ignore[assignment]  # noqa: RUF005
            pieces = halves  # type: ignore[assignment]
    return pieces


@triton.jit
def _store_entries(row, place, entry, WIDTH: tl.constexpr):
    """row[place] = entry, where place is not negative.

    Elements of a thread are stored one by one. As one tensor, Triton would move them through shared memory first, to
    threads that it thinks better for stores.
    """
    places, entries = _apart(place, WIDTH), _apart(entry, WIDTH)
    for i in tl.static_range(WIDTH):
        tl.store(row + places[i], entries[i], mask=places[i] >= 0)


@triton.jit
def _write(a, threshold, ties, before, chunk, length, error, scales, key, first, values, indices, finite,
           CHUNK: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Writes a chunk's error, where finite, and those of its elements that are selected.

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
    place = tl.where(chosen, rank.to(tl.int32), -1)
    _store_entries(values, place, stored, WIDTH)
    _store_entries(indices, place, position.to(indices.dtype.element_ty), WIDTH)
    if BITS != 0:
        rest = tl.where(chosen, a - stored.to(a.dtype), a)
        _encode(rest, error, scales, key, first, chunk, length, finite, CHUNK, BITS, MASKED)
    elif error is not None:
        rest = tl.where(chosen, a - stored.to(a.dtype), a).to(error.dtype.element_ty)
        if MASKED:
            tl.store(error + position, rest, mask=(position < length) & finite)
        else:
            tl.store(error + position, rest, mask=finite)  # stream
    return before + tl.sum(flags, 0)


@triton.jit
def _compress_block(grad, error, scales, key, first, values, indices, length, kept,
                    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr,
                    BITS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Compresses a block. Returns the sum of the squares of its gradient; if it is not finite, the row becomes zero."""
    sums = ()
    squares = tl.zeros((CHUNK,), DTYPE)
    for chunk in tl.static_range(RESIDENT):
        g = _gradient(grad, chunk, length, CHUNK, MASKED, DTYPE)
        squares += g * g
        sums = sums + (_sum(g, error, scales, chunk, length, CHUNK, BITS, MASKED, DTYPE),)  # type: ignore[assignment]  # noqa: RUF005
    for chunk in tl.range(RESIDENT, CHUNKS, loop_unroll_factor=1 if MASKED else 8):
        g = _gradient(grad, chunk, length, CHUNK, MASKED, DTYPE)
        squares += g * g
    square = tl.sum(squares, 0)
    finite = tl.where(square < float("inf"), 1, 0) != 0  # of integers: Triton's interpreter makes others floats
    a = ()  # no branch: the compiler would read the error only after it
    for chunk in tl.static_range(RESIDENT):
        a = a + (_compared(sums[chunk], finite, chunk, length, CHUNK, MASKED),)  # type: ignore[assignment]  # noqa: RUF005

    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    threshold = tl.full((), 0, INT)
    bit = tl.full((), 1, INT) << (INT.primitive_bitwidth - 2)
    count = length
    while (bit > 0) & (count != kept):
        reached = _reaching(a, threshold | bit, grad, error, scales, finite, length, CHUNKS, CHUNK, BITS, MASKED, DTYPE)
        if reached >= kept:
            threshold |= bit
            count = reached
        bit = bit >> 1
    above = _reaching(a, threshold + 1, grad, error, scales, finite, length, CHUNKS, CHUNK, BITS, MASKED, DTYPE)

    least, ties = threshold.to(DTYPE, bitcast=True), (kept - above).to(tl.uint32)
    before = tl.full((), 0, tl.uint32)
    for chunk in tl.static_range(RESIDENT):
        before = _write(a[chunk], least, ties, before, chunk, length, error, scales, key, first, values, indices,
                        finite, CHUNK, WIDTH, BITS, MASKED)  # fmt: skip
    for chunk in range(RESIDENT, CHUNKS):
        g = _gradient(grad, chunk, length, CHUNK, MASKED, DTYPE)
        other = _sum(g, error, scales, chunk, length, CHUNK, BITS, MASKED, DTYPE)
        other = _compared(other, finite, chunk, length, CHUNK, MASKED)
        before = _write(other, least, ties, before, chunk, length, error, scales, key, first, values, indices,
                        finite, CHUNK, WIDTH, BITS, MASKED)  # fmt: skip
    return square


@triton.jit
def _compress_kernel(table, parameters, slot, squares, window_size,
                     GRAD: tl.constexpr, ERROR: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr,
                     DTYPE: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
                     RESIDENT: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, block, length, kept, stride, aligned = find_block(table, parameters, program, SIZE)
    entries = (block * window_size + tl.load(slot)) * stride
    values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + entries
    indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + entries
    address = tl.load(row)
    if address == 0:  # the parameter has no gradient
        for first in range(0, kept, CHUNK):
            column = first + tl.arange(0, CHUNK)
            tl.store(values + column, tl.zeros((CHUNK,), VALUES), mask=column < kept)
        tl.store(squares + program, 0.0)
        return
    grad = address.to(tl.pointer_type(GRAD)) + block * SIZE
    error = None
    if ERROR is not None:  # computed here: what a function returns takes no hints
        error = tl.load(row + 1).to(tl.pointer_type(ERROR)) + block * (SIZE if BITS == 0 else (SIZE * BITS + 7) // 8)
    scales, key = _scales_and_key(row, block, SIZE, BITS)
    if (length == CHUNKS * CHUNK) & aligned:
        grad = tl.multiple_of(grad, 16)
        if BITS != 0:  # a thread reads the codes of its elements, and no more at a time
            error = tl.multiple_of(error, WIDTH * BITS // 8)
        elif ERROR is not None:
            error = tl.multiple_of(error, 16)
        square = _compress_block(grad, error, scales, key, block * SIZE, values, indices, length, kept,
                                 CHUNKS, CHUNK, RESIDENT, WIDTH, BITS, False, DTYPE)  # fmt: skip
    else:  # few blocks; masks need more registers, so fewer chunks stay in them
        square = _compress_block(grad, error, scales, key, block * SIZE, values, indices, length, kept,
                                 CHUNKS, CHUNK, RESIDENT // 2, WIDTH, BITS, True, DTYPE)  # fmt: skip
    tl.store(squares + program, square)


@triton.jit
def _scales_and_key(row, block, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Where the scales of a block's error begin, and the key of its random numbers; 0 for what it has not."""
    scales, key = 0, 0  # not None, which functions of Triton 3.4 cannot return
    if BITS != 0:  # each block by itself: no byte and no scale belongs to two
        PER_SCALE: tl.constexpr = 64 * 8 // BITS
        scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block * ((SIZE + PER_SCALE - 1) // PER_SCALE)
        if BITS == 4:
            key = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.int64)))
    return scales, key


@triton.jit
def _index(indices, entry, kept):
    """The position of an entry of a row; beyond the last, one that no block has."""
    return tl.where(entry < kept, tl.load(indices + entry, mask=entry < kept, other=0).to(tl.int32), 1 << 30)


@triton.jit
def _undo_kernel(table, parameters, slot, finite, window_size,
                 GRAD: tl.constexpr, ERROR: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr,
                 DTYPE: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    if tl.load(finite) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    row, block, length, kept, stride, _ = find_block(table, parameters, program, SIZE)
    address = tl.load(row)
    if address == 0:
        return
    entries = (block * window_size + tl.load(slot)) * stride
    values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + entries
    indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + entries
    grad = address.to(tl.pointer_type(GRAD)) + block * SIZE
    if ERROR is not None:
        error = tl.load(row + 1).to(tl.pointer_type(ERROR)) + block * (SIZE if BITS == 0 else (SIZE * BITS + 7) // 8)
        scales, key = _scales_and_key(row, block, SIZE, BITS)
        squares = tl.zeros((CHUNK,), DTYPE)
        for chunk in range(CHUNKS):
            g = _gradient(grad, chunk, length, CHUNK, True, DTYPE)
            squares += g * g
        if tl.sum(squares, 0) < float("inf"):
            entry = 0
            index = _index(indices, entry, kept)
            for chunk in range(CHUNKS):
                position = chunk * CHUNK + tl.arange(0, CHUNK)
                a = _error(error, scales, chunk, length, CHUNK, BITS, True, DTYPE)
                while index < (chunk + 1) * CHUNK:  # slow, but needed so rarely
                    a = tl.where(position == index, a + tl.load(values + entry).to(DTYPE), a)
                    entry += 1
                    index = _index(indices, entry, kept)
                a -= _gradient(grad, chunk, length, CHUNK, True, DTYPE)
                if BITS != 0:
                    _encode(a, error, scales, key, block * SIZE, chunk, length, True, CHUNK, BITS, True)
                else:
                    tl.store(error + position, a.to(ERROR), mask=position < length)
        tl.debug_barrier()  # all threads have read the row
    for first in range(0, kept, CHUNK):
        column = first + tl.arange(0, CHUNK)
        tl.store(values + column, tl.zeros((CHUNK,), VALUES), mask=column < kept)
        tl.store(indices + column, column.to(INDICES), mask=column < kept)


def _dtypes(grads: Sequence[Tensor | None], errors: Errors) -> tuple[torch.dtype, torch.dtype | None, int]:
    """The dtype of gradients, that of errors in memory, and the bits of these; 0 for floating point."""
    dtype = next((grad.dtype for grad in grads if grad is not None), torch.float32)
    error_dtype = stored_dtype(errors)
    return dtype, error_dtype, 8 if error_dtype is torch.int8 else 4 if error_dtype is torch.uint8 else 0


def compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    group = launch_of(rows, grads=grads, errors=errors, keys=keys)
    check_numbers(rows[0].values, slot=slot)
    dtype, error_dtype, bits = _dtypes(grads, errors)
    squares = torch.empty(group.blocks, dtype=accumulation_dtype(dtype), device=slot.device)
    if group.blocks == 0:
        return squares.sum() < float("inf")
    values, indices, blocks = rows[0]
    accumulated = triton_accumulation_dtype(dtype)
    # Elements of an access of 128 bits. Those of the error in few bits are narrower: a thread has that of its elements.
    width = max(4, 16 // dtype.itemsize) if bits else 16 // min(dtype.itemsize, (error_dtype or dtype).itemsize)

    def launch(group: Launch, squares: Tensor, configuration: Configuration) -> None:
        launch_kernel(
            _compress_kernel, (group.blocks,), slot,
            group.table, group.parameters, slot, squares, values.shape[1],
            GRAD=DTYPES[dtype], ERROR=None if error_dtype is None else DTYPES[error_dtype],
            VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype], DTYPE=accumulated,
            SIZE=blocks.block_size, WIDTH=width, BITS=bits, **configuration, enable_fp_fusion=False,
        )  # fmt: skip

    def trial(example: SparseRows) -> Callable[[Configuration], None]:
        numel, device = example.blocks.numel, slot.device
        grad = torch.randn(numel, device=device).to(dtype)
        error: Errors = [torch.zeros_like(grad, dtype=error_dtype)] if errors else []
        if bits:
            error = [allocate_lowbit(numel, bits, device, example.blocks.size)]
        keys = [torch.zeros_like(slot)] if bits == 4 else []
        own = squares.new_empty(example.blocks.count)

        def run(configuration: Configuration) -> None:  # it keeps the tensors alive whose addresses are in the table
            launch(launch_of([example], grads=[grad], errors=error, keys=keys), own, configuration)

        return run

    candidates = configurations(blocks.block_size, accumulated.primitive_bitwidth // 8, width, bits, slot.device)
    launch(group, squares, choose("compress_", rows, (dtype, error_dtype), candidates, trial))
    return squares.sum() < float("inf")


def undo_compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    finite: Tensor,
    keys: Sequence[Tensor] = (),
) -> None:
    group = launch_of(rows, grads=grads, errors=errors, keys=keys)
    check_numbers(rows[0].values, slot=slot, finite=finite)
    if group.blocks == 0:
        return
    dtype, error_dtype, bits = _dtypes(grads, errors)
    values, indices, blocks = rows[0]
    size = max(UNDO_CHUNK, triton.next_power_of_2(blocks.block_size))
    launch_kernel(
        _undo_kernel, (group.blocks,), slot,
        group.table, group.parameters, slot, finite.view(torch.uint8), values.shape[1],
        GRAD=DTYPES[dtype], ERROR=None if error_dtype is None else DTYPES[error_dtype],
        VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype], DTYPE=triton_accumulation_dtype(dtype),
        SIZE=blocks.block_size, CHUNKS=size // UNDO_CHUNK, CHUNK=UNDO_CHUNK, BITS=bits, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
