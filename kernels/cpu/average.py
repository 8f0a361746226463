"""`average_`: momentum ← β · momentum + (1 − β) · gradient, and the sum of squares, in one pass."""

from array import array
from collections.abc import Sequence
from functools import cache, partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from efcp.kernels.addresses import Momenta, average_addresses
from efcp.kernels.cpu.convert import read_block, write_block
from efcp.kernels.cpu.dtypes import CODES, FLOAT64, INT8, NONE
from efcp.kernels.cpu.launch import CPU, PIECES, momentum_code, run, scalar_address, take_share
from efcp.kernels.cpu.llvm import pieces_and_arguments
from efcp.kernels.cpu.lowbit import BLOCK8, encode8, read_momentum
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f64, load_i64, load_u8, store_f64
from efcp.kernels.lowbit import LowBit

CHUNK = 4096  # elements of a momentum, the unit in which the work is shared out


@partial(jit, fastmath={"reassoc", "contract"})
def _sum_of_squares(numbers: np.ndarray, length: int) -> float:
    total = 0.0
    for j in range(length):
        total += np.float64(numbers[j]) * np.float64(numbers[j])
    return total


@cache
def _average_kernel(wide: bool) -> Kernel:
    real = np.float64 if wide else np.float32

    @cached_kernel(wide)
    def average(call: int) -> None:
        """Sums of squares over the pieces, into `sums`.

        The table has five columns: the number of the first chunk behind a momentum, n, and addresses: of the momentum,
        of its scales, and of the gradient or 0.
        """
        pieces, table, parameters, code, grad_code, factors, finite, sums, chunks = pieces_and_arguments(call, 8)
        beta, rest, is_finite = real(load_f64(factors, 0)), real(load_f64(factors, 1)), load_u8(finite, 0) != 0
        old, new = np.empty(CHUNK, real), np.empty(CHUNK, real)
        first, last = take_share(call)
        while first < last:
            for piece in range(first, last):
                total = 0.0
                first_chunk, last_chunk = piece * chunks // pieces, (piece + 1) * chunks // pieces
                begin = np.int64(0)
                for number in range(parameters):
                    end, numel = load_i64(table, number), load_i64(table, number + parameters)
                    momentum = load_i64(table, number + parameters * 2)
                    scales, grad = load_i64(table, number + parameters * 3), load_i64(table, number + parameters * 4)
                    for chunk in range(max(first_chunk, begin) - begin, min(last_chunk, end) - begin):
                        start = chunk * CHUNK
                        length = min(CHUNK, numel - start)
                        written = is_finite and grad != 0
                        read_momentum(code, momentum, scales, start, length, old)
                        if written:
                            read_block(grad_code, grad, start, length, new)
                            for j in range(length):
                                old[j] = old[j] * beta + new[j] * rest
                            if code == INT8:
                                encode8(momentum + start, scales + start // BLOCK8 * 4, length, old)
                            else:
                                write_block(code, momentum, start, length, old)
                            read_momentum(code, momentum, scales, start, length, old)  # as it is stored
                        total += _sum_of_squares(old, length)
                    begin = end
                store_f64(sums, piece, total)
            first, last = take_share(call)

    return average


def average_(momenta: Momenta, grads: Sequence[Tensor | None], beta: float, finite: Tensor) -> Tensor:
    found, scales, gradients = average_addresses(momenta, grads, finite)
    own = [momentum.codes if isinstance(momentum, LowBit) else momentum for momentum in momenta]
    numels = [momentum.numel() for momentum in own]
    ends = list(accumulate(-(-numel // CHUNK) for numel in numels))
    table = array("q", [*ends, *numels, *found, *scales, *gradients])
    grad_dtype = next((grad.dtype for grad in grads if grad is not None), None)
    code = momentum_code(momenta)
    pieces = max(1, min(ends[-1], PIECES))
    sums, factors = array("d", bytes(8 * pieces)), array("d", [beta, 1 - beta])
    arguments = (
        table.buffer_info()[0], len(own), code, NONE if grad_dtype is None else CODES[grad_dtype],
        factors.buffer_info()[0], scalar_address("finite", finite, torch.bool), sums.buffer_info()[0], ends[-1],
    )  # fmt: skip
    run(_average_kernel(code == FLOAT64), arguments, pieces, sum(numels))
    return torch.full((), sum(sums), dtype=torch.float64, device=CPU)
