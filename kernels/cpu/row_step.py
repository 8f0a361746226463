"""`mfac_row_step_` on a CPU: the m × m algebra of a step of M-FAC in one call, by one thread.

It passes over R and over S twice each, as the Triton kernel does: R is reflected and bordered, as `inverse_root.py`
says, and column t of RᵀR refined once. Unlike the definition it computes R anew, by Cholesky, where the column that R
gives misses a well-conditioned system by more than 10⁻⁶, as after rows that float64 could not solve for.
"""

import ctypes
import math
from array import array
from functools import cache

import numpy as np
from torch import Tensor

from efcp.kernels.addresses import check_row_step
from efcp.kernels.cpu.inverse_root import add_multiple, add_multiple_and_dot, add_multiples, dot, float64s
from efcp.kernels.cpu.launch import run, slot_address, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f64, load_i64, store_f64, store_i64
from efcp.kernels.row_step import RowStep


@jit
def _follow_row(
    root: int, column: int, s: np.ndarray, t: int, ridge: float, m: int, x: np.ndarray, scratch: np.ndarray
) -> None:
    """R and the column of RᵀR follow the new row s of S; x becomes column t of RᵀR. `scratch` is (4, m)."""
    following, own, next_column = (t + 1) % m, float64s(root, t * m, m), float64s(column, 0, m)
    vR, others, row, ahead = scratch[0], scratch[1], scratch[2], scratch[3]
    for j in range(m):
        vR[j], others[j], row[j], ahead[j] = next_column[j], s[j], 0.0, 0.0
    others[t] = 0.0
    norm = math.sqrt(vR[t])
    factor = -1 / (norm * (norm + abs(own[t])))
    add_multiple(vR, math.copysign(norm, own[t]), own, m)
    square = 0.0
    for i in range(m):
        if i != t:
            old = float64s(root, i * m, m)
            p = add_multiple_and_dot(old, factor * old[t], vR, others, m)
            old[t] = 0.0
            add_multiples(row, p, ahead, old[following], old, m)
            square += p * p
    schur = max(ridge + s[t] - square, ridge)
    row[t] = -1.0
    at_following = -row[following] / math.sqrt(schur)
    for j in range(m):
        own[j] = -row[j] / math.sqrt(schur)
        next_column[j] = ahead[j] + at_following * own[j]
        x[j] = -row[j] / schur


@jit
def _multiply(gram: int, x: np.ndarray, m: int, product: np.ndarray) -> None:
    for i in range(m):
        product[i] = dot(float64s(gram, i * m, m), x, m)


@jit
def _subtract(product: np.ndarray, x: np.ndarray, t: int, ridge: float, m: int, residual: np.ndarray) -> None:
    """residual ← e_t − (ridge · I + S) x, of the product Sx."""
    for i in range(m):
        residual[i] = np.float64(i == t) - product[i] - ridge * x[i]


@jit
def _restart(root: int, column: int, gram: int, following: int, ridge: float, m: int) -> None:
    """R and the column of RᵀR become those of the diagonal of S alone."""
    for i in range(m):
        diagonal = load_f64(gram, i * m + i) + ridge
        row = float64s(root, i * m, m)
        row[:] = 0.0
        row[i] = 1 / math.sqrt(diagonal)
        store_f64(column, i, 1 / diagonal if i == following else 0.0)


@jit
def _invert(root: int, gram: int, ridge: float, m: int) -> bool:
    """R becomes L⁻¹ for LLᵀ = ridge · I + S. Returns False if rounding has made that matrix indefinite."""
    for i in range(m):
        own = float64s(root, i * m, m)
        for j in range(i + 1):
            other = float64s(root, j * m, m)
            rest = load_f64(gram, i * m + j) - dot(own, other, j)
            if i == j:
                if rest + ridge <= 0.0:
                    return False
                own[i] = math.sqrt(rest + ridge)
            else:
                own[j] = rest / other[j]
        own[i + 1 :] = 0.0
    for j in range(m):
        for i in range(j, m):
            own = float64s(root, i * m, m)
            total = np.float64(i == j)
            for k in range(j, i):
                total -= own[k] * load_f64(root, k * m + j)
            own[j] = total / own[i]
    return True


@jit
def _column(root: int, t: int, m: int, column: np.ndarray) -> None:
    """Column t of RᵀR."""
    column[:] = 0.0
    for i in range(m):
        row = float64s(root, i * m, m)
        add_multiple(column, row[t], row, m)


@cache
def _row_step_kernel() -> Kernel:
    @cached_kernel()
    def row_step(call: int) -> None:
        (
            _, gram, root, column, weights, factor, update_norm, inner_product, imprecise_steps, step, skipped_steps,
            skipped_in_a_row, dots, slot, options, finite, m,
        ) = pieces_and_arguments(call, 16)  # fmt: skip
        scratch = np.empty((8, m))  # before anything is changed
        x, product, residual, change = scratch[0], scratch[1], scratch[2], scratch[3]
        first, last = take_share(call)
        if first == last:
            return
        t = load_i64(slot, 0)
        damping, rounding, longest, length = (
            load_f64(options, 0), load_f64(options, 1), load_f64(options, 2), load_f64(options, 3),
        )  # fmt: skip
        ridge, s = damping * m, float64s(dots, 0, m)
        for j in range(m):
            store_f64(gram, t * m + j, s[j])
            store_f64(gram, j * m + t, s[j])

        _follow_row(root, column, s, t, ridge, m, x, scratch[4:])
        _multiply(gram, x, m, product)
        _subtract(product, x, t, ridge, m, residual)
        trace = 0.0
        for i in range(m):
            trace += load_f64(gram, i * m + i)
        if trace < 1e10 * ridge and not math.sqrt(dot(residual, residual, m)) <= 1e-6:
            if _invert(root, gram, ridge, m):
                _column(root, t, m, x)
                _column(root, (t + 1) % m, m, float64s(column, 0, m))
                _multiply(gram, x, m, product)
                _subtract(product, x, t, ridge, m, residual)
            else:
                _restart(root, column, gram, (t + 1) % m, ridge, m)
        change[:] = 0.0
        for i in range(m):
            row = float64s(root, i * m, m)
            add_multiple(change, dot(row, residual, m), row, m)
        add_multiple(x, 1.0, change, m)
        _multiply(gram, x, m, product)
        _subtract(product, x, t, ridge, m, residual)
        solved = math.sqrt(dot(residual, residual, m)) < 0.1
        if not solved:
            _restart(root, column, gram, (t + 1) % m, ridge, m)

        # The weights m · x, or those of the best step along the newest row where rounding would spoil them.
        square, inner, length_of_x = s[t], m * dot(s, x, m), dot(x, x, m)
        squared = m * m * (x[t] - ridge * length_of_x - dot(x, residual, m))
        if square != 0.0:
            squared = max(squared, inner * inner / square)
        sound = solved and (square == 0.0 or rounding * rounding * m * m * length_of_x * trace <= 0.01 * squared)
        if sound:
            by_weights, by_product = np.float64(m), np.float64(m)
        else:
            curvature = damping + (dot(s, s, m) / (m * square) if square != 0.0 else 0.0)
            x[:] = 0.0
            x[t] = 1.0
            product[:] = s
            by_weights = by_product = 1 / curvature
        norm = math.sqrt(max(by_weights * by_product * dot(x, product, m), 0.0))
        by = longest / norm if norm > longest else 1.0
        if length >= 0:
            by *= length / norm if norm > 0 else 0.0
        for j in range(m):
            store_f64(weights, j, x[j] * by_weights * by if finite else 0.0)
        store_f64(update_norm, 0, norm * by if finite else 0.0)
        store_f64(inner_product, 0, product[t] * by_product * by if finite else 0.0)
        store_f64(factor, 0, 0.0)
        store_i64(imprecise_steps, 0, load_i64(imprecise_steps, 0) + np.int64(not sound))
        store_i64(step, 0, load_i64(step, 0) + 1)
        store_i64(skipped_steps, 0, load_i64(skipped_steps, 0) + np.int64(finite == 0))
        store_i64(skipped_in_a_row, 0, (load_i64(skipped_in_a_row, 0) + 1) * np.int64(finite == 0))

    return row_step


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
    m = len(dots)
    limits = math.inf if longest is None else longest, -1.0 if length is None else length
    options = array("d", [damping, rounding, *limits])
    taken = ctypes.c_bool.from_address(finite.data_ptr()).value
    addresses = [tensor.data_ptr() for tensor in (*state, dots)]
    arguments = (*addresses, slot_address(slot, m), options.buffer_info()[0], int(taken), m)
    run(_row_step_kernel(), arguments, 1, m * m)
