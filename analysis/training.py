"""One run: a method trains a network from a seed, and one record comes out. Runs know nothing of each other.

The seed decides initialisation and order of batches, both the same for all methods. The learning rate falls linearly to
0. A run computes on one thread, so that its record depends neither on the number of cores nor on other runs.
"""

import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import efcp
from efcp import memory_report
from efcp.analysis.data import DataSet, Split
from efcp.analysis.methods import Method
from efcp.analysis.models import small_cnn
from efcp.kernels import backend_name

COLUMNS = {
    "phase": "tune: for the choice of lr; final: at the chosen lr; timing: of steps, one method after the other",
    "method": "its name",
    "density": "share of entries kept",
    "error_feedback": "whether what was not kept is added to the next gradient",
    "rank": "of low-rank rows",
    "power_iterations": "of each step, for low-rank rows",
    "window": "gradients kept",
    "damping": "of M-FAC",
    "lr": "learning rate at the first step; it falls linearly to 0",
    "seed": "of initialisation and order of batches",
    "epochs": "",
    "batch_size": "",
    "width": "of the network",
    "data_set": "",
    "train_size": "images",
    "steps": "taken; fewer than planned in a run that diverged",
    "diverged": "whether the training loss became infinite or NaN, where training stops",
    "train_loss": "mean over the last epoch",
    "val_accuracy": "%",
    "test_accuracy": "%, of final runs only",
    "numel": "parameters of the network",
    "state_bytes": "of the live optimizer's state, measured",
    "state_bytes_estimated": "by efcp.estimate_memory, of windowed methods",
    "bytes_per_parameter": "state_bytes / numel",
    "step_ms": "median over steps of forward, backward and optimizer, of timing only",
    "optimizer_ms": "median over steps of the optimizer's part, of timing only",
    "seconds": "of the run's training, beside other runs",
    "kernels": "backend of the sparse window's operations",
    "torch_version": "",
    "efcp_version": "",
    "git_commit": "of the source",
}
"""The columns of a record, with units; empty where they do not apply."""

PLAN = ("phase", "method", "density", "error_feedback", "rank", "power_iterations", "window", "damping", "lr", "seed")
TASK = ("epochs", "batch_size", "width", "data_set", "train_size")


@dataclass(frozen=True)
class Task:
    """What is trained on what, for how long."""

    data_set: str
    image_size: tuple[int, int]
    train_size: int
    width: int
    epochs: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Of a run. Batches are full: what remains of an epoch is left out."""
        return self.epochs * (self.train_size // self.batch_size)

    def model(self, seed: int) -> nn.Module:
        """The network as initialised from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return small_cnn(self.width, self.image_size)


@dataclass(frozen=True)
class Run:
    """A method at a learning rate on a task, from a seed, in a phase of the experiment."""

    phase: str
    task: Task
    method: Method
    lr: float
    seed: int

    @property
    def plan(self) -> dict[str, Any]:
        """The columns of the record that are known beforehand."""
        own = {"phase": self.phase, "method": self.method.name, "lr": self.lr, "seed": self.seed}
        return {
            **{name: own.get(name, self.method.options.get(name)) for name in PLAN},
            **{name: getattr(self.task, name) for name in TASK},
        }


def train(run: Run, data: DataSet) -> dict[str, Any]:
    """Trains, evaluates, measures: the record of a run. Only final runs look at the test split.

    A run whose loss becomes infinite or NaN stops there, and counts with the accuracy that the network then has.
    """
    task = run.task
    with single_thread():
        model = task.model(run.seed)
        optimizer = run.method.build(model, run.lr)
        losses, diverged = [], False
        start = time.perf_counter()
        for step, (images, labels) in enumerate(batches(data.train, task, run.seed)):
            for group in optimizer.param_groups:
                group["lr"] = run.lr * (1 - step / task.steps)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            losses.append(loss.item())
            if diverged := not math.isfinite(losses[-1]):
                break
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        last_epoch = losses[-(task.steps // task.epochs) :]
        measured, estimated = memory_report(optimizer), run.method.estimate(model)
        return {
            **run.plan,
            "steps": len(losses),
            "diverged": diverged,
            "train_loss": sum(last_epoch) / len(last_epoch),
            "val_accuracy": accuracy(model, data.validation),
            "test_accuracy": accuracy(model, data.test) if run.phase == "final" else None,
            "numel": measured.numel,
            "state_bytes": measured.total,
            "state_bytes_estimated": estimated.total if estimated else None,
            "bytes_per_parameter": measured.per_parameter,
            "seconds": round(seconds, 3),
            **_versions(),
        }


def time_steps(run: Run, data: DataSet, steps: int = 40, warm_up: int = 10) -> dict[str, Any]:
    """The record of a run of a few steps, timed: medians in ms."""
    task = run.task
    images, labels = data.train.images[: task.batch_size], data.train.labels[: task.batch_size]
    whole, own = [], []
    with single_thread():
        model = task.model(run.seed)
        optimizer = run.method.build(model, run.lr)
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            whole.append(end - start)
            own.append(end - middle)
    return {
        **run.plan,
        "steps": steps,
        "step_ms": round(1e3 * torch.tensor(whole[warm_up:]).median().item(), 3),
        "optimizer_ms": round(1e3 * torch.tensor(own[warm_up:]).median().item(), 3),
        **_versions(),
    }


def batches(train: Split, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (batch_size, 1, height, width) and labels (batch_size,) of every step; a new order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        order = torch.randperm(task.train_size, generator=generator)
        for batch in order.split(task.batch_size)[: task.train_size // task.batch_size]:
            yield train.images[batch], train.labels[batch]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Of a network on a split, in %. An image with an infinite or NaN logit counts as wrong."""
    right = 0
    for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True):
        logits = model(images)
        right += int(((logits.argmax(1) == labels) & logits.isfinite().all(1)).sum())
    return 100 * right / len(split.labels)


@contextmanager
def single_thread() -> Iterator[None]:
    """Within the context, PyTorch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def _versions() -> dict[str, str]:
    return {
        "kernels": backend_name(torch.device("cpu")),
        "torch_version": torch.__version__,
        "efcp_version": efcp.__version__,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    """Of the folder of this file, "-dirty" where it has been changed since; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
