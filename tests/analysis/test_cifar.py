"""The loader of CIFAR-10, on small files pickled as Python 2 did it, which is how the data set comes."""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from efcp.analysis.cifar import FOLDER, TEST_FILE, TRAIN_FILES, load_cifar10, read_batch


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Protocol 2, with text and bytes both as byte strings."""

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {
        **pickle._Pickler.dispatch,  # type: ignore[attr-defined]
        str: save_string,
        bytes: save_string,
    }


def write_batch(path: Path, content: object) -> None:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def batch(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": "training batch 1 of 5",
        "labels": rng.permutation(np.arange(count) % 10).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"image_{i}.png" for i in range(count)],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of 40 images."""
    (tmp_path / FOLDER).mkdir()
    for seed, name in enumerate((*TRAIN_FILES, TEST_FILE)):
        content = batch(40, seed)
        content["data"][:, :1024] = 40 * seed + np.arange(40)[:, None]  # an image's place, as its red
        write_batch(tmp_path / FOLDER / name, content)
    return tmp_path


def test_batch(tmp_path: Path) -> None:
    content = batch(7)
    write_batch(tmp_path / "batch", content)
    images, labels = read_batch(tmp_path / "batch")
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (7, 3, 32, 32), torch.int64)
    assert labels.tolist() == content["labels"]
    assert images[5, 2, 31, 30] == content["data"][5, 2 * 1024 + 31 * 32 + 30], "channel, row, column"


BAD = {
    "too few labels": ({"labels": [1]}, r"uint8 of shape \(1, 3072\)"),
    "label 10": ({"labels": [0, 10]}, r"labels must be integers in \[0, 10\)"),
    "negative label": ({"labels": [0, -1]}, r"labels must be integers in \[0, 10\)"),
    "labels of floats": ({"labels": [0.0, 1.0]}, "labels must be integers"),
    "floats": ({"data": np.zeros((2, 3072))}, "data must be uint8"),
    "other size": ({"data": np.zeros((2, 784), np.uint8)}, "data must be uint8"),
    "no array": ({"data": [1, 2]}, "data must be uint8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_named(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    write_batch(tmp_path / "batch", batch(2) | change)
    with pytest.raises(ValueError, match=message):
        read_batch(tmp_path / "batch")


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", b"\x80\x02}.", b"\x80\x02K\x01."],
    ids=["empty", "text", "empty dictionary", "number"],
)
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"other is not a batch of CIFAR-10"):
        read_batch(tmp_path / "other")


def test_truncated_file_is_named(folder: Path) -> None:
    path = folder / FOLDER / TEST_FILE
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is not a batch of CIFAR-10"):
        read_batch(path)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch", batch(2) | {"filenames": Malicious(tmp_path / "mark")})
    with pytest.raises(ValueError, match=r"eval is not allowed"):
        read_batch(tmp_path / "batch")
    assert not (tmp_path / "mark").exists()


def test_splits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFCP_DATA", str(folder))
    data = load_cifar10()
    assert data.train.inputs.shape == (180, 3, 32, 32)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.labels.bincount().tolist() == [18] * 10
    assert data.validation.labels.bincount().tolist() == [2] * 10
    std, mean = torch.std_mean(data.train.inputs, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones(3))
    # Every training image is in one split, with its label.
    reds = torch.cat([split.inputs[:, 0, 0, 0] for split in (data.train, data.validation)])
    labels = torch.cat([split.labels for split in (data.train, data.validation)])
    assert len(reds.unique()) == 200
    assert labels[reds.argsort()].equal(torch.cat([read_batch(folder / FOLDER / name)[1] for name in TRAIN_FILES]))
    # The test file is the test split, in its order.
    test_images, test_labels = read_batch(folder / FOLDER / TEST_FILE)
    assert data.test.labels.equal(test_labels)
    green = data.test.inputs[:, 1].flatten()
    assert np.corrcoef(green, test_images[:, 1].flatten())[0, 1] == pytest.approx(1, abs=1e-6)


def test_smaller_training_split_is_a_prefix(folder: Path) -> None:
    small, large = load_cifar10(folder, train_size=30), load_cifar10(folder / FOLDER)
    assert small.train.labels.equal(large.train.labels[:30])
    assert small.validation.labels.equal(large.validation.labels)
    with pytest.raises(ValueError, match=r"training size must lie in \[1, 180\], got 181"):
        load_cifar10(folder, train_size=181)


def test_missing_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / FOLDER / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{FOLDER}: missing data_batch_3\n"):
        load_cifar10(folder)
    monkeypatch.delenv("EFCP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="EFCP_DATA"):
        load_cifar10()
