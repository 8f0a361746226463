"""The one command for a GPU, rehearsed on a simulated one: all stages give rows, and it goes on where it stopped."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from efcp.perf.gpu.gpusim import why_unavailable

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from efcp.perf.gpu import measure

STAGES = ["tests", "checks", "operations", "steps", "autotune"]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "measured.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow  # two minutes, in which kernels are compiled for gpusim
def test_a_rehearsal_does_all_stages_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    measure.main(["--rehearse", "--out", str(tmp_path)])
    found = rows(tmp_path)
    assert list(dict.fromkeys(row["stage"] for row in found)) == STAGES
    assert found[0]["status"] == "skipped: no GPU"
    assert {row["status"] for row in found[1:]} == {"ok"}
    assert all(float(row["ms"]) > 0 for row in found if row["stage"] in ("operations", "steps", "autotune"))
    summary = (tmp_path / "summary.md").read_text()
    assert f"**0 wrong** of {len(found)}; 0 left to do" in summary
    assert "configurations.json" in {path.name for path in tmp_path.iterdir()}

    path = tmp_path / "measured.csv"
    text = path.read_text()
    kept = text.splitlines()[:-2]
    path.write_text("\n".join(kept) + "\n" + text.splitlines()[-2][:20])  # stopped within a line
    measure.main(["--rehearse", "--out", str(tmp_path)])
    again = rows(tmp_path)
    assert [(row["stage"], row["what"], row["case"]) for row in again] == [
        (row["stage"], row["what"], row["case"]) for row in found
    ]
    assert again[:-2] == found[:-2]


def test_a_wrong_result_and_a_failure_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.OPERATIONS["window_dots"]

    def wrong(problem, others):
        made = right(problem, others)
        return made | {measure.OURS: made[measure.DEFINITION]}

    def broken(problem, others):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(measure, "OPERATIONS", {"window_dots": wrong, "compress_": broken})
    monkeypatch.setattr(measure, "agree", lambda *_: False)
    monkeypatch.setattr(measure.Bench, "jobs", lambda self: (j for j in jobs(self) if j.stage == "checks"))
    measure.main(["--rehearse", "--out", str(tmp_path)])
    assert {(row["what"], row["status"]) for row in rows(tmp_path)} == {
        ("window_dots", "wrong"),
        ("compress_", "RuntimeError: no such luck"),
    }
    assert "**4 wrong** of 8" in (tmp_path / "summary.md").read_text()


jobs = measure.Bench.jobs


def test_without_time_nothing_is_measured_but_the_summary_says_so(tmp_path: Path) -> None:
    measure.main(["--rehearse", "--minutes", "0", "--out", str(tmp_path)])
    assert rows(tmp_path) == []
    assert "## Left to do" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is missing anyway")
def test_it_needs_nothing_but_pytorch_and_triton() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'pandas', 'matplotlib', 'tqdm', 'numba', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import efcp.perf.gpu.measure as measure\n"
        "assert measure.FULL.models\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
