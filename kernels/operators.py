"""The operations as operators of PyTorch, `torch.ops.efcp.*`, for graphs: `torch.compile` and `torch.export` keep a
call to one as a single node, whatever the backend does inside.

Calling an operator costs tens of microseconds more than calling the backend, hence the functions of `efcp.kernels` use
them only under a compiler. An operator takes no objects: `Blocks` becomes numel, block_size and density.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from efcp import kernels  # which imports this module, to call it
from efcp.kernels.blocks import Blocks


@custom_op("efcp::compress_", mutates_args=("error", "values", "indices"))
def compress_(
    grad: Tensor,
    error: Tensor | None,
    values: Tensor,
    indices: Tensor,
    slot: Tensor,
    finite: Tensor,
    numel: int,
    block_size: int,
    density: float,
) -> None:
    blocks = Blocks(numel, block_size, density)
    kernels._backend(grad).compress_(grad, error, values, indices, slot, finite, blocks)


@custom_op("efcp::window_dots", mutates_args=())
def window_dots(values: Tensor, indices: Tensor, slot: Tensor, numel: int, block_size: int, density: float) -> Tensor:
    return kernels._backend(values).window_dots(values, indices, slot, Blocks(numel, block_size, density))


@custom_op("efcp::window_apply_", mutates_args=("target",))
def window_apply_(
    target: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor,
    numel: int,
    block_size: int,
    density: float,
) -> None:
    blocks = Blocks(numel, block_size, density)
    kernels._backend(target).window_apply_(target, values, indices, weights, scale, blocks)


@compress_.register_fake
def _(grad, error, values, indices, slot, finite, numel, block_size, density):  # type: ignore[no-untyped-def]
    pass


@window_dots.register_fake
def _(values, indices, slot, numel, block_size, density):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape[1], dtype=torch.float64)


@window_apply_.register_fake
def _(target, values, indices, weights, scale, numel, block_size, density):  # type: ignore[no-untyped-def]
    pass
