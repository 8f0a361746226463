"""Runs functions in several processes that can talk to each other (gloo), and gives back what each returns.

Importing PyTorch costs seconds, so one process imports all and forks the ranks. It has not used threads before, which
would not survive that.
"""

import os
import pickle
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds


def run(functions, world, folder, *, kernels="reference", check=True):
    """Calls functions one after the other on each of `world` ranks.

    Args:
        functions: of a module of this folder, each taking rank, world and the folder; named by "module:function".
        world: the number of ranks.
        folder: an empty folder.
        kernels: the backend; compiled kernels would take longer to compile than all else takes.
        check: raise an AssertionError where a rank has failed.

    Returns:
        Of each rank a dict of what each function has returned; without `check` also tracebacks, as strings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.distributed.ranks", str(world), str(folder), *functions]
    environment = {**os.environ, "EFCP_KERNELS": kernels}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    results = []
    for rank in range(world):
        file = folder / f"{rank}.pickle"
        results.append(pickle.loads(file.read_bytes()) if file.exists() else {})
    if check:
        failed = [value for result in results for value in result.values() if isinstance(value, str)]
        said = "\n".join([*failed, done.stdout, done.stderr])
        assert not failed, said
        assert done.returncode == 0, said
    return results


def _work(rank, world, folder, functions):
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    results = {}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name in functions:
        module, _, function = name.partition(":")
        try:
            results[name] = getattr(import_module(f"tests.distributed.{module}"), function)(rank, world, folder)
        except BaseException:
            results[name] = traceback.format_exc()
            break  # ranks are no longer in step
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    return all(not isinstance(value, str) for value in results.values())


def main():
    world, folder, functions = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for name in functions:
        import_module(f"tests.distributed.{name.partition(':')[0]}")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                ok = _work(rank, world, folder, functions)
            except BaseException:
                traceback.print_exc()
                ok = False
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(not ok)
        children.append(child)
    deadline, failed = time.monotonic() + TIMEOUT - 20, 0
    while children and time.monotonic() < deadline:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                failed |= status
        time.sleep(0.005)
    for child in children:
        os.kill(child, 9)
    sys.exit(bool(failed or children))


if __name__ == "__main__":
    main()
