"""Small image sets in the format of Fashion-MNIST, written by the tests."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efcp.analysis.data import FASHION_FILES


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Writes an array as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_image_set(folder: Path, train: int = 480, test: int = 100, size: int = 8, shuffle_test: bool = False) -> Path:
    """Writes noisy images of ten patterns, in equal shares, which a network learns within an epoch or two.

    Args:
        folder: made if need be.
        train, test: numbers of images; one in twelve of the training images is for validation.
        size: height and width.
        shuffle_test: put the labels of the test images in random order.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 160, (10, size, size))
    for split, count in (("train", train), ("test", test)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        images = (patterns[labels] + rng.integers(0, 96, (count, size, size))).astype(np.uint8)
        if split == "test" and shuffle_test:
            labels = np.random.default_rng(1).permutation(labels)
        write_idx(folder / FASHION_FILES[f"{split} images"], images)
        write_idx(folder / FASHION_FILES[f"{split} labels"], labels)
    return folder
