"""What pyproject.toml cannot say: a wheel holds no modules that an earlier build has left in build/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
    def run(self) -> None:
        base = Path(self.get_finalized_command("build").build_base).resolve()
        lib = Path(self.build_lib).resolve()
        if base in lib.parents:  # not a folder of somebody's own
            shutil.rmtree(lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": CleanBuild})
