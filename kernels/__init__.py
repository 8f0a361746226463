"""The operations of an optimizer step: their contracts, one definition in PyTorch, and faster versions of it.

Each function here is the contract of an operation. It calls the backend that `dispatch.py` chooses.

| file | what |
|---|---|
| `reference.py` | the definition, in PyTorch |
| `blocks.py` | the layout: blocks, rows, padding |
| `update.py` | the weights and factors of `window_apply_` |
| `row_step.py` | what `mfac_row_step_` reads and writes |
| `lowbit.py` | numbers in 8 and 4 bits |
| `addresses.py` | checks that compiled code can read and write a tensor, and its address |
| `tables.py` | tables of addresses on a device, and who keeps them |
| `dispatch.py` | the choice of a backend |
| `cpu/` | compiled by Numba, for CPUs |
| `triton/` | Triton kernels, for GPUs |
| `operators.py` | the operations as PyTorch operators, for compiled graphs |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from efcp.kernels import dispatch, operators, reference
from efcp.kernels.addresses import Errors, Momenta, has_plain_storage, is_fake
from efcp.kernels.blocks import MAX_BLOCK_SIZE, Blocks, SparseRows
from efcp.kernels.dispatch import BACKENDS, BackendError, backend_name, is_fused, use_backend
from efcp.kernels.lowbit import LowBit, allocate_lowbit, decoded_blocks
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.row_step import RowStep
from efcp.kernels.tables import Tables, is_capturing, on_device
from efcp.kernels.update import Update

__all__ = [
    "BACKENDS",
    "MAX_BLOCK_SIZE",
    "BackendError",
    "Blocks",
    "LowBit",
    "RowStep",
    "SparseRows",
    "Tables",
    "Update",
    "accumulation_dtype",
    "add_lowbit_",
    "allocate_lowbit",
    "average_",
    "backend_name",
    "compress_",
    "decoded_blocks",
    "dense_dots",
    "has_plain_storage",
    "is_capturing",
    "is_fake",
    "is_fused",
    "mfac_row_step_",
    "norm_is_finite",
    "on_device",
    "store_lowbit_",
    "undo_compress_",
    "update_inverse_root_",
    "use_backend",
    "window_apply_",
    "window_dots",
]


def norm_is_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether the squared norm of all gradients is finite: no Inf, no NaN, and no overflow of the sum.

    Args:
        grads: at least one, each (n,) contiguous, of one floating point dtype and on one device.

    Returns:
        () bool. The sum is taken in `accumulation_dtype`: float64 for float64 gradients, else float32.
    """
    if torch.compiler.is_compiling():
        return reference.norm_is_finite(grads)
    return dispatch.run("norm_is_finite", grads[0], grads)


def compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    """Blockwise Top-k with error feedback: a = e + g, the newest row c = Top-k(a), e = a − c.

    In each block, the k elements of largest magnitude are kept; among equal ones, those at lower positions. The row is
    rounded to the window's dtype, and the error keeps what this rounding leaves. (EFCP, arXiv 2306.06098, algorithm 1.)
    In a block whose gradient has no finite norm, the row becomes zero and the error stays as it was.

    An error in few bits is rounded as `efcp.kernels.lowbit` says, each block by itself; what that leaves is lost.

    One call handles all parameters of a group, at least one. They share dtypes, block size, density, window and device.
    This holds for the other operations on windows as well.

    Args:
        grads: the gradient of each parameter: (n,) contiguous, floating point, never changed. Where one is None, only
            the values of its row are set to zero; its indices and its error stay as they were.
        errors: the error of each parameter: (n,) contiguous, all floating point, or all in 8 or all in 4 bits, updated
            in place. Empty where there is no error feedback: then a = g.
        rows: the window of each parameter: (blocks, m, k). Row `slot` is overwritten.
        slot: (1,) int64, the row to write, on the same device.
        keys: of each parameter (1,) int64, of the random numbers for errors in 4 bits: another one for each call.
            Empty for others.

    Returns:
        () bool: whether the norm of all gradients is finite, as `norm_is_finite` says. Where it, or that of gradients
        of other groups, is not, `undo_compress_` has to follow.
    """
    if torch.compiler.is_compiling():
        own, scales = operators.unpacked_numbers(errors)
        return operators.compress_(grads, own, scales, *operators.unpacked(rows), slot, keys)
    return dispatch.run("compress_", slot, grads, errors, rows, slot, keys)


def undo_compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    finite: Tensor,
    keys: Sequence[Tensor] = (),
) -> None:
    """Undoes `compress_` where `finite` is false: the newest row becomes zero, and the error e + c − g.

    That is the error of before up to one rounding. In blocks that `compress_` has left out, it is the error itself.
    Where `finite` is true, nothing is read or changed.

    Args:
        finite: () bool, on the same device.
        keys: of each parameter (1,) int64, of the random numbers for errors in 4 bits. Empty for others.

    The other arguments are those of `compress_`, after it.
    """
    if torch.compiler.is_compiling():
        own, scales = operators.unpacked_numbers(errors)
        operators.undo_compress_(grads, own, scales, *operators.unpacked(rows), slot, finite, keys)
    else:
        dispatch.run("undo_compress_", slot, grads, errors, rows, slot, finite, keys)


def average_(momenta: Momenta, grads: Sequence[Tensor | None], beta: float, finite: Tensor) -> Tensor:
    """momentum ← β · momentum + (1 − β) · gradient; and the squared norm of what is then stored.

    Arithmetic is in float32 (float64 for float64 momenta), rounded once at the end.

    Args:
        momenta: of each parameter (n,), contiguous: all floating point, or all in 8 bits. Updated in place. At least
            one.
        grads: of each parameter (n,) contiguous, floating point, never changed. None leaves the momentum as it is.
        beta: β.
        finite: () bool, on the device of the others; where false, momenta stay as they are.

    Returns:
        () float64: the sum of the squares of all momenta.
    """
    if torch.compiler.is_compiling():
        return operators.average_(*operators.unpacked_numbers(momenta), grads, beta, finite)
    return dispatch.run("average_", finite, momenta, grads, beta, finite)


def add_lowbit_(targets: Sequence[Tensor], numbers: Sequence[LowBit]) -> None:
    """target ← target + numbers.

    Args:
        targets: (n,) each, contiguous, floating point, of one dtype; updated in place. At least one.
        numbers: of each target n numbers, all in 8 or all in 4 bits.
    """
    if torch.compiler.is_compiling():
        operators.add_lowbit_(targets, [x.codes for x in numbers], [x.scales for x in numbers])
    else:
        dispatch.run("add_lowbit_", targets[0], targets, numbers)


def store_lowbit_(
    numbers: Sequence[LowBit], values: Sequence[Tensor], finite: Tensor, keys: Sequence[Tensor] = ()
) -> None:
    """numbers ← values, rounded as `efcp.kernels.lowbit` says.

    Args:
        numbers: all in 8 or all in 4 bits; replaced. At least one.
        values: of each (n,) contiguous, floating point, of one dtype; never changed.
        finite: () bool; where false, all stays as it is.
        keys: of each (1,) int64, of the random numbers for 4 bits: another one for each call. Empty for 8 bits.
    """
    if torch.compiler.is_compiling():
        operators.store_lowbit_([x.codes for x in numbers], [x.scales for x in numbers], values, finite, keys)
    else:
        dispatch.run("store_lowbit_", values[0], numbers, values, finite, keys)


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    """Inner products of every row of the window with row `slot`: one row of the Gram matrix S = G Gᵀ.

    With momenta, in the same pass over the window, also those of every row with the momenta.

    Args:
        rows: the window of each parameter: (blocks, m, k).
        slot: (1,) int64, on the window's device.
        momenta: of each parameter (n,), contiguous: all floating point, or all in 8 bits; or empty.

    Returns:
        (m,) float64, summed over the parameters; with momenta (2, m), those with the momenta second.
    """
    if torch.compiler.is_compiling():
        return operators.window_dots(*operators.unpacked(rows), slot, *operators.unpacked_numbers(momenta))
    return dispatch.run("window_dots", slot, rows, slot, momenta)


def dense_dots(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of every row of a dense window with a vector, one of the rows or another.

    Args:
        rows: (m, n) contiguous, floating point.
        vector: (n,) contiguous, floating point, on the device of the rows.

    Returns:
        (m,) float64. Products and sums are taken in float64: preconditioners need this where rows are nearly parallel.
    """
    if torch.compiler.is_compiling():
        return operators.dense_dots(rows, vector)
    return dispatch.run("dense_dots", rows, rows, vector)


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    """Adds the weighted sum of the window's rows to parameters; `Update` has the formula.

    Args:
        targets: the parameters: (n,) contiguous, floating point, updated in place. Arithmetic is in float32 (float64
            for float64 targets), rounded once at the end.
        momenta: of each parameter (n,) contiguous, floating point, updated in place where the update says so; or in 8
            bits, only read; or empty.
        rows: of each parameter, (blocks, m, k): the rows Gᵢ of the window.
        update: the weights of the rows, and the factors.
    """
    if torch.compiler.is_compiling():
        own, scales = operators.unpacked_numbers(momenta)
        operators.window_apply_(targets, own, scales, *operators.unpacked(rows), *update)
    else:
        dispatch.run("window_apply_", update.weights, targets, momenta, rows, update)


def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Updates a root R of the inverse, RᵀR = (ridge · I + S)⁻¹, after row and column `slot` of S have changed. O(m²).

    Let t be the slot, s the new column of S without its diagonal entry, and s_t that entry.

    1. A Householder reflection from the left moves all of column t of R into row t. It leaves RᵀR as it is.
    2. Row and column t of R are set to zero. RᵀR is now the inverse of ridge · I + S without row and column t.
    3. Row t of R becomes (−sᵀRᵀR, 1 at t) / √σ, where σ = ridge + s_t − ‖Rs‖² is the Schur complement, ≥ ridge.

    This is a square-root filter. Updating the inverse itself would lose twice as many digits: on windows of dependent
    rows its error grows without bound once squared gradient norms reach 10⁸ λ.

    Args:
        R: (m, m) float64, contiguous, changed in place.
        column: (m,) float64, contiguous: column t of RᵀR. Given it, one pass over R is enough. On return it holds
            column (t + 1) mod m of the new RᵀR, for the next call.
        S: (m, m) float64, contiguous, with its new row and column already in place.
        slot: (1,) int64.
        ridge: mλ.

    Returns:
        x, column t of the new RᵀR, and its residual e_t − (ridge · I + S) x, which would be zero in exact arithmetic:
        (m,) float64 each.
    """
    if torch.compiler.is_compiling():
        return operators.update_inverse_root_(R, column, S, slot, ridge)
    return dispatch.run("update_inverse_root_", R, R, column, S, slot, ridge)


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
    """All m × m algebra of a step of M-FAC along the newest row. O(m²).

    Row and column `slot` of S are replaced, and R is updated as `update_inverse_root_` says; column `slot` of the
    inverse is refined once. Where that fails, R begins anew with the diagonal of S. The weights of the rows follow, or
    those of the best step along the newest row where rounding would spoil the update. They are limited in length, and
    zero where not finite. Steps are counted.

    Args:
        state: changed in place.
        dots: (m,) float64, the inner products of all rows with the newest.
        slot: (1,) int64.
        finite: () bool.
        damping: λ.
        rounding: the machine epsilon of the arithmetic in which the rows are summed.
        longest: updates are scaled down to this length; None for no limit.
        length: updates are scaled to this length; None to leave them as they are.
    """
    if torch.compiler.is_compiling():
        return operators.mfac_row_step_(*state, dots, slot, finite, damping, rounding, longest, length)
    return dispatch.run("mfac_row_step_", dots, state, dots, slot, finite, damping, rounding, longest, length)
