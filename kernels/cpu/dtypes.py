"""Small numbers that stand for dtypes in compiled code."""

import torch

FLOAT32, BFLOAT16, FLOAT16, FLOAT64, NONE, INT8, INT4 = range(7)
SIZES = (4, 2, 2, 8, 0, 1, 0)  # whole bytes of a number, by code
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}
