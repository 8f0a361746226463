"""From tensors to addresses: the only place where compiled code learns where to read and write.

Compiled code believes what it is told. A wrong number of elements, dtype or device, a gap between elements, a sign that
PyTorch has put off (`Tensor.is_neg`), or a tensor without memory of its own would make it read or write foreign memory,
or wrong numbers, without a word. Hence an address is given out only for a tensor that is what the kernel takes it for.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from efcp.kernels.blocks import Rows


@lru_cache(maxsize=64)
def has_plain_storage(kind: type[Tensor]) -> bool:
    """Whether tensors of a class keep their elements in memory of their own, as `Tensor` and `Parameter` do.

    Classes that handle PyTorch's operations themselves, such as DTensor, may hold other tensors instead, or nothing.
    """
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor stands for one without having its elements: on the meta device, or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def addresses(
    name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, numels: Sequence[int]
) -> list[int]:
    """The addresses of the first elements of tensors, for compiled code to read and write; 0 for None.

    Args:
        name: of the argument that holds the tensors, for errors.
        tensors: each contiguous, with plain storage and without a negative bit.
        dtype, device: what all tensors must have.
        numels: how many elements each tensor must have.

    Raises:
        TypeError: for tensors without plain storage.
        ValueError: for tensors that break another rule, or another number of them than of `numels`.
    """
    if len(tensors) != len(numels):
        raise ValueError(f"{name} must hold {len(numels)} tensors, got {len(tensors)}")
    on_cpu, found = device.type == "cpu", []
    for number, (tensor, numel) in enumerate(zip(tensors, numels, strict=True)):
        if tensor is None:
            found.append(0)
        elif (
            tensor.dtype is dtype
            and tensor.numel() == numel
            and tensor.is_contiguous()
            and (tensor.is_cpu if on_cpu else tensor.device == device)
            and not tensor.is_neg()
            and has_plain_storage(type(tensor))
        ):
            found.append(tensor.data_ptr())
        else:
            raise _refusal(f"{name}[{number}]" if len(numels) > 1 else name, tensor, dtype, device, numel)
    return found


def group_addresses(
    rows: Sequence[Rows], device: torch.device, **others: Sequence[Tensor | None]
) -> tuple[list[int], ...]:
    """Addresses of values, of indices, and of other tensors with an entry for each of a parameter's, of all parameters.

    Args:
        rows: of each parameter; the same window, block size, density and dtype in all.
        device: what all tensors must be on.
        others: by the names of arguments: of each parameter (n,) or None, of one dtype; or empty, which gives zeros.

    Raises:
        TypeError, ValueError: as `addresses`, and for rows that do not belong together.
    """
    values, _, layout = rows[0]
    window = values.shape[1]
    for r in rows:
        same = r.blocks.block_size == layout.block_size and r.blocks.density == layout.density
        if not same or r.values.shape[1] != window:
            raise ValueError(f"rows must have the same window, block size and density, got {layout} and {r.blocks}")
    sizes = [r.blocks.count * window * r.blocks.kept for r in rows]
    numels = [r.blocks.numel for r in rows]
    found = [
        addresses("values", [r.values for r in rows], values.dtype, device, sizes),
        addresses("indices", [r.indices for r in rows], layout.index_dtype, device, sizes),
    ]
    for name, tensors in others.items():
        dtype = next((tensor.dtype for tensor in tensors if tensor is not None), torch.float32)
        found.append(addresses(name, tensors, dtype, device, numels) if len(tensors) else [0] * len(rows))
    return tuple(found)


def check_group(rows: Sequence[Rows], device: torch.device, **others: Sequence[Tensor | None]) -> None:
    """Raises what `group_addresses` raises, for code that needs no addresses. Tensors may be fake."""
    if not is_fake(rows[0].values):
        group_addresses(rows, device, **others)


def _refusal(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, numel: int) -> Exception:
    """What is wrong with a tensor that is given no address."""
    if not has_plain_storage(type(tensor)):
        return TypeError(f"{name} must have memory of its own, got a {type(tensor).__name__}")
    own = f"{tensor.numel()} elements of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
    if tensor.is_neg():
        own += ", with a negative bit"
    allowed = f"be contiguous, with {numel} elements of {dtype} on {device} and without a negative bit"
    return ValueError(f"{name} must {allowed}, got {own}")
