"""What PyTorch checks of every optimizer, checked of ours, over a table of its own kind (`OptimizerInfo`).

| check of PyTorch's test_optim.py | here |
|---|---|
| errors of the constructor, of all optimizers and our own | `test_construction_error` |
| no input of the table sets foreach, fused, differentiable | `test_table_sets_no_flags` |
| the loop goes in the right direction; the same with a scheduler, with param groups | `test_loss_goes_down` |
| a tensor as lr steps as the number does, and stays | `test_tensor_lr` |
| param groups with lr, with weight decay of their own | `test_param_groups_have_lr_and_weight_decay_of_their_own` |
| a step without gradients, with zero gradients, changes nothing | `test_step_is_no_op` |
| the state is not empty after a step | `test_state_is_there_after_a_step` |
| a closure is called, its loss returned | `test_closure` |
| hooks: step, all steps, state_dict, load_state_dict; pre and post; order | `test_hooks_of_*` |
| state dicts: the same twice, round trip, named and unnamed, other ids, saved with weights_only | `test_state_dict_*` |
| deepcopy and pickle keep all public attributes | `test_copies_keep_public_attributes` |
| it can be printed | `test_can_be_printed` |
| `defaults` changed to foreach after construction | `test_flags_are_refused_where_they_are_on` |
| complex parameters | refused, `tests/efcp/test_step.py`: a window has no meaning for them yet |
| sparse gradients | refused, `tests/efcp/test_step.py`: Top-k of a sparse gradient would need a kernel of its own |
| foreach, fused, their peak memory | cannot apply: there is one implementation; refused where they are on |
| capturable | cannot apply: a step never waits for the device in any case; refused where it is on |
| differentiable | cannot apply: Top-k has no useful derivative; refused |
| a `step` that is a number in old state dicts, older flags missing | cannot apply: there are no older state dicts |
| several GPUs, CUDA state moved to the CPU | need GPUs: `tests/efcp/test_gpu.py` |
| what is of one algorithm: betas as tensors, nesterov, LBFGS's return type | cannot apply |
"""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from efcp import DenseMFAC, SparseMFAC
from tests.contract.optimizers import Regression, assert_same, momentum_of
from tests.contract.table import CASES, ERRORS, OPTIMIZERS

FLAGS = ("foreach", "fused", "capturable", "differentiable")


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(shape))


# ---- construction


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(("cls", "case"), ERRORS)
def test_construction_error(cls, case):
    made = case.optimizer_error_input
    params = [parameter(2)] if made.params is None else made.params
    with pytest.raises(case.error_type, match=case.error_regex):
        cls(params, **made.kwargs)


@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
def test_table_sets_no_flags(info):
    assert not any(set(FLAGS) & case.kwargs.keys() for case in info.optim_inputs_func("cpu"))


def test_empty_list_is_refused(cls):
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])


def check_key_is_refused(cls, options, key, message):
    """Refused in a param group, added at any time or loaded. An entry of `defaults` is that of groups to come."""
    with pytest.raises(ValueError, match=message):
        cls([{"params": [parameter(2)], key: True}], **options)
    optimizer, added = cls([parameter(2)], **options), {"params": [parameter(2)], key: True}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(added)
    assert len(optimizer.param_groups) == 1
    assert added.keys() == {"params", key}

    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = True
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {message}"):
        optimizer.load_state_dict(saved)
    assert key not in optimizer.param_groups[0]

    optimizer.defaults[key] = True
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(2)]})
    assert len(optimizer.param_groups) == 1


def check_key_is_kept(cls, options, key, value):
    """A key that is no option stays in its param group, and in saved and loaded ones."""
    optimizer = cls([{"params": [parameter(2)], key: value}, {"params": [parameter(2)]}], **options)
    optimizer.add_param_group({"params": [parameter(2)], key: value})
    other = cls([{"params": [parameter(2)]} for _ in range(3)], **options)
    other.load_state_dict(optimizer.state_dict())
    for groups in (optimizer.param_groups, other.param_groups):
        assert [group.get(key, "none") for group in groups] == [value, "none", value]


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_refused_where_they_are_on(cls, options, flag):
    check_key_is_refused(cls, options, flag, rf"{flag} must be False or None, got True; {cls.__name__} has one ")


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_kept_where_they_are_off(cls, options, flag, value):
    check_key_is_kept(cls, options, flag, value)


@pytest.mark.parametrize(("key", "meant"), [("windows", "window"), ("weightdecay", "weight_decay")])
def test_misspelt_options_are_refused(cls, options, key, meant):
    message = rf"{cls.__name__} has no option {key}, did you mean {meant}\? Its options are lr, window, "
    check_key_is_refused(cls, options, key, message)


@pytest.mark.parametrize("key", ["layer_id", "betas", "nesterov", "swa_lr", 7], ids=str)
def test_other_keys_are_kept(cls, options, key):
    if key in cls([parameter(2)], **options).defaults:
        pytest.skip(f"{key} is an option of {cls.__name__}")
    check_key_is_kept(cls, options, key, 3)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "load_state_dict"])
def test_groups_added_to_a_copy_have_the_same_options(cls, options, through):
    """`Optimizer.__setstate__` puts an option of its own among the defaults."""
    optimizer = cls([parameter(2)], **options)
    if through == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer) if through == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": [parameter(2)]})
    first, second = optimizer.param_groups
    assert first.keys() == second.keys()


def test_can_be_printed(cls, options):
    text = repr(cls([parameter(2)], **options))
    assert text.startswith(cls.__name__)
    assert "window: 4" in text


# ---- steps


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "param-groups-and-scheduler"])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_loss_goes_down(cls, options, scheduled):
    problem = Regression(cls, options, split=scheduled)
    scheduler = StepLR(problem.optimizer, step_size=5) if scheduled else None
    first = problem.error()
    for _ in range(12):
        problem.step()
        if scheduler is not None:
            scheduler.step()
    assert problem.error() < first


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(cls, options, shape):
    number, tensor = (
        Regression(cls, options | {"lr": lr}) for lr in (0.02, torch.full(shape, 0.02, dtype=torch.float64))
    )
    lr = tensor.optimizer.param_groups[0]["lr"]
    number.step(6)
    tensor.step(6)
    assert torch.equal(number.flat(), tensor.flat())
    assert torch.equal(lr, torch.full_like(lr, 0.02))
    lr.zero_()
    before = tensor.flat()
    tensor.step()
    assert torch.equal(tensor.flat(), before)


def test_param_groups_have_lr_and_weight_decay_of_their_own(cls, options):
    still, decayed, plain = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    groups = [
        {"params": [still], "lr": 0.0},
        {"params": [decayed], "weight_decay": 0.5, "lr": 0.1},
        {"params": [plain], "lr": 0.1},
    ]
    optimizer = cls(groups, **options)
    for p in (still, decayed, plain):
        p.grad = torch.full_like(p, 0.25)
    optimizer.step()
    assert torch.equal(still, torch.ones(4, 4))
    torch.testing.assert_close(plain - decayed, torch.full((4, 4), 0.1 * 0.5))


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_step_is_no_op(cls, options):
    problem = Regression(cls, {**options, "weight_decay": 0.0})
    before = problem.flat()
    problem.optimizer.zero_grad()
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)
    assert not problem.optimizer.state
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    problem.optimizer.step()
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)


def test_step_with_zero_gradients_after_others_is_no_op_without_a_compressor():
    problem = Regression(DenseMFAC, {"window": 4, "lr": 0.1})
    problem.step(6)
    before = problem.flat()
    problem.optimizer.zero_grad(set_to_none=False)
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)


def test_state_is_there_after_a_step(cls, options):
    problem = Regression(cls, options)
    problem.step()
    assert all(problem.optimizer.state[p] for p in problem.params)


def test_closure(cls, options):
    plain, closed = Regression(cls, options), Regression(cls, options)
    plain.backward()
    plain.optimizer.step()
    loss = closed.optimizer.step(closed.backward)
    assert loss == plain.loss() or loss > 0
    assert torch.equal(plain.flat(), closed.flat())
    with pytest.raises(ZeroDivisionError):
        closed.optimizer.step(lambda: 1 / 0)
    assert_same(plain, closed)


# ---- hooks


def test_hooks_of_steps(cls, options):
    problem, seen = Regression(cls, options), []
    optimizer = problem.optimizer
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all before")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all after")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after")),
    ]
    problem.step()
    assert seen == ["all before", "before", "after", "all after"]
    for handle in handles:
        handle.remove()
    problem.step()
    assert len(seen) == 4


def test_hooks_of_state_dict(cls, options):
    problem, seen = Regression(cls, options), []
    problem.step()

    def after(optimizer, state_dict):
        seen.append("after")
        state_dict["note"] = "kept"

    problem.optimizer.register_state_dict_pre_hook(lambda optimizer: seen.append("second"))
    problem.optimizer.register_state_dict_pre_hook(lambda optimizer: seen.append("first"), prepend=True)
    problem.optimizer.register_state_dict_post_hook(after)
    saved = problem.optimizer.state_dict()
    assert seen == ["first", "second", "after"]
    assert saved["note"] == "kept"
    problem.optimizer.load_state_dict(saved)


def test_hooks_of_load_state_dict(cls, options):
    source, target, seen = Regression(cls, options), Regression(cls, options, seed=1), []
    source.step(3)
    original = source.optimizer.state_dict()

    def replace(optimizer, state_dict):
        seen.append("replace")
        return {**state_dict, "param_groups": [{**group, "lr": 0.5} for group in state_dict["param_groups"]]}

    target.optimizer.register_load_state_dict_pre_hook(replace)
    target.optimizer.register_load_state_dict_pre_hook(lambda *args: seen.append("first"), prepend=True)
    target.optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append("after"))
    target.optimizer.load_state_dict(original)
    assert seen == ["first", "replace", "after"]
    assert target.optimizer.param_groups[0]["lr"] == 0.5
    assert original["param_groups"][0]["lr"] == options["lr"]


# ---- state dicts and copies


def twin(problem, cls, options, **kind):
    other = Regression(cls, options, **kind)
    other.model.load_state_dict(problem.model.state_dict())
    return other


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_state_dict_round_trip_goes_on_alike(cls, options):
    problem = Regression(cls, options, split=True)
    problem.step(6)
    other = twin(problem, cls, options, split=True)
    file = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same(problem, other)
    problem.step(3)
    other.step(3)
    assert_same(problem, other)


def test_state_dict_is_the_same_twice(cls, options):
    problem = Regression(cls, options)
    problem.step(3)
    assert pickle.dumps(problem.optimizer.state_dict()) == pickle.dumps(problem.optimizer.state_dict())


@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True), (True, True)])
def test_state_dict_with_and_without_names(cls, options, source, target):
    problem = Regression(cls, options, named=source)
    problem.step(6)
    other = twin(problem, cls, options, named=target)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    problem.step(2)
    other.step(2)
    assert torch.equal(problem.flat(), other.flat())
    if target:
        assert other.optimizer.param_groups[0]["param_names"] == [name for name, _ in other.model.named_parameters()]


def test_state_dict_with_other_ids(cls, options):
    """Parameters are matched by their order, whatever stands for them; orders of keys say nothing."""
    problem = Regression(cls, options, split=True)
    problem.step(6)
    saved = problem.optimizer.state_dict()
    renamed = {
        "state": {f"p{key}": state for key, state in reversed(saved["state"].items())},
        "param_groups": [{**g, "params": [f"p{key}" for key in g["params"]]} for g in saved["param_groups"]],
    }
    other = twin(problem, cls, options, split=True)
    other.optimizer.load_state_dict(renamed)
    assert_same(problem, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_state_dict_keeps_dtypes(cls, options, dtype):
    problem = Regression(cls, options | momentum_of(cls), dtype=dtype)
    problem.step(6)
    other = twin(problem, cls, options | momentum_of(cls), dtype=dtype)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert_same(problem, other)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_public_attributes(cls, options, copier):
    problem = Regression(cls, options)
    problem.step(2)
    problem.optimizer.note = "mine"
    names = {name for name in vars(copier(problem.optimizer)) if not name.startswith("_")}
    lost = {name for name in vars(problem.optimizer) if not name.startswith("_")} - names
    assert not lost - {"note"}
    assert copier(problem.optimizer).compressor == problem.optimizer.compressor


def test_option_changed_after_the_first_step_is_refused_where_the_window_depends_on_it():
    for name, value in (
        ("window", 5),
        ("density", 0.1),
        ("block_size", 4),
        ("value_dtype", torch.float32),
        ("error_feedback", False),
    ):
        problem = Regression(SparseMFAC, {"window": 4, "lr": 0.1, "density": 0.5, "block_size": 8})
        problem.step(2)
        before = copy.deepcopy(problem.optimizer.state_dict()["state"])
        parameters = problem.flat()
        problem.optimizer.param_groups[0][name] = value
        problem.backward()
        with pytest.raises(ValueError, match=f"{name}.* must stay "):
            problem.optimizer.step()
        assert torch.equal(problem.flat(), parameters)
        assert torch.equal(problem.optimizer.state_dict()["state"][0]["step"], before[0]["step"])
