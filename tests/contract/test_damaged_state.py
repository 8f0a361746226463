"""A state that is damaged or foreign is refused with an error before anything is changed, and never indexed with."""

import copy
import re

import pytest
import torch

from efcp import DenseMFAC, LowRankMFAC, SparseGGT, SparseMFAC
from tests.contract.optimizers import Regression, assert_same, small


def fill(name, value, where=(0,)):
    def damage(state_dict):
        tensor = state_dict["state"][0][name]
        tensor[where[: tensor.ndim]] = value

    return damage


def put(name, function):
    def damage(state_dict):
        state_dict["state"][0][name] = function(state_dict["state"][0][name])

    return damage


def row(*values):
    """Positions of the first row of the first block."""

    def damage(state_dict):
        state_dict["state"][0]["indices"][0, 0] = torch.tensor(values)

    return damage


def tail(state_dict):
    """The tail of 54 elements in blocks of 20 has 14; position 14 lies in no parameter."""
    indices = state_dict["state"][0]["indices"]
    assert indices.shape == (3, 4, 5)
    indices[2, 1, 3] = 14


def padding(name, value):
    def damage(state_dict):
        state_dict["state"][0][name][2, 1, 4] = value  # a tail of 14 keeps 4

    return damage


def structure(change):
    def damage(state_dict):
        change(state_dict)

    return damage


def twice(state_dict):
    state_dict["param_groups"][0]["params"][1] = state_dict["param_groups"][0]["params"][0]


INDICES = "param_groups[0], parameter 0: indices must ascend in each row, and lie within their blocks"
SPARSE = {
    "beyond the block": (row(0, 1, 2, 3, 20), INDICES),
    "far beyond the block": (row(0, 1, 2, 3, 255), INDICES),
    "beyond the tail": (tail, INDICES),
    "padding beyond the block": (padding("indices", 20), "parameter 0: padding must have values 0, and positions in"),
    "padding with a value": (padding("values", 1.0), "parameter 0: padding must have values 0, and positions in"),
    "not ascending": (row(1, 0, 2, 3, 4), INDICES),
    "twice": (row(0, 1, 1, 3, 4), INDICES),
    "all the same": (row(0, 0, 0, 0, 0), INDICES),
    "nan in values": (fill("values", float("nan")), "parameter 0: values must be finite"),
    "inf in values": (fill("values", float("inf"), (-1, -1, -1)), "parameter 0: values must be finite"),
    "nan in error": (fill("error", float("nan"), (53,)), "parameter 0: error must be finite"),
    "inf in momentum": (fill("momentum", float("inf")), "parameter 0: momentum must be finite"),
    "nan in gram": (fill("gram", float("nan")), "parameter 0: gram must be finite"),
    "inf in gram": (fill("gram", -float("inf"), (1, 2)), "parameter 0: gram must be finite"),
    "gram not symmetric": (fill("gram", 5.0, (1, 2)), "parameter 0: gram must be symmetric"),
    "nan in root": (fill("inverse_root", float("nan")), "parameter 0: inverse_root must be finite"),
    "negative step": (put("step", torch.neg), "parameter 0: step must not be negative"),
    "more skipped than taken": (put("skipped_steps", lambda t: t + 100), "nor less than skipped_steps"),
    "negative skipped": (put("skipped_steps", lambda t: t - 100), "nor less than skipped_steps"),
    "negative age": (put("inverse_age", lambda n: -1), "inverse_age must be finite and not negative"),
    "age of another type": (put("inverse_age", float), "the type of inverse_age is 'float' in the state, but 'int'"),
    "nan damping": (put("inverse_damping", lambda x: float("nan")), "inverse_damping must be finite"),
    "sparse layout": (put("momentum", torch.Tensor.to_sparse), "the layout of momentum is torch.sparse_coo"),
    "index dtype": (put("indices", torch.Tensor.long), "the dtype of indices is torch.int64 in the state, but"),
    "shape": (put("values", lambda t: t[:, :, :-1]), "the shape of values is (3, 4, 4) in the state, but (3, 4, 5)"),
    "no groups": (structure(lambda s: s.pop("param_groups")), "state_dict: not the state of an optimizer"),
    "no state": (structure(lambda s: s.pop("state")), "state_dict: not the state of an optimizer"),
    "state is a list": (structure(lambda s: s["state"].update({0: [1]})), "state_dict: not the state of an optimizer"),
    "a parameter twice": (twice, "state_dict: a parameter is in the param groups twice"),
    "unknown": (structure(lambda s: s["state"].update({99: {}})), "state of 1 parameters that are in no param group"),
    "lr": (structure(lambda s: s["param_groups"][0].update(lr=-1.0)), "lr must be a finite number ≥ 0, got -1.0"),
    "lr text": (structure(lambda s: s["param_groups"][0].update(lr="1")), "lr must be a finite number ≥ 0, got '1'"),
    "momentum": (structure(lambda s: s["param_groups"][0].update(momentum=2.0)), "momentum must lie in [0, 1), got 2"),
    "damping": (structure(lambda s: s["param_groups"][0].update(damping=0.0)), "damping must be a finite number > 0"),
}
OTHERS = {
    "rows": (DenseMFAC, fill("rows", float("nan")), "parameter 0: rows must be finite"),
    "left": (LowRankMFAC, fill("left", float("inf")), "parameter 0: left must be finite"),
    "right": (LowRankMFAC, fill("right", float("nan")), "parameter 0: right must be finite"),
    "basis": (LowRankMFAC, fill("basis", float("nan")), "parameter 0: basis must be finite"),
    "average": (SparseGGT, fill("average", float("nan")), "parameter 0: average must be finite"),
}


def check_refused(cls, options, damage, message):
    source, target, untouched = (Regression(cls, options) for _ in range(3))
    source.step(6)
    target.step(3)
    untouched.step(3)
    state_dict = copy.deepcopy(source.optimizer.state_dict())
    damage(state_dict)
    with pytest.raises(ValueError, match=re.escape(message)):
        target.optimizer.load_state_dict(state_dict)
    assert_same(target, untouched)
    target.step()
    untouched.step()
    assert_same(target, untouched)


@pytest.mark.parametrize("case", SPARSE)
def test_damaged_state_of_a_sparse_window_is_refused(case):
    options = {"window": 4, "lr": 0.02, "density": 0.25, "block_size": 20, "damping": 0.1, "momentum": 0.5}
    check_refused(SparseMFAC, options, *SPARSE[case])


@pytest.mark.parametrize("case", OTHERS)
def test_damaged_state_of_other_windows_is_refused(case):
    cls, damage, message = OTHERS[case]
    check_refused(cls, small(cls) | ({"beta1": 0.5} if cls is SparseGGT else {}), damage, message)


@pytest.mark.parametrize("block_size", [200, 256, 257, 300], ids=str)
def test_sound_states_are_taken(block_size):
    """Block sizes around the change of the positions' dtype; a last position of 255 in a block of 256."""
    p = torch.nn.Parameter(torch.zeros(777))
    optimizer = SparseMFAC([p], window=3, density=0.1, block_size=block_size)
    for _ in range(4):
        p.grad = torch.arange(777.0).remainder(block_size)
        optimizer.step()
    assert optimizer.state[p]["indices"][0].max() == block_size - 1
    SparseMFAC([p], window=3, density=0.1, block_size=block_size).load_state_dict(optimizer.state_dict())


def test_loaded_tensors_are_contiguous_and_need_no_gradient():
    """Kernels take addresses for positions; a file can hold any strides."""
    problem, other = Regression(SparseMFAC, small(SparseMFAC)), Regression(SparseMFAC, small(SparseMFAC))
    problem.step(6)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    for state in saved["state"].values():
        state["values"] = state["values"].transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        state["indices"] = state["indices"].transpose(0, 1).contiguous().transpose(0, 1)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(saved)
    assert_same(problem, other)
    for p in other.params:
        for value in other.optimizer.state[p].values():
            assert not torch.is_tensor(value) or (value.is_contiguous() and not value.requires_grad)
    problem.step()
    other.step()
    assert_same(problem, other)
