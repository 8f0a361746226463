"""A made-up bench.csv, in which times grow with the bytes."""

import pandas as pd
import torch

from efcp.perf import bench
from efcp.perf.problems import Case
from efcp.perf.timing import Timer

SPEEDS = {  # GB/s
    "compress_": {"efcp": 8.0, "definition": 1.0, "torch.topk": 2.0, "published": 1.5},
    "window_dots": {"efcp": 9.0, "definition": 1.0, "torch.sparse": 3.0, "published": 2.0},
    "window_apply_": {"efcp": 7.0, "definition": 1.0, "torch.sparse": 4.0, "published": 2.0},
    "step": {"efcp": 6.0, "definition": 0.5, "published": 1.0, "Adam, fused": 50.0},
}
CASES = [
    *(Case(1 << 20, 64, density) for density in (0.001, 0.01, 0.05)),
    *(Case(d, 64, 0.01) for d in (1 << 18, 1 << 22)),
    *(Case(1 << 20, m, 0.01) for m in (16, 256)),
]


def bench_rows() -> pd.DataFrame:
    timer, rows = Timer(torch.device("cpu")), []
    for case in CASES:
        for operation, speeds in SPEEDS.items():
            for name, speed in speeds.items():
                size = case.floors[operation]
                ms = size / speed / 1e6
                row = bench._row(operation, name, case, timer, "ok")
                row |= {"p20_ms": 0.95 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "runs": 9, "bytes": size}
                row |= {"GB/s": speed, "bound": "copy", "bandwidth GB/s": 10.0, "of bandwidth": speed / 10}
                rows.append(row)
    return pd.DataFrame(rows, columns=bench.COLUMNS)
