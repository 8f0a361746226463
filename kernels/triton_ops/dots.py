"""`window_dots` in Gluon: batched inner products of all rows of the window with the newest one.

A program takes some consecutive blocks, one after the other. It spreads the block's newest row out in shared memory,
and streams the entries of all rows in tiles of whole rows: reads indices, looks up what the newest row holds there, and
multiplies. Prefix sums over a tile, in float64, give the sums of its rows as differences. What a program has summed up
for each row it leaves in `partial`, whose rows are added in a fixed order: no atomics.

Most entries meet a zero of the newest row. Values are therefore read after the indices, and where SKIP says so only in
those groups of 16 bytes that have something to meet.
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from efcp.kernels.blocks import Blocks, Rows, kept
from efcp.kernels.triton_ops.group import DTYPES, Group, at_most_registers, find_block, group
from efcp.kernels.triton_ops.tuning import Configuration, choose

find_block = gluon.jit(find_block.fn)
ALIGNED = gl.constexpr(16)  # entries; where tiles begin, so that every access takes 128 bits
NUM_WARPS = 4
PROGRAMS = 1056  # at most, a few for each multiprocessor
SKIP_DENSITY = 0.1  # at most; on windows from training a third of the groups has something to meet then
RESERVED = 1024  # bytes of shared memory that Triton takes for prefix sums, at most


def configurations(values: Tensor, blocks: Blocks, shared: int) -> list[Configuration]:
    """For blocks whose program may take so many bytes of shared memory; the default first, none where nothing fits."""
    row, room = kept(blocks.block_size, blocks.density), triton.next_power_of_2(blocks.block_size)
    columns = min(1 << (row.bit_length() - 1), 32 * NUM_WARPS)
    rows_room = triton.next_power_of_2(values.shape[1] + 32 * NUM_WARPS)
    least = max(2048, triton.next_power_of_2(row + 16))
    skip = blocks.density <= SKIP_DENSITY
    registers = at_most_registers(255) if blocks.block_size <= 256 else {}  # else some are spilled
    fit = []
    for tile, skipping in ((least, skip), (least, not skip), (2 * least, skip)):
        if room * values.element_size() + 8 * (tile + rows_room) + RESERVED <= shared:
            fit.append({"ROWS_ROOM": rows_room, "TILE": tile, "COLUMNS": columns, "SKIP": int(skipping)} | registers)
    return fit


@gluon.jit
def _load(tensor, position, mask, stop, end):
    """Entries of a tile in whole accesses, as far as the tensor goes; beyond that, entry by entry."""
    if (stop + ALIGNED - 1) // ALIGNED * ALIGNED <= end:
        return gl.load(tensor + position, mask=mask, other=0)  # stream
    return gl.load(tensor + position, mask=mask & (position < stop), other=0)


@gluon.jit
def _read_indices(indices, number, first, stop, end):
    """Indices of the entries from `first`, rounded down to where an access may begin, to `stop`. The tensor
    ends at `end`."""
    position = first // ALIGNED * ALIGNED + number
    return _load(indices, position, position // ALIGNED * ALIGNED < stop, stop, end)


@gluon.jit
def _look_up(newest, index, values, number, first, stop, end, SKIP: gl.constexpr, ROOM: gl.constexpr):
    """(what the newest row holds, value) of the same entries; of values, where SKIP, those in vain are not read."""
    position = first // ALIGNED * ALIGNED + number
    flat = gl.reshape(index.to(gl.int32) & (ROOM - 1), [index.numel])
    x = gl.convert_layout(gl.reshape(newest.gather(flat, 0), index.shape), index.type.layout)
    mask = position // ALIGNED * ALIGNED < stop
    if SKIP:
        mask = mask & (gl.expand_dims(gl.max((x != 0).to(gl.int32), 1), 1) != 0)
    return x, _load(values, position, mask, stop, end)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _dots_kernel(parameters, owners, slot, partial, window, blocks,
                 VALUES: gl.constexpr, INDICES: gl.constexpr, SIZE: gl.constexpr, ROOM: gl.constexpr,
                 ROWS_ROOM: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, PER_PROGRAM: gl.constexpr,
                 SKIP: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = 128 // INDICES.primitive_bitwidth
    TILES: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([WIDTH], [32], [WARPS], [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = 32 * WARPS  # at most, of a tile

    newest = gl.allocate_shared_memory(VALUES, [ROOM], SHARED)
    sums = gl.allocate_shared_memory(gl.float64, [TILE], SHARED)
    total = gl.allocate_shared_memory(gl.float64, [ROWS_ROOM], SHARED)
    total.store(gl.zeros([ROWS_ROOM], gl.float64, LANES))
    number = gl.expand_dims(gl.arange(0, TILE // WIDTH, layout=gl.SliceLayout(1, TILES)), 1) * WIDTH
    number = number + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, TILES)), 0)
    lane = gl.arange(0, ROWS, layout=LANES)
    column = gl.arange(0, COLUMNS, layout=LANES)

    program = gl.program_id(0).to(gl.int64)
    for this in range(program * PER_PROGRAM, gl.minimum((program + 1) * PER_PROGRAM, blocks)):
        row, block, _, kept, stride, aligned = find_block(parameters, owners, this, SIZE)
        values = gl.multiple_of(gl.load(row + 2).to(gl.pointer_type(VALUES)), 16)
        indices = gl.multiple_of(gl.load(row + 3).to(gl.pointer_type(INDICES)), 16)
        end = (gl.load(row + 4) + SIZE - 1) // SIZE * window * stride
        end = gl.where(aligned, end, -1)  # else no access may take 128 bits
        here = block * window * stride
        last = here + window * stride
        rows = gl.minimum((TILE - ALIGNED) // stride, ROWS)  # of a tile
        step = rows * stride

        index = _read_indices(indices, number, here, gl.minimum(here + step, last), end)
        newest.store(gl.zeros([ROOM], VALUES, FLAT))
        source = here + gl.load(slot) * stride
        for done in range(0, kept, COLUMNS):
            some = gl.minimum(done, gl.maximum(kept - COLUMNS, 0)) + column
            cell = gl.load(indices + source + some, mask=some < kept, other=0).to(gl.int32)
            kept_value = gl.load(values + source + some, mask=some < kept, other=0.0)
            newest.scatter(kept_value, gl.where(some < kept, cell, ROOM - COLUMNS + column), 0)

        x, value = _look_up(newest, index, values, number, here, gl.minimum(here + step, last), end, SKIP, ROOM)
        index = _read_indices(indices, number, here + step, gl.minimum(here + 2 * step, last), end)
        for first_row in range(0, window, rows):
            after = here + step
            stop = gl.minimum(after + step, last)
            next_x, next_value = _look_up(newest, index, values, number, after, stop, end, SKIP, ROOM)
            index = _read_indices(indices, number, after + step, gl.minimum(after + 2 * step, last), end)

            offset = (here % ALIGNED).to(gl.int32)
            place = number - offset
            width = stride.to(gl.int32)
            count = gl.minimum(rows, window - first_row).to(gl.int32)
            counts = (place >= 0) & (place < count * width)
            if kept < width:  # rows of the tail end in padding
                counts = counts & (place % width < kept)
            product = gl.where(counts, x.to(gl.float64) * value.to(gl.float64), 0.0)
            sums.store(gl.associative_scan(gl.convert_layout(gl.reshape(product, [TILE]), FLAT), 0, _add))
            before = offset + lane * width - 1
            sum = sums.gather(gl.minimum(before + width, TILE - 1), 0)
            sum -= gl.where(before >= 0, sums.gather(gl.maximum(gl.minimum(before, TILE - 1), 0), 0), 0.0)
            cell = first_row.to(gl.int32) + lane  # type: ignore[attr-defined]
            total.scatter(total.gather(cell, 0) + gl.where(lane < count, sum, 0.0), cell, 0)
            x, value, here = next_x, next_value, after

    for first_row in range(0, window, ROWS):
        number_of_row = first_row + lane
        sum = total.gather(number_of_row, 0)
        gl.store(partial + program * window + number_of_row, sum, mask=number_of_row < window)


def window_dots(rows: Sequence[Rows], slot: Tensor, candidates: Sequence[Configuration]) -> Tensor:
    """With one of some configurations."""
    table = group((), (), rows)
    values, indices, blocks = rows[0]
    row = kept(blocks.block_size, blocks.density)

    def launch(table: Group, configuration: Configuration) -> Tensor:
        # More blocks for each where the sums that a program leaves would be many bytes compared with the window.
        per_program = max(triton.cdiv(table.blocks, PROGRAMS), min(16, triton.cdiv(128, row)))
        programs = triton.cdiv(table.blocks, per_program)
        partial = torch.empty(programs, values.shape[1], dtype=torch.float64, device=slot.device)
        if programs > 0:
            with torch.cuda.device_of(slot):
                _dots_kernel[(programs,)](
                    table.parameters, table.owners, slot, partial, values.shape[1], table.blocks,
                    VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype], SIZE=blocks.block_size,
                    ROOM=triton.next_power_of_2(blocks.block_size), PER_PROGRAM=per_program, num_warps=NUM_WARPS,
                    **configuration,
                )  # fmt: skip
        return partial

    def trial(window: Rows) -> Callable[[Configuration], object]:
        return lambda configuration: launch(group((), (), [window]), configuration)

    return launch(table, choose("window_dots", rows, (), candidates, trial)).sum(0)
