"""The definition of the operations, in plain PyTorch. Every faster version is tested against these functions.

They run on any device. They work through a parameter in parts, so their temporaries do not grow with the model. On a
CPU they are deterministic. On an accelerator `window_apply_` is deterministic only under
`torch.use_deterministic_algorithms(True)`, as it uses `scatter_add_`. The contracts are in `__init__.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from efcp.kernels.addresses import (
    check_group,
    check_inverse_root,
    check_numbers,
    check_weights,
    dense_address,
    gradient_addresses,
)
from efcp.kernels.blocks import SparseRows
from efcp.kernels.update import Update

PART = 1 << 18  # elements, or entries of the window, in a temporary
DENSE_PART = 1 << 22  # entries of a dense window in a temporary; on a CPU it is PART, which fits into the cache


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of a dtype are added and multiplied: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(a: Tensor, k: int) -> Tensor:
    """Positions of the k elements of largest magnitude in each row of `a`; among equal ones, those further left.

    Args:
        a: (rows, length), without NaN.

    Returns:
        (rows, k) int64, ascending in each row.
    """
    magnitude = a.abs()
    threshold = magnitude.topk(k, dim=1).values[:, -1:]
    above = magnitude > threshold
    tied = magnitude == threshold
    chosen = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return torch.nonzero_static(chosen, size=k * len(a))[:, 1].view(-1, k)


def norm_is_finite(grads: Sequence[Tensor]) -> Tensor:
    if not torch.compiler.is_compiling():  # the only operation that compilers trace through
        gradient_addresses(grads)
    norms = torch._foreach_norm(list(grads), 2, accumulation_dtype(grads[0].dtype))
    return torch.stack(norms).square().sum().isfinite()


def compress_(
    grads: Sequence[Tensor | None], errors: Sequence[Tensor], rows: Sequence[SparseRows], slot: Tensor, finite: Tensor
) -> None:
    check_group(rows, grads=grads, errors=errors)
    check_numbers(rows[0].values, slot=slot, finite=finite)
    for number, (grad, (values, indices, blocks)) in enumerate(zip(grads, rows, strict=True)):
        for part in blocks.parts(PART):
            if grad is None:
                values[part.blocks, :, : part.kept].index_fill_(1, slot, 0.0)
                continue
            g = grad[part.elements].view(-1, part.length)
            a = g.to(accumulation_dtype(grad.dtype))
            if errors:
                e = errors[number][part.elements].view(-1, part.length)
                a = e.to(a.dtype) + a
            a = torch.where(finite, a, 0.0)
            index = largest(a, part.kept)  # (blocks, k)
            selected = a.gather(1, index)
            stored = selected.to(values.dtype)
            values[part.blocks, :, : part.kept].index_copy_(1, slot, stored.unsqueeze(1))
            indices[part.blocks, :, : part.kept].index_copy_(1, slot, index.to(indices.dtype).unsqueeze(1))
            if errors:
                rest = a.scatter_(1, index, selected - stored)
                e.copy_(torch.where(finite, rest.to(e.dtype), e))


def window_dots(rows: Sequence[SparseRows], slot: Tensor) -> Tensor:
    check_group(rows)
    check_numbers(rows[0].values, slot=slot)
    window_size, device = rows[0].values.shape[1], slot.device
    dots = torch.zeros(window_size, dtype=torch.float64, device=device)
    for values, indices, blocks in rows:
        for part in blocks.parts(min(PART, PART // (window_size * blocks.kept) * blocks.size)):
            index = indices[part.blocks, :, : part.kept].long()  # (blocks, m, k)
            value = values[part.blocks, :, : part.kept].double()
            newest = torch.zeros(len(index), part.length, dtype=torch.float64, device=device)
            newest.scatter_(1, index.index_select(1, slot).squeeze(1), value.index_select(1, slot).squeeze(1))
            dots += (newest.gather(1, index.flatten(1)).view_as(value) * value).sum((0, 2))
    return dots


def dense_dots(rows: Tensor, slot: Tensor) -> Tensor:
    dense_address(rows, slot)  # for its checks
    step = max(256, (PART if rows.is_cpu else DENSE_PART) // len(rows))
    dots = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step].double()
        dots.addmv_(part, part.index_select(0, slot).squeeze(0))
    return dots


def window_apply_(
    targets: Sequence[Tensor], momenta: Sequence[Tensor], rows: Sequence[SparseRows], update: Update
) -> None:
    check_group(rows, targets=targets, momenta=momenta)
    values = rows[0].values
    check_weights(values, update.weights, values.shape[1])
    check_numbers(values, **update.factors(len(momenta) > 0))
    dtype = accumulation_dtype(targets[0].dtype)
    weights, target_factor, update_factor = (x.to(dtype) for x in update[:3])
    for number, (target, (values, indices, blocks)) in enumerate(zip(targets, rows, strict=True)):
        window_size = values.shape[1]
        for part in blocks.parts(min(PART, PART // (window_size * blocks.kept) * blocks.size)):
            index = indices[part.blocks, :, : part.kept].long()  # (blocks, m, k)
            terms = values[part.blocks, :, : part.kept].to(dtype) * weights[:, None]
            u = torch.zeros(len(index), part.length, dtype=dtype, device=target.device)
            u.scatter_add_(1, index.flatten(1), terms.flatten(1))
            u = u.flatten()
            if update.momentum_factor is not None:
                u += update.momentum_factor.to(dtype) * momenta[number][part.elements].to(dtype)
                momenta[number][part.elements].copy_(u)
            target[part.elements].copy_(target_factor * target[part.elements].to(dtype) + update_factor * u)


def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    check_inverse_root(R, column, S, slot)
    v = R.index_select(1, slot).squeeze(1)
    shift = torch.copysign(torch.linalg.vector_norm(v), v.index_select(0, slot))
    v.index_add_(0, slot, shift)  # v reflects column t to a multiple of e_t
    vR = column + shift * R.index_select(0, slot).squeeze(0)  # as column = RᵀR e_t
    R.addr_(v, vR * (-2 / torch.dot(v, v)))
    R.index_fill_(0, slot, 0.0).index_fill_(1, slot, 0.0)

    new = S.index_select(0, slot).squeeze(0)
    diagonal = new.index_select(0, slot)
    projected = R @ new.index_fill_(0, slot, 0.0)
    schur = (ridge + diagonal - torch.dot(projected, projected)).clamp(min=ridge)
    following = (slot + 1) % len(R)
    row, others = torch.stack([projected, R.index_select(1, following).squeeze(1)]) @ R
    x = row.neg_().index_fill_(0, slot, 1.0) / schur
    row = row * schur.rsqrt()
    R.index_copy_(0, slot, row.unsqueeze(0))
    column.copy_(others + row * row.index_select(0, following))
    return x, column_residual(x, S, slot, ridge)


def column_residual(x: Tensor, S: Tensor, slot: Tensor, ridge: float) -> Tensor:
    """The residual e_t − (ridge · I + S) x, (m,): zero where x is column `slot` of the inverse."""
    unit = torch.zeros_like(x).index_fill_(0, slot, 1.0)
    return torch.addmv(unit, S, x, alpha=-1).sub_(x, alpha=ridge)
