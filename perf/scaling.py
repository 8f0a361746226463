"""How time and memory grow with the parameter's size d, the window m and the density: exponents of fitted power laws.

For each quantity y and each varied x, log y = a + b log x is fitted by least squares over all x. The others are held at
the values with the most measurements. `exponent at the end` is the slope between the two largest x, where fixed costs
matter least. Times are those of a step; memory is the estimate of `efcp.estimate_memory` for one float32 parameter.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

import efcp
from efcp.perf.tables import timed

__all__ = ["AXES", "exponents", "memory_curve", "series"]

AXES = ("d", "m", "density")
CONSTANT = ["d", "m", "density", "B", "dtype"]
SIZES = tuple(int(10**exponent) for exponent in (5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9))
WINDOWS = (16, 32, 64, 128, 256, 512, 1024, 2048)
DENSITIES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def series(frame: pd.DataFrame, operation: str, axis: str) -> pd.DataFrame:
    """The measurements of an operation along one axis, with all other columns of CONSTANT equal.

    Of all such lines it is the one with the most values of the axis, and then the most rows.

    Args:
        frame: bench.csv.
        axis: a column of CONSTANT.

    Returns:
        The rows with a time, sorted by that column; none where it has one value only.
    """
    rows = timed(frame[frame["operation"] == operation])
    others = [column for column in CONSTANT if column != axis]
    lines = [(group[axis].nunique(), len(group), group) for _, group in rows.groupby(others, sort=True)]
    if not lines:
        return rows
    most, _, line = max(lines, key=lambda item: item[:2])
    return line.sort_values(axis) if most > 1 else rows.iloc[:0]


def memory_curve(axis: str) -> pd.DataFrame:
    """Estimated bytes of SparseMFAC's state along an axis; the others are d = 16.8M, m = 256 and density 1%.

    Returns:
        Columns: the axis, bytes.
    """

    def total(d: int = 1 << 24, m: int = 256, density: float = 0.01) -> int:
        return efcp.estimate_memory(d, efcp.SparseMFAC, window=m, density=density).total

    of: dict[str, tuple[tuple[float, ...], Callable[[float], int]]] = {
        "d": (SIZES, lambda x: total(d=int(x))),
        "m": (WINDOWS, lambda x: total(m=int(x))),
        "density": (DENSITIES, lambda x: total(density=x)),
    }
    values, function = of[axis]
    return pd.DataFrame({axis: values, "bytes": [function(x) for x in values]})


def exponents(bench: pd.DataFrame) -> pd.DataFrame:
    """Fits the exponents of time and memory along each axis.

    Args:
        bench: bench.csv.

    Returns:
        Columns: quantity, implementation, along, from, to, points, exponent, exponent at the end, how.
    """
    rows = []
    for axis in AXES:
        line = series(bench, "step", axis)
        for name, own in line.groupby("implementation", sort=False):
            fit = _fit(own[axis], own["p50_ms"])
            rows.append({"quantity": "time of a step", "implementation": name, "along": axis, **fit, "how": "measured"})
        curve = memory_curve(axis)
        fit = _fit(curve[axis], curve["bytes"])
        rows.append({"quantity": "bytes of state", "implementation": "efcp", "along": axis, **fit, "how": "estimate"})
    columns = ["quantity", "implementation", "along", "from", "to", "points", "exponent", "exponent at the end", "how"]
    return pd.DataFrame(rows, columns=columns)


def _fit(x: pd.Series, y: pd.Series) -> dict[str, float]:
    lx, ly = np.log(x.to_numpy(float)), np.log(y.to_numpy(float))
    if len(set(lx)) < 2:
        return {"from": x.min(), "to": x.max(), "points": len(x)}
    slope = float(np.polyfit(lx, ly, 1)[0])
    last = float((ly[-1] - ly[-2]) / (lx[-1] - lx[-2]))
    return {"from": x.min(), "to": x.max(), "points": len(x), "exponent": slope, "exponent at the end": last}
