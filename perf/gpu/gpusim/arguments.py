"""Converts the arguments of a launch to the form that native code takes."""

import ctypes
from typing import Any

import torch

Extent = tuple[int, int]  # addresses [begin, end)


def pack(value: Any, llvm_type: str) -> int:
    """An argument as the content of an 8-byte slot."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if llvm_type in ("half", "bfloat"):
        dtype = torch.float16 if llvm_type == "half" else torch.bfloat16
        return int(torch.tensor(value, dtype=dtype).view(torch.int16).item()) & 0xFFFF
    if llvm_type == "float":
        return int.from_bytes(ctypes.c_float(value), "little")
    if llvm_type == "double":
        return int.from_bytes(ctypes.c_double(value), "little")
    return int(value) & (2**64 - 1)


def extent(tensor: torch.Tensor) -> Extent:
    """The bytes between a tensor's first and last element.

    Raises:
        TypeError: the tensor is not on the CPU.
    """
    if tensor.device.type != "cpu":
        raise TypeError(f"gpusim takes CPU tensors, not one on {tensor.device}")
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def merge(extents: list[Extent]) -> list[Extent]:
    """The same bytes as sorted, disjoint, nonempty extents."""
    merged: list[Extent] = []
    for begin, end in sorted(e for e in extents if e[0] < e[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
