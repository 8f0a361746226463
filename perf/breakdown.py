"""Measures where the time of a SparseMFAC step goes, and what each phase would take by its bytes alone.

The phases are compress (`compress_` and `undo_compress_`), dots, apply, algebra (the Gram matrix and M-FAC's weights)
and Python (the rest of the step). On a GPU the first four are times between CUDA events, including the gaps in which
the GPU waits for Python. Python is then the rest of a step by the host's clock, which stops when the GPU has finished.

A row of breakdown.csv is one phase of one model: quantiles over steps in ms. The phase `step` is the whole step. The
floor of a phase is the time in which a copy, measured just before, moves the bytes that the phase has to move: each
tensor read or written once. Algebra and Python have none.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from efcp import MFAC, SparseMFAC, kernels
from efcp.gram import Gram
from efcp.perf import models
from efcp.perf.tables import write_csv
from efcp.perf.timing import Timer

__all__ = ["PHASES", "floors", "measure", "phases_of_steps"]

PHASES = ("compress", "dots", "algebra", "apply", "Python")
COLUMNS = [
    *("model", "d", "parameters", "device", "m", "density", "error", "threads", "status", "phase"),
    *("p20_ms", "p50_ms", "p80_ms", "steps", "floor_ms"),
]
MEASURED: tuple[tuple[str, int, torch.dtype], ...] = (  # model, window, dtype of the error
    ("CNN, 95k", 256, torch.float32),
    ("small transformer, 4.3M", 256, torch.float32),
    ("ResNet-18, 11.7M", 256, torch.float32),
    ("one vector, 4.2M", 32, torch.int8),
    ("one vector, 16.8M", 32, torch.int8),
)
DENSITY = 0.01
COPIES = 7  # of which the median is the speed of memory
TIMED: tuple[tuple[Any, str, str], ...] = (  # owner, name, phase
    (kernels, "compress_", "compress"),
    (kernels, "undo_compress_", "compress"),
    (kernels, "window_dots", "dots"),
    (kernels, "window_apply_", "apply"),
    (Gram, "replace", "algebra"),
    (MFAC, "step_along_row", "algebra"),
    (MFAC, "weights", "algebra"),
)


class Stopwatch:
    """Adds up the times of calls by phase: between CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*arguments, **options)
            self._spans.append((phase, start, self._now()))
            return result

        return call

    def milliseconds(self) -> dict[str, float]:
        """The milliseconds of each phase since this method was last called."""
        total: dict[str, float] = defaultdict(float)
        for phase, start, end in self._spans:
            total[phase] += start.elapsed_time(end) if self.cuda else (end - start) * 1e3
        self._spans.clear()
        return total

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def watched(device: torch.device) -> Iterator[Stopwatch]:
    """Within the context, the functions of `TIMED` are timed in every step."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        for owner, name, phase in TIMED:
            stack.enter_context(patch.object(owner, name, _unbound(watch.timed(getattr(owner, name), phase))))
        yield watch


def _unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a callable in a plain function, which becomes a method when it is put into a class."""
    return lambda *arguments, **options: function(*arguments, **options)


def phases_of_steps(optimizer: SparseMFAC, steps: int, device: torch.device) -> pd.DataFrame:
    """The milliseconds of every phase and of the whole `step`, with a row for each step."""
    rows = []
    with watched(device) as watch:
        for _ in range(steps):
            if watch.cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            optimizer.step()
            if watch.cuda:
                torch.cuda.synchronize(device)
            step = (time.perf_counter() - start) * 1e3
            phases = watch.milliseconds()
            rows.append({**phases, "Python": max(0.0, step - sum(phases.values())), "step": step})
    return pd.DataFrame(rows, columns=[*PHASES, "step"])


def floors(optimizer: SparseMFAC) -> dict[str, int]:
    """The fewest bytes that the phases of a step have to move: everything is read or written once."""
    sizes: dict[str, int] = defaultdict(int)
    for param, state in optimizer.state.items():
        assert param.grad is not None
        sizes["grad"] += param.grad.nbytes
        sizes["param"] += param.nbytes
        sizes["window"] += state["values"].nbytes + state["indices"].nbytes
        sizes["row"] += (state["values"].nbytes + state["indices"].nbytes) // state["values"].shape[1]
        sizes["error"] += sum(state[name].nbytes for name in ("error", "error_codes", "error_scales") if name in state)
    parts = {
        "compress": sizes["grad"] + 2 * sizes["error"] + sizes["row"],
        "dots": sizes["window"],
        "apply": sizes["window"] + 2 * sizes["param"],
    }
    return {**parts, "step": sum(parts.values())}


def full_optimizer(
    shapes: models.Shapes, device: torch.device, window: int, error_dtype: torch.dtype = torch.float32
) -> SparseMFAC:
    """An optimizer with a full window, after `window` steps with random gradients of norm 1 over all parameters.

    The gradients are the same in each step. The rows still differ, since error feedback brings up other entries.
    """
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = SparseMFAC(params, 1e-3, window=window, density=DENSITY, damping=1e-2, error_dtype=error_dtype)
    length = sum(param.numel() for param in params) ** 0.5
    for param in params:
        param.grad = torch.randn_like(param) / length
    for _ in range(window):
        optimizer.step()
    return optimizer


def measure(device: torch.device, path: Path, steps: int) -> pd.DataFrame:
    """Measures the models of `MEASURED`; writes breakdown.csv and returns its rows."""
    rows: list[dict[str, Any]] = []
    timer = Timer(device)
    copy, copied_bytes = timer.transfers["copy"]
    for name, window, error_dtype in tqdm(MEASURED, desc="breakdown", unit="model"):
        shapes = models.MODELS[name]()
        known = {"model": name, "device": device.type, "m": window, "error": str(error_dtype).removeprefix("torch.")}
        try:
            optimizer = full_optimizer(shapes, device, window, error_dtype)
            phases_of_steps(optimizer, 2, device)  # warm-up
            byte_ms = float(np.median([timer.milliseconds(copy) for _ in range(COPIES)])) / copied_bytes
            frame = phases_of_steps(optimizer, steps, device)
        except Exception as error:
            rows.append({**known, "status": f"{type(error).__name__}: {error}"})
            continue
        least = floors(optimizer)
        for phase in frame:
            p20, p50, p80 = np.quantile(frame[phase], (0.2, 0.5, 0.8))
            rows.append(
                {
                    **known,
                    **{"d": models.numel(shapes), "parameters": len(shapes), "density": DENSITY},
                    **{"threads": torch.get_num_threads(), "status": "ok"},
                    **{"phase": phase, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "steps": steps},
                    "floor_ms": least[phase] * byte_ms if phase in least else None,
                }
            )
    frame = pd.DataFrame(rows, columns=COLUMNS)
    write_csv(frame, path)
    return frame
