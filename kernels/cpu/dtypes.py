"""Dtypes as compiled code knows them: by small numbers."""

import torch
from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16, FLOAT64, NONE = range(5)
SIZES = (4, 2, 2, 8, 0)  # bytes, by code
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}


def coded(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor, which is one that kernels read and write."""
    if tensor.dtype not in CODES:
        raise TypeError(f"{name} must be of dtype {', '.join(map(str, CODES))}, got {tensor.dtype}")
    return tensor.dtype
