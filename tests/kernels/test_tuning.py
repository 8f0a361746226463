"""The choice of a configuration: the default, what a file says, or what was fastest; always with the same result."""

import inspect
import json
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch

from efcp.perf.gpu.gpusim import simulate, why_unavailable
from tests.kernels.kernel_cases import BITS4, BITS8, Case, check_apply, check_compress, check_dots, parts_of, tensors_of

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from efcp.kernels import triton as triton_ops
from efcp.kernels.triton import apply, compress, dots, tuning

CASE = Case(5000, 1024, 0.05, window=40)
CHECKS = {"compress_": check_compress, "window_dots": check_dots, "window_apply_": check_apply}
# Of some operations there are many kernels, and gpusim needs seconds to compile each.
slow = pytest.mark.slow
operations = pytest.mark.parametrize(
    "name", ["window_dots", *(pytest.param(name, marks=slow) for name in ("compress_", "window_apply_"))]
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EFCP_CACHE", str(tmp_path / "new"))
    monkeypatch.delenv("EFCP_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "NUMEL", 3000)
    tuning._known.cache_clear()
    yield tmp_path / "new"
    tuning._known.cache_clear()


@pytest.fixture
def run(monkeypatch):
    """Checks an operation, in a simulator that admits the tensors of trials, too."""
    simulators = []

    def allowing(original):
        def group(rows, **others):
            given = (x for x in chain(*others.values()) if x is not None)
            for tensor in (*parts_of(given), *tensors_of(rows)):
                simulators[-1].allow(tensor)
            return original(rows, **others)

        return group

    for module in (compress, dots, apply):
        monkeypatch.setattr(module, "launch_of", allowing(module.launch_of))

    def check(name, case=CASE):
        with simulate(90) as simulator:
            simulators.append(simulator)
            CHECKS[name](getattr(triton_ops, name), case, simulator.allow)

    return check


@pytest.fixture
def last_is_fastest(monkeypatch, folder):
    """Each trial is faster than the one before. Three configurations are tried, since each is a compilation."""
    tried = []

    def choose_of_three(operation, rows, dtypes, candidates, trial):
        first, *others = candidates
        return tuning.choose(operation, rows, dtypes, [first, *others[-2:]], trial)

    for module in (compress, dots, apply):
        monkeypatch.setattr(module, "choose", choose_of_three)

    def milliseconds(launch):
        launch()
        tried.append(inspect.getclosurevars(launch).nonlocals["candidate"])
        return 100 - len(tried)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setenv("EFCP_AUTOTUNE", "1")
    return tried


@operations
def test_without_the_variable_nothing_is_tried(name, run, monkeypatch, folder):
    monkeypatch.setattr(tuning, "_milliseconds", lambda launch: pytest.fail("measured"))
    run(name)
    assert not folder.exists()


@operations
def test_the_fastest_is_kept_and_used_from_then_on(name, run, last_is_fastest, folder):
    run(name)
    tried = list(last_is_fastest)
    saved = json.loads((folder / "configurations.json").read_text())
    assert len(saved) == {"compress_": 1, "window_dots": 1, "window_apply_": 5}[name]  # none, float, 8 bits; squares, 2
    squares = "( with squares)?" if name == "window_apply_" else ""
    assert all(re.match(f"{name}{squares} cuda:90 B=1024 density=0.05 m=40", key) for key in saved)
    assert len(tried) > len(saved)
    assert list(saved.values())[-1] == tried[-1]
    tuning._known.cache_clear()  # as in another process
    run(name)
    assert last_is_fastest == tried  # nothing was tried again


@slow
@pytest.mark.parametrize(("error", "name"), [(BITS8, "int8"), (BITS4, "uint8")], ids=["8 bits", "4 bits"])
def test_errors_in_few_bits_have_a_choice_of_their_own(error, name, run, last_is_fastest, folder):
    run("compress_", replace(CASE, error=error))
    run("compress_")
    keys = json.loads((folder / "configurations.json").read_text())
    assert [key.rsplit(" ", 1)[1] for key in keys] == [f"float32/{name}/bfloat16", "float32/float32/bfloat16"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"window_dots cuda:90 B=1024 density=0.05 m=40 bfloat16": {"TILE": 3}}']
)
def test_a_damaged_file_is_not_used(content, run, folder):
    folder.mkdir()
    (folder / "configurations.json").write_text(content)
    if content == "{":
        with pytest.warns(UserWarning, match="cannot be read"):
            run("window_dots")
    else:
        run("window_dots")


def test_what_is_tried_is_a_window():
    rows = CASE.random_window()
    scratch = tuning._scratch(rows.blocks, rows.values)
    assert scratch.values.shape == (3, 40, rows.blocks.kept)
    assert scratch.indices.dtype == rows.indices.dtype
    index = scratch.indices.long()
    assert (index.diff() > 0).all()
    assert index.min() >= 0
    assert index.max() < rows.blocks.size
    assert torch.isfinite(scratch.values).all()


def test_enough_bytes_in_flight_come_first():
    """Of 164 KB, of which a program takes 1 KB more than its own."""
    kb, few, enough, more = 1 << 10, {"TILE": 1}, {"TILE": 2}, {"TILE": 3}
    candidates = [(few, 81 * kb, 8 * kb), (enough, 100 * kb, 32 * kb), (more, 53 * kb, 20 * kb)]
    assert tuning.most_in_flight(candidates, 163 * kb) == [enough, more, few]
    assert tuning.most_in_flight(candidates, 99 * kb) == [more, few]
    assert tuning.most_in_flight([(few, 81 * kb, 16 * kb), *candidates[1:]], 163 * kb) == [few, enough, more]
    assert tuning.most_in_flight([(few, 82 * kb, 16 * kb)], 81 * kb) == []
