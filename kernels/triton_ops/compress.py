"""`compress_` in Triton: blockwise Top-k selection with fused error-feedback update, one program a block.

The bits of |a|, read as an integer, order like |a|, so the k-th largest magnitude is found bit by bit, from the
highest: a bit belongs to the threshold if at least k keys reach it. The search ends early when exactly k do. Prefix
sums over the block then number the selected elements, which are written in ascending order; among elements equal to
the threshold the lowest are taken.

A block of up to CHUNK elements is read once and stays in registers. Of a larger one the first CHUNK elements do, the
others are read again in every pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.blocks import Blocks
from efcp.kernels.triton_ops.common import triton_accumulation_dtype

CHUNK_BYTES = 16384


def configuration(size: int, numel_bytes: int) -> tuple[int, int]:
    """(CHUNK, num_warps) for blocks of a size: 64 bytes a thread, or 32 where a second chunk needs registers, too."""
    chunk = min(triton.next_power_of_2(size), CHUNK_BYTES // numel_bytes)
    thread = 64 if size <= chunk else 32
    return chunk, max(1, chunk * numel_bytes // thread // 32)


@triton.jit
def _load(grad, error, finite, chunk, length, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """a = e + g of one chunk of a block, and its keys: the bits of |a|, -1 beyond the end of the block."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = position < length
    a = tl.load(grad + position, mask=inside, other=0.0).to(DTYPE)
    if error is not None:
        a = tl.load(error + position, mask=inside, other=0.0).to(DTYPE) + a
    a = tl.where(finite, a, 0.0)
    key = tl.abs(a).to(tl.int64 if DTYPE == tl.float64 else tl.int32, bitcast=True)
    return a, tl.where(inside, key, -1)


@triton.jit
def _count(key, threshold, grad, error, finite, length, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """How many keys of a block reach the threshold; `key` are those of its first chunk."""
    count = tl.sum((key >= threshold).to(tl.int32), 0)
    for chunk in range(1, CHUNKS):
        _, other = _load(grad, error, finite, chunk, length, CHUNK, DTYPE)
        count += tl.sum((other >= threshold).to(tl.int32), 0)
    return count


@triton.jit
def _write(a, key, threshold, ties, error, values, indices, finite, chunk, length, written, tied_before,
           CHUNK: tl.constexpr):  # fmt: skip
    """Writes a chunk's error and selected elements; returns how many were written, and how many tied, so far."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    tied = key == threshold
    tied_rank = tied_before + tl.cumsum(tied.to(tl.int32), 0)
    chosen = (key > threshold) | (tied & (tied_rank <= ties))
    rank = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
    stored = a.to(values.dtype.element_ty)
    tl.store(values + rank, stored, mask=chosen)
    tl.store(indices + rank, position.to(indices.dtype.element_ty), mask=chosen)
    if error is not None:
        rest = tl.where(chosen, a - stored.to(a.dtype), a)
        tl.store(error + position, rest.to(error.dtype.element_ty), mask=(position < length) & finite)
    return written + tl.sum(chosen.to(tl.int32), 0), tied_before + tl.sum(tied.to(tl.int32), 0)


@triton.jit
def _compress_kernel(grad, error, values, indices, slot, finite, numel, window, full_kept, tail_kept,
                     SIZE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    block = tl.program_id(0).to(tl.int64)
    length = tl.minimum(numel - block * SIZE, SIZE).to(tl.int32)
    kept = tl.where(length == SIZE, full_kept, tail_kept)
    finite = tl.load(finite) != 0
    grad += block * SIZE
    if error is not None:
        error += block * SIZE
    row = (block * window + tl.load(slot)) * full_kept
    values += row
    indices += row

    a, key = _load(grad, error, finite, 0, length, CHUNK, DTYPE)
    threshold = tl.full((), 0, key.dtype)
    bit = tl.full((), 1, key.dtype) << (key.dtype.primitive_bitwidth - 2)
    count = length
    while (bit > 0) & (count != kept):
        reached = _count(key, threshold | bit, grad, error, finite, length, CHUNKS, CHUNK, DTYPE)
        if reached >= kept:
            threshold |= bit
            count = reached
        bit = bit >> 1

    ties = kept - _count(key, threshold + 1, grad, error, finite, length, CHUNKS, CHUNK, DTYPE)
    written, tied = _write(a, key, threshold, ties, error, values, indices, finite, 0, length, 0, 0, CHUNK)
    for chunk in range(1, CHUNKS):
        a, key = _load(grad, error, finite, chunk, length, CHUNK, DTYPE)
        written, tied = _write(a, key, threshold, ties, error, values, indices, finite, chunk, length, written, tied,
                               CHUNK)  # fmt: skip


def compress_(
    grad: Tensor,
    error: Tensor | None,
    values: Tensor,
    indices: Tensor,
    slot: Tensor,
    finite: Tensor,
    blocks: Blocks,
) -> None:
    if blocks.count == 0:
        return
    dtype = triton_accumulation_dtype(grad.dtype)
    chunk, num_warps = configuration(blocks.size, dtype.primitive_bitwidth // 8)
    with torch.cuda.device_of(grad):
        _compress_kernel[(blocks.count,)](
            grad, error, values, indices, slot, finite.view(torch.uint8), blocks.numel, values.shape[1], blocks.kept,
            blocks.kept_in_tail, SIZE=blocks.size, CHUNK=chunk, DTYPE=dtype, num_warps=num_warps,
        )  # fmt: skip
