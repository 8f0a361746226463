"""`mfac_row_step_` in Triton: one program does the m × m algebra of a step, in float64.

It passes over R and over S twice each, a few rows at a time: R is reflected and bordered, as `update_inverse_root_`
says, and column t of RᵀR refined once. Products with S, which is symmetric, are sums of its rows. Vectors that are
needed both by column and by row go through `scratch`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import check_row_step
from efcp.kernels.row_step import RowStep
from efcp.kernels.triton.gpu import at_most_registers, launch_kernel

ENTRIES = 2048  # of a matrix that the program has in registers
NUM_WARPS = 8


@triton.jit
def _at(vector, chosen):
    """The number of a vector where one lane is chosen."""
    return tl.sum(tl.where(chosen, vector, 0.0), 0)


@triton.jit
def _tile(matrix, first, window_size, ROWS: tl.constexpr, M: tl.constexpr):
    """Some rows of a matrix: (their numbers, the places of their entries, which of these there are)."""
    i, j = first + tl.arange(0, ROWS), tl.arange(0, M)
    mask = (i < window_size)[:, None] & (j < window_size)[None, :]
    return i, matrix + i[:, None] * window_size + j[None, :], mask


@triton.jit
def _product(gram, x, window_size, ROWS: tl.constexpr, M: tl.constexpr):
    """(Sx, the trace of S), of a vector x in memory."""
    product, trace = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
    for first in range(0, window_size, ROWS):
        i, place, mask = _tile(gram, first, window_size, ROWS, M)
        rows = tl.load(place, mask=mask, other=0.0)
        own = tl.load(x + i, mask=i < window_size, other=0.0)
        product += tl.sum(own[:, None] * rows, 0)
        trace += tl.sum(tl.where(i[:, None] == tl.arange(0, M)[None, :], rows, 0.0), 0)
    return product, tl.sum(trace, 0)


@triton.jit
def _row_step_kernel(gram, root, column, weights, factor, update_norm, inner_product, imprecise_steps, step,
                     skipped_steps, skipped_in_a_row, dots, slot, finite, scratch, window_size,
                     damping: tl.float64, rounding: tl.float64, longest: tl.float64, length: tl.float64,
                     M: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    j = tl.arange(0, M)
    inside, t = j < window_size, tl.load(slot).to(tl.int32)
    newest, following = j == t, j == (t + 1) % window_size
    unit, ridge = tl.where(newest, 1.0, 0.0).to(tl.float64), damping * window_size
    products = tl.load(dots + j, mask=inside, other=0.0)
    tl.store(gram + t * window_size + j, products, mask=inside)
    tl.store(gram + j * window_size + t, products, mask=inside)

    # R is reflected, so that column t is zero but for row t, which is taken out with it.
    own = tl.load(root + t * window_size + j, mask=inside, other=0.0)
    next_column = tl.load(column + j, mask=inside, other=0.0)
    length_of_column, corner = tl.sqrt(_at(next_column, newest)), _at(own, newest)
    scale = -1.0 / (length_of_column * (length_of_column + tl.abs(corner)))
    vR = next_column + tl.where(corner < 0, -length_of_column, length_of_column) * own
    s = tl.where(newest, 0.0, products)
    tl.debug_barrier()  # all have read row t
    row, ahead, square = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for first in range(0, window_size, ROWS):
        i, place, mask = _tile(root, first, window_size, ROWS, M)
        rows = tl.load(place, mask=mask, other=0.0)
        v = tl.sum(tl.where(newest[None, :], rows, 0.0), 1)
        rows += (scale * v)[:, None] * vR[None, :]
        rows = tl.where(newest[None, :] | (i == t)[:, None], 0.0, rows)
        projected = tl.sum(rows * s[None, :], 1)
        square += projected * projected
        row += tl.sum(projected[:, None] * rows, 0)
        ahead += tl.sum(tl.sum(tl.where(following[None, :], rows, 0.0), 1)[:, None] * rows, 0)
        tl.store(place, rows, mask=mask)
    schur = tl.maximum(ridge + _at(products, newest) - tl.sum(square, 0), ridge)
    row = unit - row
    x = row / schur
    row = row / tl.sqrt(schur)
    next_column = ahead + row * _at(row, following)
    tl.store(scratch + j, x)
    tl.debug_barrier()  # row t has been written as zeros
    tl.store(root + t * window_size + j, row, mask=inside)
    tl.debug_barrier()

    product, trace = _product(gram, scratch, window_size, ROWS, M)
    residual = unit - ridge * x - product
    for first in range(0, window_size, ROWS):  # x ← x + RᵀR · residual
        i, place, mask = _tile(root, first, window_size, ROWS, M)
        rows = tl.load(place, mask=mask, other=0.0)
        x += tl.sum(tl.sum(rows * residual[None, :], 1)[:, None] * rows, 0)
    tl.store(scratch + M + j, x)
    tl.debug_barrier()
    product, trace = _product(gram, scratch + M, window_size, ROWS, M)
    residual = tl.where(inside, unit - ridge * x - product, 0.0)
    solved = tl.sqrt(tl.sum(residual * residual, 0)) < 0.1
    if solved == 0:  # R and the column of the diagonal alone
        diagonal = tl.load(gram + j * (window_size + 1), mask=inside, other=0.0) + ridge
        for first in range(0, window_size, ROWS):
            i, place, mask = _tile(root, first, window_size, ROWS, M)
            rows = tl.where(i[:, None] == j[None, :], (1.0 / tl.sqrt(diagonal))[None, :], 0.0)
            tl.store(place, rows, mask=mask)
        next_column = tl.where(following, 1.0 / diagonal, 0.0)
    tl.store(column + j, next_column, mask=inside)

    # The weights, or those of the best step along the newest row where rounding would spoil them.
    w, norm = window_size * x, _at(products, newest)  # ‖c‖²
    divisor = tl.where(norm == 0, 1.0, norm)
    inner, length_of_w = tl.sum(products * w, 0), tl.sum(w * w, 0)
    squared = window_size * (_at(w, newest) - damping * length_of_w - tl.sum(w * residual, 0))
    squared = tl.maximum(squared, inner * inner / divisor)
    sound = ((rounding * rounding * length_of_w * trace <= 0.01 * squared) | (norm == 0)) & solved
    curvature = damping + tl.where(norm == 0, 0.0, tl.sum(products * products, 0) / (window_size * divisor))
    w = tl.where(sound, w, unit / curvature)
    product = tl.where(sound, window_size * product, products / curvature)
    squared = tl.maximum(tl.sum(w * product, 0), 0.0)
    size = tl.sqrt(squared)
    by = tl.where(size > longest, longest / size, 1.0)
    if length >= 0:
        by = by * tl.where(size > 0, length / size, 0.0)
    taken = tl.load(finite) != 0
    tl.store(weights + j, tl.where(taken, w * by, 0.0), mask=inside)
    tl.store(update_norm, tl.where(taken, size * by, 0.0))
    tl.store(inner_product, tl.where(taken, _at(product, newest) * by, 0.0))
    tl.store(factor, 0.0)
    missed = tl.where(taken, 0, 1)
    tl.store(imprecise_steps, tl.load(imprecise_steps) + tl.where(sound, 0, 1))
    tl.store(step, tl.load(step) + 1)
    tl.store(skipped_steps, tl.load(skipped_steps) + missed)
    tl.store(skipped_in_a_row, (tl.load(skipped_in_a_row) + 1) * missed)


def mfac_row_step_(
    state: RowStep,
    dots: Tensor,
    slot: Tensor,
    finite: Tensor,
    damping: float,
    rounding: float,
    longest: float | None = None,
    length: float | None = None,
) -> None:
    check_row_step(state, dots, slot, finite)
    window_size = len(dots)
    room = triton.next_power_of_2(window_size)
    scratch = torch.empty(2 * room, dtype=torch.float64, device=dots.device)
    launch_kernel(
        _row_step_kernel, (1,), dots,
        *state, dots, slot, finite.view(torch.uint8), scratch, window_size, float(damping), float(rounding),
        float("inf") if longest is None else float(longest), -1.0 if length is None else float(length),
        M=room, ROWS=max(1, min(room, ENTRIES // room)), num_warps=NUM_WARPS,
        **at_most_registers(255, dots.device),  # one program: no occupancy to raise by spilling
        enable_fp_fusion=True,
    )  # fmt: skip
