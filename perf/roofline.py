"""Compares times with the bytes that have to be moved, and predicts times on GPUs that have not been measured.

The operations do next to no arithmetic for each byte, so their roof is the bandwidth of memory. The floors are those
of `Case.floors`: every tensor is read or written once.

The prediction combines the reports on the compiled kernels (compile-report.csv, traffic.csv) with the datasheets of the
GPUs. An operation of a step takes the largest of three times, plus its launches:

| time | formula |
|---|---|
| memory | floor × times floor as counted by gpusim (traffic.csv, sm_90, random windows) / bandwidth reached |
| in flight | the same bytes / (bytes in flight of a multiprocessor × multiprocessors / latency) |
| instructions | instructions for each element × elements / (lanes × multiprocessors × clock) |

Assumptions: a kernel reaches `REACHED` of the datasheet's bandwidth. Memory answers in `LATENCY`. Each warp scheduler
issues one instruction in each cycle. Instructions are those of the main loop with all branches taken; a kernel without
one counts its static instructions, each loop once. A launch costs `LAUNCH`, as in a CUDA graph. The m × m algebra of a
step launches one small kernel for each PyTorch operation in it (counted). Where there is no report for sm_80, that for
sm_90 stands in. None of this has been checked against a GPU: see GPU.md.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efcp import SparseMFAC, kernels
from efcp.kernels.gpus import PRODUCTS, Product
from efcp.perf.problems import Case
from efcp.perf.tables import read_measured, timed
from efcp.preconditioners import mfac

__all__ = ["predict", "small_launches", "standing"]

REACHED = 0.9  # of the datasheet's bandwidth; copies on an H100 reach 3.0 of 3.35 TB/s
LATENCY = 800e-9  # seconds, of memory under load
LAUNCH = 2.5e-6  # seconds
OPERATIONS = ("compress_", "window_dots", "window_apply_")
REPORTED = "B=4096 1% fp32/fp32/bf16 m=256"  # the case whose configurations are looked up
ADAM_TENSORS = 7


def standing(bench: pd.DataFrame) -> pd.DataFrame:
    """Compares each time with the least that the measured bandwidth allows.

    Returns:
        Columns: operation, implementation, d, m, B, density, dtype, bytes, p50_ms, floor_ms = bytes / bandwidth, and
        times floor = p50_ms / floor_ms.
    """
    rows = timed(bench)
    floor = rows["bytes"] / rows["bandwidth GB/s"] / 1e6
    kept = rows[["operation", "implementation", "d", "m", "B", "density", "dtype", "bytes", "p50_ms"]]
    return kept.assign(**{"floor_ms": floor, "times floor": rows["p50_ms"] / floor})


@cache
def small_launches() -> int:
    """The number of small kernels that a step of SparseMFAC launches on a GPU, besides those on windows.

    It counts PyTorch operations on a CPU, where the host reads no values either, and M-FAC's algebra as one kernel.
    """
    calls = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            # views and scalars launch nothing
            calls += not function.is_view and "_local_scalar" not in str(function)
            return function(*args, **(kwargs or {}))

    param = torch.nn.Parameter(torch.zeros(4096))
    param.grad = torch.ones(4096)
    optimizer = SparseMFAC([param], window=8)
    optimizer.step()
    fused, algebra = (patch.object(kernels, name) for name in ("is_fused", "mfac_row_step_"))
    with fused, algebra, patch.object(mfac, "is_on_cpu", lambda _: False), Counting():
        optimizer.step()
    return calls + 1


def predict(results: Path, d: int, window: int = 256) -> pd.DataFrame:
    """Predicted ms of a step, by GPU and density.

    Args:
        results: folder of compile-report.csv and traffic.csv.
        d: elements of one float32 parameter, a multiple of 4096.
        window: m, as counted in traffic.csv.

    Returns:
        Columns: gpu, density, d, m, operation ("step" is their sum, "Adam" what its bytes take), bytes, memory_ms,
        in_flight_ms, instructions_ms, predicted_ms, limit, report (the target that it is of), how ("prediction").

    Raises:
        FileNotFoundError: where there are no reports.
        ValueError: where nothing was counted for this window, or a kernel is missing.
    """
    compiled, traffic = (read_measured(results / name) for name in ("compile-report.csv", "traffic.csv"))
    counted = traffic[(traffic["launch"] == "all") & (traffic["m"] == window)]
    if counted.empty:
        raise ValueError(f"window must be one of traffic.csv, {sorted(set(traffic['m']))}, got {window}")
    rows = []
    for name, gpu in PRODUCTS.items():
        reported = set(compiled["target"])
        target = next((t for t in gpu.targets if t in reported), None)
        if target is None:
            continue
        kernels = compiled[compiled["target"] == target]
        for density in sorted(set(counted["density"])):
            case = Case(d, window, density)
            parts = [_operation(operation, case, gpu, kernels, traffic) for operation in OPERATIONS]
            launches = small_launches() * LAUNCH * 1e3
            parts.append({"operation": "algebra", "predicted_ms": launches, "limit": "launches"})
            parts.append({"operation": "step", "predicted_ms": sum(part["predicted_ms"] for part in parts)})
            adam = ADAM_TENSORS * 4 * d
            milliseconds = adam / (REACHED * gpu.bandwidth) * 1e3
            parts.append({"operation": "Adam", "bytes": adam, "predicted_ms": milliseconds, "limit": "memory"})
            where = {"gpu": name, "density": density, "d": d, "m": window, "report": target, "how": "prediction"}
            rows += [{**where, **part} for part in parts]
    if not rows:
        targets = sorted({target for gpu in PRODUCTS.values() for target in gpu.targets})
        raise ValueError(f"compile-report.csv must have a target of {', '.join(targets)}, got none of these")
    return pd.DataFrame(rows)


def _operation(
    operation: str, case: Case, gpu: Product, kernels: pd.DataFrame, traffic: pd.DataFrame
) -> dict[str, Any]:
    moved = case.floors[operation] * _times_floor(operation, case, traffic)
    reported = kernels["case"] == REPORTED
    with_momentum = kernels["configuration"].str.contains("MOMENTUM", na=False)
    own = kernels[(kernels["operation"] == operation) & reported & ~with_momentum]
    columns = ["kernel", "configuration", "warps", "KB in flight", "instructions"]
    if own.empty or own[columns].isna().any(axis=None):
        raise ValueError(f"compile-report.csv must have {operation} for {REPORTED}, as compile_report --quick makes it")
    lanes = 64 if gpu.targets[0].startswith("gfx") else 32
    in_flight = own["KB in flight"].max() * 1024 * gpu.multiprocessors / LATENCY  # of the kernel that streams
    instructions = 0.0
    for kernel in own.to_dict("records"):
        elements = case.entries if operation.startswith("window") else case.numel
        if kernel["kernel"] == "_spread_kernel":
            elements //= case.window  # the newest row alone
        each = kernel["an element"]
        if pd.isna(each):
            size = re.search(r"\bSIZE=(\d+)", kernel["configuration"])
            if size is None:
                raise ValueError(f"compile-report.csv must have the SIZE of {kernel['kernel']}")
            each = kernel["instructions"] / (int(size[1]) / (kernel["warps"] * lanes))
        instructions += each * elements / (gpu.lanes * gpu.multiprocessors * gpu.clock)
    times = {
        "memory": moved / (REACHED * gpu.bandwidth) * 1e3,
        "in flight": moved / in_flight * 1e3,
        "instructions": instructions * 1e3,
    }
    limit = max(times, key=lambda name: times[name])
    each_limit = {f"{name.replace(' ', '_')}_ms": t for name, t in times.items()}
    total = times[limit] + len(own) * LAUNCH * 1e3
    return {"operation": operation, "bytes": int(moved), **each_limit, "predicted_ms": total, "limit": limit}


def _times_floor(operation: str, case: Case, traffic: pd.DataFrame) -> float:
    rows = traffic[(traffic["operation"] == operation) & (traffic["launch"] == "all")]
    rows = rows[(rows["density"] == case.density) & (rows["support"] != "trained")]
    rows = rows[rows["error"].isna() | (rows["error"] == "float32")]
    rows = rows[rows["m"].notna() & rows["times floor"].notna()]
    if rows.empty:
        raise ValueError(f"traffic.csv must have {operation} at a density of {case.density:g}")
    best = rows.loc[(rows["m"] - case.window).abs().idxmin()]  # `compress_` does not depend on m
    return float(best["times floor"])
