"""`import efcp` finds its folders, installed and from the root of a clone, whatever is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import efcp

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # as without an editable install
import importlib.util, torch, efcp
assert all(importlib.util.find_spec(f"efcp.{name}") for name in ("perf.bench", "analysis.paper"))
p = torch.nn.Parameter(torch.ones(300))
optimizer = efcp.DenseMFAC([p], lr=0.1, window=4)
p.grad = torch.ones(300)
optimizer.step()
assert (p < 1).all()
print(efcp.kernels.__file__)
"""


def kernels_of(folder, **environment):
    """The file of `efcp.kernels` for a script that is run in a folder."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=variables, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel holds, built over what an earlier release has left."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("build")
    for name in ("efcp", "efcp/kernels", "kernels"):
        (folder / "lib" / name).mkdir(parents=True)
        (folder / "lib" / name / "of_an_earlier_release.py").touch()
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


@pytest.mark.skipif(not (ROOT / "efcp").samefile(Path(efcp.__file__).parent), reason="an installed package is tested")
def test_a_script_beside_the_folder_of_the_package_finds_the_folders_beside_it(installed):
    """A wheel's `efcp` is hidden by the clone's, in which kernels/ is not inside."""
    assert kernels_of(ROOT, PYTHONPATH=installed) == ROOT / "kernels" / "__init__.py"


@pytest.mark.slow
def test_a_script_elsewhere_finds_the_folders_inside_the_installed_package(installed, tmp_path):
    assert kernels_of(tmp_path, PYTHONPATH=installed) == installed / "efcp" / "kernels" / "__init__.py"


def test_a_wheel_holds_the_modules_of_the_clone_and_no_others(installed):
    built = {path.relative_to(installed) for path in installed.rglob("*.py")}
    here = {path.relative_to(ROOT) for path in (ROOT / "efcp").rglob("*.py")}
    for name in ("kernels", "perf", "analysis"):
        here |= {"efcp" / path.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
    assert built == here
