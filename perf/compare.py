"""Finds what has become slower between two runs of `efcp.perf.bench`.

    python -m efcp.perf.compare old.csv new.csv

Rows with the same operation, implementation and case are compared. A row is slower if the difference exceeds the noise:
its p20 lies above the old p80. This must hold in milliseconds, and also in units of the bandwidth measured beside the
row, since a whole machine can be faster or slower at times. A row that has lost its time, or is missing, is flagged as
well.

The exit status is 1 if a row of our own is flagged, 0 otherwise, and 2 for files that cannot be compared.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.compare")

import argparse
from pathlib import Path

import pandas as pd

from efcp.perf.command import ending
from efcp.perf.implementations import OURS
from efcp.perf.tables import read_measured, timed

__all__ = ["compare", "main"]

KEY = ["operation", "implementation", "device", "dtype", "d", "m", "B", "density"]
USED = [*KEY, "status", "p20_ms", "p50_ms", "p80_ms", "bandwidth GB/s"]


def compare(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Compares two runs, with a row for every row of the old one.

    Args:
        old, new: bench.csv of two runs.

    Returns:
        Columns: those of `KEY`; old_ms and new_ms, the medians; ratio = new_ms / old_ms; ratio_of_bandwidth, the same
        with each time multiplied by the bandwidth of its run; verdict: "slower", "faster", "lost" (no time any more)
        or "".
    """
    both = old[USED].merge(new[USED], on=KEY, how="left", suffixes=("", " new"))
    own, other = both["bandwidth GB/s"], both["bandwidth GB/s new"]
    ratio = both["p50_ms new"] / both["p50_ms"]
    slower = both["p20_ms new"] > both["p80_ms"]
    slower &= both["p20_ms new"] * other > both["p80_ms"] * own
    faster = both["p80_ms new"] < both["p20_ms"]
    faster &= both["p80_ms new"] * other < both["p20_ms"] * own
    quantiles = ["p20_ms", "p50_ms", "p80_ms"]
    had = (both["status"] == "ok") & both[quantiles].notna().all(axis=1)
    has = (both["status new"] == "ok") & both[[f"{name} new" for name in quantiles]].notna().all(axis=1)
    lost = had & ~has
    verdict = pd.Series("", index=both.index).mask(faster, "faster").mask(slower, "slower").mask(lost, "lost")
    return both[KEY].assign(
        old_ms=both["p50_ms"],
        new_ms=both["p50_ms new"],
        ratio=ratio,
        ratio_of_bandwidth=ratio * other / own,
        verdict=verdict,
    )


def _read(path: Path) -> pd.DataFrame:
    frame = read_measured(path, "bench.csv")
    if timed(frame).empty:
        raise ValueError(f"{path} holds no measurement with a time")
    return frame


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="efcp.perf.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="bench.csv of the run before")
    parser.add_argument("new", type=Path, help="bench.csv of the run to judge")
    parser.add_argument("--all", action="store_true", help="show also what has stayed the same, and others' rows")
    options = parser.parse_args(arguments)
    with ending(parser, "nothing has been compared"):
        old, new = _read(options.old), _read(options.new)
    for column in ("machine", "threads"):
        here, there = (sorted(frame[column].dropna().unique().tolist()) for frame in (old, new))
        if here != there:
            print(f"not the same {column}: {here} and {there}")
    table = compare(old, new)
    ours = table["implementation"].str.startswith(OURS)
    shown = table if options.all else table[ours & (table["verdict"] != "")]
    if not shown.empty:
        print(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    flagged = table[ours & table["verdict"].isin(("slower", "lost"))]
    print(f"{len(flagged)} of {int(ours.sum())} of our measurements fell by more than the noise")
    return int(not flagged.empty)
