"""The definition of the operations, in plain PyTorch. Every faster version is tested against these functions.

They run on any device. They work through a parameter in parts, so their temporaries do not grow with the model. On a
CPU they are deterministic. On an accelerator `window_apply_` is deterministic only under
`torch.use_deterministic_algorithms(True)`, as it uses `scatter_add_`. The contracts are in `__init__.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from efcp.kernels.addresses import (
    Errors,
    Momenta,
    check_average,
    check_compress,
    check_group,
    check_inverse_root,
    check_lowbit,
    check_momenta,
    check_numbers,
    check_row_step,
    check_weights,
    dense_addresses,
    gradient_addresses,
    is_fake,
    momentum_addresses,
)
from efcp.kernels.blocks import Blocks, Part, SparseRows
from efcp.kernels.lowbit import BLOCK, LowBit, decoded, decoded_pieces, encoded, encoded_pieces, parts, pieces, replace_
from efcp.kernels.row_step import RowStep
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
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    keys: Sequence[Tensor] = (),
) -> Tensor:
    check_compress(grads, errors, rows, keys, slot=slot)
    squares = torch.zeros((), dtype=torch.float64, device=slot.device)
    for number, (grad, (values, indices, blocks)) in enumerate(zip(grads, rows, strict=True)):
        error, key = errors[number] if errors else None, keys[number] if keys else None
        for part in blocks.parts(PART):
            if grad is None:
                values[part.blocks, :, : part.kept].index_fill_(1, slot, 0.0)
                continue
            a = _block_gradients(grad, part)
            own = a.square().sum(1, keepdim=True)  # of each block
            squares += own.sum(dtype=torch.float64)
            if error is not None:
                e = _block_errors(error, blocks, part)
                a = _decoded(e, part.length).to(a.dtype) + a
            a = torch.where(own.isfinite(), a, 0.0)
            index = largest(a, part.kept)  # (blocks, k)
            selected = a.gather(1, index)
            stored = selected.to(values.dtype)
            values[part.blocks, :, : part.kept].index_copy_(1, slot, stored.unsqueeze(1))
            indices[part.blocks, :, : part.kept].index_copy_(1, slot, index.to(indices.dtype).unsqueeze(1))
            if error is not None:
                _store(e, a.scatter_(1, index, selected - stored), own.isfinite(), part, key)
    dtype = next((accumulation_dtype(grad.dtype) for grad in grads if grad is not None), torch.float32)
    return squares <= torch.finfo(dtype).max


def undo_compress_(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    slot: Tensor,
    finite: Tensor,
    keys: Sequence[Tensor] = (),
) -> None:
    check_compress(grads, errors, rows, keys, slot=slot, finite=finite)
    if finite.device.type == "cpu" and not is_fake(finite) and finite:
        return
    for number, (grad, (values, indices, blocks)) in enumerate(zip(grads, rows, strict=True)):
        if grad is None:
            continue
        for part in blocks.parts(PART):
            row, at = (t[part.blocks, :, : part.kept].index_select(1, slot).squeeze(1) for t in (values, indices))
            if errors:
                g, e = _block_gradients(grad, part), _block_errors(errors[number], blocks, part)
                compressed = g.square().sum(1, keepdim=True).isfinite()
                a = _decoded(e, part.length).to(g.dtype)
                a = a.scatter(1, at.long(), a.gather(1, at.long()) + row.to(g.dtype)) - g
                _store(e, a, compressed & ~finite, part, keys[number] if keys else None)
            first = torch.arange(part.kept, dtype=at.dtype, device=at.device).expand_as(at)
            for tensor, old, new in ((values, row, 0.0), (indices, at, first)):
                restored = torch.where(finite, old, new).to(tensor.dtype)
                tensor[part.blocks, :, : part.kept].index_copy_(1, slot, restored.unsqueeze(1))


def _block_gradients(grad: Tensor, part: Part) -> Tensor:
    """The gradient of some blocks, in the dtype of arithmetic: (blocks, length)."""
    return grad[part.elements].view(-1, part.length).to(accumulation_dtype(grad.dtype))


def _block_errors(error: Tensor | LowBit, blocks: Blocks, part: Part) -> Tensor | LowBit:
    """A view of the error of some blocks: (blocks, length), or as `pieces` gives it."""
    if isinstance(error, LowBit):
        return pieces(error, blocks.size, part.blocks.start, part.blocks.stop - part.blocks.start, part.length)
    return error[part.elements].view(-1, part.length)


def _decoded(error: Tensor | LowBit, length: int) -> Tensor:
    return decoded_pieces(error, length) if isinstance(error, LowBit) else error


def _store(error: Tensor | LowBit, new: Tensor, where: Tensor, part: Part, key: Tensor | None) -> None:
    """Writes a new error of some blocks, (blocks, length), where a condition holds, (blocks, 1) bool."""
    if not isinstance(error, LowBit):
        error.copy_(torch.where(where, new.to(error.dtype), error))
        return
    encoded = encoded_pieces(new.float(), error.codes.dtype, part.elements.start, key)
    for old, other in zip(error, encoded, strict=True):
        old.copy_(torch.where(where, other, old))


def average_(momenta: Momenta, grads: Sequence[Tensor | None], beta: float, finite: Tensor) -> Tensor:
    check_average(momenta, grads, finite)
    total = torch.zeros((), dtype=torch.float64, device=finite.device)
    for momentum, grad in zip(momenta, grads, strict=True):
        numel = momentum.codes.numel() if isinstance(momentum, LowBit) else momentum.numel()
        for elements in parts(numel, BLOCK[torch.int8], PART):
            old = decoded(momentum, elements) if isinstance(momentum, LowBit) else momentum[elements]
            if grad is not None:
                dtype = accumulation_dtype(old.dtype)
                new = old.to(dtype) * beta + grad[elements].to(dtype) * (1 - beta)
                if isinstance(momentum, LowBit):
                    replace_(momentum, encoded(new, torch.int8), elements, finite)
                    old = decoded(momentum, elements)
                else:
                    old = momentum[elements].copy_(torch.where(finite, new, old.to(dtype)))
            total += old.double().square().sum()
    return total


def add_lowbit_(targets: Sequence[Tensor], numbers: Sequence[LowBit]) -> None:
    check_lowbit(targets, numbers)
    for target, own in zip(targets, numbers, strict=True):
        for elements in parts(target.numel(), BLOCK[own.codes.dtype], PART):
            target[elements] += decoded(own, elements)


def store_lowbit_(
    numbers: Sequence[LowBit], values: Sequence[Tensor], finite: Tensor, keys: Sequence[Tensor] = ()
) -> None:
    check_lowbit(values, numbers, finite, keys)
    for number, (own, value) in enumerate(zip(numbers, values, strict=True)):
        dtype, key = own.codes.dtype, keys[number] if keys else None
        for elements in parts(value.numel(), BLOCK[dtype], PART):
            new = encoded(value[elements].float(), dtype, elements.start, key)
            replace_(own, new, elements, finite)


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    check_group(rows)
    momentum_addresses(momenta, rows[0].values.device, [r.blocks.numel for r in rows], is_fake(rows[0].values))
    check_numbers(rows[0].values, slot=slot)
    window_size, device = rows[0].values.shape[1], slot.device
    dots = torch.zeros(1 + bool(momenta), window_size, dtype=torch.float64, device=device)
    for number, (values, indices, blocks) in enumerate(rows):
        for part in blocks.parts(min(PART, PART // (window_size * blocks.kept) * blocks.size)):
            index = indices[part.blocks, :, : part.kept].long()  # (blocks, m, k)
            value = values[part.blocks, :, : part.kept].double()
            newest = torch.zeros(len(index), part.length, dtype=torch.float64, device=device)
            newest.scatter_(1, index.index_select(1, slot).squeeze(1), value.index_select(1, slot).squeeze(1))
            vectors = [newest, *(_numbers(x, part.elements).view_as(newest) for x in momenta[number : number + 1])]
            for own, vector in zip(dots, vectors, strict=True):
                own += (vector.gather(1, index.flatten(1)).view_as(value) * value).sum((0, 2))
    return dots if momenta else dots[0]


def _numbers(momentum: Tensor | LowBit, elements: slice) -> Tensor:
    """Some elements of a momentum as float64."""
    if isinstance(momentum, Tensor):
        return momentum[elements].double()
    block = BLOCK[momentum.codes.dtype]
    whole = slice(elements.start // block * block, min(-(-elements.stop // block) * block, momentum.codes.numel()))
    skipped = elements.start - whole.start
    return decoded(momentum, whole)[skipped : skipped + elements.stop - elements.start].double()


def dense_dots(rows: Tensor, vector: Tensor) -> Tensor:
    dense_addresses(rows, vector)  # for its checks
    step = max(256, (PART if rows.is_cpu else DENSE_PART) // len(rows))
    dots = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], step):
        dots.addmv_(rows[:, first : first + step].double(), vector[first : first + step].double())
    return dots


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    check_group(rows, targets=targets)
    check_momenta(rows, momenta, update)
    values = rows[0].values
    check_weights(values, update, values.shape[1])
    check_numbers(values, **update.factors(len(momenta) > 0))
    dtype = accumulation_dtype(targets[0].dtype)
    weights, target_factor, update_factor = (x.to(dtype) for x in update[:3])
    square_weights, eps = (None if x is None else x.to(dtype) for x in (update.square_weights, update.eps))
    for number, (target, (values, indices, blocks)) in enumerate(zip(targets, rows, strict=True)):
        window_size = values.shape[1]
        for part in blocks.parts(min(PART, PART // (window_size * blocks.kept) * blocks.size)):
            index = indices[part.blocks, :, : part.kept].long().flatten(1)  # (blocks, m · k)
            value = values[part.blocks, :, : part.kept].to(dtype)  # (blocks, m, k)
            zeros = torch.zeros(len(index), part.length, dtype=dtype, device=target.device)
            u = zeros.scatter_add(1, index, (value * weights[:, None]).flatten(1))
            if square_weights is not None and eps is not None:
                W = zeros.scatter_add(1, index, (value * value * square_weights[:, None]).flatten(1))
                u /= W.double().sqrt().to(dtype) + eps  # PyTorch's root of float32 may be off by a last bit
            u = u.flatten()
            if update.momentum_factor is not None:
                momentum = momenta[number]
                u += update.momentum_factor.to(dtype) * _numbers(momentum, part.elements).to(dtype)
                if update.writes_momenta and isinstance(momentum, Tensor):
                    momentum[part.elements].copy_(u)
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
    S, R, column = state.gram, state.inverse_root, state.inverse_column
    ridge, newest = len(S) * damping, torch.zeros_like(dots).index_fill_(0, slot, 1.0)
    state.step.add_(1)
    state.skipped_steps.add_(~finite)
    state.skipped_in_a_row.copy_((state.skipped_in_a_row + 1) * ~finite)
    S.index_copy_(0, slot, dots.unsqueeze(0)).index_copy_(1, slot, dots.unsqueeze(1))
    x, residual = update_inverse_root_(R, column, S, slot, ridge)
    x = x + R.t() @ (R @ residual)
    residual = column_residual(x, S, slot, ridge)
    solved = torch.linalg.vector_norm(residual) < 0.1
    restart_(R, column, S, (slot + 1) % len(S), ridge, solved)
    weights, sound = sound_weights(S, newest, dots, x, residual, damping, rounding)
    sound = sound & solved
    state.imprecise_steps.add_(~sound)
    weights = torch.where(sound, len(S) * x, weights)
    products = S @ weights
    squared = torch.dot(weights, products).clamp(min=0)
    norm, by = squared.sqrt(), torch.ones_like(squared)
    if longest is not None:
        by = (longest / norm).clamp(max=1.0)
    if length is not None:
        by = by * torch.where(norm > 0, length / norm, 0.0)
    state.weights.copy_(torch.where(finite, weights * by, 0.0))
    state.factor.zero_()
    state.update_norm.copy_(torch.where(finite, norm * by, 0.0))
    state.inner_product.copy_(torch.where(finite, products.index_select(0, slot).squeeze(0) * by, 0.0))


def restart_(R: Tensor, column: Tensor, S: Tensor, following: Tensor, ridge: float, solved: Tensor) -> None:
    """Where not `solved`, makes R the root of the inverse of the diagonal alone, and `column` that of RᵀR."""
    diagonal = S.diagonal() + ridge
    alone = torch.zeros_like(diagonal).index_fill_(0, following, 1.0) / diagonal
    torch.where(solved, R, R.new_zeros(()), out=R).diagonal().add_(torch.where(solved, 0.0, diagonal.rsqrt()))
    torch.where(solved, column, alone, out=column)


def sound_weights(
    S: Tensor, x: Tensor, products: Tensor, y: Tensor, r: Tensor, damping: Tensor | float, rounding: float
) -> tuple[Tensor, Tensor]:
    """The weights of the best step along a combination c = Gᵀx, and whether the weights m · y are better than that.

    They are unless rounding would spoil u, whose length is known in two ways that lose different digits: it is at least
    ⟨c, u⟩/‖c‖, and with the residual r of y  ‖u‖² = m(⟨w, x⟩ − λ‖w‖² − ⟨w, r⟩).

    Args:
        products: Gc, (m,), as x and y.
        damping: λ.
        rounding: the machine epsilon of the sum of the rows.
    """
    m = len(x)
    w, square = m * y, torch.dot(x, products)  # ‖c‖²
    inner = torch.dot(products, w)  # ⟨c, u⟩
    squared_norm = m * (torch.dot(w, x) - damping * torch.dot(w, w) - torch.dot(w, r))
    squared_norm = torch.maximum(squared_norm, inner * inner / square)
    spoilt = rounding**2 * torch.dot(w, w) * S.trace()  # of ‖u‖, squared, at most
    curvature = damping + torch.where(square == 0, 0.0, torch.dot(products, products) / (m * square))  # cᵀFc/‖c‖²
    return x / curvature, (spoilt <= 0.01 * squared_norm) | (square == 0)
