"""What the launchers share."""

import torch
import triton.language as tl

from efcp.kernels.reference import accumulation_dtype


def triton_accumulation_dtype(dtype: torch.dtype) -> tl.dtype:
    """`accumulation_dtype` in Triton's terms."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32
