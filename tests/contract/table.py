"""The table of optimizers in the form that PyTorch's own tests use: arguments to try, and arguments to refuse."""

import sys
from unittest import mock

import pytest
import torch

import efcp
from tests.contract.optimizers import CLASSES, is_sparse, small

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with mock.patch.object(sys, "argv", sys.argv[:1]):  # it reads the command line, and takes it for its own
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
    )
torch.backends.__allow_nonbracketed_mutation_flag = True  # it also forbids the process to set flags of backends


def _inputs(cls):
    own = {"damping": 1.0} if "MFAC" in cls.__name__ else {"beta1": 0.5, "beta2": 0.9}
    if cls is efcp.MicroAdam:
        own = {"betas": (0.5, 0.9), "correction": "step"}
    variants = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "tensor lr of one dimension": {"lr": torch.tensor([0.01])},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "of its own": own,
    }
    if cls is not efcp.MicroAdam:
        variants["momentum"] = {"momentum": 0.5, "weight_decay": 0.1}
        variants["max_update_norm"] = {"max_update_norm": 1.0}
    if is_sparse(cls):
        variants["kept in float32"] = {"value_dtype": torch.float32, "error_dtype": torch.bfloat16}
        variants["error in 8 bits"] = {"error_dtype": torch.int8}
        variants["error in 4 bits"] = {"error_dtype": torch.int4}
        variants["no error feedback"] = {"error_feedback": False}
    return [OptimizerInput(None, small(cls) | options, name) for name, options in variants.items()]


def _error_inputs(cls, device, dtype):
    wrong = [
        ({"lr": -1.0}, "lr must be a finite number ≥ 0, got -1.0"),
        ({"lr": torch.tensor([0.1, 0.1])}, "lr must have one element"),
        ({"window": 0}, "window must be an integer ≥ 1, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number ≥ 0, got -0.1"),
    ]
    if cls is efcp.MicroAdam:
        wrong += [({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)")]
    else:
        wrong += [({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0")]
    own = [ErrorOptimizerInput(OptimizerInput(None, k), error_type=ValueError, error_regex=m) for k, m in wrong]
    flags = [
        ErrorOptimizerInput(
            OptimizerInput(None, {flag: value}),
            error_type=TypeError,
            error_regex=f"got an unexpected keyword argument '{flag}'",
        )
        for flag in ("foreach", "fused", "capturable", "differentiable")
        for value in (True, False, None)
    ]
    generic = get_error_inputs_for_all_optims(device, dtype)
    for case in generic:
        if "duplicate parameters" in case.error_regex:  # PyTorch warns of what it will refuse; a window cannot hold it
            case.error_type, case.error_regex = ValueError, "params must not hold a parameter twice"
        if "1-element" in case.error_regex:
            case.error_regex = "lr must have one element"
    return [*generic, *own, *flags]


def _info(cls):
    return OptimizerInfo(
        cls,
        optim_inputs_func=lambda device, dtype=None: _inputs(cls),
        optim_error_inputs_func=lambda device, dtype: _error_inputs(cls, device, dtype),
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )


OPTIMIZERS = [_info(cls) for cls in CLASSES]
CASES = [
    pytest.param(info.optim_cls, case.kwargs, id=f"{info.name}-{case.desc.replace(' ', '-')}")
    for info in OPTIMIZERS
    for case in info.optim_inputs_func("cpu")
]
ERRORS = [
    pytest.param(info.optim_cls, case, id=f"{info.name}-{number}")
    for info in OPTIMIZERS
    for number, case in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]
assert all(param.values[1].error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR for param in ERRORS)
