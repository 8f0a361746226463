"""The definition of the three operations of the sparse window, in plain PyTorch.

Every faster version is tested against these. They run on any device, and work through a parameter in parts, so that
their temporaries do not grow with it. On a CPU they are deterministic; on an accelerator `scatter_add_`, and with it
`window_apply_`, is so only under `torch.use_deterministic_algorithms(True)`.
"""

import torch
from torch import Tensor

from efcp.kernels.blocks import Blocks

PART = 1 << 18  # elements, or entries of the window, in a temporary


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(a: Tensor, k: int) -> Tensor:
    """Positions of the k elements of largest magnitude in each row of `a`; of equal ones, those further left.

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


def compress_(
    grad: Tensor,
    error: Tensor | None,
    values: Tensor,
    indices: Tensor,
    slot: Tensor,
    finite: Tensor,
    blocks: Blocks,
) -> None:
    for part in blocks.parts(PART):
        g = grad[part.elements].view(-1, part.length)
        a = g.to(accumulation_dtype(grad.dtype))
        if error is not None:
            e = error[part.elements].view(-1, part.length)
            a = e.to(a.dtype) + a
        a = torch.where(finite, a, 0.0)
        index = largest(a, part.kept)  # (blocks, k)
        selected = a.gather(1, index)
        stored = selected.to(values.dtype)
        values[part.blocks, :, : part.kept].index_copy_(1, slot, stored.unsqueeze(1))
        indices[part.blocks, :, : part.kept].index_copy_(1, slot, index.to(indices.dtype).unsqueeze(1))
        if error is not None:
            rest = a.scatter_(1, index, selected - stored)
            e.copy_(torch.where(finite, rest.to(e.dtype), e))


def window_dots(values: Tensor, indices: Tensor, slot: Tensor, blocks: Blocks) -> Tensor:
    window = values.shape[1]
    dots = torch.zeros(window, dtype=torch.float64, device=values.device)
    for part in blocks.parts(min(PART, PART // (window * blocks.kept) * blocks.size)):
        index = indices[part.blocks, :, : part.kept].long()  # (blocks, m, k)
        value = values[part.blocks, :, : part.kept].double()
        newest = torch.zeros(len(index), part.length, dtype=torch.float64, device=values.device)
        newest.scatter_(1, index.index_select(1, slot).squeeze(1), value.index_select(1, slot).squeeze(1))
        dots += (newest.gather(1, index.flatten(1)).view_as(value) * value).sum((0, 2))
    return dots


def window_apply_(
    target: Tensor, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor, blocks: Blocks
) -> None:
    window = values.shape[1]
    dtype = accumulation_dtype(target.dtype)
    scale, weights = scale.to(dtype), weights.to(dtype)
    for part in blocks.parts(min(PART, PART // (window * blocks.kept) * blocks.size)):
        index = indices[part.blocks, :, : part.kept].long()  # (blocks, m, k)
        terms = values[part.blocks, :, : part.kept].to(dtype) * weights[:, None]
        total = target[part.elements].view(-1, part.length).to(dtype) * scale
        total.scatter_add_(1, index.flatten(1), terms.flatten(1))
        target[part.elements].view_as(total).copy_(total)
