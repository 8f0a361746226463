"""A user's compressor and preconditioner, those of the examples and worse ones, through what an optimizer promises."""

import copy
import io
import pickle
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import efcp
from efcp import EFCP, MFAC, TopK, estimate_memory, memory_report
from tests.contract.optimizers import assert_same
from tests.efcp.problems import Problem

EXAMPLES = Path(__file__).parents[2] / "examples"


def from_example(name, cls):
    """A class of an example, put where pickle finds it."""
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=__name__)
    for value in found.values():
        if isinstance(value, type) and value.__module__ == __name__:
            setattr(sys.modules[__name__], value.__name__, value)
    return found[cls]


TopRows = from_example("custom_compressor", "TopRows")
Normalized = from_example("custom_preconditioner", "Normalized")


@dataclass(frozen=True)
class Rounded(efcp.Compressor):
    """Keeps whole gradients in a dtype, which has no default."""

    dtype: torch.dtype
    names: tuple[str, ...] = ("kept",)

    def allocate(self, param: Tensor, window: int) -> dict[str, Tensor]:
        zeros = torch.zeros(window, param.numel(), dtype=self.dtype, device=param.device)
        return {name: zeros.clone() for name in self.names}

    def row_names(self, param: Tensor) -> tuple[str, ...]:
        return self.names

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> efcp.Window:
        return efcp.Separate([efcp.windows.dense.DenseWindow(state[self.names[0]]) for state in states])


@dataclass(frozen=True)
class Slowed(efcp.Preconditioner):
    """Along the newest row, slower with each step; keeps a number and a tensor, and its option has no default."""

    rate: float
    name: str = "trust"

    def allocate(self, window: int, device: torch.device) -> dict[str, object]:
        return {self.name: torch.ones((), dtype=torch.float64, device=device), "calls": 0}

    def weights(self, gram: efcp.gram.Gram, slot: Tensor) -> Tensor:
        gram.state["trust"] *= self.rate
        gram.state["calls"] += 1
        return torch.zeros_like(gram.matrix[0]).index_fill_(0, slot, 1.0) * gram.state["trust"]


PAIRS = {
    "example-compressor": (TopRows(density=0.3), MFAC(damping=0.1)),
    "example-preconditioner": (TopK(density=0.3, block_size=8), Normalized()),
    "both-examples": (TopRows(density=0.3), Normalized()),
    "options-without-defaults": (Rounded(torch.float32), Slowed(0.9)),
}


@pytest.fixture(params=PAIRS)
def options(request):
    compressor, preconditioner = PAIRS[request.param]
    return {"compressor": compressor, "preconditioner": preconditioner, "lr": 0.1, "momentum": 0.5}


def saved_and_loaded(problem, options):
    file = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    other = Problem(dtype=torch.float32, **options)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(other.params, problem.params, strict=True):
        p.data.copy_(q.data)
    other.generator.set_state(problem.generator.get_state())
    return other


WAYS = {
    "state_dict": saved_and_loaded,
    "deepcopy": lambda problem, options: copy.deepcopy(problem),
    "pickle": lambda problem, options: pickle.loads(pickle.dumps(problem)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_as_the_optimizer_does(options, way):
    problem = Problem(dtype=torch.float32, **options)
    before = problem.flat()
    problem.step(7)  # the window has 5 rows
    assert problem.flat().isfinite().all()
    assert not torch.equal(problem.flat(), before)
    other = WAYS[way](problem, options)
    assert_same(problem, other)
    problem.step(4)
    other.step(4)
    assert_same(problem, other)


def test_estimate_is_what_is_allocated(options):
    problem = Problem(dtype=torch.float32, **options)
    problem.step()
    assert estimate_memory(problem.params, EFCP, window=5, **options) == memory_report(problem.optimizer)


def test_diagnostics_and_the_gram_matrix_are_those_of_the_rows(options):
    problem = Problem(dtype=torch.float32, **{**options, "momentum": 0.0})
    problem.step(6)
    before = problem.flat()
    problem.step()
    u = (before - problem.flat()).double() / 0.1
    seen = problem.optimizer.diagnostics(quantiles=True)
    assert seen["update_norm"] == pytest.approx(u.norm().item(), rel=1e-4)
    g = torch.cat([p.grad.flatten() for p in problem.params]).double()
    assert seen["grad_norm"] == pytest.approx(g.norm().item(), rel=1e-5)
    assert seen["scaling_q50"] == pytest.approx((u / g).abs().quantile(0.5, interpolation="lower").item(), rel=1e-3)
    errors = [s["error"].flatten() for s in problem.optimizer.state.values() if "error" in s]
    assert seen["error_norm"] == pytest.approx(torch.cat(errors).norm().item() if errors else 0.0, rel=1e-5)


def test_a_skipped_step_and_a_missing_gradient_change_what_they_should(options):
    problem = Problem(dtype=torch.float32, **options)
    problem.step(3)
    before = problem.flat()
    problem.set_gradients()
    problem.params[0].grad[0] = float("nan")
    problem.optimizer.step()
    assert torch.equal(problem.flat(), before)
    assert problem.optimizer.skipped_steps == 1
    problem.set_gradients()
    first, problem.params[0].grad = problem.params[0].detach().clone(), None
    problem.optimizer.step()
    assert torch.equal(problem.params[0], first)
    assert not torch.equal(problem.flat(), before)
    assert problem.flat().isfinite().all()


def test_what_the_example_does_not_keep_is_the_error():
    """c + e = e + g, exactly, and c has the rows of largest norm."""
    param = torch.nn.Parameter(torch.zeros(5, 3))
    optimizer = EFCP([param], 0.1, TopRows(density=0.4), window=4)
    total = torch.zeros(5, 3)
    for slot in range(6):
        param.grad = torch.randn(5, 3)
        total += param.grad
        optimizer.step()
        state = optimizer.state[param]
        largest = total.norm(dim=1).topk(2).indices
        kept = torch.zeros(5, 3)
        kept[state["positions"][slot % 4]] = state["values"][slot % 4]
        assert kept.norm(dim=1).nonzero().flatten().tolist() == sorted(largest.tolist())
        total -= kept
        assert torch.equal(total, state["error"])


def test_the_example_normalizes():
    problem = Problem(compressor=TopK(density=0.3), preconditioner=Normalized(), lr=0.1)
    for _ in range(3):
        problem.step()
        assert problem.optimizer.diagnostics()["update_norm"] == pytest.approx(1)


def test_dtypes_in_param_groups_reach_the_compressor_as_dtypes():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "dtype": torch.bfloat16}]
    optimizer = EFCP(groups, compressor=Rounded(torch.float32), window=3)
    optimizer.allocate_state()
    assert [optimizer.state[p]["kept"].dtype for p in params] == [torch.float32, torch.bfloat16]
    assert [group["dtype"] for group in optimizer.param_groups] == ["float32", "bfloat16"]


class Undecorated(efcp.Preconditioner):
    def __init__(self, rate: float = 0.9) -> None:
        object.__setattr__(self, "rate", rate)

    def weights(self, gram: efcp.gram.Gram, slot: Tensor) -> Tensor:
        return gram.matrix[0]


@dataclass(frozen=True)
class Momentum(Slowed):
    momentum: float = field(default=0.5)


@dataclass(frozen=True)
class Dense(Slowed):
    density: float = 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compressor": TopRows}, TypeError, "compressor must be an instance of a subclass of efcp.Compressor"),
        ({"preconditioner": TopK()}, TypeError, "preconditioner must be an instance of a subclass of efcp.Precond"),
        ({"preconditioner": Undecorated()}, TypeError, r"Undecorated has the fields \(\) and takes \(rate\)"),
        ({"preconditioner": Momentum(0.9)}, ValueError, "preconditioner must not have options named momentum"),
        ({"preconditioner": Dense(0.9)}, ValueError, "preconditioner must not have options named density"),
    ],
    ids=["class", "wrong-part", "undecorated", "option-of-the-optimizer", "option-of-the-compressor"],
)
def test_parts_that_could_not_work_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        EFCP([torch.nn.Parameter(torch.ones(3))], **arguments)


@pytest.mark.parametrize("name", ["numel", "momentum", "average", "gram", "weights", "version", "calls"])
def test_names_in_the_state_that_are_taken_are_refused(name):
    problem = Problem(compressor=Rounded(torch.float32, (name,)), preconditioner=Slowed(0.9))
    with pytest.raises(ValueError, match=f"state of Rounded must not have names that are taken: {name}"):
        problem.step()


def test_a_preconditioner_cannot_replace_the_gram_matrix():
    problem = Problem(preconditioner=Slowed(0.9, "gram"))
    with pytest.raises(ValueError, match="state of Slowed must not have names that are taken: gram"):
        problem.step()
