"""`window_dots` in Gluon: inner products of all rows of the window with the newest one.

A program handles some consecutive blocks, one after another. For each block it spreads the newest row out in shared
memory, as a dense vector. Then it streams the entries of all rows, in tiles of whole rows: it reads indices, looks up
the newest row's numbers there, and multiplies them with the values. Prefix sums over a tile, in float64, give the sums
of its rows as differences. A program leaves its sum for each row in `partial`. The programs' sums are then added in a
fixed order, so there are no atomics.

At the positions of most entries, the newest row is zero. Values are therefore read after the indices. With SKIP, a
group of values, whose indices take 16 bytes, is read only if it has an entry where the newest row is not zero. To hide
latency, tiles are copied to shared memory ahead of their use: while the products of tile t are added up, the values of
tile t + 1 and the indices of tiles t + 2 and t + 3 are on their way.
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from efcp.kernels.addresses import check_numbers
from efcp.kernels.blocks import Blocks, SparseRows, kept
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel
from efcp.kernels.triton.launch import DTYPES, Launch, find_block, launch_of
from efcp.kernels.triton.tuning import Configuration, choose, most_in_flight

find_block = gluon.jit(find_block.fn)
load_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
ALIGNED = gl.constexpr(16)  # entries; tiles begin at multiples of it, so that every access takes 128 bits
PROGRAMS = 1056  # the most programs, a few for each multiprocessor
SKIP_DENSITY = 0.1  # SKIP is the default up to it; on windows from training, a third of the groups is then read
RESERVED = 1024  # bytes of shared memory that Triton takes for prefix sums, at most


def configurations(values: Tensor, blocks: Blocks, shared: int) -> list[Configuration]:
    """The configurations whose programs fit into `shared` bytes of shared memory. The first one is the default.

    A multiprocessor runs as many programs as fit into its shared memory. The default has the shortest tiles with which
    these have enough bytes in flight, and a thread for each access to the indices of a tile. The list is empty where
    nothing fits.
    """
    row, room = kept(blocks.block_size, blocks.density), triton.next_power_of_2(blocks.block_size)
    index_bytes, value_bytes, window_size = blocks.index_dtype.itemsize, values.element_size(), values.shape[1]
    skip = int(blocks.density <= SKIP_DENSITY)
    least = max(1024, triton.next_power_of_2(row + 16))
    candidates = []
    for tile in (least, 2 * least, 4 * least):
        threads = max(32, min(512, tile * index_bytes // 16))
        rows = max(threads, min(512, triton.next_power_of_2(min(tile // row, window_size))))
        rows_room = max(rows, triton.next_power_of_2(window_size))
        tiles = 2 * tile * (index_bytes + value_bytes)
        taken = room * value_bytes + tiles + 8 * (tile + rows_room) + RESERVED
        columns = min(1 << (row.bit_length() - 1), threads)
        configuration = {"TILE": tile, "ROWS": rows, "ROWS_ROOM": rows_room, "COLUMNS": columns, "SKIP": skip}
        # Without this limit registers are spilled on some targets; with a higher one, fewer programs are resident.
        registers = min(128, 64 + 4 * tile // threads) if index_bytes > 1 else 144
        configuration |= {"num_warps": threads // 32} | at_most_registers(registers, values.device)
        candidates.append((configuration, taken, tiles))
    fit = most_in_flight(candidates, shared)
    return [*fit[:1], *(default | {"SKIP": 1 - skip} for default in fit[:1]), *fit[1:]]


@gluon.jit
def _tile(tensor, tile, step, here, last):
    """Where a tile begins and ends: (address, entries from there to its first row, entries from there to its end).

    The address is rounded down to a multiple of ALIGNED entries.
    """
    first = here + tile * step
    aligned = first // ALIGNED * ALIGNED
    return tensor + aligned, (first - aligned).to(gl.int32), (gl.minimum(first + step, last) - aligned).to(gl.int32)


@gluon.jit
def _copy(shared, tensor, number, mask):
    load_async(shared, tensor + number, mask)  # stream


@gluon.jit
def _look_up(newest, index, ROOM: gl.constexpr):
    """The numbers that the newest row holds at some indices."""
    flat = gl.reshape(index.to(gl.int32) & (ROOM - 1), [index.numel])
    return gl.convert_layout(gl.reshape(newest.gather(flat, 0), index.shape), index.type.layout)


@gluon.jit
def _wanted(x, number, span, SKIP: gl.constexpr):
    """A mask of the values of a tile that are read, in whole accesses. With SKIP, none whose products are all zero."""
    mask = number // ALIGNED * ALIGNED < span
    if SKIP:
        mask = mask & (gl.expand_dims(gl.max((x != 0).to(gl.int32), 1), 1) != 0)
    return mask


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _add_rows(total, sums, x, value, offset, first_row, count, kept, width, number,
              ROWS: gl.constexpr, ROWS_ROOM: gl.constexpr, FLAT: gl.constexpr, LANES: gl.constexpr):  # fmt: skip
    """total[row] += sum of the products x · value over the entries of a row, for all rows of a tile."""
    lane = gl.arange(0, ROWS, layout=LANES)
    product = x.to(gl.float64) * value.to(gl.float64)
    if kept < width:  # rows of the tail end in padding
        product = gl.where((number - offset + width) % width < kept, product, 0.0)
    sums.store(gl.associative_scan(gl.convert_layout(gl.reshape(product, [product.numel]), FLAT), 0, _add))
    before = offset + lane * width - 1
    sum = sums.gather(gl.minimum(before + width, product.numel - 1), 0)
    sum -= gl.where(before >= 0, sums.gather(gl.maximum(gl.minimum(before, product.numel - 1), 0), 0), 0.0)
    cell = (first_row + lane) & (ROWS_ROOM - 1)
    total.scatter(total.gather(cell, 0) + gl.where(lane < count, sum, 0.0), cell, 0)


@gluon.jit
def _dots_kernel(table, parameters, slot, partial, window_size, blocks,
                 VALUES: gl.constexpr, INDICES: gl.constexpr, SIZE: gl.constexpr, ROOM: gl.constexpr,
                 ROWS_ROOM: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr,
                 PER_PROGRAM: gl.constexpr, SKIP: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = 128 // INDICES.primitive_bitwidth
    TILES: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([WIDTH], [32], [WARPS], [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SHARED_TILES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    newest = gl.allocate_shared_memory(VALUES, [ROOM], SHARED)
    sums = gl.allocate_shared_memory(gl.float64, [TILE], SHARED)
    total = gl.allocate_shared_memory(gl.float64, [ROWS_ROOM], SHARED)
    tile_values = gl.allocate_shared_memory(VALUES, [2, TILE // WIDTH, WIDTH], SHARED_TILES)
    tile_indices = gl.allocate_shared_memory(INDICES, [2, TILE // WIDTH, WIDTH], SHARED_TILES)
    total.store(gl.zeros([ROWS_ROOM], gl.float64, LANES))
    number = gl.expand_dims(gl.arange(0, TILE // WIDTH, layout=gl.SliceLayout(1, TILES)), 1) * WIDTH
    number = number + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, TILES)), 0)
    column = gl.arange(0, COLUMNS, layout=LANES)

    program = gl.program_id(0).to(gl.int64)
    for this in range(program * PER_PROGRAM, gl.minimum((program + 1) * PER_PROGRAM, blocks)):
        row, block, _, kept, stride, aligned = find_block(table, parameters, this, SIZE)
        values = gl.multiple_of(gl.load(row + 2).to(gl.pointer_type(VALUES)), 16)
        indices = gl.multiple_of(gl.load(row + 3).to(gl.pointer_type(INDICES)), 16)
        end = gl.load(row + 4) * window_size * stride
        here = block * window_size * stride
        last = here + window_size * stride
        width = stride.to(gl.int32)
        rows = gl.minimum((TILE - ALIGNED) // width, ROWS)  # of a tile
        step = (rows * width).to(gl.int64)
        # Whether all entries of the block can be read 128 bits at a time, up to the end of the tensor.
        wide = aligned & ((last + ALIGNED - 1) // ALIGNED * ALIGNED <= end)

        if wide:
            for tile in gl.static_range(2):
                tensor, _, span = _tile(indices, tile, step, here, last)
                _copy(tile_indices.index(tile), tensor, number, number // ALIGNED * ALIGNED < span)
        async_copy.commit_group()

        newest.store(gl.zeros([ROOM], VALUES, FLAT))
        source = here + gl.load(slot) * stride
        for done in range(0, kept, COLUMNS):
            some = gl.minimum(done, gl.maximum(kept - COLUMNS, 0)) + column
            cell = gl.load(indices + source + some, mask=some < kept, other=0).to(gl.int32)
            kept_value = gl.load(values + source + some, mask=some < kept, other=0.0)
            newest.scatter(kept_value, gl.where(some < kept, cell, ROOM - COLUMNS + column), 0)

        if wide:
            # The values of a tile are used once those of the next tile, and later indices, are on their way.
            async_copy.wait_group(0)
            x = _look_up(newest, tile_indices.index(0).load(TILES), ROOM)
            tensor, offset, span = _tile(values, 0, step, here, last)
            _copy(tile_values.index(0), tensor, number, _wanted(x, number, span, SKIP))
            tensor, _, span = _tile(indices, 2, step, here, last)
            _copy(tile_indices.index(0), tensor, number, number // ALIGNED * ALIGNED < span)
            async_copy.commit_group()
            tile = 0
            for first_row in range(0, window_size, rows):
                other = (tile + 1) & 1
                next_x = _look_up(newest, tile_indices.index(other).load(TILES), ROOM)
                tensor, next_offset, span = _tile(values, tile + 1, step, here, last)
                _copy(tile_values.index(other), tensor, number, _wanted(next_x, number, span, SKIP))
                tensor, _, span = _tile(indices, tile + 3, step, here, last)
                _copy(tile_indices.index(other), tensor, number, number // ALIGNED * ALIGNED < span)
                async_copy.commit_group()
                async_copy.wait_group(1)
                _add_rows(total, sums, x, tile_values.index(tile & 1).load(TILES), offset,
                          first_row, gl.minimum(rows, window_size - first_row), kept, width, number,
                          ROWS, ROWS_ROOM, FLAT, LANES)  # fmt: skip
                x, offset, tile = next_x, next_offset, tile + 1
            async_copy.wait_group(0)
        else:
            for first_row in range(0, window_size, rows):
                tile = first_row // rows
                tensor, offset, span = _tile(indices, tile, step, here, last)
                x = _look_up(newest, gl.load(tensor + number, mask=number < span, other=0), ROOM)
                tensor, _, span = _tile(values, tile, step, here, last)
                value = gl.load(tensor + number, mask=_wanted(x, number, span, SKIP) & (number < span), other=0.0)
                _add_rows(total, sums, x, value, offset,
                          first_row, gl.minimum(rows, window_size - first_row), kept, width, number,
                          ROWS, ROWS_ROOM, FLAT, LANES)  # fmt: skip

    lane = gl.arange(0, 32 * WARPS, layout=LANES)
    for first_row in range(0, window_size, 32 * WARPS):
        number_of_row = first_row + lane
        sum = total.gather(number_of_row & (ROWS_ROOM - 1), 0)
        gl.store(partial + program * window_size + number_of_row, sum, mask=number_of_row < window_size)


def window_dots(rows: Sequence[SparseRows], slot: Tensor, candidates: Sequence[Configuration]) -> Tensor:
    """Chooses one of the configurations, and launches the kernel."""
    group = launch_of(rows)
    values, indices, blocks = rows[0]
    check_numbers(values, slot=slot)
    row = kept(blocks.block_size, blocks.density)

    def launch(group: Launch, configuration: Configuration) -> Tensor:
        # With short rows, a program takes more blocks: its sums would else be many bytes compared with the window.
        per_program = max(triton.cdiv(group.blocks, PROGRAMS), min(16, triton.cdiv(128, row)))
        programs = triton.cdiv(group.blocks, per_program)
        partial = torch.empty(programs, values.shape[1], dtype=torch.float64, device=slot.device)
        if programs > 0:
            launch_kernel(
                _dots_kernel, (programs,), slot,
                group.table, group.parameters, slot, partial, values.shape[1], group.blocks,
                VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype], SIZE=blocks.block_size,
                ROOM=triton.next_power_of_2(blocks.block_size), PER_PROGRAM=per_program,
                **configuration, enable_fp_fusion=True,
            )  # fmt: skip
        return partial

    def trial(example: SparseRows) -> Callable[[Configuration], object]:
        return lambda configuration: launch(launch_of([example]), configuration)

    return launch(group, choose("window_dots", rows, (), candidates, trial)).sum(0)
