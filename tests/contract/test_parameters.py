"""Parameters that are frozen, tied, swapped, cast or absent."""

import copy

import pytest
import torch
from torch import nn

from efcp import SparseMFAC
from tests.contract.optimizers import Regression, assert_same, momentum_of


def test_frozen_parameters_stay_and_take_no_memory(cls, options):
    problem = Regression(cls, options)
    frozen = problem.params[0]
    frozen.requires_grad_(False)
    before = frozen.clone()
    problem.step(6)
    assert torch.equal(frozen, before)
    if frozen is not problem.optimizer.param_groups[0]["params"][0]:
        assert not problem.optimizer.state[frozen]
    assert not {"values", "rows", "left", "error"} & problem.optimizer.state[frozen].keys()


def test_parameter_frozen_in_the_middle_stays(cls, options):
    problem = Regression(cls, options | momentum_of(cls) | {"weight_decay": 0.1})
    problem.step(3)
    frozen = problem.params[2]
    frozen.requires_grad_(False)
    before = frozen.clone()
    problem.step(6)
    assert torch.equal(frozen, before)
    frozen.requires_grad_(True)
    problem.step(2)
    assert not torch.equal(frozen, before)
    assert problem.flat().isfinite().all()


def test_tied_parameters_are_one(cls, options):
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight
    optimizer = cls(tied.parameters(), **options)
    x = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        (tied(x) - 1).square().mean().backward()
        optimizer.step()
    assert tied[0].weight is tied[2].weight
    assert len(optimizer.state) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group_is_refused(cls, options):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = cls([p], **options)
    with pytest.raises(ValueError, match="params must not hold a parameter twice"):
        optimizer.add_param_group({"params": [q, q]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_swapped_tensors_keep_their_state(cls, options):
    problem, other = Regression(cls, options), Regression(cls, options)
    problem.step(5)
    other.step(5)
    for p in problem.params:
        p.grad = None
        state = problem.optimizer.state[p]
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
        assert problem.optimizer.state[p] is state
    problem.step(5)
    other.step(5)
    assert_same(problem, other)


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_cast_before_the_first_step(cls, options, dtype, swap):
    options = options | momentum_of(cls)
    problem, other = Regression(cls, options), Regression(cls, options, dtype=dtype)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        problem.model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p, q in zip(problem.params, other.params, strict=True):
        q.data.copy_(p.data)
    problem.x, problem.y = other.x, other.y
    problem.step(5)
    other.step(5)
    assert_same(problem, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_cast_in_the_middle_goes_on_with_its_state(cls, options, dtype):
    options = options | momentum_of(cls) | ({"beta1": 0.5} if "GGT" in cls.__name__ else {})
    problem = Regression(cls, options)
    problem.step(5)
    before = problem.error()
    problem.model.to(dtype)
    problem.x, problem.y = problem.x.to(dtype), problem.y.to(dtype)
    problem.step(8)
    assert problem.params[0].dtype == dtype
    assert problem.error() < before


def test_state_allocated_early_is_the_state_of_the_first_step(cls, options):
    problem, early = Regression(cls, options), Regression(cls, options)
    early.optimizer.allocate_state()
    problem.step(5)
    early.step(5)
    assert_same(problem, early)


def test_empty_groups(cls, options):
    problem, other = Regression(cls, options), Regression(cls, options)
    with_empty = cls([{"params": []}, {"params": other.params}, {"params": []}], **options)
    other.optimizer = with_empty
    problem.step(5)
    other.step(5)
    assert torch.equal(problem.flat(), other.flat())
    again = cls([{"params": []}, {"params": other.params}, {"params": []}], **options)
    again.load_state_dict(with_empty.state_dict())
    assert again.state_dict()["state"].keys() == with_empty.state_dict()["state"].keys()


# ---- a state of parameters of another dtype


def test_state_without_tensors_of_the_parameters_dtype_goes_to_another_dtype():
    """From float32 to bfloat16: what TopK keeps has dtypes of its own, and is taken over bit for bit."""
    options = {"window": 4, "lr": 0.02, "density": 0.5, "block_size": 8}
    source, target = Regression(SparseMFAC, options), Regression(SparseMFAC, options, dtype=torch.bfloat16)
    source.step(6)
    saved = copy.deepcopy(source.optimizer.state_dict())
    target.model.load_state_dict(source.model.state_dict())
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    for key, state in target.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert not torch.is_tensor(value) or torch.equal(value, saved["state"][key][name])
    before = target.error()
    target.step(5)
    assert target.error() < before


@pytest.mark.parametrize(
    ("options", "dtype", "name"),
    [
        ({"momentum": 0.5}, torch.bfloat16, "momentum"),
        ({}, torch.float64, "error"),
    ],
)
def test_state_with_tensors_of_the_parameters_dtype_is_refused_elsewhere(options, dtype, name):
    options = {"window": 4, "lr": 0.02, "density": 0.5, "block_size": 8, **options}
    source, target = Regression(SparseMFAC, options), Regression(SparseMFAC, options, dtype=dtype)
    source.step(2)
    message = f"parameter 0: the dtype of {name} is torch.float32 in the state, but {dtype} in the optimizer"
    with pytest.raises(ValueError, match=message):
        target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert not target.optimizer.state
