"""`window_dots` on a CPU: inner products of all rows of the window with the newest one.

In each block, the newest row is spread out to a dense float32 array. For every entry of the window, the number at its
position is looked up there and multiplied with its value. This goes eight entries at a time, by hand, since Numba
vectorises no loop that looks numbers up.

Where rows are short, few entries share a position with the newest row, so a filter first finds those that may. It holds
two sets of bytes: the highest bits of the newest row's positions, and the lowest bits. One instruction looks up 32
bytes in a table of 16, so 32 positions are compared with both sets without access to memory. Few positions are in
both sets but not in the row.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import Momenta
from efcp.kernels.blocks import SparseRows
from efcp.kernels.cpu.bits import bits_of_float, bits_set, trailing_zeros
from efcp.kernels.cpu.convert import index_at, value_at
from efcp.kernels.cpu.dtypes import CODES, FLOAT16, FLOAT32, SIZES
from efcp.kernels.cpu.launch import CPU, PIECES, launch_of, momentum_code, run, slot_address, table_row, take_share
from efcp.kernels.cpu.llvm import (
    EIGHT,
    HAS_AVX2,
    LANES,
    add_bf16_u8,
    add_bf16_u16,
    add_f32_u8,
    add_f32_u16,
    no_sums,
    overlap_mask_u8,
    overlap_mask_u16,
    pieces_and_arguments,
    prefetch,
    sum_of_eight,
)
from efcp.kernels.cpu.lowbit import read_momentum
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f64, load_i64, store_f64

FEW = 48  # entries; the filter pays where a row has at most so many in a block
PORTION = 1024  # entries of the window that are filtered at a time
TABLES = 64  # bytes of the two sets: two tables of 16 bytes for each


@jit
def _add_products(code: int, size: int, sums: Any, values: int, indices: int, entry: int, table: int) -> Any:
    if code == FLOAT32:
        if size == 1:
            return add_f32_u8(sums, values, indices, entry, table)
        return add_f32_u16(sums, values, indices, entry, table)
    if size == 1:
        return add_bf16_u8(sums, values, indices, entry, table)
    return add_bf16_u16(sums, values, indices, entry, table)


@jit
def _product(code: int, one: float, other: float) -> float:
    """The product of two values of a window, given as float32. In float32 where that is exact (see `_dots_kernel`)."""
    return np.float64(one) * np.float64(other) if code == FLOAT32 else np.float64(one * other)


@jit
def _include(tables: np.ndarray, shift: int, position: int) -> None:
    """Adds a position to both sets.

    A position has an upper byte (position >> shift) and a lower byte. Each set has two tables of 16 bytes. The highest
    bit of a byte chooses the table, and its lowest four bits choose the byte in it. Bits 4 to 6 of the upper byte
    choose the bit that is set there, in both sets.
    """
    upper, lower = position >> shift, position & 255
    bit = 1 << ((upper >> 4) & 7)
    tables[upper >> 3 & 16 | upper & 15] |= bit
    tables[32 + (lower >> 3 & 16 | lower & 15)] |= bit


@jit
def _may_overlap(
    size: int, indices: int, first: int, last: int, entries: int, tables: int, shift: int,
    values: int, bytes_a_value: int, found: np.ndarray,
) -> int:  # fmt: skip
    """Finds the entries of a block that may share a position with the newest row, among `first` to `last` − 1.

    The block must have at least 64 entries. The numbers of the entries are written to `found`, and their values are
    fetched into the cache. As in `_positions`, four are written at a time, so `found` needs room for four more.

    Returns:
        How many were found.
    """
    count = np.uint64(0)
    for start in range(first, last, LANES):
        before = max(start + LANES - entries, 0)  # by so much, the last 64 entries begin earlier
        if size == 1:
            mask = overlap_mask_u8(indices + start - before, tables, shift)
        else:
            mask = overlap_mask_u16(indices + 2 * (start - before), tables, shift)
        mask >>= np.uint64(before)
        place, more = count, bits_set(mask)
        count += np.uint64(more)
        while True:
            for number in range(4):
                entry = np.uint64(start) + trailing_zeros(mask)
                found[place + np.uint64(number)] = entry
                prefetch(values + np.int64(entry) * bytes_a_value)
                mask &= mask - np.uint64(1)
            if more <= 4:
                break
            more -= 4
            place += np.uint64(4)
    return np.int64(count)


@jit
def _add_dots_of_few(
    value_code: int, index_size: int, values: int, indices: int, window_size: int, kept: int, row: int,
    newest: np.ndarray, unit: float, shift: int, tables: np.ndarray, found: np.ndarray, total: np.ndarray,
) -> None:  # fmt: skip
    """Adds the inner products of a block's rows with the newest one to `total`, with the filter.

    `newest` holds the newest row of the block, divided by `unit`.
    """
    tables[:] = 0
    for j in range(row * kept, (row + 1) * kept):
        _include(tables, shift, index_at(index_size, indices, j))
    entries, inverse = window_size * kept, np.uint64((1 << 32) // kept + 1)
    for start in range(0, entries, PORTION):
        stop, address = min(start + PORTION, entries), tables.ctypes.data
        count = _may_overlap(
            index_size, indices, start, stop, entries, address, shift, values, SIZES[value_code], found
        )
        for place in range(count):
            j = np.int64(found[place])
            product = _product(value_code, newest[index_at(index_size, indices, j)], value_at(value_code, values, j))
            total[found[place] * inverse >> np.uint64(32)] += unit * product  # the index is j // kept


@cache
def _dots_kernel(value_code: int, index_size: int) -> Kernel:
    # The product of two bfloat16 or float16 numbers is exact in float32, unless it overflows or underflows. The newest
    # row is scaled so that products cannot overflow, and only those below 1e-29 times the largest underflow.
    narrow = value_code != FLOAT32
    eight = value_code != FLOAT16  # whether entries are taken eight at a time
    bytes_a_value = SIZES[value_code]

    @cached_kernel(value_code, index_size)
    def dots(call: int) -> None:
        pieces, table, parameters, largest, sums, blocks, slot, window_size, few = pieces_and_arguments(call, 8)
        row = load_i64(slot, 0)
        shift = 0
        while (largest - 1) >> shift > 255:
            shift += 1
        newest = np.zeros(largest, np.float32)
        tables = np.empty(TABLES, np.uint8)
        found = np.empty(PORTION + 4, np.uint64)
        total = np.empty(window_size, np.float64)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                total[:] = 0.0
                first_block, last_block = piece * blocks // pieces, (piece + 1) * blocks // pieces
                begin = np.int64(0)
                for number in range(parameters):
                    end, numel, size, kept, kept_in_tail, values, indices, _, _, _ = table_row(
                        table, parameters, number
                    )
                    for block in range(max(first_block, begin) - begin, min(last_block, end) - begin):
                        chosen = kept if (block + 1) * size <= numel else kept_in_tail
                        entry = block * window_size * kept
                        own = entry + row * kept
                        unit = 1.0
                        if narrow:
                            highest = np.float32(0)
                            for j in range(own, own + chosen):
                                highest = max(highest, abs(value_at(value_code, values, j)))
                            unit = math.ldexp(1.0, (bits_of_float(highest) >> 23) - 126)
                        for j in range(own, own + chosen):
                            newest[index_at(index_size, indices, j)] = (
                                np.float64(value_at(value_code, values, j)) / unit
                            )
                        if chosen == kept <= few:  # there is no padding, which may hold anything
                            _add_dots_of_few(
                                value_code, index_size, values + entry * bytes_a_value, indices + entry * index_size,
                                window_size, kept, row, newest, unit, shift, tables, found, total,
                            )  # fmt: skip
                        else:
                            for i in range(window_size):
                                first_entry = entry + i * kept
                                rest = first_entry + (chosen - chosen % EIGHT if eight else 0)
                                eight_dots = no_sums()
                                for j in range(first_entry, rest, EIGHT):
                                    eight_dots = _add_products(
                                        value_code, index_size, eight_dots, values, indices, j, newest.ctypes.data
                                    )
                                dot = sum_of_eight(eight_dots)
                                for j in range(rest, first_entry + chosen):
                                    one = newest[index_at(index_size, indices, j)]
                                    dot += _product(value_code, one, value_at(value_code, values, j))
                                total[i] += unit * dot
                        for j in range(own, own + chosen):
                            newest[index_at(index_size, indices, j)] = np.float32(0)
                    begin = end
                for i in range(window_size):
                    store_f64(sums, piece * window_size + i, total[i])
            first, last = take_share(call)

    return dots


@cache
def _momenta_kernel(value_code: int, index_size: int) -> Kernel:
    @cached_kernel(value_code, index_size)
    def with_momenta(call: int) -> None:
        """Sums over the pieces of products with the newest row, and with the momenta: (pieces, 2, m), into `sums`."""
        pieces, table, parameters, largest, sums, blocks, slot, window_size, code = pieces_and_arguments(call, 8)
        row = load_i64(slot, 0)
        newest, dense = np.zeros(largest, np.float64), np.empty(largest, np.float64)
        total = np.empty(2 * window_size, np.float64)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                total[:] = 0.0
                first_block, last_block = piece * blocks // pieces, (piece + 1) * blocks // pieces
                begin = np.int64(0)
                for number in range(parameters):
                    end, numel, size, kept, kept_in_tail, values, indices, _, momentum, scales = table_row(
                        table, parameters, number
                    )
                    for block in range(max(first_block, begin) - begin, min(last_block, end) - begin):
                        length = min(size, numel - block * size)
                        chosen = kept if length == size else kept_in_tail
                        read_momentum(code, momentum, scales, block * size, length, dense)
                        entry = block * window_size * kept
                        own = entry + row * kept
                        for j in range(own, own + chosen):
                            newest[index_at(index_size, indices, j)] = value_at(value_code, values, j)
                        for i in range(window_size):
                            with_newest, with_momentum = 0.0, 0.0
                            for j in range(entry + i * kept, entry + i * kept + chosen):
                                index = index_at(index_size, indices, j)
                                value = np.float64(value_at(value_code, values, j))
                                with_newest += value * newest[index]
                                with_momentum += value * dense[index]
                            total[i] += with_newest
                            total[window_size + i] += with_momentum
                        for j in range(own, own + chosen):
                            newest[index_at(index_size, indices, j)] = 0.0
                    begin = end
                for i in range(2 * window_size):
                    store_f64(sums, piece * 2 * window_size + i, total[i])
            first, last = take_share(call)

    return with_momenta


@cache
def _add_up_kernel() -> Kernel:
    @cached_kernel()
    def add_up(call: int) -> None:
        """Sums the rows of a float64 matrix, in order. The pieces are its columns."""
        columns, matrix, rows, result = pieces_and_arguments(call, 3)
        first, last = take_share(call)
        while first < last:
            for column in range(first, last):
                store_f64(result, column, load_f64(matrix, column))
            for row in range(1, rows):
                for column in range(first, last):
                    total = load_f64(result, column) + load_f64(matrix, row * columns + column)
                    store_f64(result, column, total)
            first, last = take_share(call)

    return add_up


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    launch = launch_of(rows, momenta)
    values, indices, _ = rows[0]
    window_size = values.shape[1]
    pieces = max(1, min(launch.blocks, PIECES))
    sums = torch.empty(pieces * window_size * (1 + bool(momenta)), dtype=torch.float64, device=CPU)
    known = (*launch.arguments, sums.data_ptr(), launch.blocks, slot_address(slot, window_size), window_size)
    if momenta:
        kernel = _momenta_kernel(CODES[values.dtype], indices.itemsize)
        run(kernel, (*known, momentum_code(momenta)), pieces, launch.entries * window_size)
        return add_up(sums, pieces, 2 * window_size).view(2, window_size)
    few = FEW if HAS_AVX2 and window_size >= LANES else 0  # of fewer rows a block may not have 64 entries
    kernel = _dots_kernel(CODES[values.dtype], indices.itemsize)
    run(kernel, (*known, few), pieces, launch.entries * window_size)
    return add_up(sums, pieces, window_size)


def add_up(sums: Tensor, pieces: int, window_size: int) -> Tensor:
    """Adds up the sums of all pieces in order: from (pieces · m,) to (m,), float64."""
    if pieces == 1:
        return sums
    total = torch.empty(window_size, dtype=torch.float64, device=CPU)
    run(_add_up_kernel(), (sums.data_ptr(), pieces, total.data_ptr()), window_size, pieces * window_size)
    return total
