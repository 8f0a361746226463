"""The Triton kernels on a GPU, against the definition on a CPU. Needs one."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from efcp.kernels import triton as triton_ops
from tests.kernels.kernel_cases import (
    BFLOAT16,
    BITS4,
    BITS8,
    FLOAT16,
    FLOAT64,
    Case,
    check_apply,
    check_average,
    check_compress,
    check_dots,
    check_lowbit,
    check_norm_is_finite,
    check_undo,
)

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CASES = [
    Case(1, 4096, 0.01),
    Case(100_003, 4096, 0.01),
    Case(100_003, 4096, 0.01, kind="ties", grad=BFLOAT16, error=BFLOAT16),
    Case(100_003, 32768, 0.1, kind="wide"),
    Case(4097, 256, 0.1, kind="denormal", grad=FLOAT16),
    Case(4097, 7, 1.0, kind="signed zero", grad=FLOAT64, error=FLOAT64),
    Case(4097, 1000, 0.05, finite=False),
    Case(100_003, 4096, 0.01, error=BITS8),
    Case(100_003, 4096, 0.01, grad=BFLOAT16, error=BITS4),
    Case(100_003, 32768, 0.01, error=BITS4),
    Case(4097, 301, 0.05, error=BITS4),
]


def on_gpu(operation, *arguments):
    """Runs an operation on copies of its tensors on the GPU, and copies back what it changed."""
    there = tree_map_only(torch.Tensor, torch.Tensor.cuda, arguments)
    result = operation(*there)
    for here, copy in zip(tree_leaves(arguments), tree_leaves(there), strict=True):
        if isinstance(here, torch.Tensor):
            here.copy_(copy)
    return result.cpu() if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition_and_gpu_agree(case):
    check_norm_is_finite(partial(on_gpu, triton_ops.norm_is_finite), case)
    check_compress(partial(on_gpu, triton_ops.compress_), case)
    check_undo(partial(on_gpu, triton_ops.undo_compress_), case)
    check_average(partial(on_gpu, triton_ops.average_), case)
    check_lowbit([partial(on_gpu, operation) for operation in (triton_ops.store_lowbit_, triton_ops.add_lowbit_)], case)
    check_dots(partial(on_gpu, triton_ops.window_dots), case)
    check_apply(partial(on_gpu, triton_ops.window_apply_), case)
