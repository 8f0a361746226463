"""`add_lowbit_` and `store_lowbit_`, and how other operations read and write numbers in 8 bits."""

from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import check_lowbit
from efcp.kernels.cpu.bits import float_of_bits
from efcp.kernels.cpu.convert import read_block, write_block
from efcp.kernels.cpu.dtypes import CODES, FLOAT64, INT4, INT8
from efcp.kernels.cpu.launch import run, scalar_address, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments, round_to_codes
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f32, load_i64, load_u8, store_f32, store_u8
from efcp.kernels.lowbit import BLOCK, LARGEST, MIX, SMALLEST_SCALE, LowBit

CHUNK = 4096  # numbers, the unit in which the work is shared out
BLOCK8, BLOCK4 = BLOCK[torch.int8], BLOCK[torch.uint8]
LARGEST8, LARGEST4 = LARGEST[torch.int8], LARGEST[torch.uint8]
SMALLEST = np.float32(SMALLEST_SCALE)
ROUND = np.float32(1.5 * 2.0**23)  # added to a float32, it leaves no place for fractions: rounds to even
(SHIFT1, FACTOR1), (SHIFT2, FACTOR2) = MIX


# Indices of arrays are uint64: negative ones, which count from the end, would keep LLVM from using vector lanes.


@jit
def _scale(numbers: np.ndarray, first: int, count: int, largest: int) -> float:
    """The scale of a block; zero for a block that becomes zero."""
    bits = np.int32(0)  # those of magnitudes have the same order
    for j in range(count):
        bits = max(bits, np.int32(np.float32(abs(numbers[np.uint64(first + j)])).view(np.int32)))
    scale = np.float32(float_of_bits(bits) / np.float32(largest))
    return scale if scale >= SMALLEST else np.float32(0)


@jit
def _inverse(scale: float) -> float:
    return np.float32(np.float32(1) / scale) if scale > 0 else np.float32(0)


@jit
def decode8(codes: int, scales: int, start: int, length: int, out: np.ndarray) -> None:
    """Numbers from `start` on, which may be anywhere, as float32."""
    first = np.int64(0)
    while first < length:
        block = (start + first) // BLOCK8
        last = min(length, (block + 1) * BLOCK8 - start)
        scale = load_f32(scales, block)
        for j in range(last - first):
            code = np.int32(np.int8(load_u8(codes, start + first + j)))
            out[np.uint64(first + j)] = np.float32(code) * scale
        first = last


@jit
def read_momentum(code: int, momentum: int, scales: int, start: int, length: int, out: np.ndarray) -> None:
    """Numbers of a momentum, floating point or in 8 bits."""
    if code == INT8:
        decode8(momentum, scales, start, length, out)
    else:
        read_block(code, momentum, start, length, out)


@jit
def add_few_bits(code: int, codes: int, scales: int, length: int, out: np.ndarray) -> None:
    """Adds numbers of the dtype `code`, INT8 or INT4, from the address of the first code and of the first scale on."""
    if code == INT8:
        for first in range(0, length, BLOCK8):
            scale = load_f32(scales, first // BLOCK8)
            for j in range(min(BLOCK8, length - first)):
                at = np.uint64(first + j)
                out[at] += np.float32(np.int32(np.int8(load_u8(codes, at)))) * scale
        return
    for first in range(0, length, BLOCK4):
        scale = load_f32(scales, first // BLOCK4)
        for pair in range(first // 2, min(first + BLOCK4, length) // 2):
            both = np.int32(load_u8(codes, pair))
            out[np.uint64(2 * pair)] += np.float32(np.int32((both & 15) - 8)) * scale
            out[np.uint64(2 * pair + 1)] += np.float32(np.int32((both >> 4) - 8)) * scale
    if length & 1:
        last = np.int32(load_u8(codes, length // 2))
        out[np.uint64(length - 1)] += np.float32(np.int32((last & 15) - 8)) * load_f32(scales, length // BLOCK4)


@jit
def encode8(codes: int, scales: int, length: int, numbers: np.ndarray) -> None:
    """Stores numbers, at the address of the first code and of the first scale.

    Scales come first: rounding that waited for the scale of its own block would take half as long again.
    """
    for first in range(0, length, BLOCK8):
        if length - first >= BLOCK8:  # LLVM unrolls loops of a length that it knows
            store_f32(scales, first // BLOCK8, _scale(numbers, first, BLOCK8, LARGEST8))
        else:
            store_f32(scales, first // BLOCK8, _scale(numbers, first, length - first, LARGEST8))
    for first in range(0, length, BLOCK8):
        inverse = _inverse(load_f32(scales, first // BLOCK8))
        if numbers.itemsize == 4 and length - first >= BLOCK8:
            round_to_codes(numbers.ctypes.data + 4 * first, inverse, codes + first)
            continue
        for j in range(first, min(length, first + BLOCK8)):  # no magnitude exceeds 127 by more than roundings
            scaled = np.float32(np.float32(numbers[np.uint64(j)]) * inverse)
            store_u8(codes, j, np.uint8(np.float32(scaled + ROUND).view(np.uint32)))  # its lowest bits


@jit
def _hashed(number: int) -> int:
    number = np.uint32(number)
    number = np.uint32((number ^ (number >> np.uint32(SHIFT1))) * np.uint32(FACTOR1))
    number = np.uint32((number ^ (number >> np.uint32(SHIFT2))) * np.uint32(FACTOR2))
    return np.uint32(number ^ (number >> np.uint32(16)))


@jit
def _encode4_block(
    code: np.ndarray, first: int, count: int, numbers: np.ndarray, inverse: float, position: int, mixed: int
) -> None:
    for j in range(count):
        scaled = np.float32(numbers[np.uint64(first + j)]) * inverse
        down = np.floor(scaled)
        drawn = np.int32(_hashed(np.uint32(position + j) ^ mixed) >> np.uint32(8))
        up = np.float32(1) if np.float32(drawn) * np.float32(2.0**-24) < scaled - down else np.float32(0)
        inside = max(np.float32(-LARGEST4), min(np.float32(LARGEST4), down + up))
        code[np.uint64(first + j)] = np.uint8(np.int32(inside) + np.int32(8))


@jit
def encode4(
    codes: int, scales: int, position: int, length: int, numbers: np.ndarray, key: int, code: np.ndarray
) -> None:
    """Stores numbers, at the address of the first code and of the first scale.

    Args:
        position: of the first number, for random numbers.
        key: of random numbers.
        code: scratch of length + 1, uint8.
    """
    mixed = _hashed(np.uint64(key) ^ np.uint64(_hashed(np.uint64(key) >> np.uint64(32))))
    for first in range(0, length, BLOCK4):
        if length - first >= BLOCK4:  # LLVM unrolls loops of a length that it knows
            scale = _scale(numbers, first, BLOCK4, LARGEST4)
            _encode4_block(code, first, BLOCK4, numbers, _inverse(scale), position + first, mixed)
        else:
            scale = _scale(numbers, first, length - first, LARGEST4)
            _encode4_block(code, first, length - first, numbers, _inverse(scale), position + first, mixed)
        store_f32(scales, first // BLOCK4, scale)
    if length & 1:
        code[np.uint64(length)] = 8
    for pair in range((length + 1) // 2):
        store_u8(codes, pair, code[np.uint64(2 * pair)] | code[np.uint64(2 * pair + 1)] << 4)


@cache
def _add_kernel(four: bool) -> Kernel:
    @cached_kernel(four)
    def add(call: int) -> None:
        """The pieces are chunks. The table has five columns: the number of the first chunk behind a target, n, and
        addresses: of the target, of codes and of scales."""
        _, table, parameters, code = pieces_and_arguments(call, 3)
        numbers, wide = np.empty(CHUNK, np.float32), np.empty(CHUNK if code == FLOAT64 else 0, np.float64)
        first, last = take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel = load_i64(table, number), load_i64(table, number + parameters)
                target, codes = load_i64(table, number + parameters * 2), load_i64(table, number + parameters * 3)
                scales = load_i64(table, number + parameters * 4)
                for chunk in range(max(first, begin) - begin, min(last, end) - begin):
                    start = chunk * CHUNK
                    length = min(CHUNK, numel - start)
                    first_code = codes + (start // 2 if four else start)
                    first_scale = scales + start // (BLOCK4 if four else BLOCK8) * 4
                    if code == FLOAT64:
                        read_block(code, target, start, length, wide)
                        add_few_bits(INT4 if four else INT8, first_code, first_scale, length, wide)
                        write_block(code, target, start, length, wide)
                    else:
                        read_block(code, target, start, length, numbers)
                        add_few_bits(INT4 if four else INT8, first_code, first_scale, length, numbers)
                        write_block(code, target, start, length, numbers)
                begin = end
            first, last = take_share(call)

    return add


@cache
def _store_kernel(four: bool) -> Kernel:
    @cached_kernel(four)
    def store(call: int) -> None:
        """The pieces are chunks. The table has six columns: the number of the first chunk behind a vector, n, and
        addresses: of values, codes, scales and keys."""
        _, table, parameters, code = pieces_and_arguments(call, 3)
        numbers, scratch = np.empty(CHUNK, np.float32), np.empty(CHUNK + 1 if four else 0, np.uint8)
        first, last = take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel = load_i64(table, number), load_i64(table, number + parameters)
                values, codes = load_i64(table, number + parameters * 2), load_i64(table, number + parameters * 3)
                scales, key = load_i64(table, number + parameters * 4), load_i64(table, number + parameters * 5)
                for chunk in range(max(first, begin) - begin, min(last, end) - begin):
                    start = chunk * CHUNK
                    length = min(CHUNK, numel - start)
                    read_block(code, values, start, length, numbers)
                    if four:
                        first_code, first_scale = codes + start // 2, scales + start // BLOCK4 * 4
                        encode4(first_code, first_scale, start, length, numbers, load_i64(key, 0), scratch)
                    else:
                        encode8(codes + start, scales + start // BLOCK8 * 4, length, numbers)
                begin = end
            first, last = take_share(call)

    return store


def _table(numels: Sequence[int], *columns: Sequence[int]) -> tuple["array[int]", int]:
    """The table of a kernel, and the number of chunks."""
    ends = list(accumulate(-(-numel // CHUNK) for numel in numels))
    return array("q", [*ends, *numels, *(number for column in columns for number in column)]), ends[-1]


def add_lowbit_(targets: Sequence[Tensor], numbers: Sequence[LowBit]) -> None:
    values, codes, scales, _ = check_lowbit(targets, numbers)
    numels = [target.numel() for target in targets]
    table, chunks = _table(numels, values, codes, scales)
    arguments = table.buffer_info()[0], len(numels), CODES[targets[0].dtype]
    run(_add_kernel(numbers[0].codes.dtype is torch.uint8), arguments, chunks, sum(numels))


def store_lowbit_(
    numbers: Sequence[LowBit], values: Sequence[Tensor], finite: Tensor, keys: Sequence[Tensor] = ()
) -> None:
    found, codes, scales, key_addresses = check_lowbit(values, numbers, finite, keys)
    scalar_address("finite", finite, torch.bool)
    if not finite.item():
        return
    numels = [value.numel() for value in values]
    table, chunks = _table(numels, found, codes, scales, key_addresses)
    arguments = table.buffer_info()[0], len(numels), CODES[values[0].dtype]
    run(_store_kernel(numbers[0].codes.dtype is torch.uint8), arguments, chunks, sum(numels))
