"""Measures the memory of optimizers, each in a process of its own, beside the estimate of `efcp.estimate_memory`.

Columns of memory.csv:

| column | what |
|---|---|
| how | "measured"; "estimate", with nothing allocated; "formula", for optimizers that neither EFCP nor PyTorch has |
| state bytes | bytes of the tensors in the optimizer's state |
| estimated bytes | the estimate of the same |
| per parameter | state bytes for each element of the parameters |
| resident bytes | growth of the process (on a GPU: of the allocator) until all state has been written to |
| temporary bytes | the most that a step adds to that |
| peak bytes | peak of the process (the allocator), with parameters, gradients and, on a CPU, PyTorch itself |

The formula of the Shampoo-like optimizer: each matrix (first dimension × the others) is cut into blocks r × c of at
most 1024 × 1024. A block takes 4 · 2 (r² + c²) bytes for both statistics and their inverse roots, and each element 8
bytes for momentum and grafting. Optimizers of PyTorch are estimated by a step on meta tensors.

    python -m efcp.perf.memory '{"shapes": [[10, 4]], ...}'    # one measurement, in this process, as JSON
"""

import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import efcp
from efcp.perf import models
from efcp.perf.tables import write_csv

__all__ = ["Candidate", "largest_models", "measure", "measure_here", "shampoo_bytes"]

COLUMNS = [
    *("model", "d", "optimizer", "m", "density", "values", "error", "device", "how", "state bytes", "estimated bytes"),
    *("per parameter", "resident bytes", "temporary bytes", "peak bytes", "status"),
]
WINDOWS = (64, 256, 1024)
DENSITIES = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
SHAMPOO_BLOCK = 1024
SECONDS = 120  # for one measurement


@dataclass(frozen=True)
class Candidate:
    """An optimizer with its options, for a model."""

    model: str
    optimizer: str  # a class of efcp or torch.optim
    options: dict[str, Any] = field(default_factory=dict)  # dtypes by name

    @property
    def resolved(self) -> dict[str, Any]:
        return {k: getattr(torch, v) if k.endswith("_dtype") else v for k, v in self.options.items()}

    def build(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        owner = efcp if hasattr(efcp, self.optimizer) else torch.optim
        return getattr(owner, self.optimizer)(params, lr=1e-3, **self.resolved)

    def estimate(self, shapes: models.Shapes) -> int:
        """Bytes of the optimizer's state for parameters of these shapes; nothing is allocated."""
        params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        if hasattr(efcp, self.optimizer):
            return efcp.estimate_memory(params, getattr(efcp, self.optimizer), **self.resolved).total
        optimizer = self.build(params)
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        return efcp.memory_report(optimizer).total

    @property
    def row(self) -> dict[str, Any]:
        shapes, sparse = models.MODELS[self.model](), self.optimizer.startswith("Sparse")
        kept = {
            "values": self.options.get("value_dtype", "bfloat16"),
            "error": self.options.get("error_dtype", "float32"),
            "density": self.options.get("density"),
        }
        window = {"m": self.options.get("window")}
        return {
            **{"model": self.model, "d": models.numel(shapes), "optimizer": self.optimizer, "status": "ok"},
            **window,
            **(kept if sparse else {}),
        }


def candidates(quick: bool) -> Iterator[tuple[Candidate, bool]]:
    """Yields each candidate, and whether it is measured or only estimated."""
    resnet, bert, large = "ResNet-18, 11.7M", "BERT-base, 109M", "TinyLlama, 1.1B"
    measured = (
        {(64, 0.01)} if quick else {(64, 0.001), (64, 0.01), (64, 0.05), (1024, 0.001), (1024, 0.01), (1024, 0.05)}
    )
    for model in (resnet, bert, large):
        for window in WINDOWS:
            for density in DENSITIES:
                key = (window, density)
                here = key in measured if model == resnet else model == bert and key == (64, 0.01) and not quick
                yield Candidate(model, "SparseMFAC", {"window": window, "density": density}), here
        for dtypes in ({"error_dtype": "bfloat16"}, {"value_dtype": "float32"}):
            yield (
                Candidate(model, "SparseMFAC", {"window": 64, "density": 0.01, **dtypes}),
                model == resnet and not quick,
            )
        yield Candidate(model, "LowRankMFAC", {"window": 64}), model == resnet and not quick
        yield Candidate(model, "DenseMFAC", {"window": 64}), model == resnet and not quick
        yield Candidate(model, "DenseMFAC", {"window": 1024}), False
        yield Candidate(model, "Adam"), model == resnet or (model == bert and not quick)
        yield Candidate(model, "SGD", {"momentum": 0.9}), model == resnet and not quick


def shampoo_bytes(shapes: models.Shapes) -> int:
    """Bytes of state of a Shampoo-like optimizer, by the formula at the head of this file."""

    def pieces(length: int) -> list[int]:
        whole, rest = divmod(length, SHAMPOO_BLOCK)
        return [SHAMPOO_BLOCK] * whole + ([rest] if rest else [])

    total = 0
    for shape in shapes:
        total += 8 * math.prod(shape)
        if len(shape) > 1:
            rows, columns = pieces(shape[0]), pieces(math.prod(shape[1:]))
            total += 8 * sum(r**2 + c**2 for r in rows for c in columns)
    return total


def measure_here(candidate: Candidate, device: torch.device) -> dict[str, int | None]:
    """State, resident, temporary and peak bytes of an optimizer, in this process, which should be fresh."""
    warm_up = [torch.nn.Parameter(torch.zeros(1 << 17, device=device))]  # for what libraries allocate once
    shapes = models.MODELS[candidate.model]()
    for params in (warm_up, [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]):
        optimizer = candidate.build(params)
        for param in params:
            param.grad = torch.ones_like(param)
            param.data.add_(1)  # so that its pages are resident
        before = _now(device)
        optimizer.step()
        for state in optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor):
                    tensor.add_(0)
        after = _now(device)
        peak_before = _peak(device)
        step_from = _reset_peak(device)
        optimizer.step()
        peak = _peak(device)
    return {
        "state bytes": efcp.memory_report(optimizer).total,
        "resident bytes": after - before,
        "temporary bytes": None if step_from is None else max(0, peak - step_from),
        "peak bytes": max(peak_before, peak),
    }


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; on systems without it, the peak of the process stands for every line."""
    file = Path("/proc/self/status")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS:")


def _reset_peak(device: torch.device) -> int | None:
    """Resets the peak to the memory in use now, and returns it; None where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
    except OSError:
        return None
    return _status("VmRSS:")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM:")


def measured(candidate: Candidate, device: torch.device) -> dict[str, Any]:
    """The result of `measure_here` in a process of its own, or a status that says what went wrong."""
    request = json.dumps({"candidate": asdict(candidate), "device": device.type})
    command = [sys.executable, "-m", "efcp.perf.memory", request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": f"took more than {SECONDS} s"}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
        return {"status": f"failed: {last[0]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(device: torch.device, path: Path, quick: bool) -> pd.DataFrame:
    """Measures or estimates all candidates; writes memory.csv and returns its rows."""
    rows: list[dict[str, Any]] = []
    for candidate, here in tqdm(list(candidates(quick)), desc="memory", unit="case"):
        estimated = candidate.estimate(models.MODELS[candidate.model]())
        row = {**candidate.row, "how": "estimate", "state bytes": estimated, "estimated bytes": estimated}
        if here:
            row |= {"how": "measured", "device": device.type, "state bytes": None, **measured(candidate, device)}
        rows.append(row)
    for model in dict.fromkeys(row["model"] for row in rows):
        shapes = models.MODELS[model]()
        row = {"model": model, "d": models.numel(shapes), "optimizer": "Shampoo-like", "how": "formula", "status": "ok"}
        rows.append({**row, "state bytes": shampoo_bytes(shapes)})
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["per parameter"] = frame["state bytes"].astype(float) / frame["d"]
    write_csv(frame, path)
    return frame


GIB = 1 << 30
FITTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "sparse M-FAC, m=64, 1%": ("SparseMFAC", {"window": 64, "density": 0.01}),
    "sparse M-FAC, m=64, 1%, bf16 error": ("SparseMFAC", {"window": 64, "density": 0.01, "error_dtype": "bfloat16"}),
    "sparse M-FAC, m=1024, 1%": ("SparseMFAC", {"window": 1024, "density": 0.01}),
    "dense M-FAC, m=64": ("DenseMFAC", {"window": 64}),
    "dense M-FAC, m=1024": ("DenseMFAC", {"window": 1024}),
}


def largest_models(memories: tuple[int, ...] = (16, 24, 40, 80, 141)) -> pd.DataFrame:
    """Estimates how many float32 parameters fit with gradients and the optimizer's state, without activations.

    Args:
        memories: sizes of memory in GiB.

    Returns:
        Rows: optimizer, memory GiB, largest d (of one vector of d elements), how.
    """
    rows = []
    for name, (optimizer, options) in FITTED.items():
        candidate = Candidate("", optimizer, options)
        for memory in memories:
            low, high = 1, memory * GIB // 8  # parameter and gradient alone
            while high - low > 1000:
                middle = (low + high) // 2
                fits = 8 * middle + candidate.estimate([(middle,)]) <= memory * GIB
                low, high = (middle, high) if fits else (low, middle)
            rows.append({"optimizer": name, "memory GiB": memory, "largest d": low, "how": "estimate"})
    return pd.DataFrame(rows)


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(measure_here(Candidate(**request["candidate"]), torch.device(request["device"]))))


if __name__ == "__main__":
    main()
