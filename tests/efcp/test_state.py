"""Saving, loading, copying: nothing is lost, nothing is cast, and a state that does not fit is refused."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efcp import EFCP, DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, SparseGGT, SparseMFAC
from tests.efcp.problems import Problem

OPTIMIZERS = {
    "SparseMFAC": (SparseMFAC, {"density": 0.1, "block_size": 300, "momentum": 0.9}),
    "SparseMFAC-bf16-error": (SparseMFAC, {"density": 0.1, "error_dtype": torch.bfloat16}),
    "SparseMFAC-8-bits": (SparseMFAC, {"density": 0.1, "error_dtype": torch.int8}),
    "SparseGGT-4-bits": (SparseGGT, {"density": 0.1, "error_dtype": torch.int4, "block_size": 99}),
    "SparseMFAC-no-feedback": (SparseMFAC, {"density": 0.1, "error_feedback": False}),
    "DenseMFAC": (DenseMFAC, {"weight_decay": 0.1}),
    "SparseGGT": (SparseGGT, {"density": 0.1, "beta1": 0.5, "beta2": 0.9}),
    "SparseGGT-refresh": (SparseGGT, {"density": 0.1, "beta2": 0.9, "refresh_every": 4}),
    "DenseGGT": (DenseGGT, {"max_update_norm": 1.0}),
    "LowRankMFAC": (LowRankMFAC, {"rank": 2, "momentum": 0.9}),
    "LowRankMFAC-float32": (LowRankMFAC, {"rank": 1, "value_dtype": torch.float32, "error_dtype": torch.bfloat16}),
    "LowRankGGT": (LowRankGGT, {"rank": 2, "power_iterations": 2, "beta1": 0.5, "error_feedback": False}),
}
SHAPES = ((700,), (5, 9), ())
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    return request.param


def problem(kind, dtype=torch.float32, **changes):
    cls, options = OPTIMIZERS[kind]
    return Problem(dtype=dtype, shapes=SHAPES, optimizer=cls, **{"window": 6, "lr": 0.05, **options, **changes})


def assert_same_state(a, b):
    """The states of two problems' optimizers are bitwise the same."""
    for p, q in zip(a.params, b.params, strict=True):
        assert torch.equal(p, q)
        state, other = a.optimizer.state[p], b.optimizer.state[q]
        assert state.keys() == other.keys()
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype, name
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


RESUME = """
import sys, torch
from tests.efcp.test_state import OPTIMIZERS, problem
dtype, folder = getattr(torch, sys.argv[1]), sys.argv[2]
for kind in OPTIMIZERS:
    p = problem(kind, dtype)
    saved = torch.load(f"{folder}/{kind}.pt", weights_only=True)
    for param, value in zip(p.params, saved["params"], strict=True):
        param.data.copy_(value)
    p.optimizer.load_state_dict(saved["optimizer"])
    p.generator.set_state(saved["generator"])
    p.step(8)
    torch.save({"params": p.values(), "optimizer": p.optimizer.state_dict()}, f"{folder}/{kind}.resumed.pt")
"""


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "float64")]


@pytest.fixture(scope="module", params=["float32", *OTHERS])
def resumed(request, tmp_path_factory):
    """Training that stops after 9 steps, saves, and goes on for 8 in a new process; and the same without a stop."""
    folder, dtype = tmp_path_factory.mktemp("resume"), getattr(torch, request.param)
    problems = {kind: problem(kind, dtype) for kind in OPTIMIZERS}
    for kind, p in problems.items():
        p.step(9)  # the ring has wrapped, and the inverse has been computed anew
        saved = {"params": p.values(), "optimizer": p.optimizer.state_dict(), "generator": p.generator.get_state()}
        torch.save(saved, folder / f"{kind}.pt")
    subprocess.run([sys.executable, "-c", RESUME, request.param, str(folder)], check=True, cwd=ROOT)
    for p in problems.values():
        p.step(8)
    return problems, {kind: torch.load(folder / f"{kind}.resumed.pt", weights_only=True) for kind in OPTIMIZERS}


def test_resuming_in_a_new_process_is_not_stopping(kind, resumed):
    problems, loaded = resumed
    going_on, other = problems[kind], loaded[kind]
    for p, value in zip(going_on.params, other["params"], strict=True):
        assert torch.equal(p, value)
    own = going_on.optimizer.state_dict()
    assert own["param_groups"] == other["optimizer"]["param_groups"]
    assert own["state"].keys() == other["optimizer"]["state"].keys()
    for key, state in own["state"].items():
        for name, value in state.items():
            twin = other["optimizer"]["state"][key][name]
            assert torch.equal(value, twin) if isinstance(value, torch.Tensor) else value == twin


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(kind, copier):
    original = problem(kind)
    original.step(8)
    params, optimizer = copier((original.params, original.optimizer))
    twin = copy.copy(original)
    twin.params, twin.optimizer = params, optimizer
    twin.generator = torch.Generator()
    twin.generator.set_state(original.generator.get_state())
    assert type(optimizer) is type(original.optimizer)
    assert optimizer.compressor == original.optimizer.compressor
    assert_same_state(original, twin)
    before = original.flat()
    twin.step(3)
    assert torch.equal(original.flat(), before)
    original.step(3)
    assert_same_state(original, twin)


def test_loaded_state_is_a_copy(kind):
    source, other = problem(kind), problem(kind)
    source.step(8)
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    saved = io.BytesIO()
    torch.save(source.optimizer.state_dict(), saved)
    other.step(2)
    again = io.BytesIO()
    torch.save(source.optimizer.state_dict(), again)
    assert saved.getvalue() == again.getvalue()


def test_state_of_an_optimizer_that_has_not_stepped(kind):
    fresh, other = problem(kind), problem(kind)
    other.optimizer.load_state_dict(fresh.optimizer.state_dict())
    fresh.step(3)
    other.step(3)
    assert_same_state(fresh, other)


def test_loaded_options_replace_those_of_the_optimizer():
    source, other = problem("SparseMFAC", weight_decay=0.3), problem("SparseMFAC", weight_decay=0.1)
    source.optimizer.param_groups[0]["lr"] = 0.123
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.123
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_parameter_that_had_no_gradient_gets_its_window_after_loading():
    source, other = problem("SparseMFAC"), problem("SparseMFAC")
    source.set_gradients()
    source.params[1].grad = None
    source.optimizer.step()
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    assert "values" not in other.optimizer.state.get(other.params[1], {})
    other.step()
    assert "values" in other.optimizer.state[other.params[1]]


def test_hooks_of_users_see_and_change_the_state():
    source, other = problem("SparseMFAC"), problem("SparseMFAC")
    source.step(8)
    seen = []

    def before(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.5
        seen.append(sorted(state_dict["state"][0]))

    def after(optimizer):
        seen.append(sorted(optimizer.state[optimizer.param_groups[0]["params"][0]]))

    other.optimizer.register_load_state_dict_pre_hook(before)
    other.optimizer.register_load_state_dict_post_hook(after)
    other.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    assert seen[0] == seen[1]
    assert other.optimizer.param_groups[0]["lr"] == 0.5


def lose(name):
    def change(state_dict):
        del state_dict["state"][0][name]

    return change


def replace(name, function):
    def change(state_dict):
        state_dict["state"][0][name] = function(state_dict["state"][0][name])

    return change


MISFITS = {
    "window": ({"window": 7}, None, r"param_groups\[0\]: window is 7 in the state, but 6 in the optimizer"),
    "density": ({"density": 0.2}, None, r"param_groups\[0\]: density is 0.2 in the state, but 0.1 in the optimizer"),
    "block": ({"block_size": 64}, None, r"param_groups\[0\]: block_size is 64 in the state, but 300 in the"),
    "value": ({"value_dtype": torch.float32}, None, r"value_dtype is 'float32' in the state, but 'bfloat16'"),
    "feedback": ({"error_feedback": False}, None, r"error_feedback is False in the state, but True in the optimizer"),
    "lost": ({}, lose("indices"), r"param_groups\[0\], parameter 0: the state has no indices; it is damaged"),
    "lost gram": ({}, lose("gram"), r"state_dict: there must be one Gram matrix, got 0; the state is damaged"),
    "shape": ({}, replace("gram", lambda t: t[:5, :5]), r"the shape of gram is \(5, 5\) in the state, but \(6, 6\)"),
    "dtype": ({}, replace("indices", torch.Tensor.float), r"the dtype of indices is torch.float32 in the state, but"),
    "type": (
        {},
        replace("error", lambda t: 3),
        r"the type of error is 'int' in the state, but 'Tensor' in the optimizer",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_state_that_does_not_fit_is_refused_and_nothing_changed(case):
    changes, corrupt, message = MISFITS[case]
    source, target, untouched = problem("SparseMFAC", **changes), problem("SparseMFAC"), problem("SparseMFAC")
    source.step(2)
    target.step(3)
    untouched.step(3)
    state_dict = copy.deepcopy(source.optimizer.state_dict())
    if corrupt is not None:
        corrupt(state_dict)
    with pytest.raises(ValueError, match=message):
        target.optimizer.load_state_dict(state_dict)
    assert target.optimizer.param_groups[0]["window"] == 6
    target.step()
    untouched.step()
    assert_same_state(target, untouched)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("DenseMFAC", "SparseMFAC", "the state has no density;"),
        ("SparseGGT", "SparseMFAC", "the state has no damping"),
    ],
)
def test_state_of_another_kind_is_refused(source, target, message):
    other = problem(target)
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(problem(source).optimizer.state_dict())


def test_state_of_another_model_is_refused():
    source, target = problem("DenseMFAC"), problem("DenseMFAC")
    target.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="the number of param groups is 1 in the state, but 2 in the optimizer"):
        target.optimizer.load_state_dict(source.optimizer.state_dict())
    other = EFCP([torch.nn.Parameter(torch.zeros(2))], window=6)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: the number of parameters is 3 in the state, but 1"):
        other.load_state_dict(problem("SparseMFAC").optimizer.state_dict())
