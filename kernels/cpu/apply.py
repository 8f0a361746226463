"""`window_apply_` on a CPU: sums the weighted rows of a block in a scratch buffer, then adds them to the parameter.

With square_weights a second buffer holds the sums of squares.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import Momenta, check_momenta, check_weights
from efcp.kernels.blocks import SparseRows
from efcp.kernels.cpu.convert import blend_block, index_at, number_at, value_at
from efcp.kernels.cpu.dtypes import BFLOAT16, CODES, NONE, SIZES
from efcp.kernels.cpu.launch import launch_of, momentum_code, run, scalar_address, table_row, take_share
from efcp.kernels.cpu.llvm import EIGHT, eight_terms, eight_terms_of_rows, pieces_and_arguments, prefetch
from efcp.kernels.cpu.lowbit import read_momentum
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel
from efcp.kernels.update import Update

FETCHING_ROWS = 16  # rows of the window; before each such group, a portion of the parameter is fetched into the cache
SHORT = 16  # entries; blocks with rows of at most so many are taken eight entries at a time, across rows


@cache
def _apply_kernel(wide: bool, value_code: int, index_size: int, with_squares: bool) -> Kernel:
    real = np.float64 if wide else np.float32
    # Eight entries at a time take a third fewer instructions.
    eight = value_code == BFLOAT16 and not wide and not with_squares

    @cached_kernel(wide, value_code, index_size, with_squares)
    def apply(call: int) -> None:
        (
            _, table, parameters, largest, target_code, momentum_code, weights, weight_code,
            for_target, target_factor_code, for_update, update_factor_code, for_momentum, momentum_factor_code,
            for_squares, eps_code, square_weights, square_weight_code, writes_momenta, window_size,
        ) = pieces_and_arguments(call, 19)  # fmt: skip
        target_factor = real(number_at(target_factor_code, for_target, 0))
        update_factor = real(number_at(update_factor_code, for_update, 0))
        momentum_factor = real(0)
        if momentum_factor_code != NONE:
            momentum_factor = real(number_at(momentum_factor_code, for_momentum, 0))
        weight, square_weight = np.empty(window_size, real), np.empty(window_size if with_squares else 0, real)
        for i in range(window_size):
            weight[i] = real(number_at(weight_code, weights, i))
            if with_squares:
                square_weight[i] = real(number_at(square_weight_code, square_weights, i))
        eps = real(number_at(eps_code, for_squares, 0)) if with_squares else real(0)
        spread, spread_kept = np.empty(window_size * SHORT if eight else 0, np.float32), np.int64(0)
        update, squares = np.zeros(largest, real), np.zeros(largest if with_squares else 0, real)
        dense = np.empty(0 if writes_momenta else largest, real)
        target_size = SIZES[target_code]
        portion = 64 * (largest * target_size * FETCHING_ROWS // (64 * window_size) + 1)  # bytes
        first, last = take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel, size, kept, kept_in_tail, values, indices, target, momentum, scales = table_row(
                    table, parameters, number
                )
                if eight and spread_kept != kept <= SHORT:  # repeats each weight for every entry of its row
                    spread_kept = kept
                    for i in range(window_size):
                        spread[i * kept : (i + 1) * kept] = weight[i]
                for block in range(max(first, begin) - begin, min(last, end) - begin):
                    start = block * size
                    length = min(size, numel - start)
                    chosen = kept if length == size else kept_in_tail
                    before = block * window_size * kept  # entries
                    unfetched, behind = target + start * target_size, target + (start + length) * target_size
                    for first_row in range(0, window_size, FETCHING_ROWS):
                        for line in range(unfetched, min(unfetched + portion, behind), 64):
                            prefetch(line)
                        unfetched += portion
                        last_row = min(first_row + FETCHING_ROWS, window_size)
                        # Several loops, since a single loop for all cases is slow where rows have few entries.
                        if with_squares:
                            for i in range(first_row, last_row):
                                entry, factor, square = before + i * kept, weight[i], square_weight[i]
                                for j in range(entry, entry + chosen):
                                    value = real(value_at(value_code, values, j))
                                    place = index_at(index_size, indices, j)
                                    update[place] += value * factor
                                    squares[place] += value * value * square
                        elif eight and chosen == kept <= SHORT:
                            rest = last_row * kept - (last_row - first_row) * kept % EIGHT
                            for j in range(first_row * kept, rest, EIGHT):
                                terms = eight_terms_of_rows(values, before + j, spread.ctypes.data + 4 * j)
                                for lane in range(EIGHT):
                                    update[index_at(index_size, indices, before + j + lane)] += terms[lane]
                            for j in range(rest, last_row * kept):
                                term = value_at(value_code, values, before + j) * spread[j]
                                update[index_at(index_size, indices, before + j)] += term
                        elif eight and chosen >= EIGHT:
                            for i in range(first_row, last_row):
                                entry, factor = before + i * kept, weight[np.uint64(i)]
                                rest = entry + chosen - chosen % EIGHT
                                for j in range(entry, rest, EIGHT):
                                    terms = eight_terms(values, j, factor)
                                    for lane in range(EIGHT):
                                        update[index_at(index_size, indices, j + lane)] += terms[lane]
                                for j in range(rest, entry + chosen):
                                    update[index_at(index_size, indices, j)] += value_at(value_code, values, j) * factor
                        else:
                            for i in range(first_row, last_row):
                                entry, factor = before + i * kept, weight[np.uint64(i)]
                                for j in range(entry, entry + chosen):
                                    term = real(value_at(value_code, values, j)) * factor
                                    update[index_at(index_size, indices, j)] += term
                    if with_squares:
                        for j in range(length):
                            at = np.uint64(j)
                            update[at] /= np.sqrt(squares[at]) + eps
                            squares[at] = real(0)
                    if momentum != 0 and writes_momenta:
                        blend_block(momentum_code, momentum, start, length, momentum_factor, update, real(1), False)
                    elif momentum != 0:
                        read_momentum(momentum_code, momentum, scales, start, length, dense)
                        for j in range(length):
                            update[j] += momentum_factor * dense[j]
                    blend_block(target_code, target, start, length, target_factor, update, update_factor, True)
                begin = end
            first, last = take_share(call)

    return apply


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    check_momenta(rows, momenta, update)
    launch = launch_of(rows, momenta, targets=targets)
    dtype, (values, indices, _) = targets[0].dtype, rows[0]
    window_size = values.shape[1]
    weights, square_weights = check_weights(values, update, window_size)
    given, factors = update.factors(len(momenta) > 0), list[int]()
    for name in ("target_factor", "update_factor", "momentum_factor", "eps"):
        factor = given.get(name)
        factors += (0, NONE) if factor is None else (scalar_address(name, factor), CODES[factor.dtype])
    squares = (0, NONE) if square_weights is None else (square_weights.data_ptr(), CODES[square_weights.dtype])
    arguments = (
        *launch.arguments, CODES[dtype], momentum_code(momenta),
        weights.data_ptr(), CODES[weights.dtype], *factors, *squares,
        int(update.writes_momenta), window_size,
    )  # fmt: skip
    wide, with_squares = dtype is torch.float64, square_weights is not None
    kernel = _apply_kernel(wide, CODES[values.dtype], indices.itemsize, with_squares)
    run(kernel, arguments, launch.blocks, launch.elements + launch.entries * window_size)
