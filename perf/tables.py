"""CSV files, and tables for people."""

from pathlib import Path

import pandas as pd

__all__ = ["markdown", "write_csv"]


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Writes a file that is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    frame.round(9).to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)


def markdown(frame: pd.DataFrame) -> str:
    """A table; numbers with three digits, empty where there is none."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    lines += [[text(value) for value in row] for row in frame.astype(object).itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
