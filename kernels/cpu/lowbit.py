"""`add_lowbit_` and `store_lowbit_`, and how other operations read and write numbers in 8 bits."""

from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import check_lowbit
from efcp.kernels.cpu.convert import add_block, read_block, write_block
from efcp.kernels.cpu.dtypes import CODES, FLOAT64, INT8
from efcp.kernels.cpu.launch import run, scalar_address, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f32, load_f64, load_i64, load_u8, store_f32, store_f64, store_u8
from efcp.kernels.lowbit import BLOCK, LARGEST, MASK, MIX, SMALLEST_SCALE, LowBit

CHUNK = 4096  # numbers, the unit in which the work is shared out
BLOCK8, BLOCK4 = BLOCK[torch.int8], BLOCK[torch.uint8]
LARGEST8, LARGEST4 = LARGEST[torch.int8], LARGEST[torch.uint8]
SMALLEST = np.float32(SMALLEST_SCALE)
(SHIFT1, FACTOR1), (SHIFT2, FACTOR2) = MIX


@jit
def _scale_and_inverse(numbers: np.ndarray, first: int, last: int, largest: int) -> tuple[float, float]:
    """The scale of a block, and its inverse; zeros for a block that becomes zero."""
    magnitude = np.float32(0)
    for j in range(first, last):
        magnitude = max(magnitude, np.float32(abs(numbers[j])))
    scale = np.float32(magnitude / np.float32(largest))
    if scale >= SMALLEST:
        return scale, np.float32(np.float32(1) / scale)
    return np.float32(0), np.float32(0)


@jit
def decode8(codes: int, scales: int, start: int, length: int, out: np.ndarray) -> None:
    """Numbers from `start` on, which may be anywhere, as float32."""
    first = np.int64(0)
    while first < length:
        block = (start + first) // BLOCK8
        last = min(length, (block + 1) * BLOCK8 - start)
        scale = load_f32(scales, block)
        for j in range(first, last):
            code = (np.int64(load_u8(codes, start + j)) ^ 128) - 128  # of two's complement
            out[j] = np.float32(code) * scale
        first = last


@jit
def read_momentum(code: int, momentum: int, scales: int, start: int, length: int, out: np.ndarray) -> None:
    """Numbers of a momentum, floating point or in 8 bits."""
    if code == INT8:
        decode8(momentum, scales, start, length, out)
    else:
        read_block(code, momentum, start, length, out)


@jit
def encode8(codes: int, scales: int, start: int, length: int, numbers: np.ndarray) -> None:
    """Stores numbers from `start` on, where a block begins."""
    for first in range(0, length, BLOCK8):
        last = min(first + BLOCK8, length)
        scale, inverse = _scale_and_inverse(numbers, first, last, LARGEST8)
        store_f32(scales, (start + first) // BLOCK8, scale)
        for j in range(first, last):
            nearest = np.rint(np.float32(numbers[j]) * inverse)
            code = np.int64(max(np.float32(-LARGEST8), min(np.float32(LARGEST8), nearest)))
            store_u8(codes, start + j, code & 255)


@jit
def _hashed(number: int) -> int:
    number = np.uint64(number) & np.uint64(MASK)
    number = ((number ^ (number >> np.uint64(SHIFT1))) * np.uint64(FACTOR1)) & np.uint64(MASK)
    number = ((number ^ (number >> np.uint64(SHIFT2))) * np.uint64(FACTOR2)) & np.uint64(MASK)
    return number ^ (number >> np.uint64(16))


@jit
def _decode4(codes: int, scales: int, start: int, length: int, out: np.ndarray) -> None:
    for first in range(0, length, BLOCK4):
        scale = load_f32(scales, (start + first) // BLOCK4)
        for j in range(first, min(first + BLOCK4, length)):
            pair = np.int64(load_u8(codes, (start + j) >> 1))
            out[j] = np.float32(((pair >> (4 * (j & 1))) & 15) - 8) * scale


@jit
def _encode4(codes: int, scales: int, start: int, length: int, numbers: np.ndarray, key: int, code: np.ndarray) -> None:
    mixed = _hashed(np.uint64(key) ^ _hashed(np.uint64(key) >> np.uint64(32)))
    for first in range(0, length, BLOCK4):
        last = min(first + BLOCK4, length)
        scale, inverse = _scale_and_inverse(numbers, first, last, LARGEST4)
        store_f32(scales, (start + first) // BLOCK4, scale)
        for j in range(first, last):
            scaled = np.float32(numbers[j]) * inverse
            down = np.floor(scaled)
            drawn = _hashed(np.uint64(start + j) ^ mixed) >> np.uint64(8)
            up = np.float32(np.int64(drawn)) * np.float32(2.0**-24) < scaled - down
            code[j] = max(-LARGEST4, min(LARGEST4, np.int64(down) + np.int64(up))) + 8
    if length & 1:
        code[length] = 8
    for pair in range((length + 1) // 2):
        store_u8(codes, (start >> 1) + pair, code[2 * pair] | code[2 * pair + 1] << 4)


@cache
def _add_kernel(four: bool) -> Kernel:
    @cached_kernel(four)
    def add(call: int) -> None:
        """The pieces are chunks. The table has five columns: the number of the first chunk behind a target, n, and
        addresses: of the target, of codes and of scales."""
        _, table, parameters, code = pieces_and_arguments(call, 3)
        numbers = np.empty(CHUNK, np.float32)
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
                    if four:
                        _decode4(codes, scales, start, length, numbers)
                    else:
                        decode8(codes, scales, start, length, numbers)
                    if code == FLOAT64:  # which a scratch of float32 would round
                        for j in range(length):
                            store_f64(target, start + j, load_f64(target, start + j) + np.float64(numbers[j]))
                    else:
                        add_block(code, target, start, length, numbers)
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
        numbers, scratch = np.empty(CHUNK, np.float32), np.empty(CHUNK + 1 if four else 0, np.int64)
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
                        _encode4(codes, scales, start, length, numbers, load_i64(key, 0), scratch)
                    else:
                        encode8(codes, scales, start, length, numbers)
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
