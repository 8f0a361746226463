"""CIFAR-10 (Krizhevsky, 2009) from the six files of its Python version: 45,000 training, 5,000 validation, 10,000 test.

A file is a pickled dictionary: `b"data"` holds (n, 3072) uint8, an image's red, green and blue planes of 32 × 32
pixels; `b"labels"` is a list of n integers in [0, 10). Validation images are cut from the training files; splits are
stratified and fixed. Nothing is downloaded.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efcp.analysis.data import CLASSES, DataSet, Split, first, named_folder, stratified_order

NAME = "cifar10"
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
_ALLOWED = {  # what arrays are pickled with
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # has since moved to another module
}


def load_cifar10(directory: Path | None = None, train_size: int | None = None) -> DataSet:
    """Images (n, 3, 32, 32) float32; each colour has mean 0 and standard deviation 1 over the training split.

    Args:
        directory: folder with the files, or with a subfolder `cifar-10-batches-py` of them; None for `$EFCP_DATA`.
        train_size: training images; None for 45,000.

    Raises:
        FileNotFoundError: where files are missing; it says which, and where they were looked for.
        ValueError: for a file of another format, or more training images than there are.
    """
    folder = find_cifar10(directory)
    batches = [read_batch(folder / name) for name in TRAIN_FILES]
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    order = stratified_order(labels)
    validation, rest = order[: len(order) // 10], order[len(order) // 10 :]
    train = first(rest, train_size, len(rest))
    pixels = images[train].float()
    std, mean = torch.std_mean(pixels, (0, 2, 3), correction=0, keepdim=True)  # (1, 3, 1, 1)

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split((images.float() - mean) / std.clamp_min(1e-6), labels)

    return DataSet(
        NAME,
        split(images[train], labels[train]),
        split(images[validation], labels[validation]),
        split(*read_batch(folder / TEST_FILE)),
    )


def find_cifar10(directory: Path | None = None) -> Path:
    """The folder with all six files.

    Raises:
        FileNotFoundError: if there is none.
    """
    named = named_folder(directory)
    if named is None:
        raise FileNotFoundError(f"name the folder with {FOLDER} by --data-dir or the environment variable EFCP_DATA")
    looked = []
    for folder in (named / FOLDER, named):
        missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]
        if not missing:
            return folder
        looked.append(f"  {folder}: missing {', '.join(missing)}")
    raise FileNotFoundError("CIFAR-10 (Python version) was not found. Looked in\n" + "\n".join(looked))


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one of the files. Code in the pickle is not run.

    Raises:
        ValueError: if the file is truncated, holds other things than arrays, lists, numbers and bytes, or other shapes.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        data, labels = content[b"data"], torch.tensor(content[b"labels"])
    except Exception as error:  # a corrupted pickle can raise any
        raise ValueError(f"{path} is not a batch of CIFAR-10: {type(error).__name__}: {error}") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{path}: data must be uint8 of shape ({len(labels)}, 3072), one row for each label")
    if labels.dtype != torch.int64 or labels.ndim != 1 or not ((labels >= 0) & (labels < CLASSES)).all():
        raise ValueError(f"{path}: labels must be integers in [0, {CLASSES})")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses whatever could run code: the only classes and functions that it knows are those that make arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
