"""The git commit of the source that a measurement was made with."""

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str:
    """The commit of this package's checkout, with "-dirty" if files have changed; "unknown" outside a checkout."""
    folder = str(Path(__file__).resolve().parent)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "__init__.py"):  # installed inside another project's checkout
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"
    except (OSError, subprocess.TimeoutExpired):  # no git
        return "unknown"
