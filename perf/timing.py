"""Measures how long a run takes on a device, and how much memory it allocates.

Before each run a tensor larger than the last cache is read (on a CPU) or overwritten (on a GPU), so that operands come
from memory. A CPU is timed by the wall clock. On a GPU, CUDA events are recorded around the run, as
`triton.testing.do_bench` does. A run that Python launches too slowly to fill the GPU can be replayed from a CUDA graph
(`as_graph`). This module needs nothing but PyTorch.
"""

import os
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timer"]

ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # of the tensors that are copied and read, and that flush the caches
MOST_RUNS = 100
LEAST_RUNS = 3
SLOW = 2

Call = Callable[[], Any]
"""What is timed."""


class Timer:
    """Times runs on a device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: for another type of device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type not in ELEMENTS:
            raise ValueError(f"device must be of type {' or '.join(ELEMENTS)}, got {device.type!r}")
        self.device = device
        self._source, self._copied = (torch.ones(ELEMENTS[device.type], device=device) for _ in range(2))

    @property
    def name(self) -> str:
        """The name of the clock."""
        return "CUDA events" if self.device.type == "cuda" else "wall clock"

    @property
    def transfers(self) -> dict[str, tuple[Call, int]]:
        """The runs that copy and read memory, each with the bytes that it moves."""
        size = self._source.nbytes
        return {"copy": (lambda: self._copied.copy_(self._source), 2 * size), "read": (self._source.sum, size)}

    def milliseconds(self, run: Call) -> float:
        """The milliseconds of one run with cold caches."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._copied.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
        self._source.sum()
        before = time.perf_counter()
        run()
        return (time.perf_counter() - before) * 1e3

    def in_turn(
        self, runs: Mapping[str, Call], seconds: Mapping[str, float], first: Mapping[str, float] | None = None
    ) -> dict[str, list[float]]:
        """The milliseconds of several runs, repeated in turn, so that all meet the same disturbances.

        Args:
            runs: by name; each has been run before.
            seconds: by name, about how long to repeat it.
            first: by name, milliseconds of that earlier run. If they exceed `SLOW` times `seconds`, they stand for all
                repetitions, and it is not run again.
        """
        slow = {name: t for name, t in (first or {}).items() if t > SLOW * seconds[name] * 1e3}
        times = {name: [slow[name]] if name in slow else [] for name in runs}
        spent = dict.fromkeys(runs, 0.0)

        def wanted(name: str) -> bool:
            some = len(times[name])
            return name not in slow and (some < LEAST_RUNS or (spent[name] < seconds[name] and some < MOST_RUNS))

        while waiting := [name for name in runs if wanted(name)]:
            for name in waiting:
                before = time.perf_counter()
                times[name].append(self.milliseconds(runs[name]))
                spent[name] += time.perf_counter() - before
        return times

    def temporary_bytes(self, run: Call) -> int:
        """The most bytes that PyTorch allocates during a run beyond those before it.

        Compiled kernels also have work spaces of their own, which do not grow with the model; these do not count.
        """
        if self.device.type != "cuda":
            return _profiled_bytes(run)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def as_graph(self, run: Call) -> Call | None:
        """Captures a run, which has been run before, in a CUDA graph and returns its replay; None on a CPU."""
        if self.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def _profiled_bytes(run: Call) -> int:
    """The greatest sum of the profiler's records, one for each allocation (positive) and each release (negative)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells of every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    recorded.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in recorded), initial=0))
