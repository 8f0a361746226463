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
from efcp.kernels.blocks import Blocks, SparseRows
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


@custom_op(
    "efcp::compress_",
    mutates_args=("errors", "values", "indices"),
    schema="(Tensor?[] grads, Tensor(a!)[] errors, Tensor(b!)[] values, Tensor(c!)[] indices, SymInt[] numels, "
    "SymInt block_size, float density, Tensor slot, Tensor finite) -> ()",
)
def compress_(
    grads: Sequence[Tensor | None],
    errors: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    slot: Tensor,
    finite: Tensor,
) -> None:
    rows = _packed(values, indices, numels, block_size, density)
    dispatch.run("compress_", slot, grads, errors, rows, slot, finite)


@custom_op(
    "efcp::window_dots",
    mutates_args=(),
    schema="(Tensor[] values, Tensor[] indices, SymInt[] numels, SymInt block_size, float density, Tensor slot) "
    "-> Tensor",
)
def window_dots(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    slot: Tensor,
) -> Tensor:
    return dispatch.run("window_dots", slot, _packed(values, indices, numels, block_size, density), slot)


@custom_op(
    "efcp::window_apply_",
    mutates_args=("targets", "momenta"),
    schema="(Tensor(a!)[] targets, Tensor(b!)[] momenta, Tensor[] values, Tensor[] indices, SymInt[] numels, "
    "SymInt block_size, float density, Tensor weights, Tensor target_factor, Tensor update_factor, "
    "Tensor? momentum_factor) -> ()",
)
def window_apply_(
    targets: Sequence[Tensor],
    momenta: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    numels: Sequence[int],
    block_size: int,
    density: float,
    weights: Tensor,
    target_factor: Tensor,
    update_factor: Tensor,
    momentum_factor: Tensor | None,
) -> None:
    rows = _packed(values, indices, numels, block_size, density)
    update = Update(weights, target_factor, update_factor, momentum_factor)
    dispatch.run("window_apply_", weights, targets, momenta, rows, update)


@custom_op("efcp::dense_dots", mutates_args=(), schema="(Tensor rows, Tensor slot) -> Tensor")
def dense_dots(rows: Tensor, slot: Tensor) -> Tensor:
    result: Tensor = dispatch.run("dense_dots", slot, rows, slot)
    return result


@custom_op(
    "efcp::update_inverse_root_",
    mutates_args=("R", "column"),
    schema="(Tensor(a!) R, Tensor(b!) column, Tensor S, Tensor slot, float ridge) -> (Tensor, Tensor)",
)
def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    return dispatch.run("update_inverse_root_", R, R, column, S, slot, ridge)


@compress_.register_fake
def _(grads, errors, values, indices, numels, block_size, density, slot, finite):  # type: ignore[no-untyped-def]
    pass


@window_dots.register_fake
def _(values, indices, numels, block_size, density, slot):  # type: ignore[no-untyped-def]
    return values[0].new_empty(values[0].shape[1], dtype=torch.float64)


@dense_dots.register_fake
def _(rows, slot):  # type: ignore[no-untyped-def]
    return rows.new_empty(len(rows), dtype=torch.float64)


@window_apply_.register_fake
def _(targets, momenta, values, indices, numels, block_size, density, *update):  # type: ignore[no-untyped-def]
    pass


@update_inverse_root_.register_fake
def _(R, column, S, slot, ridge):  # type: ignore[no-untyped-def]
    return torch.empty_like(S[0]), torch.empty_like(S[0])
