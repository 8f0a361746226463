"""The operations as PyTorch operators, `torch.ops.efcp.*`, for compiled graphs.

`torch.compile` and `torch.export` keep a call to an operator as a single node, whatever the backend does inside.
Calling an operator costs tens of microseconds more than calling the backend directly, so the functions of
`efcp.kernels` call operators only under a compiler. Operators cannot take objects of our classes: `SparseRows` are
passed as lists of tensors with the numbers of their `Blocks`, and an `Update` as its tensors.

Schemas are written out, since PyTorch 2.6 cannot infer them from annotations such as `Sequence[Tensor | None]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from efcp.kernels import dispatch
from efcp.kernels.addresses import Momenta
from efcp.kernels.blocks import Blocks, SparseRows
from efcp.kernels.lowbit import LowBit
from efcp.kernels.row_step import RowStep
from efcp.kernels.update import Update


def unpacked(rows: Sequence[SparseRows]) -> tuple[list[Tensor], list[Tensor], list[int], int, float]:
    """The arguments that operators take in place of `SparseRows`: (values, indices, numels, block_size, density)."""
    blocks = [r.blocks for r in rows]
    numels = [b.numel for b in blocks]
    return [r.values for r in rows], [r.indices for r in rows], numels, blocks[0].block_size, blocks[0].density


def _packed(
    values: Sequence[Tensor], indices: Sequence[Tensor], numels: Sequence[int], block_size: int, density: float
) -> list[SparseRows]:
    return [SparseRows(v, i, Blocks(n, block_size, density)) for v, i, n in zip(values, indices, numels, strict=True)]


def unpacked_numbers(numbers: Momenta) -> tuple[list[Tensor], list[Tensor]]:
    """Momenta or errors and their scales, as operators take them: codes and scales, or floating point and no scales."""
    return (
        [x.codes if isinstance(x, LowBit) else x for x in numbers],
        [x.scales for x in numbers if isinstance(x, LowBit)],
    )


def _packed_numbers(numbers: Sequence[Tensor], scales: Sequence[Tensor]) -> Momenta:
    return [LowBit(*pair) for pair in zip(numbers, scales, strict=True)] if scales else numbers


@custom_op(
    "efcp::compress_",
    mutates_args=("errors", "scales", "values", "indices"),
    schema="(Tensor?[] grads, Tensor(a!)[] errors, Tensor(b!)[] scales, Tensor(c!)[] values, Tensor(d!)[] indices, "
    "SymInt[] numels, SymInt block_size, float density, Tensor slot, Tensor[] keys) -> Tensor",
)
def compress_(
    grads: Sequence[Tensor | None],
    errors: Sequence[Tensor],
    scales: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    slot: Tensor,
    keys: Sequence[Tensor],
) -> Tensor:
    rows = _packed(values, indices, numels, block_size, density)
    finite: Tensor = dispatch.run("compress_", slot, grads, _packed_numbers(errors, scales), rows, slot, keys)
    return finite


@custom_op(
    "efcp::undo_compress_",
    mutates_args=("errors", "scales", "values", "indices"),
    schema="(Tensor?[] grads, Tensor(a!)[] errors, Tensor(b!)[] scales, Tensor(c!)[] values, Tensor(d!)[] indices, "
    "SymInt[] numels, SymInt block_size, float density, Tensor slot, Tensor finite, Tensor[] keys) -> ()",
)
def undo_compress_(
    grads: Sequence[Tensor | None],
    errors: Sequence[Tensor],
    scales: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    slot: Tensor,
    finite: Tensor,
    keys: Sequence[Tensor],
) -> None:
    rows = _packed(values, indices, numels, block_size, density)
    dispatch.run("undo_compress_", slot, grads, _packed_numbers(errors, scales), rows, slot, finite, keys)


@custom_op(
    "efcp::average_",
    mutates_args=("momenta", "scales"),
    schema="(Tensor(a!)[] momenta, Tensor(b!)[] scales, Tensor?[] grads, float beta, Tensor finite) -> Tensor",
)
def average_(
    momenta: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor | None], beta: float, finite: Tensor
) -> Tensor:
    result: Tensor = dispatch.run("average_", finite, _packed_numbers(momenta, scales), grads, beta, finite)
    return result


@custom_op(
    "efcp::add_lowbit_",
    mutates_args=("targets",),
    schema="(Tensor(a!)[] targets, Tensor[] codes, Tensor[] scales) -> ()",
)
def add_lowbit_(targets: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    dispatch.run("add_lowbit_", targets[0], targets, _packed_numbers(codes, scales))


@custom_op(
    "efcp::store_lowbit_",
    mutates_args=("codes", "scales"),
    schema="(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] values, Tensor finite, Tensor[] keys) -> ()",
)
def store_lowbit_(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    values: Sequence[Tensor],
    finite: Tensor,
    keys: Sequence[Tensor],
) -> None:
    dispatch.run("store_lowbit_", finite, _packed_numbers(codes, scales), values, finite, keys)


@custom_op(
    "efcp::window_dots",
    mutates_args=(),
    schema="(Tensor[] values, Tensor[] indices, SymInt[] numels, SymInt block_size, float density, Tensor slot, "
    "Tensor[] momenta, Tensor[] scales) -> Tensor",
)
def window_dots(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    slot: Tensor,
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> Tensor:
    rows = _packed(values, indices, numels, block_size, density)
    return dispatch.run("window_dots", slot, rows, slot, _packed_numbers(momenta, scales))


@custom_op(
    "efcp::window_apply_",
    mutates_args=("targets", "momenta"),
    schema="(Tensor(a!)[] targets, Tensor(b!)[] momenta, Tensor[] scales, Tensor[] values, Tensor[] indices, "
    "SymInt[] numels, SymInt block_size, float density, Tensor weights, Tensor target_factor, Tensor update_factor, "
    "Tensor? momentum_factor, bool writes_momenta, Tensor? square_weights, Tensor? eps) -> ()",
)
def window_apply_(
    targets: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    weights: Tensor,
    target_factor: Tensor,
    update_factor: Tensor,
    momentum_factor: Tensor | None,
    writes_momenta: bool,
    square_weights: Tensor | None,
    eps: Tensor | None,
) -> None:
    rows = _packed(values, indices, numels, block_size, density)
    update = Update(weights, target_factor, update_factor, momentum_factor, writes_momenta, square_weights, eps)
    dispatch.run("window_apply_", weights, targets, _packed_numbers(momenta, scales), rows, update)


@custom_op("efcp::dense_dots", mutates_args=(), schema="(Tensor rows, Tensor vector) -> Tensor")
def dense_dots(rows: Tensor, vector: Tensor) -> Tensor:
    result: Tensor = dispatch.run("dense_dots", rows, rows, vector)
    return result


@custom_op(
    "efcp::update_inverse_root_",
    mutates_args=("R", "column"),
    schema="(Tensor(a!) R, Tensor(b!) column, Tensor S, Tensor slot, float ridge) -> (Tensor, Tensor)",
)
def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    return dispatch.run("update_inverse_root_", R, R, column, S, slot, ridge)


@custom_op(
    "efcp::mfac_row_step_",
    mutates_args=RowStep._fields,
    schema="(Tensor(a!) gram, Tensor(b!) inverse_root, Tensor(c!) inverse_column, Tensor(d!) weights, "
    "Tensor(e!) factor, Tensor(f!) update_norm, Tensor(g!) inner_product, Tensor(h!) imprecise_steps, "
    "Tensor(i!) step, Tensor(j!) skipped_steps, Tensor(k!) skipped_in_a_row, Tensor dots, Tensor slot, Tensor finite, "
    "float damping, float rounding, float? longest, float? length) -> ()",
)
def mfac_row_step_(
    gram: Tensor,
    inverse_root: Tensor,
    inverse_column: Tensor,
    weights: Tensor,
    factor: Tensor,
    update_norm: Tensor,
    inner_product: Tensor,
    imprecise_steps: Tensor,
    step: Tensor,
    skipped_steps: Tensor,
    skipped_in_a_row: Tensor,
    dots: Tensor,
    slot: Tensor,
    finite: Tensor,
    damping: float,
    rounding: float,
    longest: float | None,
    length: float | None,
) -> None:
    state = RowStep(
        *(gram, inverse_root, inverse_column, weights, factor, update_norm, inner_product),
        *(imprecise_steps, step, skipped_steps, skipped_in_a_row),
    )
    dispatch.run("mfac_row_step_", dots, state, dots, slot, finite, damping, rounding, longest, length)


@compress_.register_fake
def _(grads, errors, scales, values, indices, numels, block_size, density, slot, keys):  # type: ignore[no-untyped-def]
    return slot.new_empty((), dtype=torch.bool)


@undo_compress_.register_fake
def _(grads, errors, scales, values, indices, numels, block_size, density, slot, finite, keys):  # type: ignore[no-untyped-def]
    pass


@average_.register_fake
def _(momenta, scales, grads, beta, finite):  # type: ignore[no-untyped-def]
    return finite.new_empty((), dtype=torch.float64)


@add_lowbit_.register_fake
def _(targets, codes, scales):  # type: ignore[no-untyped-def]
    pass


@store_lowbit_.register_fake
def _(codes, scales, values, finite, keys):  # type: ignore[no-untyped-def]
    pass


@window_dots.register_fake
def _(values, indices, numels, block_size, density, slot, momenta, scales):  # type: ignore[no-untyped-def]
    size = values[0].shape[1]
    return values[0].new_empty((2, size) if momenta else (size,), dtype=torch.float64)


@dense_dots.register_fake
def _(rows, vector):  # type: ignore[no-untyped-def]
    return rows.new_empty(len(rows), dtype=torch.float64)


@window_apply_.register_fake
def _(targets, momenta, scales, values, indices, numels, block_size, density, *update):  # type: ignore[no-untyped-def]
    pass


@update_inverse_root_.register_fake
def _(R, column, S, slot, ridge):  # type: ignore[no-untyped-def]
    return torch.empty_like(S[0]), torch.empty_like(S[0])


@mfac_row_step_.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    pass
