"""Writes a file with a state of each optimizer into v<VERSION>/ beside it: `python tests/contract/states/write.py`.

To be run once when `efcp.checkpoint.VERSION` has grown, with the code that writes that version, and never again: the
files say what earlier versions wrote and how they went on. Those of version 0 were written by this script with the code
of that time. `test_checkpoints.py` loads them all. Each holds

    options      of the optimizer; dtypes by their names
    parameters   when the state was saved
    optimizer    its state_dict()
    gradients    of the steps that followed
    expected     the parameters after these
"""

import copy
from pathlib import Path

import torch
from torch import nn

import efcp
from efcp import checkpoint

SHAPES = ((6, 9), (9,), (3, 9), ())
STEPS, FURTHER = 7, 5  # past a window of 4
OPTIONS = {
    "SparseMFAC": {"density": 0.25, "block_size": 16, "momentum": 0.9, "damping": 0.1, "error_dtype": "bfloat16"},
    "DenseMFAC": {"weight_decay": 0.1, "max_update_norm": 1.0, "damping": 0.1},
    "LowRankMFAC": {"rank": 2, "momentum": 0.5, "damping": 0.1, "error_dtype": "bfloat16"},
    "SparseGGT": {"density": 0.25, "block_size": 16, "beta1": 0.5, "eps": 1e-3, "value_dtype": "float32"},
    "DenseGGT": {"beta2": 0.9, "refresh_every": 2, "eps": 1e-3},
    "MFACW": {"rank": 2, "weight_decay": 0.1},
    "KroneckerW": {"rank": 2, "refresh_every": 2},
    "MicroAdam": {"density": 0.25, "block_size": 16, "weight_decay": 0.1, "correction": "step"},
    "LowRankGGT": {"rank": 2, "power_iterations": 2, "beta1": 0.5, "beta2": 0.9, "refresh_every": 2, "eps": 1e-3},
}


def with_dtypes(options):
    return {name: getattr(torch, value) if name.endswith("dtype") else value for name, value in options.items()}


def go_on(optimizer, params, gradients):
    """Takes steps along gradients."""
    for grads in gradients:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()


def write(name, options, folder):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS + FURTHER)]
    options = {"lr": 0.05, "window": 4, **options}
    optimizer = getattr(efcp, name)(params, **with_dtypes(options))
    go_on(optimizer, params, gradients[:STEPS])
    file = {
        "options": options,
        "parameters": [p.detach().clone() for p in params],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "gradients": gradients[STEPS:],
    }
    go_on(optimizer, params, file["gradients"])
    torch.save({**file, "expected": [p.detach() for p in params]}, folder / f"{name}.pt")


if __name__ == "__main__":
    folder = Path(__file__).parent / f"v{getattr(checkpoint, 'VERSION', 0)}"
    folder.mkdir()
    for name, options in OPTIONS.items():
        write(name, options, folder)
