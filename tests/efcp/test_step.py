"""What users expect of a step: options, param groups, dtypes and shapes, non-finite gradients, errors, costs."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efcp import EFCP, GGT, MFAC, DenseGGT, DenseMFAC, Identity, SparseGGT, SparseMFAC, TopK, kernels
from efcp.kernels import reference
from efcp.lookout import Lookout
from efcp.preconditioners import mfac
from efcp.windows import batched, dense
from tests.efcp.problems import Problem, window_rows

ALL = [SparseMFAC, DenseMFAC, SparseGGT, DenseGGT]


def updates(problem, times):
    """The updates that the optimizer applies in each of some steps, flat."""
    steps = []
    for _ in range(times):
        before = problem.flat()
        problem.step()
        steps.append(before - problem.flat())
    return steps


# ---- options


def test_momentum_is_heavy_ball_on_the_update(compressor):
    plain = updates(Problem(compressor=compressor, lr=0.1), 8)
    heavy = updates(Problem(compressor=compressor, lr=0.1, momentum=0.9), 8)
    velocity = torch.zeros_like(plain[0])
    for u, v in zip(plain, heavy, strict=True):
        velocity = 0.9 * velocity + u
        torch.testing.assert_close(v, velocity, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_weight_decay_is_decoupled_and_multiplied_by_lr(compressor, momentum):
    plain = Problem(compressor=compressor, lr=0.1, momentum=momentum)
    decayed = Problem(compressor=compressor, lr=0.1, momentum=momentum, weight_decay=0.3)
    for _ in range(7):
        before = decayed.flat()
        (u,) = updates(plain, 1)
        decayed.step()
        torch.testing.assert_close(decayed.flat(), (1 - 0.1 * 0.3) * before - u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_maximize_is_minimising_the_negative(compressor, preconditioner, momentum):
    if getattr(compressor, "error_dtype", None) == torch.int4:  # whose random rounding is not symmetric
        compressor = replace(compressor, error_dtype=torch.int8)
    options = {"compressor": compressor, "preconditioner": preconditioner, "momentum": momentum, "weight_decay": 0.1}
    up = Problem(maximize=True, **options)
    down = Problem(**options)
    for _ in range(7):
        up.step()
        down.set_gradients()
        for p in down.params:
            p.grad.neg_()
        down.optimizer.step()
    torch.testing.assert_close(up.flat(), down.flat(), rtol=1e-12, atol=1e-12)


def test_lr_may_be_a_tensor(compressor):
    number, tensor = Problem(compressor=compressor, lr=0.1), Problem(compressor=compressor, lr=torch.tensor([0.1]))
    for problem in (number, tensor):
        problem.step(3)
    tensor.optimizer.param_groups[0]["lr"].fill_(0.02)
    number.optimizer.param_groups[0]["lr"] = 0.02
    for problem in (number, tensor):
        problem.step(3)
    torch.testing.assert_close(number.flat(), tensor.flat(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    ],
    ids=["linear", "cosine", "one-cycle", "lambda"],
)
def test_schedulers(scheduler):
    scheduled, by_hand = Problem(compressor=TopK(0.2, 16)), Problem(compressor=TopK(0.2, 16))
    schedule = scheduler(scheduled.optimizer)
    for _ in range(6):
        by_hand.optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        by_hand.step()
        scheduled.step()
        schedule.step()
    assert torch.equal(scheduled.flat(), by_hand.flat())


@pytest.mark.parametrize("cls", ALL)
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(cls):
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = cls([p], lr=0.01, window=4)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 13.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SparseMFAC, {"damping": 1e-2, "density": 0.2}),
        (DenseMFAC, {"damping": 1e-2}),
        (SparseGGT, {"density": 0.2}),
        (DenseGGT, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trains_a_regression_from_mini_batches(cls, options):
    inputs = torch.randn(512, 20)
    targets = inputs @ torch.randn(20, 3)
    model = torch.nn.Linear(20, 3)
    optimizer = cls(model.parameters(), lr=0.3, window=20, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)

    def loss(rows):
        return torch.nn.functional.mse_loss(model(inputs[rows]), targets[rows])

    first = loss(slice(None)).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.randint(512, (16,))).backward()
        optimizer.step()
        scheduler.step()
    assert loss(slice(None)) < 0.01 * first


# ---- param groups


def test_groups_have_options_of_their_own():
    first, second = (torch.nn.Parameter(torch.ones(60)) for _ in range(2))
    optimizer = SparseMFAC(
        [
            {"params": [first], "lr": 0.0, "density": 0.5, "block_size": 20},
            {"params": [second], "weight_decay": 0.5, "value_dtype": torch.float32},
        ],
        lr=0.1,
        window=3,
        density=0.05,
    )
    first.grad, second.grad = torch.randn(60), torch.zeros(60)
    optimizer.step()
    assert torch.equal(first, torch.ones(60))
    torch.testing.assert_close(second.detach(), torch.full((60,), 0.95))
    assert optimizer.state[first]["values"].shape == (3, 3, 10)
    assert optimizer.state[second]["values"].shape == (1, 3, 3)
    assert optimizer.state[second]["values"].dtype == torch.float32


def test_added_group_takes_part_from_then_on(compressor):
    problem = Problem(compressor=compressor, lr=1.0)
    problem.step(7)
    added = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    problem.optimizer.add_param_group({"params": [added], "lr": 0.5})
    problem.params.append(added)
    problem.step(2)
    G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params], 1)
    torch.testing.assert_close(problem.optimizer.shared["gram"], G @ G.t(), rtol=1e-12, atol=1e-12)
    assert added.abs().sum() > 0
    assert (window_rows(problem.optimizer, added).abs().sum(1) > 0).sum() == 2


def test_parameter_without_gradient_stays_and_has_a_zero_row(compressor):
    problem = Problem(compressor=compressor, window=4, momentum=0.5, weight_decay=0.1)
    problem.step(2)
    problem.set_gradients()
    problem.params[0].grad = None
    before = problem.values()
    problem.optimizer.step()
    assert torch.equal(problem.params[0], before[0])
    assert not torch.equal(problem.params[3], before[3])
    rows = [window_rows(problem.optimizer, p) for p in problem.params]
    assert not rows[0][2].any()
    G = torch.cat(rows, 1)
    torch.testing.assert_close(problem.optimizer.shared["gram"], G @ G.t(), rtol=1e-12, atol=1e-12)


def test_first_parameter_may_never_have_a_gradient(compressor):
    problem = Problem(compressor=compressor, window=4)
    for _ in range(6):
        problem.set_gradients()
        problem.params[0].grad = None
        problem.optimizer.step()
    assert "gram" in problem.optimizer.shared
    assert compressor.row_names(problem.params[0])[0] not in problem.optimizer.state[problem.params[0]]


def test_step_without_any_gradient_does_nothing():
    problem = Problem(compressor=TopK())
    before = problem.flat()
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)
    assert not problem.optimizer.state
    assert problem.optimizer.skipped_steps == 0


def test_empty_group_and_empty_parameter():
    empty, p = torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.ones(3))
    optimizer = SparseMFAC([{"params": []}, {"params": [empty, p]}], window=2)
    for _ in range(3):
        empty.grad, p.grad = torch.zeros(0), torch.randn(3)
        optimizer.step()
    assert p.isfinite().all()


# ---- dtypes, shapes, memory layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_follows_double(dtype, compressor, preconditioner):
    low, double = (
        Problem(dtype=t, compressor=compressor, preconditioner=preconditioner) for t in (dtype, torch.float64)
    )
    for p, q in zip(low.params, double.params, strict=True):
        q.data.copy_(p.data)
    for _ in range(6):
        low.set_gradients()
        for p, q in zip(low.params, double.params, strict=True):
            q.grad = p.grad.double()
        low.optimizer.step()
        double.optimizer.step()
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(low.flat().double(), double.flat(), rtol=tolerance, atol=tolerance)


def test_non_contiguous_parameters_and_gradients(compressor):
    plain = Problem(compressor=compressor, shapes=[(6, 8), (2, 3, 4, 5)], momentum=0.5)
    strided = Problem(compressor=compressor, shapes=[(6, 8), (2, 3, 4, 5)], momentum=0.5)
    transposed = torch.empty(8, 6, dtype=torch.float64).t()
    strided.params[0].data = transposed.copy_(strided.params[0].data)
    strided.params[1].data = strided.params[1].data.contiguous(memory_format=torch.channels_last)
    for _ in range(7):
        plain.step()
        strided.set_gradients()
        strided.params[1].grad = strided.params[1].grad.contiguous(memory_format=torch.channels_last)
        strided.optimizer.step()
    assert not strided.params[0].is_contiguous()
    assert torch.equal(plain.flat(), strided.flat())


def test_one_block_or_many_small_models(compressor):
    """Fewer elements than a block, one element, no dimension."""
    problem = Problem(shapes=[()], compressor=compressor)
    problem.step(8)
    assert problem.flat().isfinite().all()


def test_gradients_are_not_changed(compressor, preconditioner):
    problem = Problem(compressor=compressor, preconditioner=preconditioner, beta1=0.5, momentum=0.5, maximize=True)
    for _ in range(3):
        problem.set_gradients()
        before = [p.grad.clone() for p in problem.params]
        problem.optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, before, strict=True))


def test_autograd_notices_a_step_between_forward_and_backward():
    p = torch.nn.Parameter(torch.randn(3))
    optimizer = SparseMFAC([p], window=2)
    loss = p.square().sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- non-finite gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200], ids=str)
@pytest.mark.parametrize(("step", "beta1"), [(0, 0.0), (1, 0.5), (6, 0.0), (6, 0.5)])
def test_step_with_a_non_finite_gradient_changes_nothing_but_the_row(bad, step, beta1, compressor, preconditioner):
    """Errors of sparse windows are those of before up to one rounding of the largest number that was in them."""
    options = {"momentum": 0.5, "beta1": beta1, "weight_decay": 0.1, "window": 4}
    problem = Problem(compressor=compressor, preconditioner=preconditioner, **options)
    problem.step(step)
    problem.set_gradients()
    problem.params[3].grad[17] = bad
    before = problem.flat()
    kept = {
        (i, name): problem.optimizer.state[p][name].clone()
        for i, p in enumerate(problem.params)
        for name in ("error", "momentum", "average")
        if name in problem.optimizer.state[p]
    }
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)
    assert problem.optimizer.skipped_steps == 1
    for (i, name), value in kept.items():
        now, grad = problem.optimizer.state[problem.params[i]][name], problem.params[i].grad
        if name == "error" and isinstance(compressor, TopK) and grad is not None:
            largest = max(float(t[t.isfinite()].abs().max()) for t in (value, grad.clamp(-1e6, 1e6)))
            torch.testing.assert_close(now, value, rtol=0, atol=2 * torch.finfo(value.dtype).eps * largest)
        else:
            assert torch.equal(now, value)
    for p in problem.params:
        assert not window_rows(problem.optimizer, p)[step % 4].any()
        for value in problem.optimizer.state[p].values():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()
    problem.step(6)
    assert problem.flat().isfinite().all()
    assert not torch.equal(problem.flat(), before)
    assert problem.optimizer.skipped_steps == 1


def test_float16_gradients_with_a_large_norm_are_not_skipped():
    p = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    optimizer = SparseMFAC([p], lr=1e3, window=2)
    p.grad = torch.full_like(p, 1000.0)  # a norm of 100,000, beyond the range of float16
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert p.abs().sum() > 0


# ---- errors

BAD_OPTIONS = {
    "lr": (-1.0, "lr must be a finite number ≥ 0, got -1.0"),
    "lr_tensor": (torch.ones(2), "lr must have one element"),
    "window": (0, "window must be an integer ≥ 1, got 0"),
    "window_float": (2.5, "window must be an integer ≥ 1, got 2.5"),
    "momentum": (1.0, "momentum must lie in [0, 1), got 1.0"),
    "weight_decay": (float("nan"), "weight_decay must be a finite number ≥ 0, got nan"),
    "max_update_norm": (0.0, "max_update_norm must be a finite number > 0, got 0.0"),
    "maximize": (1, "maximize must be True or False, got 1"),
    "density": (1.5, "density must lie in (0, 1], got 1.5"),
    "density_zero": (0, "density must lie in (0, 1], got 0"),
    "block_size": (40000, "block_size must be an integer from 1 to 32768, got 40000"),
    "damping": (0.0, "damping must be a finite number > 0, got 0.0"),
    "value_dtype": (
        torch.int8,
        "value_dtype must be one of torch.bfloat16, torch.float32, got torch.int8",
    ),
    "error_dtype": (torch.float16, "error_dtype must be one of torch.bfloat16, torch.float32, torch.float64"),
    "error_feedback": (0, "error_feedback must be True or False, got 0"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_named(case):
    value, message = BAD_OPTIONS[case]
    name = case.removesuffix("_tensor").removesuffix("_float").removesuffix("_zero")
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseMFAC([torch.nn.Parameter(torch.zeros(3))], **{name: value})
    optimizer = SparseMFAC([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="must"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("eps", 0.0, "> 0"),
        ("beta2", 0.0, r"lie in \(0, 1\]"),
        ("beta2", 1.1, r"lie in \(0, 1\]"),
        ("beta1", 1.0, "lie in"),
    ],
)
def test_bad_option_of_ggt_is_named(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} must .*{allowed}.*, got {value}"):
        SparseGGT([torch.nn.Parameter(torch.zeros(3))], **{name: value})


@pytest.mark.parametrize("name", ["window", "damping", "max_update_norm"])
def test_groups_must_agree_on_what_they_share(name):
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{name} must be the same in all param groups, got"):
        SparseMFAC([{"params": [params[0]]}, {"params": [params[1]], name: 7}], max_update_norm=3.0)
    optimizer = SparseMFAC([{"params": [p]} for p in params], max_update_norm=3.0)
    params[0].grad = torch.ones(3)
    optimizer.param_groups[1][name] = 7
    with pytest.raises(ValueError, match=f"{name} must be the same"):
        optimizer.step()
    assert not params[0].any()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_parameters_must_be_real_floating_point(dtype):
    p = torch.zeros(3, dtype=dtype)
    message = rf"params must be of dtype float16, .* got {dtype} for param_groups\[0\], parameter 0"
    with pytest.raises(TypeError, match=message):
        SparseMFAC([p])


def test_sparse_gradients_are_refused_before_anything_is_changed():
    dense, sparse = torch.nn.Parameter(torch.zeros(3)), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = SparseMFAC([dense, *sparse.parameters()], window=2)
    dense.grad = torch.ones(3)
    sparse(torch.tensor([1])).sum().backward()
    message = r"gradients must be dense, got torch.sparse_coo for param_groups\[0\], parameter 1"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert not dense.any()
    assert not optimizer.state


# ---- costs


class Operations(TorchDispatchMode):
    """Records the names of operations, and the sizes of tensors that they allocate."""

    def __init__(self):
        super().__init__()
        self.names, self.allocated = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)
        }
        result = func(*args, **kwargs)
        self.names.add(func.overloadpacket.__name__)
        for t in torch.utils._pytree.tree_leaves(result):
            if is_tensor(t) and t.untyped_storage().data_ptr() not in inputs:
                self.allocated.append(t.untyped_storage().nbytes())
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero"}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "beta1": 0.5, "max_update_norm": 1.0, "weight_decay": 0.1}])
@pytest.mark.parametrize("preconditioner", [MFAC(), GGT()], ids=["mfac", "ggt"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_step_never_waits_for_a_value(options, preconditioner, lr, compressor, monkeypatch):
    """No operation whose result the host must know before it goes on: a number, or a shape."""
    for module in (mfac, dense, batched):
        monkeypatch.setattr(module, "is_on_cpu", lambda tensor: False)  # as on an accelerator
    monkeypatch.setattr(kernels, "is_fused", lambda tensor: False)
    monkeypatch.setattr(Lookout, "_read", lambda *_: None)  # it copies, and waits for nothing
    problem = Problem(compressor=compressor, preconditioner=preconditioner, lr=lr, window=3, **options)
    for _ in range(5):
        problem.set_gradients()
        with Operations() as operations:
            problem.optimizer.step()
        assert not operations.names & SYNCHRONISING
        assert "index_copy_" in operations.names


def test_sparse_step_has_no_temporary_of_the_size_of_a_parameter():
    numel = 3 << 20
    p = torch.nn.Parameter(torch.zeros(numel))
    optimizer = SparseMFAC([p], window=8, momentum=0.9, weight_decay=0.1, max_update_norm=1.0)
    p.grad = torch.randn(numel)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert 0 < max(operations.allocated) <= 8 * reference.PART < 4 * numel


def test_dense_step_has_at_most_one_temporary_of_the_size_of_a_parameter():
    numel = 1 << 22
    p = torch.nn.Parameter(torch.zeros(numel))
    optimizer = DenseMFAC([p], window=8)
    p.grad = torch.randn(numel)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    large = [size for size in operations.allocated if size >= 2 * numel]
    assert large == [4 * numel]


def test_identity_and_top_k_are_interchangeable():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = EFCP([p], 0.1, Identity(), GGT(), window=3)
    p.grad = torch.ones(5)
    optimizer.step()
    assert (p < 1).all()
