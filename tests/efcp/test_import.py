"""`import efcp` finds its folders from the root of a clone, whatever is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

import efcp

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # as without an editable install
import efcp, efcp.kernels, efcp.perf, efcp.analysis
print(efcp.kernels.__file__)
"""


@pytest.mark.skipif(not (ROOT / "efcp").samefile(Path(efcp.__file__).parent), reason="an installed package is tested")
def test_a_script_beside_the_folder_of_the_package_finds_the_folders_beside_it(tmp_path):
    """A wheel's `efcp` is hidden by the clone's, in which kernels/ is not inside."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
