"""Commands that are stopped, started again, or started twice: real processes on a data set of noise."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from efcp.analysis.summary import read_runs
from efcp.perf.command import LOCK
from tests.analysis.image_sets import write_image_set
from tests.analysis.test_paper import CONFIG

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")

DYING = "import os, sys\nif '--multiprocessing-fork' in sys.orig_argv:\n    os._exit(3)\n"
SECONDS = 300  # the longest that a test waits for something that takes a few
EXPERIMENT = CONFIG.replace("epochs = 1", "epochs = 10\ntrain_size = 200")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {SECONDS} s for {what}"
        time.sleep(0.05)


def workers(parent: int) -> set[int]:
    """The processes that a process has spawned to train in."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            own, line = state(int(folder.name)), (folder / "cmdline").read_bytes()
        except (OSError, ValueError):  # no process, or gone
            continue
        if own and own[1] == parent and b"spawn_main" in line:
            found.add(int(folder.name))
    return found


def state(process: int) -> tuple[str, int] | None:
    """State and parent of a process; None where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    own, parent = text.rpartition(")")[2].split()[:2]
    return own, int(parent)


def runs(processes: set[int]) -> set[int]:
    """Those of the processes that still run; a zombie, whose exit status nobody has read, does not."""
    return {process for process in processes if (own := state(process)) and own[0] not in "ZX"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_set(tmp_path_factory.mktemp("images"))


def tradeoff_arguments(images: Path, out: Path) -> list[str]:
    settings = "--data fashion-mnist --train-size 200 --epochs 10 --batch-size 20 --width 4 --window 4 --jobs 2"
    return ["efcp.analysis.tradeoff", *settings.split(), "--data-dir", str(images), "--out", str(out)]


def paper_arguments(images: Path, out: Path) -> list[str]:
    config = out.parent / f"{out.name}.toml"
    config.write_text(EXPERIMENT, encoding="utf-8")
    settings = ["--jobs", "2", "--data-dir", str(images), "--out", str(out.parent)]
    return ["efcp.analysis.paper", str(config), *settings]


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a command in a process group of its own, and kills it at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def begin(arguments: list[str]) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def training(process: subprocess.Popen[str], out: Path) -> set[int]:
    """The two workers of a command, once it has written a record."""
    wait_for(lambda: process.poll() is not None or (out / "runs.csv").exists(), "a record")
    assert process.poll() is None, process.communicate()[1]
    found = workers(process.pid)
    assert len(found) == 2
    return found


@pytest.mark.parametrize(
    ("arguments", "name", "send"),
    [
        pytest.param(tradeoff_arguments, "SIGTERM", os.kill, marks=pytest.mark.slow),
        pytest.param(paper_arguments, "SIGTERM", os.kill, marks=pytest.mark.slow),
        pytest.param(tradeoff_arguments, "SIGKILL", os.kill, marks=pytest.mark.slow),
        pytest.param(tradeoff_arguments, "SIGINT", os.killpg, marks=pytest.mark.slow),  # as Ctrl-C does
    ],
    ids=["tradeoff-SIGTERM", "paper-SIGTERM", "tradeoff-SIGKILL", "tradeoff-Ctrl-C"],
)
def test_no_worker_survives_its_command(
    images: Path,
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
    arguments: Callable[[Path, Path], list[str]],
    name: str,
    send: Callable[[int, int], None],
) -> None:
    out, number = tmp_path / "out", getattr(signal, name)
    process = start(arguments(images, out))
    found = training(process, out)
    finished = set(read_runs(out / "runs.csv")["run"])
    send(process.pid, number)
    _, errors = process.communicate(timeout=SECONDS)
    wait_for(lambda: not runs(found), "the end of the workers")
    assert finished <= set(read_runs(out / "runs.csv")["run"])
    if name == "SIGKILL":
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {name}: finished runs are in {tmp_path}" in errors
        assert "Traceback" not in errors
        assert not (out / LOCK).exists()


@pytest.mark.parametrize("arguments", [tradeoff_arguments, paper_arguments], ids=["tradeoff", "paper"])
def test_a_worker_that_dies_at_its_start_ends_the_command(
    images: Path, tmp_path: Path, arguments: Callable[[Path, Path], list[str]]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DYING, encoding="utf-8")
    (tmp_path / "out").mkdir()
    line = [sys.executable, "-m", *arguments(images, tmp_path / "out" / "trial")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 2
    assert "a worker process died" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_second_command_in_the_folder_is_refused_and_changes_nothing(
    images: Path, tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    first = start(tradeoff_arguments(images, out))
    found = training(first, out)
    second = start(tradeoff_arguments(images, out))
    _, errors = second.communicate(timeout=SECONDS)
    assert second.returncode == 2
    assert f"another command is writing into {out}" in errors
    assert first.poll() is None
    assert runs(found) == found
    assert not pd.read_csv(out / "runs.csv").empty
