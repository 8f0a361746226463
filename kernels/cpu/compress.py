"""`compress_` on a CPU: blockwise Top-k with error feedback, one block at a time.

The key of a number is its bits without the sign, an integer: keys have the same order as magnitudes. Selecting the k
largest magnitudes means finding the k-th largest key. The search starts from the key found in the previous block.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from efcp.kernels import reference
from efcp.kernels.addresses import Errors
from efcp.kernels.blocks import SparseRows
from efcp.kernels.cpu.bits import bits_set, trailing_zeros
from efcp.kernels.cpu.convert import add_block, read_block, store_index, store_value, write_block
from efcp.kernels.cpu.dtypes import CODES, FLOAT32, FLOAT64, INT4, INT8, NONE, SIZES
from efcp.kernels.cpu.finite import sum_of_squares
from efcp.kernels.cpu.launch import (
    CPU,
    error_code_of,
    launch_of,
    run,
    scalar_address,
    slot_address,
    table_row,
    take_share,
)
from efcp.kernels.cpu.llvm import (
    LANES,
    add_and_mask,
    decode_add_and_mask,
    mask_at_least,
    pieces_and_arguments,
    pointer,
    prefetch,
)
from efcp.kernels.cpu.lowbit import BLOCK4, BLOCK8, add_few_bits, encode4, encode8
from efcp.kernels.cpu.machine_code import Kernel, cached_kernel, jit
from efcp.kernels.cpu.memory import load_f32, load_i64, store_f64
from efcp.kernels.reference import accumulation_dtype

Ahead = tuple[int, int, int, int]  # of the next block: address of its gradient, bytes an element; the same of its error


@jit
def _count(bits: np.ndarray, length: int, key: int, most: int) -> int:
    """How many keys are at least `key`. Counts in the integer type of the bits, so that LLVM uses all vector lanes."""
    count = np.int32(0)
    for j in range(length):
        count = np.int32(count + np.int32(bits.dtype.type(bits[j] & most) >= key))
    return count


@jit
def _largest(bits: np.ndarray, length: int, most: int) -> int:
    largest = bits.dtype.type(0)
    for j in range(length):
        largest = max(largest, bits.dtype.type(bits[j] & most))
    return largest


@jit
def _coarse_threshold(
    bits: np.ndarray, length: int, kept: int, enough: int, guess: int, reaching: int, most: int
) -> tuple[int, int]:
    """A key that at least `kept` and at most `enough` elements reach, and how many reach it.

    Where ties make that impossible, it is the largest key that at least `kept` elements reach. The search starts from
    the guess and takes growing steps until it has a key on either side of the wanted one; then it bisects.

    Args:
        guess: a key that `reaching` elements reach; 0 for no guess.
    """
    integer = bits.dtype.type
    low, reached = integer(0), np.int64(length)
    if reached <= enough:
        return low, reached
    high = most  # fewer than `kept` elements reach it
    key, count = guess, np.int64(reaching)
    if guess == 0:
        key = max(integer(1), _largest(bits, length, most))
        count = np.int64(_count(bits, length, key, most))
    step = np.int64(most >> 13)
    while True:
        if count < kept:
            high, following = key, np.int64(key) - step
        else:
            low, reached, following = key, count, np.int64(key) + step
            if count <= enough:
                break
        if high - low <= 1:
            break
        if not low < following < high:
            following = low + ((np.int64(high) - low) >> 1)
        key, step = integer(following), step << 1
        count = np.int64(_count(bits, length, key, most))
    return low, reached


@jit
def _fine_threshold(keys: np.ndarray, length: int, kept: int, low: int, most: int) -> int:
    """A key that exactly `kept` of the keys reach; where ties make that impossible, the largest that more reach.

    All keys reach `low`. Interpolation, which assumes that keys are spread evenly, takes turns with bisection.
    """
    integer = keys.dtype.type
    reached, above = np.int64(length), np.int64(0)
    high = np.int64(_largest(keys, length, most)) + 1
    even = False
    while reached != kept and high - low > 1:
        span, even = high - low, not even
        part = np.int64(np.float64(span) * (np.float64(reached - kept) / np.float64(reached - above)))
        key = integer(low + (min(max(part, 1), span - 1) if even else span >> 1))
        count = np.int64(_count(keys, length, key, most))
        if count >= kept:
            low, reached = key, count
        else:
            high, above = np.int64(key), count
    return low


@jit
def _collect(bits: np.ndarray, length: int, key: int, most: int, ties: int, limit: int, found: np.ndarray) -> None:
    """Finds the `limit` elements that exceed a key, or are among the first `ties` equal to it: ascending positions."""
    count = np.uint64(0)
    for position in range(length):
        own = bits.dtype.type(bits[position] & most)
        if own >= key:
            if own == key:
                if ties == 0:
                    continue
                ties -= 1
            found[count] = position
            count += np.uint64(1)
            if count == np.uint64(limit):
                return


@jit
def _masks(bits: np.ndarray, length: int, key: int, masks: np.ndarray) -> int:
    """Writes masks of the elements that reach a key, 64 elements to a mask. Returns how many reach it."""
    reached = np.int64(0)
    for start in range(0, length, LANES):
        mask = mask_at_least(bits.ctypes.data + start * bits.itemsize, key)
        if start + LANES > length:
            mask &= (np.uint64(1) << np.uint64(length - start)) - np.uint64(1)
        masks[start // LANES] = mask
        reached += bits_set(mask)
    return reached


@jit
def _positions(masks: np.ndarray, length: int, found: np.ndarray, ahead: Ahead) -> None:
    """Writes the positions of the set bits of masks to `found`, ascending. `found` needs room for four more.

    Always writes four positions at a time, even where fewer are left: the processor could not predict a branch on the
    number of set bits. In between it fetches the next block into the cache, in small portions, so that neither memory
    nor the processor waits.
    """
    grad, grad_size, error, error_size = ahead
    count = np.uint64(0)
    for start in range(0, length, LANES):
        for line in range(start * grad_size, (start + LANES) * grad_size, 64):
            prefetch(grad + line)
        for line in range(start * error_size, (start + LANES) * error_size, 64):
            prefetch(error + line)
        mask = masks[start // LANES]
        for at in range(count, count + np.uint64(bits_set(mask)), np.uint64(4)):
            for more in range(4):
                found[np.uint64(at) + np.uint64(more)] = np.uint64(start) + trailing_zeros(mask)
                mask &= mask - np.uint64(1)
        count += np.uint64(bits_set(masks[start // LANES]))


@jit
def _select(
    bits: np.ndarray, length: int, kept: int, guess: int, reached: int, most: int, masks: np.ndarray,
    found: np.ndarray, keys: np.ndarray, ahead: Ahead,
) -> int:  # fmt: skip
    """Writes the positions of the `kept` largest keys to `found`, ascending; among equal keys, the first ones win.

    A few passes over the block find a key that somewhat more than `kept` elements reach. The exact choice is then made
    among those elements only. For most blocks the guess is good, and the pass that made `masks` was the only one.

    Args:
        guess: a key that `reached` elements reach.
        masks: which elements these are, 64 to a mask.

    Returns:
        The key found, as a guess for the next block.
    """
    enough = len(keys)
    if not kept <= reached <= enough:
        guess, reached = _coarse_threshold(bits, length, kept, enough, guess, reached, most)
        if reached > enough:  # only because of ties
            ties = kept - np.int64(_count(bits, length, bits.dtype.type(guess + 1), most))
            _collect(bits, length, guess, most, ties, kept, found)
            return guess
        _masks(bits, length, guess, masks)
    _positions(masks, length, found, ahead)
    for i in range(reached):
        keys[i] = bits[found[i]] & most
    threshold = _fine_threshold(keys, reached, kept, guess, most)
    ties = kept - np.int64(_count(keys, reached, bits.dtype.type(threshold + 1), most))
    count = np.uint64(0)
    for i in range(reached):  # without branches, which a processor could not predict
        tied = np.int64(keys[i] == threshold)
        found[count] = found[i]
        count += np.uint64(np.int64(keys[i] > threshold) | (tied & np.int64(ties > 0)))
        ties -= tied
    return guess


@cache
def _compress_kernel(wide: bool, few_bits: bool = False) -> Kernel:
    """The kernel for gradients in float64, or for all others; with errors in few bits, or in floating point."""
    real, integer, code = (np.float64, np.int64, FLOAT64) if wide else (np.float32, np.int32, FLOAT32)

    @cached_kernel(wide, few_bits)
    def compress(call: int) -> None:
        (
            _, table, parameters, largest, grad_code, error_code, value_code, index_size, slot, sums, window_size,
        ) = pieces_and_arguments(call, 10)  # fmt: skip
        row = load_i64(slot, 0)
        most = integer(np.iinfo(integer).max)
        scratch = np.zeros(largest + LANES, real)  # masks read up to 64 elements, even beyond the end of a block
        masks = np.empty(largest // LANES + 1, np.uint64)
        found = np.zeros(largest + 4, np.uint16)
        all_keys = np.empty(largest, integer)
        scratch4 = np.empty(largest + 1 if error_code == INT4 else 0, np.uint8)
        guess = integer(0)
        grad_size, error_size = SIZES[grad_code], SIZES[error_code]
        first, last = take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel, size, kept, kept_in_tail, values, indices, grad, error, scales = table_row(
                    table, parameters, number
                )
                keys = all_keys[: min(size, kept + max(kept >> 1, 64))]
                for block in range(max(first, begin) - begin, min(last, end) - begin):
                    start = block * size
                    length = min(size, numel - start)
                    chosen = kept if length == size else kept_in_tail
                    entry = (block * window_size + row) * kept
                    if grad == 0:
                        for j in range(chosen):
                            store_value(value_code, values, entry + j, np.float32(0))
                        continue
                    squares = sum_of_squares(grad_code, grad, start, start + length)
                    store_f64(sums, begin + block, squares)
                    if not math.isfinite(squares):
                        for j in range(chosen):
                            store_value(value_code, values, entry + j, np.float32(0))
                            store_index(index_size, indices, entry + j, j)
                        continue
                    in_place = not few_bits and grad_code == code and error_code == code and length % LANES == 0
                    if in_place:
                        a = carray(pointer(error + start * error_size), length, real)
                        reached = np.int64(0)
                        for j in range(0, length, LANES):
                            at = (start + j) * error_size
                            mask = add_and_mask(error + at, grad + at, guess)
                            masks[j // LANES] = mask
                            reached += bits_set(mask)
                    elif few_bits and error_code == INT8 and grad_code == FLOAT32 and length % LANES == 0:
                        a = scratch
                        block_codes, block_scales = error + block * size, scales + block * (-(-size // BLOCK8)) * 4
                        reached = np.int64(0)
                        for j in range(0, length, LANES):
                            scale, summed = load_f32(block_scales, j // BLOCK8), scratch.ctypes.data + j * 4
                            mask = decode_add_and_mask(block_codes + j, scale, grad + (start + j) * 4, summed, guess)
                            masks[j // LANES] = mask
                            reached += bits_set(mask)
                    else:
                        a = scratch
                        read_block(grad_code, grad, start, length, a)
                        if few_bits:
                            block_codes = error + block * (size if error_code == INT8 else (size + 1) // 2)
                            block_scales = scales + block * (-(-size // (BLOCK8 if error_code == INT8 else BLOCK4))) * 4
                            add_few_bits(error_code, block_codes, block_scales, length, a)
                        elif error_code != NONE:
                            add_block(error_code, error, start, length, a)
                        reached = _masks(a.view(integer), length, guess, masks)
                    following = start + size
                    ahead = (grad + following * grad_size, grad_size, error + following * error_size, error_size)
                    guess = _select(a.view(integer), length, chosen, guess, reached, most, masks, found, keys, ahead)
                    for j in range(chosen):
                        position = found[j]
                        stored = store_value(value_code, values, entry + j, np.float32(a[position]))
                        store_index(index_size, indices, entry + j, position)
                        a[position] -= stored
                    if few_bits:
                        if error_code == INT8:
                            encode8(block_codes, block_scales, length, a)
                        else:
                            key = load_i64(load_i64(table, number + parameters * 10), 0)
                            encode4(block_codes, block_scales, start, length, a, key, scratch4)
                    elif error_code != NONE and not in_place:
                        write_block(error_code, error, start, length, a)
                begin = end
            first, last = take_share(call)

    return compress


def compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    launch = launch_of(rows, grads=grads, errors=errors, keys=keys)
    dtype = next((grad.dtype for grad in grads if grad is not None), torch.float32)
    values, indices, _ = rows[0]
    code, sums = error_code_of(errors), np.zeros(launch.blocks)
    arguments = (
        *launch.arguments, CODES[dtype], code, CODES[values.dtype], indices.itemsize,
        slot_address(slot, values.shape[1]), sums.ctypes.data, values.shape[1],
    )  # fmt: skip
    kernel = _compress_kernel(dtype is torch.float64, code in (INT8, INT4))
    run(kernel, arguments, launch.blocks, launch.elements)
    return torch.full((), float(sums.sum()) <= torch.finfo(accumulation_dtype(dtype)).max, device=CPU)


def undo_compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    finite: Tensor,
    keys: Sequence[Tensor] = (),
) -> None:
    if not ctypes.c_bool.from_address(scalar_address("finite", finite, torch.bool)).value:
        # So rarely that the definition will do.
        reference.undo_compress_(grads, errors, rows, slot, finite, keys)
