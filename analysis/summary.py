"""From the CSV of runs to one row a method: the chosen learning rate, accuracy over seeds, memory, time.

A learning rate is chosen by validation accuracy of the tuning runs, and by nothing else.
"""

from pathlib import Path

import pandas as pd

from efcp.analysis.methods import LABELLED, method_label
from efcp.analysis.training import COLUMNS


def read_runs(path: Path) -> pd.DataFrame:
    """The runs of a CSV file, and the label of each one's method.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the experiment first")
    runs = pd.read_csv(path, float_precision="round_trip")
    if missing := [name for name in COLUMNS if name not in runs]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    options = runs[["method", *LABELLED]].astype(object)
    options = options.where(options.notna(), None)
    runs["label"] = [method_label(*row) for row in options.itertuples(index=False)]
    return runs


def choose_lrs(runs: pd.DataFrame) -> dict[str, float]:
    """The learning rate of each method, by label: best in mean validation accuracy over the seeds of the tuning runs.

    Of equally good ones the smallest.
    """
    tuning = runs[runs["phase"] == "tune"]
    means = tuning.groupby(["label", "lr"])["val_accuracy"].mean().reset_index()
    best = means.sort_values(["val_accuracy", "lr"], ascending=[False, True]).drop_duplicates("label")
    return {str(label): float(lr) for label, lr in zip(best["label"], best["lr"], strict=True)}


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a method, by label, in the order of the runs.

    Columns: method and the options that tell methods apart; lr and whether it is the smallest or largest that was tried
    (at_edge); val and test accuracy (test_mean and test_std over seeds, val_mean) in %; seeds; diverged, how many of
    the final runs; bytes_per_parameter and estimated_per_parameter; step_ms and optimizer_ms.

    Raises:
        ValueError: where the runs hold no final one at a chosen learning rate.
    """
    chosen = choose_lrs(runs)
    rows = []
    for label, own in runs.groupby("label", sort=False):
        lr = chosen.get(str(label))
        final = own[(own["phase"] == "final") & (own["lr"] == lr)]
        if final.empty:
            continue
        tried = own.loc[own["phase"] == "tune", "lr"]
        timing = own[own["phase"] == "timing"]
        first = final.iloc[0]
        rows.append(
            {
                "label": label,
                **{name: first[name] for name in ("method", *LABELLED, "bytes_per_parameter")},
                "estimated_per_parameter": first["state_bytes_estimated"] / first["numel"],
                "lr": lr,
                "at_edge": lr in (tried.min(), tried.max()),
                "val_mean": final["val_accuracy"].mean(),
                "test_mean": final["test_accuracy"].mean(),
                "test_std": final["test_accuracy"].std(),
                "seeds": len(final),
                "diverged": int(final["diverged"].eq(True).sum()),
                "step_ms": timing["step_ms"].mean(),
                "optimizer_ms": timing["optimizer_ms"].mean(),
            }
        )
    if not rows:
        raise ValueError("there is no final run at a chosen learning rate yet")
    return pd.DataFrame(rows).set_index("label")


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a table in Markdown, aligned for reading as plain text."""
    header = ("method", "test accuracy, %", "lr", "state, bytes/param", "estimated", "step, ms", "optimizer, ms")
    lines = [header, *(_cells(str(label), row) for label, row in summary.iterrows())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, tuple("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)))
    aligned = (
        (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def remarks(runs: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What the table does not say: settings, and whatever went wrong."""
    final = runs[runs["phase"] == "final"].iloc[0]
    tuning, seeds = runs[runs["phase"] == "tune"], sorted(summary["seeds"].unique())
    lrs = ", ".join(f"{lr:g}" for lr in sorted(tuning["lr"].unique()))
    lines = [
        f"{final['data_set']}, {final['train_size']:,} training images; {final['numel']:,.0f} parameters; "
        f"{final['epochs']} epochs, {final['steps']} steps of batch {final['batch_size']}; "
        f"window {runs['window'].max():g}, damping {runs['damping'].max():g}.",
        f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds. Each method's lr: the best of {lrs} on "
        f"the validation split ({tuning['seed'].nunique()} other seed(s)).",
        f"Steps timed on one thread, sparse windows by the {final['kernels']} kernels; torch {final['torch_version']}.",
    ]
    if diverged := int(tuning["diverged"].eq(True).sum()):
        lines.append(f"{diverged} of {len(tuning)} tuning runs diverged, and count with the accuracy that they had.")
    for label, row in summary.iterrows():
        if row["diverged"]:
            lines.append(f"{label}: {row['diverged']} of {row['seeds']} final runs diverged.")
        if row["at_edge"]:
            lines.append(f"{label}: the chosen lr {row['lr']:g} lies at the edge of the grid.")
    return lines


def _cells(label: str, row: pd.Series) -> tuple[str, ...]:
    def number(value: float, digits: int) -> str:
        return "" if pd.isna(value) else f"{value:.{digits}f}"

    spread = "" if pd.isna(row["test_std"]) else f" ± {row['test_std']:.2f}"
    return (
        label,
        f"{row['test_mean']:.2f}{spread}",
        f"{row['lr']:g}{' (edge)' if row['at_edge'] else ''}",
        number(row["bytes_per_parameter"], 2),
        number(row["estimated_per_parameter"], 2),
        number(row["step_ms"], 1),
        number(row["optimizer_ms"], 1),
    )
