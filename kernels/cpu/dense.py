"""`dense_dots`: inner products of whole rows with a vector, summed in float64.

The vector is taken in parts that stay in the first-level cache, as float64, while all rows pass by.
"""

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import dense_addresses
from efcp.kernels.cpu.convert import bfloat16_to_float32, float16_to_float32
from efcp.kernels.cpu.dots import add_up
from efcp.kernels.cpu.dtypes import BFLOAT16, CODES, FLOAT32, FLOAT64
from efcp.kernels.cpu.launch import CPU, PIECES, run, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f32, load_f64, load_u16, store_f64

PART = 4096  # columns in a part


@partial(jit, fastmath={"reassoc", "contract"})
def _dot(code: int, rows: int, first: int, part: np.ndarray, length: int) -> float:
    """The inner product of `length` numbers of the rows, from index `first` on, with those of `part`."""
    total = np.float64(0)
    if code == FLOAT32:
        for j in range(length):
            total += np.float64(load_f32(rows, first + j)) * part[j]
    elif code == FLOAT64:
        for j in range(length):
            total += load_f64(rows, first + j) * part[j]
    elif code == BFLOAT16:
        for j in range(length):
            total += np.float64(bfloat16_to_float32(load_u16(rows, first + j))) * part[j]
    else:
        for j in range(length):
            total += np.float64(float16_to_float32(load_u16(rows, first + j))) * part[j]
    return total


@jit
def _widen(code: int, rows: int, first: int, length: int, part: np.ndarray) -> None:
    """Writes `length` numbers, from index `first` on, to `part` as float64."""
    if code == FLOAT32:
        for j in range(length):
            part[j] = np.float64(load_f32(rows, first + j))
    elif code == FLOAT64:
        for j in range(length):
            part[j] = load_f64(rows, first + j)
    elif code == BFLOAT16:
        for j in range(length):
            part[j] = np.float64(bfloat16_to_float32(load_u16(rows, first + j)))
    else:
        for j in range(length):
            part[j] = np.float64(float16_to_float32(load_u16(rows, first + j)))


@cache
def _dense_kernel() -> Kernel:
    @cached_kernel()
    def dense(call: int) -> None:
        """Writes the inner products over each piece, a range of columns, to `sums`: (pieces, m) float64."""
        pieces, code, rows, window_size, columns, vector_code, vector, sums = pieces_and_arguments(call, 7)
        part, total = np.empty(PART, np.float64), np.empty(window_size, np.float64)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                total[:] = 0.0
                start, stop = piece * columns // pieces, (piece + 1) * columns // pieces
                while start < stop:
                    length = min(PART, stop - start)
                    _widen(vector_code, vector, start, length, part)
                    for i in range(window_size):
                        total[i] += _dot(code, rows, i * columns + start, part, length)
                    start += length
                for i in range(window_size):
                    store_f64(sums, piece * window_size + i, total[i])
            first, last = take_share(call)

    return dense


def dense_dots(rows: Tensor, vector: Tensor) -> Tensor:
    address, other = dense_addresses(rows, vector)
    (window_size, columns), code = rows.shape, CODES[rows.dtype]
    pieces = max(1, min(columns // PART, PIECES))
    sums = torch.empty(pieces * window_size, dtype=torch.float64, device=CPU)
    arguments = (code, address, window_size, columns, CODES[vector.dtype], other, sums.data_ptr())
    run(_dense_kernel(), arguments, pieces, window_size * columns)
    return add_up(sums, pieces, window_size)
