"""Computes the least loss of a convex task, by L-BFGS on the whole training split in float64.

It is kept in `optimum.csv` of the experiment's folder, so that distances to it can be plotted from CSV files alone.
"""

import csv
from pathlib import Path

import pandas as pd
import torch

from efcp.analysis.data import DataSet
from efcp.analysis.tasks import Task
from efcp.analysis.training import text
from efcp.perf.tables import write_csv

FILE = "optimum.csv"
_SETTINGS = ("network", "data_set", "train_size", "l2")
_COLUMNS = (*_SETTINGS, "objective", "grad_norm", "lower_bound", "evaluations", "torch_version")
_TOLERANCE = 1e-6  # of the gradient's norm: with l2 = 1e-3 the loss is within 5e-10 of the least


def keep_optimum(task: Task, data: DataSet, folder: Path) -> None:
    """Computes the optimum and writes it, unless the file already holds that of the task."""
    path, settings = folder / FILE, {name: text(getattr(task, name)) for name in _SETTINGS}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            row = next(csv.DictReader(file), {})
        if all(row.get(name) == value for name, value in settings.items()):
            return
    row = settings | {name: text(value) for name, value in optimum(task, data).items()}
    write_csv(pd.DataFrame([row], columns=_COLUMNS), path)


def optimum(task: Task, data: DataSet) -> dict[str, float | int | str]:
    """Minimises the loss, and bounds how far the result may be from the least loss.

    Returns:
        objective, the least loss found; grad_norm, the norm of its gradient; evaluations of loss and gradient; and
        lower_bound, which no loss is below: an l2-strongly convex loss is at most ‖gradient‖²/(2·l2) above its least.

    Raises:
        RuntimeError: if the gradient does not become small.
    """
    model = task.model(0).double()
    inputs, labels = data.train.inputs.double(), data.train.labels
    params, evaluations = list(model.parameters()), 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        model.zero_grad()
        loss = task.loss(model, inputs, labels)
        loss.backward()
        return loss

    def grad_norm() -> float:
        return torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params if p.grad is not None])).item()

    optimizer = torch.optim.LBFGS(
        params, max_iter=20, history_size=50, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    for _ in range(500):
        optimizer.step(closure)
        loss = closure().item()
        if grad_norm() <= _TOLERANCE:
            break
    else:
        raise RuntimeError(
            f"L-BFGS has not converged: the gradient's norm is {grad_norm():.2g} after {evaluations} evaluations"
        )
    return {
        "objective": f"{loss:.15g}",
        "grad_norm": grad_norm(),
        "lower_bound": f"{loss - grad_norm() ** 2 / (2 * task.l2):.15g}",
        "evaluations": evaluations,
        "torch_version": torch.__version__,
    }
