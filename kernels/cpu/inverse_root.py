"""`update_inverse_root_` on a CPU: updates M-FAC's inverse root R in one pass over R and one over S.

Column t of RᵀR is known. It gives vᵀR for the vector v of the reflection without a pass over R. A single pass over the
rows of R, in pieces of rows, then computes the reflected matrix R' = R + φ v vᵀR, p = R's, R'ᵀp, and the following
column of R'ᵀR'. A second pass, over S, computes the residual. The first pass leaves vectors of m numbers in `scratch`:
p, then R'ᵀp of each piece, then each piece's part of the following column.
"""

import math
from array import array
from functools import cache, partial

import numpy as np
import torch
from numba import carray
from torch import Tensor

from efcp.kernels.addresses import addresses
from efcp.kernels.cpu.launch import CPU, run, slot_address, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments, pointer
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f64, load_i64, store_f64

PIECE_ROWS = 64  # rows of an m × m matrix in a piece; threads take whole pieces


@partial(jit, fastmath={"reassoc", "contract"})
def dot(one: np.ndarray, other: np.ndarray, length: int) -> float:
    total = 0.0
    for j in range(length):
        total += one[j] * other[j]
    return total


@jit
def add_multiple(total: np.ndarray, factor: float, row: np.ndarray, length: int) -> None:
    for j in range(length):
        total[j] += factor * row[j]


@partial(jit, fastmath={"reassoc", "contract"})
def add_multiple_and_dot(row: np.ndarray, factor: float, other: np.ndarray, third: np.ndarray, length: int) -> float:
    """row ← row + factor · other. Returns the inner product of the new row with `third`."""
    total = 0.0
    for j in range(length):
        number = row[j] + factor * other[j]
        row[j] = number
        total += number * third[j]
    return total


@jit
def add_multiples(
    total: np.ndarray, factor: float, other: np.ndarray, other_factor: float, row: np.ndarray, length: int
) -> None:
    for j in range(length):
        total[j] += factor * row[j]
        other[j] += other_factor * row[j]


@jit
def float64s(address: int, first: int, length: int) -> np.ndarray:
    return carray(pointer(address + 8 * first), length, np.float64)


COORDINATES, SUMS_OF_PIECES = range(2)


@jit
def _sum_of_pieces(scratch: int, first: int, pieces: int, window_size: int) -> np.ndarray:
    total = np.zeros(window_size, np.float64)
    for piece in range(first, first + pieces):
        add_multiple(total, 1.0, float64s(scratch, piece * window_size, window_size), window_size)
    return total


@cache
def _reflect_kernel() -> Kernel:
    @cached_kernel()
    def reflect(call: int) -> None:
        """The pass over R. Row t is not changed here; `border` writes it."""
        pieces, root, column, gram, slot, scratch, window_size = pieces_and_arguments(call, 6)
        t = load_i64(slot, 0)
        following = (t + 1) % window_size
        new = float64s(gram, t * window_size, window_size).copy()
        new[t] = 0.0
        vR = float64s(column, 0, window_size).copy()
        own = float64s(root, t * window_size, window_size)
        norm = math.sqrt(vR[t])
        factor = -1 / (norm * (norm + abs(own[t])))
        add_multiple(vR, math.copysign(norm, own[t]), own, window_size)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                row_sum = float64s(scratch, (SUMS_OF_PIECES + piece) * window_size, window_size)
                column_sum = float64s(scratch, (SUMS_OF_PIECES + pieces + piece) * window_size, window_size)
                row_sum[:] = 0.0
                column_sum[:] = 0.0
                for i in range(piece * window_size // pieces, (piece + 1) * window_size // pieces):
                    row = float64s(root, i * window_size, window_size)
                    p = 0.0
                    if i != t:
                        p = add_multiple_and_dot(row, factor * row[t], vR, new, window_size)
                        row[t] = 0.0
                        add_multiples(row_sum, p, column_sum, row[following], row, window_size)
                    store_f64(scratch, COORDINATES * window_size + i, p)
            first, last = take_share(call)

    return reflect


@cache
def _border_kernel() -> Kernel:
    @cached_kernel()
    def border(call: int) -> None:
        """Writes row t of R, x, and the following column of RᵀR."""
        _, root, column, gram, slot, x, scratch, window_size, pieces, ridge = pieces_and_arguments(call, 9)
        t, least = load_i64(slot, 0), load_f64(ridge, 0)
        following = (t + 1) % window_size
        p = float64s(scratch, COORDINATES * window_size, window_size)
        schur = max(least + load_f64(gram, t * window_size + t) - dot(p, p, window_size), least)
        row = _sum_of_pieces(scratch, SUMS_OF_PIECES, pieces, window_size)
        ahead = _sum_of_pieces(scratch, SUMS_OF_PIECES + pieces, pieces, window_size)
        row[t] = -1.0
        first, last = take_share(call)
        if first < last:
            at_following = -row[following] / math.sqrt(schur)
            for j in range(window_size):
                own = -row[j] / math.sqrt(schur)
                store_f64(root, t * window_size + j, own)
                store_f64(column, j, ahead[j] + at_following * own)
                store_f64(x, j, -row[j] / schur)

    return border


@cache
def _residual_kernel() -> Kernel:
    @cached_kernel()
    def subtract(call: int) -> None:
        """The pass over S: writes the residual e_t − (ridge · I + S) x."""
        pieces, gram, slot, x_at, residual, window_size, ridge = pieces_and_arguments(call, 6)
        t, x = load_i64(slot, 0), float64s(x_at, 0, window_size)
        first, last = take_share(call)
        while first < last:
            for i in range(first * window_size // pieces, last * window_size // pieces):
                product = dot(float64s(gram, i * window_size, window_size), x, window_size) + load_f64(ridge, 0) * x[i]
                store_f64(residual, i, np.float64(i == t) - product)
            first, last = take_share(call)

    return subtract


def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    window_size = len(R)
    pieces = -(-window_size // PIECE_ROWS)
    x, residual = (torch.empty(window_size, dtype=torch.float64, device=CPU) for _ in range(2))
    vectors = torch.empty(SUMS_OF_PIECES + 2 * pieces, window_size, dtype=torch.float64, device=CPU)
    scratch, number = vectors.data_ptr(), array("d", [ridge])
    root, gram = (addresses(n, [M], torch.float64, CPU, [window_size**2])[0] for n, M in (("R", R), ("S", S)))
    (column_at,), at = addresses("column", [column], torch.float64, CPU, [window_size]), slot_address(slot, window_size)
    reflect, border, subtract = _reflect_kernel(), _border_kernel(), _residual_kernel()  # compiled before R changes
    ridge_at, work = number.buffer_info()[0], window_size * window_size
    run(reflect, (root, column_at, gram, at, scratch, window_size), pieces, work)
    run(border, (root, column_at, gram, at, x.data_ptr(), scratch, window_size, pieces, ridge_at), 1, window_size)
    run(subtract, (gram, at, x.data_ptr(), residual.data_ptr(), window_size, ridge_at), pieces, work)
    return x, residual
