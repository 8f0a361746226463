"""One run: a method trains a network from a seed, and one record comes out. Runs know nothing of each other.

The seed decides initialisation and order of batches, both the same for all methods. The learning rate falls to 0,
after a warm-up where the task has one. A run computes on one thread, so that its record depends neither on the number
of cores nor on other runs.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import efcp
from efcp import EFCP, MemoryReport, memory_report
from efcp.analysis.data import DataSet, Split
from efcp.analysis.methods import TUNED, VARIANT, Method
from efcp.analysis.tasks import EVALUATED, Task
from efcp.gram import allocate_gram
from efcp.kernels import backend_name
from efcp.perf.source import commit

COLUMNS = {
    "phase": "tune: for the choice of lr and of what else is tuned; map: more of the plane of lr and damping; final: "
    "at the chosen point; rule: at the point that a rule gives; timing: of steps, methods in turn",
    "method": "its name",
    "density": "share of entries kept",
    "error_feedback": "whether what was not kept is added to the next gradient",
    "rank": "of low-rank rows",
    "power_iterations": "of each step, for low-rank rows",
    "window": "gradients kept",
    "block_size": "entries among which the largest are kept",
    "value_dtype": "of the rows of the window",
    "error_dtype": "of the error; that of the parameters where empty",
    "damping": "of M-FAC",
    "eps": "of GGT, Adam, AdamW and Adagrad; PyTorch's default where empty",
    "weight_decay": "decoupled; 0 where empty, but PyTorch's default for AdamW",
    "lr": "the largest learning rate",
    "seed": "of initialisation and order of batches",
    "run": "names the run in curves.csv and diagnostics.csv",
    "network": "",
    "data_set": "",
    "train_size": "examples",
    "epochs": "",
    "batch_size": "",
    "width": "of an image network",
    "layers": "of MiniLM",
    "l2": "weight of ‖θ‖²/2 in the loss",
    "warm_up": "share of the steps",
    "decay": "of the learning rate, after the warm-up",
    "steps": "taken; fewer than planned in a run that diverged",
    "diverged": "whether the training loss became infinite or NaN, where training stops",
    "train_loss": "mean over the last epoch",
    "val_loss": "mean loss; of a PINN the relative error of its solution",
    "val_accuracy": "%",
    "test_accuracy": "%, of phases final and rule only",
    "test_loss": "the same over the test split, of phases final and rule only, of tasks without classes",
    "objective": "loss over the whole training split, of convex tasks",
    "grad_norm": "‖g‖, median over the steps that were looked at",
    "cosine": "cos(g, u), the same",
    "scaling_q25": "quantile of |u/g| over entries with g ≠ 0, the same",
    "scaling_q50": "",
    "scaling_q75": "",
    "error_ratio": "‖e‖ over the sum of all ‖g‖ so far, at the last step that was looked at",
    "numel": "trained parameters of the network",
    "state_bytes": "of the live optimizer's state, measured",
    "matrix_bytes": "of these, what does not grow with the network: m × m matrices, of windowed methods",
    "state_bytes_estimated": "by efcp.estimate_memory, of windowed methods",
    "bytes_per_parameter": "state_bytes / numel",
    "step_ms": "median over steps of the CPU time of forward, backward and optimizer, of timing only",
    "optimizer_ms": "median over steps of the optimizer's part, of timing only",
    "seconds": "of the run's training, beside other runs",
    "cpu_seconds": "that the run's process computed meanwhile: on one thread, and undisturbed by what else runs",
    "kernels": "backend of the sparse window's operations",
    "torch_version": "",
    "efcp_version": "",
    "git_commit": "of the source",
}
"""The columns of a record, with units; empty where they do not apply."""

CURVE_COLUMNS = ("run", "step", "epoch", "cpu_seconds", "train_loss", "val_loss", "val_accuracy", "objective")
"""The columns of a point of a learning curve; train_loss is the mean since the point before. See `COLUMNS`."""
DIAGNOSTICS_COLUMNS = ("run", "step", "grad_norm", "cosine", "scaling_q25", "scaling_q50", "scaling_q75", "error_ratio")
"""The columns of the diagnostics of a step. See `COLUMNS`."""

SETTINGS = ("phase", "method", *VARIANT, *TUNED, "lr", "seed")
TASK = ("network", "data_set", "train_size", "epochs", "batch_size", "width", "layers", "l2", "warm_up", "decay")


@dataclass(frozen=True)
class Run:
    """A method at a learning rate on a task, from a seed, in a phase of the experiment."""

    phase: str
    task: Task
    method: Method
    lr: float
    seed: int

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The columns of the record that are known beforehand."""
        known = {
            "phase": self.phase,
            "method": self.method.name,
            "lr": self.lr,
            "seed": self.seed,
            **self.method.columns,
        }
        own = {name: known[name] for name in SETTINGS}
        task = {name: getattr(self.task, name) for name in TASK}
        key = "|".join(text(value) for value in own.values())
        return {**own, "run": hashlib.sha1(key.encode()).hexdigest()[:8], **task}

    @property
    def key(self) -> str:
        """The name of the record, in the column `run`."""
        return str(self.settings["run"])

    @property
    def steps(self) -> int:
        """The number of steps. Batches are full: what remains of an epoch is left out."""
        return self.task.epochs * self.steps_of_epoch

    @property
    def steps_of_epoch(self) -> int:
        return self.task.train_size // self.task.batch_size

    @property
    def tested(self) -> bool:
        """Is true for runs that may look at the test split: the final ones."""
        return self.phase == "final"


@dataclass
class Result:
    """The result of a run: a record and, for a final run, a learning curve and the diagnostics of single steps."""

    record: dict[str, Any]
    curve: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)


def train(run: Run, data: DataSet) -> Result:
    """Trains a network, evaluates it, and measures the optimizer.

    A run whose loss becomes infinite or NaN stops there, and counts with the accuracy that the network then has.
    """
    task, settings = run.task, run.settings
    evaluated = _spread(run.steps, task.evaluations if run.tested else 0)
    watched = {step - 1 - run.steps // (2 * task.diagnostics) for step in _spread(run.steps, task.diagnostics)}
    losses: list[float] = []
    curve: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    clock = _Clock()
    diverged, gradients = False, 0.0
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # for dropout
        model = task.model(run.seed)
        optimizer = run.method.build(model, run.lr)
        for step, (inputs, labels) in enumerate(batches(data.train, run)):
            with clock:
                _set_rate(optimizer, run.lr * task.factor(step, run.steps))
                closure = _Closure(optimizer, partial(task.loss, model, inputs, labels))
                losses.append(closure.first)
                if diverged := not math.isfinite(losses[-1]):
                    break
            if task.diagnostics:
                gradients += _grad_norm(optimizer)
            before = _flat(optimizer) if step in watched else None
            with clock:
                optimizer.step(closure)
            if before is not None:
                seen.append({"run": settings["run"], "step": step + 1, **_look(optimizer, before, gradients)})
            if step + 1 in evaluated:
                since = curve[-1]["step"] if curve else 0
                point = {"run": settings["run"], "step": step + 1, "epoch": round((step + 1) / run.steps_of_epoch, 3)}
                point |= {"cpu_seconds": round(clock.cpu, 3), "train_loss": _mean(losses[since:])}
                curve.append(point | _validation(task, model, data))
        measured, estimated = memory_report(optimizer), run.method.estimate(model)
        record = {
            **settings,
            "steps": len(losses),
            "diverged": diverged,
            "train_loss": _mean(losses[-run.steps_of_epoch :]),
            **(_ending(curve, run) or _validation(task, model, data)),
            "test_accuracy": accuracy(model, data.test) if run.tested and task.has_classes else None,
            "test_loss": error(task, model, data.test) if run.tested and not task.has_classes else None,
            **_summary(seen),
            "numel": measured.numel,
            "state_bytes": measured.total,
            "matrix_bytes": _matrix_bytes(optimizer, measured),
            "state_bytes_estimated": estimated.total if estimated else None,
            "bytes_per_parameter": measured.per_parameter,
            "seconds": round(clock.wall, 3),
            "cpu_seconds": round(clock.cpu, 3),
            **_versions(),
        }
    return Result(record, curve, seen if run.tested else [])


def time_steps(runs: Sequence[Run], data: DataSet, steps: int = 40, warm_up: int = 10) -> list[dict[str, Any]]:
    """Times a few steps of runs, which take them in turn; the records have medians of CPU time, in ms."""
    with single_thread():
        timed = [_Timed(run, data.train) for run in runs]
        for _ in range(warm_up + steps):
            for one in timed:
                one.step()
    return [{**one.run.settings, "steps": steps, **one.medians(warm_up), **_versions()} for one in timed]


class _Timed:
    """A run whose steps are timed, all on its first batch."""

    def __init__(self, run: Run, train: Split) -> None:
        size = run.task.batch_size
        self.run, self.batch, self.model = run, (train.inputs[:size], train.labels[:size]), run.task.model(run.seed)
        self.optimizer = run.method.build(self.model, run.lr)
        self.whole: list[float] = []
        self.own: list[float] = []
        self.evaluations: list[int] = []

    def step(self) -> None:
        start = time.process_time()
        closure = _Closure(self.optimizer, partial(self.run.task.loss, self.model, *self.batch))
        middle = time.process_time()
        self.optimizer.step(closure)
        end = time.process_time()
        self.whole.append(end - start)
        self.own.append(end - middle)
        self.evaluations.append(closure.evaluations)

    def medians(self, warm_up: int) -> dict[str, float]:
        each = [seconds / count for seconds, count in zip(self.whole, self.evaluations, strict=True)]
        times = {"step_ms": self.whole, "optimizer_ms": self.own, "evaluation_ms": each}
        return {name: round(1e3 * torch.tensor(some[warm_up:]).median().item(), 3) for name, some in times.items()}


def batches(train: Split, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (batch_size, ...) and labels (batch_size,) of every step; a new order in each epoch."""
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.task.epochs):
        order = torch.randperm(run.task.train_size, generator=generator)
        for batch in order.split(run.task.batch_size)[: run.steps_of_epoch]:
            yield train.inputs[batch], train.labels[batch]


def accuracy(model: nn.Module, split: Split) -> float:
    """The accuracy of a network on a split, in %. An example with an infinite or NaN logit counts as wrong."""
    logits = _logits(model, split)
    return 100 * ((logits.argmax(1) == split.labels) & logits.isfinite().all(1)).double().mean().item()


@contextmanager
def single_thread() -> Iterator[None]:
    """Within the context, PyTorch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def text(value: Any) -> str:
    """A value as it stands in a CSV file; empty for None. Floats are cut to seven digits; settings have fewer."""
    if value is None:
        return ""
    return repr(float(f"{value:.7g}")) if isinstance(value, float) else str(value)


class _Closure:
    """Computes loss and gradients, as optimizers ask for that evaluate more than once in a step.

    It computes them when it is made; the first call returns that loss.
    """

    def __init__(self, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
        self.optimizer, self.loss, self.called, self.evaluations = optimizer, loss, False, 0
        self.first = self._evaluate()

    def __call__(self) -> float:
        fresh, self.called = not self.called, True
        return self.first if fresh else self._evaluate()

    def _evaluate(self) -> float:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
        self.evaluations += 1
        return loss.item()


def _set_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups, unless they keep theirs."""
    for group in optimizer.param_groups:
        if group.get("keeps_lr"):
            continue
        if isinstance(group["lr"], Tensor):  # which compiled steps have taken in
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class _Clock:
    """A context that adds up the seconds spent in it, of wall time and of the process's CPU time."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def _spread(steps: int, count: int) -> set[int]:
    """Numbers of `count` steps, counted from 1, that are evenly spaced and end with the last."""
    return {round(steps * (i + 1) / count) for i in range(count)} - {0}


@torch.no_grad()
def _logits(model: nn.Module, split: Split) -> Tensor:
    """The logits of a network in evaluation mode, (n, classes)."""
    was_training = model.training
    model.eval()
    logits = torch.cat([model(inputs) for inputs in split.inputs.split(EVALUATED)])
    model.train(was_training)
    return logits


def error(task: Task, model: nn.Module, split: Split) -> float:
    """`Task.error` of a network in evaluation mode."""
    was_training = model.training
    model.eval()
    found = task.error(model, split)
    model.train(was_training)
    return found


def _validation(task: Task, model: nn.Module, data: DataSet) -> dict[str, Any]:
    if not task.has_classes:
        return {"val_loss": error(task, model, data.validation), "val_accuracy": None, "objective": None}
    logits, labels = _logits(model, data.validation), data.validation.labels
    right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": 100 * right.double().mean().item(),
        "objective": f"{objective(task, model, data.train):.12g}" if task.l2 else None,
    }


def _ending(curve: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    """The validation results after the last step, if the curve has them; otherwise empty."""
    if not curve or curve[-1]["step"] < run.steps:
        return {}
    return {name: curve[-1][name] for name in ("val_loss", "val_accuracy", "objective")}


@torch.no_grad()
def objective(task: Task, model: nn.Module, train: Split) -> float:
    """The loss over the whole training split, in float64."""
    exact = task.model(0).double()
    exact.load_state_dict(model.state_dict())
    return task.loss(exact, train.inputs.double(), train.labels).item()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _flat(optimizer: Optimizer) -> Tensor:
    """All parameters as a vector, (d,) float32."""
    return torch.cat([p.flatten() for p in _params(optimizer)])


@torch.no_grad()
def _grad_norm(optimizer: Optimizer) -> float:
    grads = [p.grad for p in _params(optimizer) if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()


@torch.no_grad()
def _look(optimizer: Optimizer, before: Tensor, gradients: float) -> dict[str, float | None]:
    """The diagnostics of a step, by column. The update is the change of the parameters, divided by −lr.

    Args:
        optimizer: after the step.
        before: (d,), its parameters before the step.
        gradients: the sum of the norms of all gradients up to this one.
    """
    update = (before - _flat(optimizer)) / optimizer.param_groups[0]["lr"]
    grad = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in _params(optimizer)]
    )
    cosine = F.cosine_similarity(grad.double(), update.double(), dim=0).item()
    error = None
    if isinstance(optimizer, EFCP):
        known = optimizer.diagnostics(quantiles=True)
        quantiles = [known[f"scaling_q{q}"] for q in (25, 50, 75)]
        if any(state.keys() & {"error", "error_codes"} for state in optimizer.state.values()):
            error = (known["error_norm"] or 0.0) / max(gradients, 1e-30)
    else:
        ratios = (update / grad)[grad != 0].abs().sort().values
        quantiles = (
            [ratios[int(q * (len(ratios) - 1))].item() for q in (0.25, 0.5, 0.75)] if len(ratios) else [None] * 3
        )
    return {
        "grad_norm": torch.linalg.vector_norm(grad).item(),
        "cosine": cosine,
        **{f"scaling_q{q}": value for q, value in zip((25, 50, 75), quantiles, strict=True)},
        "error_ratio": error,
    }


def _summary(seen: list[dict[str, Any]]) -> dict[str, float | None]:
    """Summarises the diagnostics of a run's steps: medians, and the last ratio of the error."""

    def median(name: str) -> float | None:
        values = [row[name] for row in seen if row[name] is not None]
        return torch.tensor(values).median().item() if values else None

    names = ("grad_norm", "cosine", "scaling_q25", "scaling_q50", "scaling_q75")
    return {**{name: median(name) for name in names}, "error_ratio": seen[-1]["error_ratio"] if seen else None}


def _matrix_bytes(optimizer: Optimizer, measured: MemoryReport) -> int | None:
    """Bytes of a windowed method's state that do not grow with the network; None for other methods."""
    if not isinstance(optimizer, EFCP):
        return None
    window, device = optimizer.param_groups[0]["window"], torch.device("meta")
    names = {**allocate_gram(window, device), **optimizer.preconditioner.allocate(window, device)}
    return sum(measured.tensors.get(name, 0) for name in names)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@lru_cache
def _versions() -> dict[str, str]:
    return {
        "kernels": backend_name(torch.device("cpu")),
        "torch_version": torch.__version__,
        "efcp_version": efcp.__version__,
        "git_commit": commit(),
    }
