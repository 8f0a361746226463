"""`window_apply_` in Gluon: adds the weighted sum of all rows of the window to the parameter, in place.

One program handles one block. It keeps the sum in shared memory and adds one row after another. The indices within a
row are distinct, and a barrier separates rows, so plain loads and stores are enough: there are no atomics, and the
order of summation is fixed. The window is streamed through shared memory in tiles of whole rows; the next tile is read
while the current one is added. At the end the parameter is read and written once, with momentum and weight decay.

A row is added in steps of COLUMNS entries. Accesses to shared memory cannot be masked, so every lane of a step must add
something somewhere. The last step of a row therefore begins earlier, and adds zero for entries that have already been
added. Where a row is shorter than a step, its block is short too, and the lanes without an entry add zero to unused
memory at the end of the sum.

With square_weights a second sum, of squares, is kept beside the first.
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from efcp.kernels.addresses import Momenta, check_momenta, check_numbers, check_weights
from efcp.kernels.blocks import Blocks, SparseRows, kept
from efcp.kernels.lowbit import LowBit, allocate_lowbit
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel
from efcp.kernels.triton.launch import (
    DTYPES,
    SCALE_BITS,
    SCALE_MASK,
    Launch,
    find_block,
    find_scales,
    launch_of,
    stored_dtype,
    triton_accumulation_dtype,
)
from efcp.kernels.triton.tuning import Configuration, choose, most_in_flight
from efcp.kernels.update import Update

find_block, find_scales = gluon.jit(find_block.fn), gluon.jit(find_scales.fn)
Shared = gl.shared_memory_descriptor
reinterpret = Shared.reinterpret if hasattr(Shared, "reinterpret") else Shared._reinterpret
ALIGNED = gl.constexpr(16)  # entries; tiles begin at multiples of it, so that every access takes 128 bits


def configurations(
    target: torch.dtype, values: Tensor, blocks: Blocks, shared: int, with_squares: bool = False
) -> list[Configuration]:
    """The configurations whose programs fit into `shared` bytes of shared memory. The first one is the default.

    Rows of up to 127 entries are added by a single warp: that needs no barriers between warps, and many programs fit on
    a multiprocessor. The list is empty where nothing fits.
    """
    row, room = kept(blocks.block_size, blocks.density), triton.next_power_of_2(blocks.block_size)
    default = 1 << max(0, min(3, (row // 64).bit_length() - 1))
    least = max(2048, triton.next_power_of_2(row + 16))
    entry = values.element_size() + blocks.index_dtype.itemsize
    candidates = []
    for num_warps, tile in (
        (default, least),
        (default, 2 * least),
        (2 * default, least),
        (default // 2, least),
        (2 * default, 4 * least),
        (default, least // 2),
    ):
        sums = (room + triton.next_power_of_2(values.shape[1])) * accumulation_dtype(target).itemsize
        sums *= 1 + with_squares
        if 0 < num_warps <= 8 and 32 * num_warps <= max(32, row) and row + 16 <= tile <= max(2048 * num_warps, least):
            columns = min(1 << (row.bit_length() - 1), 64 * num_warps)
            chunk = min(room, 512 * num_warps)  # of the sum, taken at a time: more would not fit into registers
            configuration = {"TILE": tile, "COLUMNS": columns, "CHUNK": chunk, "num_warps": num_warps}
            # Without a limit the compiler spills registers to raise occupancy, which is of no use here.
            configuration |= at_most_registers(128 if num_warps == 4 else 255, values.device)
            candidates.append((configuration, sums + tile * entry, tile * entry))
    return most_in_flight(candidates, shared)


@gluon.jit
def _load_tile(values, indices, first, last, end, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Loads the values and indices of entries up to `last`, from `first` rounded down to a multiple of ALIGNED.

    `end` is the end of the tensor, beyond which nothing is read.
    """
    position = gl.multiple_of(first // ALIGNED * ALIGNED, 16) + gl.arange(0, TILE, layout=LAYOUT)
    if (last + ALIGNED - 1) // ALIGNED * ALIGNED <= end:
        mask = position // ALIGNED * ALIGNED < last
        value = gl.load(values + position, mask=mask)  # stream
        index = gl.load(indices + position, mask=mask)  # stream
    else:
        mask = position < last
        value = gl.load(values + position, mask=mask)
        index = gl.load(indices + position, mask=mask)
    return value, index


@gluon.jit
def _scaled(code, scales, skipped, first, length, WHOLE: gl.constexpr):
    """Numbers in 8 bits as float32, of a block from `first` on; scales as of `find_scales`.

    Where WHOLE, the block and these numbers begin and end with those of a scale, and a thread reads each scale once.
    """
    if WHOLE:
        ROWS: gl.constexpr = code.numel >> SCALE_BITS
        rows = gl.reshape(code.to(gl.float32), [ROWS, 1 << SCALE_BITS])
        number = (first >> SCALE_BITS) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows.type.layout))
        scale = gl.load(scales + number, mask=(number << SCALE_BITS) < length, other=0.0)
        return gl.convert_layout(gl.reshape(rows * gl.expand_dims(scale, 1), code.shape), code.type.layout)
    else:
        position = first + gl.arange(0, code.numel, layout=code.type.layout)
        scale = gl.load(scales + ((skipped + position) >> SCALE_BITS), mask=position < length, other=0.0)
        return code.to(gl.float32) * scale


@gluon.jit
def _apply_kernel(table, parameters, weights, target_factor, update_factor, momentum_factor, square_weights, eps,
                  window_size,
                  TARGET: gl.constexpr, VALUES: gl.constexpr, INDICES: gl.constexpr, MOMENTUM: gl.constexpr,
                  WRITES: gl.constexpr, DTYPE: gl.constexpr, WINDOW: gl.constexpr, SIZE: gl.constexpr,
                  ROOM: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr,
                  CHUNK: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = 128 // min(VALUES.primitive_bitwidth, INDICES.primitive_bitwidth)
    TILES: gl.constexpr = gl.BlockedLayout([WIDTH], [32], [WARPS], [0])
    STEPS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CHUNKS: gl.constexpr = gl.BlockedLayout([128 // TARGET.primitive_bitwidth], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WHOLE: gl.constexpr = (SIZE & SCALE_MASK) + (CHUNK & SCALE_MASK) == 0

    program = gl.program_id(0).to(gl.int64)
    row, block, length, kept, stride, aligned = find_block(table, parameters, program, SIZE)
    values = gl.multiple_of(gl.load(row + 2).to(gl.pointer_type(VALUES)), 16)
    indices = gl.multiple_of(gl.load(row + 3).to(gl.pointer_type(INDICES)), 16)
    entries = block * window_size * stride
    end = gl.load(row + 4) * window_size * stride
    end = gl.where(aligned, end, -1)  # -1 where no access may take 128 bits

    chunks = gl.allocate_shared_memory(DTYPE, [ROOM // CHUNK, CHUNK], SHARED)
    total = reinterpret(chunks, DTYPE, [ROOM], SHARED)
    tile_values = gl.allocate_shared_memory(VALUES, [TILE], SHARED)
    tile_indices = gl.allocate_shared_memory(INDICES, [TILE], SHARED)
    shared_weights = gl.allocate_shared_memory(DTYPE, [WINDOW], SHARED)
    lanes = gl.arange(0, WINDOW, layout=STEPS)
    shared_weights.store(gl.load(weights + lanes, mask=lanes < window_size, other=0.0).to(DTYPE))
    zero = gl.zeros([CHUNK], DTYPE, CHUNKS)
    for chunk in range(ROOM // CHUNK):
        chunks.index(chunk).store(zero)
    if square_weights is not None:
        square_chunks = gl.allocate_shared_memory(DTYPE, [ROOM // CHUNK, CHUNK], SHARED)
        squares = reinterpret(square_chunks, DTYPE, [ROOM], SHARED)
        shared_square_weights = gl.allocate_shared_memory(DTYPE, [WINDOW], SHARED)
        shared_square_weights.store(gl.load(square_weights + lanes, mask=lanes < window_size, other=0.0).to(DTYPE))
        for chunk in range(ROOM // CHUNK):
            square_chunks.index(chunk).store(zero)

    rows = gl.maximum((TILE - ALIGNED) // stride.to(gl.int32), 1)  # of a tile
    lane = gl.arange(0, COLUMNS, layout=STEPS)
    back = gl.maximum(kept - COLUMNS, 0)
    spare = ROOM - COLUMNS + lane
    value, index = _load_tile(
        values, indices, entries, entries + gl.minimum(rows, window_size) * stride, end, TILE, TILES
    )
    for first in range(0, window_size, rows):
        tile_values.store(value)
        tile_indices.store(index)
        here = entries + first * stride
        after = here + rows * stride
        last = entries + gl.minimum(first + 2 * rows, window_size) * stride
        value, index = _load_tile(values, indices, after, last, end, TILE, TILES)
        offset = (here % ALIGNED).to(gl.int32)
        for i in range(0, gl.minimum(rows, window_size - first)):
            this = gl.full([COLUMNS], first + i, gl.int32, STEPS)
            weight = shared_weights.gather(this, 0)
            if square_weights is not None:
                square_weight = shared_square_weights.gather(this, 0)
            for done in range(0, kept, COLUMNS):
                column = gl.minimum(done, back) + lane
                place = gl.minimum(offset + i * stride.to(gl.int32) + column, TILE - 1)
                new = (column >= done) & (column < kept)
                entry = gl.where(new, tile_values.gather(place, 0).to(DTYPE), 0.0)
                cell = gl.where(column < kept, tile_indices.gather(place, 0).to(gl.int32), spare)
                total.scatter(total.gather(cell, 0) + entry * weight, cell, 0)
                if square_weights is not None:
                    squares.scatter(squares.gather(cell, 0) + entry * entry * square_weight, cell, 0)

    target = gl.load(row).to(gl.pointer_type(TARGET)) + block * SIZE
    momentum = gl.load(row + 1).to(gl.pointer_type(TARGET if MOMENTUM is None else MOMENTUM)) + block * SIZE
    target_factor, update_factor = gl.load(target_factor).to(DTYPE), gl.load(update_factor).to(DTYPE)
    if MOMENTUM is not None:
        momentum_factor = gl.load(momentum_factor).to(DTYPE)
        scales, skipped = find_scales(row, block, SIZE)
    if square_weights is not None:
        eps = gl.load(eps).to(DTYPE)
    if (length == ROOM) & aligned:
        target, momentum = gl.multiple_of(target, 16), gl.multiple_of(momentum, 16)
        for chunk in range(ROOM // CHUNK):
            position = chunk * CHUNK + gl.arange(0, CHUNK, layout=CHUNKS)
            update = chunks.index(chunk).load(CHUNKS)
            if square_weights is not None:
                update = update / (gl.sqrt(square_chunks.index(chunk).load(CHUNKS)) + eps)
            if MOMENTUM == gl.int8:  # too few bits for wide accesses, where those of the target are wide
                number = _scaled(gl.load(momentum + position), scales, skipped, chunk * CHUNK, ROOM, WHOLE)
                update += momentum_factor * number.to(DTYPE)
            elif MOMENTUM is not None:
                update += momentum_factor * gl.load(momentum + position).to(DTYPE)  # stream
            if WRITES:
                gl.store(momentum + position, update.to(MOMENTUM))  # stream
            old = gl.load(target + position).to(DTYPE)  # stream
            gl.store(target + position, (target_factor * old + update_factor * update).to(TARGET))  # stream
    else:
        for chunk in range(ROOM // CHUNK):
            position = chunk * CHUNK + gl.arange(0, CHUNK, layout=CHUNKS)
            inside = position < length
            update = chunks.index(chunk).load(CHUNKS)
            if square_weights is not None:
                update = update / (gl.sqrt(square_chunks.index(chunk).load(CHUNKS)) + eps)
            if MOMENTUM is not None:
                number = gl.load(momentum + position, mask=inside, other=0)
                if MOMENTUM == gl.int8:
                    number = _scaled(number, scales, skipped, chunk * CHUNK, length, WHOLE)
                update += momentum_factor * number.to(DTYPE)
            if WRITES:
                gl.store(momentum + position, update.to(MOMENTUM), mask=inside)
            old = gl.load(target + position, mask=inside).to(DTYPE)
            gl.store(target + position, (target_factor * old + update_factor * update).to(TARGET), mask=inside)


def window_apply_(
    targets: Sequence[Tensor],
    momenta: Momenta,
    rows: Sequence[SparseRows],
    update: Update,
    candidates: Sequence[Configuration],
) -> None:
    """Chooses one of the configurations, and launches the kernel."""
    group = launch_of(rows, momenta=momenta, targets=targets)
    check_momenta(rows, momenta, update)
    weights, square_weights = check_weights(rows[0].values, update, rows[0].values.shape[1])
    check_numbers(rows[0].values, **update.factors(len(momenta) > 0))
    if group.blocks == 0:
        return
    values, indices, blocks = rows[0]
    dtype, writes = targets[0].dtype, update.writes_momenta and len(momenta) > 0
    own = stored_dtype(momenta)

    def launch(group: Launch, configuration: Configuration) -> None:
        launch_kernel(
            _apply_kernel, (group.blocks,), weights,
            group.table, group.parameters, weights, *update[1:4], square_weights, update.eps, values.shape[1],
            TARGET=DTYPES[dtype], VALUES=DTYPES[values.dtype], INDICES=DTYPES[indices.dtype],
            MOMENTUM=None if own is None else DTYPES[own], WRITES=writes,
            DTYPE=triton_accumulation_dtype(dtype), WINDOW=triton.next_power_of_2(values.shape[1]),
            SIZE=blocks.block_size, ROOM=triton.next_power_of_2(blocks.block_size),
            **configuration, enable_fp_fusion=True,
        )  # fmt: skip

    def trial(example: SparseRows) -> Callable[[Configuration], None]:
        target = torch.zeros(example.blocks.numel, dtype=dtype, device=weights.device)
        momentum: list[Tensor | LowBit] = [torch.zeros_like(target, dtype=own)] if momenta else []
        if own is torch.int8:
            momentum = [allocate_lowbit(len(target), 8, weights.device)]
        return lambda configuration: launch(launch_of([example], momenta=momentum, targets=[target]), configuration)

    name = "window_apply_" if square_weights is None else "window_apply_ with squares"
    launch(group, choose(name, rows, (dtype, own), candidates, trial))
