"""`norm_is_finite` on a CPU: sums squares within a chunk in the dtype of arithmetic, and over chunks in float64."""

import math
from array import array
from collections.abc import Sequence
from functools import cache, partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import gradient_addresses
from efcp.kernels.cpu.convert import bfloat16_to_float32, float16_to_float32
from efcp.kernels.cpu.dtypes import BFLOAT16, CODES, FLOAT32, FLOAT64
from efcp.kernels.cpu.launch import CPU, PIECES, run, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f32, load_f64, load_i64, load_u16, store_f64
from efcp.kernels.reference import accumulation_dtype

CHUNK = 4096  # elements of a gradient in a chunk


@partial(jit, fastmath={"reassoc", "contract"})
def sum_of_squares(code: int, address: int, first: int, last: int) -> float:
    """The sum of squares of some elements, in the dtype of arithmetic. If it overflows, so does the sum over all."""
    if code == FLOAT64:
        wide = np.float64(0)
        for j in range(first, last):
            wide += load_f64(address, j) ** 2
        return wide
    total = np.float32(0)
    if code == FLOAT32:
        for j in range(first, last):
            number = load_f32(address, j)
            total += number * number
    elif code == BFLOAT16:
        for j in range(first, last):
            number = bfloat16_to_float32(load_u16(address, j))
            total += number * number
    else:
        for j in range(first, last):
            number = float16_to_float32(load_u16(address, j))
            total += number * number
    return np.float64(total)


@cache
def _squares_kernel() -> Kernel:
    @cached_kernel()
    def squares(call: int) -> None:
        """Writes the sum of squares of each piece, a range of chunks, to `sums`: (pieces + 1,) float64.

        Once a sum is not finite, infinity is written to the last element, and the remaining pieces are not read. The
        table has a column each for the number of the first chunk after a gradient, for n, and for the address.
        """
        pieces, table, gradients, code, sums, chunks = pieces_and_arguments(call, 5)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                if load_f64(sums, pieces) != 0.0:
                    break
                total = 0.0
                first_chunk, last_chunk = piece * chunks // pieces, (piece + 1) * chunks // pieces
                begin = np.int64(0)
                for number in range(gradients):
                    end, numel = load_i64(table, number), load_i64(table, number + gradients)
                    address = load_i64(table, number + gradients * 2)
                    for chunk in range(max(first_chunk, begin) - begin, min(last_chunk, end) - begin):
                        start = chunk * CHUNK
                        total += sum_of_squares(code, address, start, min(start + CHUNK, numel))
                    begin = end
                if not math.isfinite(total):
                    piece, total = pieces, math.inf
                store_f64(sums, piece, total)
            first, last = take_share(call)

    return squares


def norm_is_finite(grads: Sequence[Tensor]) -> Tensor:
    found = gradient_addresses(grads, CPU)
    dtype, numels = grads[0].dtype, [grad.numel() for grad in grads]
    ends = list(accumulate(-(-numel // CHUNK) for numel in numels))
    table = array("q", [*ends, *numels, *found])
    pieces = max(1, min(ends[-1], PIECES))
    sums = array("d", bytes(8 * (pieces + 1)))
    arguments = (table.buffer_info()[0], len(grads), CODES[dtype], sums.buffer_info()[0], ends[-1])
    run(_squares_kernel(), arguments, pieces, sum(numels))
    return torch.full((), sum(sums) <= torch.finfo(accumulation_dtype(dtype)).max, device=CPU)
