"""Data sets of noise, and invented results, for tests of everything around training."""

import math
import random

import torch

from efcp.analysis.data import DataSet, Split
from efcp.analysis.training import Result, Run

PARAMETERS = 10_000


def noise(shape: tuple[int, ...], classes: int = 10, tokens: bool = False, count: int = 64) -> DataSet:
    """A data set of normal numbers, or of tokens, with random labels."""
    generator = torch.Generator().manual_seed(0)

    def split() -> Split:
        numbers = torch.randn(count, *shape, generator=generator)
        inputs = torch.randint(1, 1000, (count, *shape), generator=generator) if tokens else numbers
        return Split(inputs, torch.randint(0, classes, (count,), generator=generator))

    return DataSet("noise", split(), split(), split())


def invented(run: Run, data: DataSet) -> Result:
    """A result as a function of the run: accuracy falls with sparsity, and is best at some lr and damping."""
    noise = random.Random(run.key).gauss(0, 0.15)
    options = run.method.columns
    density = options["density"] or (0.05 if options["rank"] else 1.0)
    loss = 0.4 * math.log10(density) ** 2 * (1 if options["error_feedback"] is not False else 3)
    off = math.log10(run.lr / 0.03) ** 2 + 0.2 * math.log10((options["damping"] or 1e-3) / 1e-3) ** 2
    accuracy = round(90 - loss - 5 * off + noise, 2)
    window = options["window"]
    scaling = 30 / (1 + 300 * (options["damping"] or 0)) if window else 1.0
    size = 4 * window * density + 4 if window else 8.0
    record = {
        **run.settings,
        "steps": run.steps,
        "diverged": False,
        "train_loss": 0.3,
        "val_loss": 0.4,
        "val_accuracy": accuracy,
        "test_accuracy": accuracy - 0.5 if run.tested else None,
        "objective": "0.51" if run.task.l2 else None,
        "cosine": 0.5,
        **{f"scaling_q{q}": scaling * q / 50 for q in (25, 50, 75)},
        "error_ratio": 0.01,
        "numel": PARAMETERS,
        "state_bytes": round(size * PARAMETERS),
        "matrix_bytes": 16 * window**2 if window else None,
        "state_bytes_estimated": round(size * PARAMETERS) if window else None,
        "bytes_per_parameter": size,
        "seconds": 1.0,
        "cpu_seconds": 1.0 + density,
        "kernels": "cpu",
        "torch_version": torch.__version__,
        "efcp_version": "0",
        "git_commit": "0",
    }
    steps = [round(run.steps * (i + 1) / 5) for i in range(5)] if run.tested else []
    curve = [
        {
            "run": run.key,
            "step": step,
            "epoch": step / run.steps_of_epoch,
            "cpu_seconds": step * (1.0 + density) / run.steps,
            "train_loss": 1 / step,
            "val_loss": 1 / step,
            "val_accuracy": accuracy - 10 * (1 - step / run.steps),
            "objective": f"{0.5 + 1 / step:.12g}" if run.task.l2 else None,
        }
        for step in steps
    ]
    seen = [
        {
            "run": run.key,
            "step": step,
            "cosine": 0.5 - 0.1 * i,
            **{f"scaling_q{q}": scaling * q / 50 * (1 + i) for q in (25, 50, 75)},
            "error_ratio": 0.1 / step if options["error_feedback"] else None,
        }
        for i, step in enumerate(steps)
    ]
    return Result(record, curve, seen)
