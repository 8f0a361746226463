"""The counts of traffic, for kernels whose traffic is known, and the windows that it is counted with."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from efcp.perf.gpu.gpusim import why_unavailable

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from efcp.kernels import Blocks, SparseRows
from efcp.perf.gpu import traffic
from efcp.perf.gpu.traffic import Window, count, overlap, random_window

SIZE = 256


@triton.jit
def _copy_kernel(x, y, factor, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    position = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + position, tl.load(x + position * STRIDE) * tl.load(factor))


@triton.jit
def _table_kernel(table, SIZE: tl.constexpr):
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.atomic_add(x + tl.arange(0, SIZE), 1.0)


def test_counts_launches_and_their_sum():
    x, y, factor = torch.ones(4 * SIZE), torch.zeros(4 * SIZE), torch.ones(1)

    def run():
        _copy_kernel[(4,)](x, y, factor, STRIDE=1, SIZE=SIZE, num_warps=1)
        _copy_kernel[(1,)](x, y, factor, STRIDE=4, SIZE=SIZE, num_warps=1)

    frame = count(90, run, [], 8 * 4 * SIZE)
    one = 32  # for the factor, a sector a program
    assert list(frame["launch"]) == ["_copy_kernel", "_copy_kernel", "all"]
    assert list(frame["bytes loaded"]) == [4 * (4 * SIZE + one), 4 * SIZE + one, 20 * SIZE + 5 * one]
    assert list(frame["bytes stored"]) == [16 * SIZE, 4 * SIZE, 20 * SIZE]
    assert frame["efficiency"][0] == 1
    assert frame["sectors"][1] == 1 + SIZE + SIZE // 8  # the lanes of a load are more than 32 bytes apart
    total = frame.iloc[-1]
    assert (total["floor"], total["times floor"]) == (32 * SIZE, round((40 * SIZE + 5 * one) / (32 * SIZE), 3))
    assert frame["floor"][:2].isna().all()
    assert (y[:SIZE] == 1).all()


def test_counts_atomics_and_memory_behind_pointers():
    x = torch.zeros(SIZE)
    frame = count(90, lambda: _table_kernel[(1,)](torch.tensor([x.data_ptr()]), SIZE=SIZE), [x], 4 * SIZE)
    assert frame["bytes stored"].iloc[-1] == 4 * SIZE
    assert (x == 1).all()


def test_overlap_by_hand():
    """Row 1 is the newest; one of its two entries is a zero."""
    indices = torch.tensor([[[0, 1], [1, 3], [2, 3], [1, 2]]] * 4, dtype=torch.int16)
    values = torch.ones(4, 4, 2)
    values[:, 1, 1] = 0
    shares = overlap(Window(SparseRows(values, indices, Blocks(16, 4, 0.5)), 1))
    assert shares.entries_met == pytest.approx(2 / 6)  # element 1, in rows 0 and 3
    assert (shares.groups_of_8, shares.groups_of_16) == (1, 1)  # 8 entries are a block
    indices[1:, 0], indices[1:, 3] = torch.tensor([0, 2]), torch.tensor([0, 3])
    shares = overlap(Window(SparseRows(values, indices, Blocks(16, 4, 0.5)), 1))
    assert (shares.groups_of_8, shares.groups_of_16) == (1 / 4, 1 / 2)


def test_random_windows_are_at_chance(monkeypatch):
    monkeypatch.setattr(traffic, "BLOCKS", 2)
    window = random_window(32, 0.1)
    indices = window.rows.indices.long()
    assert indices.shape == (2, 32, 410)
    assert (indices.diff() > 0).all()
    assert indices.min() >= 0
    assert indices.max() < 4096
    assert overlap(window).entries_met == pytest.approx(0.1, abs=0.01)


def test_training_fills_the_window(monkeypatch):
    monkeypatch.setattr(traffic, "BLOCKS", 2)
    images = torch.randn(64, 1, 28, 28)
    split = SimpleNamespace(inputs=images, labels=torch.arange(64) % 10)
    monkeypatch.setattr(traffic, "_data", lambda: SimpleNamespace(train=split))
    window = traffic.trained_window(4, 0.01)
    assert window.rows.values.shape == window.rows.indices.shape == (2, 4, 41)
    assert window.slot == 0  # five steps
    assert (window.rows.values != 0).any(2).all()


def test_writes_tables(monkeypatch, tmp_path):
    def copy(x: torch.Tensor) -> None:
        _copy_kernel[(1,)](x, torch.zeros(SIZE), torch.ones(1), STRIDE=1, SIZE=SIZE)

    monkeypatch.setattr(traffic, "BLOCKS", 2)
    monkeypatch.setattr(traffic, "trained_window", random_window)
    operations = SimpleNamespace(
        compress_=lambda grads, *_: copy(grads[0]),
        window_apply_=lambda targets, *_: copy(targets[0]),
        window_dots=lambda rows, slot: copy(rows[0].values.flatten()),
    )
    monkeypatch.setattr(traffic, "triton_ops", operations)
    csv, text = tmp_path / "a" / "traffic.csv", tmp_path / "traffic.md"
    traffic.main(["--quick", "--csv", str(csv), "--markdown", str(text), "--arch", "80"])
    totals = pd.read_csv(csv).query("launch == 'all'").set_index(["operation", "error", "support"])
    elements, row = 2 * 4096, 2 * 41 * 4
    floors = totals["floor"].droplevel(["error", "support"])
    bytes_of = (12, 8, 4 + 2 * (1 + 4 / 64), 4 + 2 * (0.5 + 4 / 128))  # of an element, by the dtype of the error
    assert list(floors["compress_"]) == [each * elements + row for each in bytes_of]
    assert list(floors["window_dots"]) == [32 * row] * 2
    assert floors["window_apply_"] == 32 * row + 8 * elements
    assert "sm_80" in text.read_text()
    assert text.read_text().count("\n## ") == 3
