"""Whether something has become slower: `python -m efcp.perf.compare old.csv new.csv`, of two runs of `efcp.perf.bench`.

Rows with the same operation, implementation and case are compared. Slower is what took more by more than the noise:
its p20 lies above the old p80, in milliseconds and, because machines have fast and slow hours, also in units of the
bandwidth that was measured beside it. What had a time and has none any more, or is missing, is flagged as well.

The exit status is 1 if anything of our own is flagged, 0 otherwise, and 2 for files that cannot be compared.
"""

if __name__ == "__main__":  # before the imports, of which one may fail
    from efcp.perf.command import run

    run("efcp.perf.compare")

import argparse
from pathlib import Path

import pandas as pd

from efcp.perf.implementations import OURS

__all__ = ["compare", "main"]

KEY = ["operation", "implementation", "device", "dtype", "d", "m", "B", "density"]
USED = [*KEY, "status", "p20_ms", "p50_ms", "p80_ms", "bandwidth GB/s", "machine", "threads"]


def compare(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """A row for every row of the old run.

    Args:
        old, new: bench.csv of two runs.

    Returns:
        The key, the old and new p50 in ms, ratio = new / old, ratio of bandwidth = the same with times in units of what
        a copy or a read took, and verdict: "slower", "faster", "lost" (no time any more) or "".
    """
    both = old[USED].merge(new[USED], on=KEY, how="left", suffixes=("", " new"))
    own, other = both["bandwidth GB/s"], both["bandwidth GB/s new"]
    ratio = both["p50_ms new"] / both["p50_ms"]
    slower = both["p20_ms new"] > both["p80_ms"]
    slower &= both["p20_ms new"] * other > both["p80_ms"] * own
    faster = both["p80_ms new"] < both["p20_ms"]
    faster &= both["p80_ms new"] * other < both["p20_ms"] * own
    lost = (both["status"] == "ok") & (both["status new"] != "ok")
    verdict = pd.Series("", index=both.index).mask(faster, "faster").mask(slower, "slower").mask(lost, "lost")
    return both[KEY].assign(
        old_ms=both["p50_ms"],
        new_ms=both["p50_ms new"],
        ratio=ratio,
        ratio_of_bandwidth=ratio * other / own,
        verdict=verdict,
    )


def _read(path: str) -> pd.DataFrame:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    frame = pd.read_csv(path)
    if missing := [column for column in USED if column not in frame]:
        raise ValueError(f"{path} must be a bench.csv, but has no column {', '.join(missing)}")
    return frame


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="efcp.perf.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="bench.csv of the run before")
    parser.add_argument("new", help="bench.csv of the run to judge")
    parser.add_argument("--all", action="store_true", help="show also what has stayed the same, and others' rows")
    options = parser.parse_args(arguments)
    try:
        old, new = _read(options.old), _read(options.new)
    except ValueError as error:
        parser.error(str(error))
    for column in ("machine", "threads"):
        if set(old[column]) != set(new[column]):
            print(f"not the same {column}: {sorted(set(old[column]))} and {sorted(set(new[column]))}")
    table = compare(old, new)
    ours = table["implementation"].str.startswith(OURS)
    shown = table if options.all else table[ours & (table["verdict"] != "")]
    if not shown.empty:
        print(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    flagged = table[ours & table["verdict"].isin(("slower", "lost"))]
    print(f"{len(flagged)} of {int(ours.sum())} of our measurements fell by more than the noise")
    return int(not flagged.empty)
