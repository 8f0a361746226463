"""Source code of Python's own library as text: bytes, cut into sequences, with files held out.

Every Python installation has it. Files are put in a fixed order by a hash of their names; the last twentieth of them is
for the test, the twentieth before for validation. Which text that is depends on the version of Python, so results are
comparable within one version only.
"""

import sysconfig
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from efcp.analysis.data import DataSet, Split, first

NAME = "python-library"
LENGTH = 64
"""Bytes of a sequence."""
HELD_OUT = 1000
"""Sequences for validation, and for the test."""


def load_source(train_size: int | None = None, folder: Path | None = None) -> DataSet:
    """Sequences of 64 bytes (n, 64) int64; the labels are the bytes that follow each, (n, 64) int64.

    Args:
        train_size: training sequences; None for 20,000.
        folder: with .py files; None for Python's library.

    Raises:
        FileNotFoundError: if there are too few files.
        ValueError: for more training sequences than there are.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts)]
    files.sort(key=lambda path: sha256(path.relative_to(folder).as_posix().encode()).digest())
    if len(files) < 20:
        raise FileNotFoundError(f"{folder} must hold at least 20 .py files, got {len(files)}")
    twentieth = len(files) // 20
    groups = files[: -2 * twentieth], files[-2 * twentieth : -twentieth], files[-twentieth:]
    train, validation, test = (_sequences(group) for group in groups)
    chosen = first(torch.arange(len(train)), train_size, 20_000)
    return DataSet(NAME, *(_split(some) for some in (train[chosen], validation[:HELD_OUT], test[:HELD_OUT])))


def _sequences(files: list[Path]) -> Tensor:
    """The bytes of files, one after the other, as sequences in a fixed random order: (n, 65) uint8."""
    text = b"\n".join(path.read_bytes() for path in files)
    count = len(text) // (LENGTH + 1)
    whole = torch.frombuffer(bytearray(text[: count * (LENGTH + 1)]), dtype=torch.uint8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(20240613))
    return whole.view(count, LENGTH + 1)[order]


def _split(sequences: Tensor) -> Split:
    whole = sequences.long()
    return Split(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())
