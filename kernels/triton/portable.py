"""`window_dots` and `window_apply_` in plain Triton, where the Gluon kernels (`dots.py`, `apply.py`) cannot run.

What those keep in shared memory is here in global memory, in a scratch tensor small enough to stay in caches.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Momenta, check_momenta, check_numbers, check_weights
from efcp.kernels.blocks import SparseRows, kept
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel
from efcp.kernels.triton.launch import (
    DTYPES,
    SCALE_BITS,
    find_block,
    find_scales,
    launch_of,
    stored_dtype,
    triton_accumulation_dtype,
)
from efcp.kernels.update import Update

TILE = 2048  # entries of the window that `window_apply_` reads at a time, at most
DOTS_TILE = 1024  # the same for `window_dots`: more would not fit into registers, nor would sums of more than
MOST_ROWS = 512
PROGRAMS = 1056  # the most programs, a few for each multiprocessor


@triton.jit
def _spread_kernel(table, parameters, slot, newest, window_size, VALUES: tl.constexpr, INDICES: tl.constexpr,
                   SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """newest[block, index] = value, for the entries of row `slot`."""
    program = tl.program_id(0).to(tl.int64)
    row, block, _, kept, stride, _ = find_block(table, parameters, program, SIZE)
    entries = (block * window_size + tl.load(slot)) * stride
    values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + entries
    indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + entries
    for first in range(0, kept, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        index = tl.load(indices + column, mask=column < kept, other=0).to(tl.int32)
        value = tl.load(values + column, mask=column < kept, other=0.0)
        tl.store(newest + program * SIZE + index, value, mask=column < kept)


@triton.jit
def _numbers(momentum, scales, skipped, position, mask, DTYPE: tl.constexpr):
    """Some elements of a block's momentum: floating point, or in 8 bits with scales as of `find_scales`."""
    number = tl.load(momentum + position, mask=mask, other=0)
    if momentum.dtype.element_ty == tl.int8:
        scale = tl.load(scales + ((skipped + position) >> SCALE_BITS), mask=mask, other=0.0)
        number = number.to(tl.float32) * scale
    return number.to(DTYPE)


@triton.jit
def _portable_dots_kernel(table, parameters, newest, partial, window_size, blocks, PER_PROGRAM: tl.constexpr,
                 VALUES: tl.constexpr, INDICES: tl.constexpr, MOMENTUM: tl.constexpr, SIZE: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Inner products of rows with `newest`, and then with the momentum, summed over the blocks of a program.

    They are partial[program, row] without momenta, with them partial[program, 0 or 1, row].
    """
    VECTORS: tl.constexpr = 1 if MOMENTUM is None else 2
    program = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    with_momentum = tl.zeros((ROWS,), tl.float64)
    for this in range(program * PER_PROGRAM, tl.minimum((program + 1) * PER_PROGRAM, blocks)):
        row, block, _, kept, stride, _ = find_block(table, parameters, this, SIZE)
        entries = (block * window_size + number) * stride
        values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + entries[:, None]
        indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + entries[:, None]
        if MOMENTUM is not None:
            momentum = tl.load(row + 1).to(tl.pointer_type(MOMENTUM)) + block * SIZE
            scales, skipped = find_scales(row, block, SIZE)
        for first in range(0, kept, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (number < window_size)[:, None] & (column < kept)[None, :]
            index = tl.load(indices + column[None, :], mask=mask, other=0).to(tl.int32)
            value = tl.load(values + column[None, :], mask=mask, other=0.0).to(tl.float64)
            other = tl.load(newest + this * SIZE + index, mask=mask, other=0.0).to(tl.float64)
            total += tl.sum(value * other, 1)
            if MOMENTUM is not None:
                own = _numbers(momentum, scales, skipped, index, mask, tl.float64)
                with_momentum += tl.sum(value * own, 1)
    partial += program * VECTORS * window_size + number
    tl.store(partial, total, mask=number < window_size)
    if MOMENTUM is not None:
        tl.store(partial + window_size, with_momentum, mask=number < window_size)


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    group = launch_of(rows, momenta=momenta)
    values, indices, blocks = rows[0]
    check_numbers(values, slot=slot)
    window_size, size = values.shape[1], blocks.block_size
    columns = min(triton.next_power_of_2(kept(size, blocks.density)), DOTS_TILE)
    tile_rows = min(DOTS_TILE // columns, MOST_ROWS)
    per_program = max(1, triton.cdiv(group.blocks, PROGRAMS))
    programs = triton.cdiv(group.blocks, per_program)
    own, vectors = stored_dtype(momenta), (2,) if momenta else ()
    partial = torch.empty(programs, *vectors, window_size, dtype=torch.float64, device=slot.device)
    if programs > 0:
        newest = torch.zeros(group.blocks * size, dtype=values.dtype, device=slot.device)
        dtypes = {"VALUES": DTYPES[values.dtype], "INDICES": DTYPES[indices.dtype]}
        launch_kernel(
            _spread_kernel, (group.blocks,), slot,
            group.table, group.parameters, slot, newest, window_size, **dtypes, SIZE=size, COLUMNS=columns,
            enable_fp_fusion=True,
        )  # fmt: skip
        launch_kernel(
            _portable_dots_kernel, (programs, triton.cdiv(window_size, tile_rows)), slot,
            group.table, group.parameters, newest, partial, window_size, group.blocks, PER_PROGRAM=per_program,
            **dtypes, MOMENTUM=None if own is None else DTYPES[own], SIZE=size, ROWS=tile_rows, COLUMNS=columns,
            **at_most_registers(128, slot.device),  # else some are spilled
            enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _portable_apply_kernel(table, parameters, weights, target_factor, update_factor, momentum_factor, square_weights,
                  eps, scratch, window_size, blocks,
                  TARGET: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr, MOMENTUM: tl.constexpr,
                  WRITES: tl.constexpr, DTYPE: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Adds one row after another to a sum in `scratch`: needs no atomics, as a row's indices are distinct.

    With square_weights, squares are added to a second sum behind those of all programs.
    """
    program = tl.program_id(0).to(tl.int64)
    total = scratch + program * SIZE
    squares = total + tl.num_programs(0).to(tl.int64) * SIZE
    target_factor, update_factor = tl.load(target_factor).to(DTYPE), tl.load(update_factor).to(DTYPE)
    if MOMENTUM is not None:
        momentum_factor = tl.load(momentum_factor).to(DTYPE)
    if square_weights is not None:
        eps = tl.load(eps).to(DTYPE)
    for this in range(program, blocks, tl.num_programs(0)):
        row, block, length, kept, stride, _ = find_block(table, parameters, this, SIZE)
        for first in range(0, length, COLUMNS):
            position = first + tl.arange(0, COLUMNS)
            tl.store(total + position, tl.zeros((COLUMNS,), DTYPE), mask=position < length)
            if square_weights is not None:
                tl.store(squares + position, tl.zeros((COLUMNS,), DTYPE), mask=position < length)
        tl.debug_barrier()
        values = tl.load(row + 2).to(tl.pointer_type(VALUES)) + block * window_size * stride
        indices = tl.load(row + 3).to(tl.pointer_type(INDICES)) + block * window_size * stride
        for number in range(0, window_size):
            weight = tl.load(weights + number).to(DTYPE)
            if square_weights is not None:
                square_weight = tl.load(square_weights + number).to(DTYPE)
            for first in range(0, kept, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mask = column < kept
                index = tl.load(indices + number * stride + column, mask=mask, other=0).to(tl.int32)
                value = tl.load(values + number * stride + column, mask=mask, other=0.0).to(DTYPE)
                old = tl.load(total + index, mask=mask, other=0.0)
                tl.store(total + index, old + weight * value, mask=mask)
                if square_weights is not None:
                    old = tl.load(squares + index, mask=mask, other=0.0)
                    tl.store(squares + index, old + square_weight * (value * value), mask=mask)
            tl.debug_barrier()
        target = tl.load(row).to(tl.pointer_type(TARGET)) + block * SIZE
        if MOMENTUM is not None:
            momentum = tl.load(row + 1).to(tl.pointer_type(MOMENTUM)) + block * SIZE
            scales, skipped = find_scales(row, block, SIZE)
        for first in range(0, length, COLUMNS):
            position = first + tl.arange(0, COLUMNS)
            mask = position < length
            update = tl.load(total + position, mask=mask, other=0.0)
            if square_weights is not None:
                update = update / (tl.sqrt(tl.load(squares + position, mask=mask, other=0.0)) + eps)
            if MOMENTUM is not None:
                update += momentum_factor * _numbers(momentum, scales, skipped, position, mask, DTYPE)
                if WRITES:
                    tl.store(momentum + position, update.to(MOMENTUM), mask=mask)
            old = tl.load(target + position, mask=mask, other=0.0).to(DTYPE)
            tl.store(target + position, (target_factor * old + update_factor * update).to(TARGET), mask=mask)
        tl.debug_barrier()


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    group = launch_of(rows, momenta=momenta, targets=targets)
    check_momenta(rows, momenta, update)
    weights, square_weights = check_weights(rows[0].values, update, rows[0].values.shape[1])
    check_numbers(rows[0].values, **update.factors(len(momenta) > 0))
    if group.blocks == 0:
        return
    values, indices, blocks = rows[0]
    size, dtype, own = blocks.block_size, targets[0].dtype, stored_dtype(momenta)
    columns = min(triton.next_power_of_2(kept(size, blocks.density)), TILE)
    programs = min(group.blocks, PROGRAMS)
    sums = 1 if square_weights is None else 2
    scratch = torch.empty(sums * programs * size, dtype=accumulation_dtype(dtype), device=weights.device)
    launch_kernel(
        _portable_apply_kernel, (programs,), weights,
        group.table, group.parameters, weights, *update[1:4], square_weights, update.eps, scratch,
        values.shape[1], group.blocks,
        TARGET=DTYPES[dtype], VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype],
        MOMENTUM=None if own is None else DTYPES[own], WRITES=update.writes_momenta and len(momenta) > 0,
        DTYPE=triton_accumulation_dtype(dtype), SIZE=size, COLUMNS=columns, num_warps=max(1, min(8, columns // 64)),
        **at_most_registers(168, weights.device),  # else some are spilled
        enable_fp_fusion=True,
    )  # fmt: skip
