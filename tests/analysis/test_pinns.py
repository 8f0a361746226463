"""Physics-informed networks: solutions fulfil their equations and conditions, methods train, experiments are drawn."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from efcp.analysis.equations import (
    EQUATIONS,
    VISCOSITY,
    Edges,
    allen_cahn_solution,
    burgers_solution,
    equation,
    kdv_solution,
    reaction_solution,
)
from efcp.analysis.experiments import find_experiment, read_experiments
from efcp.analysis.methods import LineSearchLBFGS, Method, named_method
from efcp.analysis.paper import main
from efcp.analysis.pinns import SINGLE, load_points, pinn, relative_error
from efcp.analysis.tasks import Task, load_task_data
from efcp.analysis.training import Run, train

STEP = np.array([1e-3, 0.01])  # of x and t; solutions that are computed are known at multiples of 0.01 only
FIRST = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
SECOND = {-2: -1 / 12, -1: 4 / 3, 0: -5 / 2, 1: 4 / 3, 2: -1 / 12}
THIRD = {-3: 1 / 8, -2: -1, -1: 13 / 8, 1: -13 / 8, 2: 1, 3: -1 / 8}


def inner_points(name, count=200):
    """Points (count, 2) with times in [0.05, 0.95]."""
    problem, generator = equation(name), np.random.default_rng(0)
    x = generator.uniform(problem.low[0] + 0.01, problem.high[0] - 0.01, count)
    return np.stack([x, generator.integers(5, 96, count) / 100], axis=1)


class Taylor(torch.nn.Module):
    """The Taylor polynomials of a solution at points, from finite differences of fourth order."""

    def __init__(self, solution, points):
        super().__init__()
        self.points = torch.as_tensor(points)

        def derived(axis, stencil, order):
            shift = np.eye(2)[axis] * STEP[axis]
            total = sum(weight * solution(points + k * shift) for k, weight in stencil.items())
            return torch.as_tensor(total / STEP[axis] ** order)

        self.u = torch.as_tensor(solution(points))
        self.terms = [
            (0, 1, derived(0, FIRST, 1)),
            (0, 2, derived(0, SECOND, 2) / 2),
            (0, 3, derived(0, THIRD, 3) / 6),
            (1, 1, derived(1, FIRST, 1)),
            (1, 2, derived(1, SECOND, 2) / 2),
        ]

    def forward(self, points):
        away = points - self.points
        return self.u + sum(factor * away[:, axis] ** power for axis, power, factor in self.terms)

    def coefficient(self):
        return torch.tensor(VISCOSITY)


@pytest.mark.parametrize("name", EQUATIONS)
def test_solutions_fulfil_their_equations(name):
    problem, points = equation(name), inner_points(name)
    model = Taylor(problem.solution, points)
    where = torch.as_tensor(points).requires_grad_()
    residual = problem.residual(model(where), where, model).detach()
    size = model.terms[3][2].abs().median()  # of u_t
    assert residual.abs().median() < 5e-3 * max(size, 1)


class Solution(torch.nn.Module):
    """The solution of an equation, on edges, as far as conditions ask for its values."""

    def __init__(self, name):
        super().__init__()
        self.problem = equation(name)

    def forward(self, points):
        u = torch.as_tensor(self.problem.solution(points.detach().numpy()))
        return u + 0 * points.sum(1)  # at rest, as the wave begins


@pytest.mark.parametrize("name", EQUATIONS)
def test_solutions_fulfil_the_conditions(name):
    problem = equation(name)
    edges = Edges(problem.low, problem.high, torch.float64)
    for lacking in problem.conditions(Solution(name), edges):
        assert lacking.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "coarse", "fine"),
    [
        ("allen-cahn", allen_cahn_solution(), allen_cahn_solution(2048)),
        ("kdv", kdv_solution(), kdv_solution(512)),
        ("reaction-diffusion", reaction_solution(), reaction_solution(96)),
        ("burgers", burgers_solution, lambda points: burgers_solution(points, 120)),
    ],
)
def test_computed_solutions_are_exact_to_six_digits(name, coarse, fine):
    points = inner_points(name)
    error = np.linalg.norm(coarse(points) - fine(points)) / np.linalg.norm(fine(points))
    assert error < 2e-6


def test_computed_solutions_are_not_made_up_between_their_times():
    with pytest.raises(ValueError, match="multiples of 1/100"):
        kdv_solution()(np.array([[0.0, 0.005]]))


@pytest.mark.parametrize("suffix", ["", SINGLE])
def test_the_error_is_relative_to_the_solution(suffix):
    name = f"convection-10{suffix}"
    data = load_points(name, 64)
    assert data.train.inputs.shape == (64, 2)
    assert data.train.inputs.dtype == (torch.float32 if suffix else torch.float64)
    assert relative_error(name, lambda x: 1.25 * (x[:, 0] - 10 * x[:, 1]).sin(), data.test) == pytest.approx(
        0.25, abs=1e-5
    )
    model = pinn(name, 8, 2)
    assert model(data.train.inputs).dtype == data.train.inputs.dtype


def test_the_error_of_an_inverse_problem_is_that_of_its_coefficient():
    model = pinn("burgers-inverse", 8, 2)
    assert relative_error("burgers-inverse", model, None) == pytest.approx(0.05 / VISCOSITY - 1, rel=1e-6)
    loss = Task("pinn", "burgers-inverse", (2,), 64, 1, 64, width=8, layers=2).loss(
        model, torch.rand(9, 2).double(), None
    )
    loss.backward()
    assert model.log_coefficient.grad.abs() > 0


def test_networks_of_periodic_equations_are_periodic():
    model, points = pinn("kdv", 8, 2), torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(model(points), model(points + torch.tensor([2.0, 0.0], dtype=torch.float64)))


@pytest.mark.parametrize(
    ("name", "options", "lr", "steps"),
    [
        ("dense M-FAC, momentum", {"window": 16, "damping": 0.01}, 0.01, 60),
        ("low-rank M-FAC, momentum", {"window": 16, "damping": 0.01, "rank": 4}, 0.01, 60),
        ("sparse M-FAC, momentum", {"window": 16, "damping": 0.1, "density": 0.1}, 0.01, 60),
        ("L-BFGS, line search", {}, 1.0, 3),
        ("Adam, then L-BFGS", {"adam_steps": 20}, 0.003, 22),
    ],
)
@pytest.mark.parametrize("suffix", ["", SINGLE])
def test_methods_train(name, options, lr, steps, suffix):
    data_set = f"reaction-diffusion{suffix}"
    data = load_task_data(data_set, 64)
    task = Task("pinn", data_set, (2,), 64, steps, 64, width=8, layers=2, evaluations=2, diagnostics=1)
    result = train(Run("final", task, named_method(name, options), lr, 0), data)
    assert result.record["train_loss"] < 0.5 * task.loss(task.model(0), data.train.inputs, None).item()
    assert 0 < result.record["test_loss"] < 2
    assert result.record["steps"] == steps
    assert result.record["state_bytes"] > 0


def test_line_search_keeps_its_first_step():
    """The rate of L-BFGS is the length that it tries first, which no schedule changes."""
    lengths = []

    class Watched(LineSearchLBFGS):
        def step(self, closure):
            lengths.append(self.param_groups[0]["lr"])
            return super().step(closure)

    data = load_task_data("poisson", 32)
    task = Task("pinn", "poisson", (2,), 32, 3, 32, width=4, layers=1, evaluations=1, diagnostics=1)
    train(Run("tune", task, Method("watched", Watched, {}), 0.5, 0), data)
    assert lengths == [0.5] * 3


def test_a_rate_in_a_tensor_follows_the_schedule():
    data = load_task_data("poisson", 32)
    task = Task("pinn", "poisson", (2,), 32, 4, 32, width=4, layers=1, evaluations=1, diagnostics=1)
    losses = [
        train(Run("tune", task, Method("AdamW", constructor, {}), 0.1, 0), data).record["val_loss"]
        for constructor in (torch.optim.AdamW, lambda params, lr: torch.optim.AdamW(params, torch.tensor(lr)))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_experiment_of_several_equations(tmp_path: Path, capsys):
    file = tmp_path / "pair.toml"
    file.write_text("""
title = "Two equations"
[task]
network = "pinn"
data_set = ["convection-5", "poisson"]
train_size = 32
width = 4
layers = 1
epochs = 4
batch_size = 32
evaluations = 2
diagnostics = 1
[seeds]
tuning = [1000]
final = [0, 1]
[grids.some]
lr = [0.001, 0.01]
[[methods]]
name = ["AdamW", "L-BFGS, line search"]
grid = "some"
""")
    names = [experiment.name for experiment in read_experiments(file)]
    assert names == ["pair/convection-5", "pair/poisson"]
    main([str(file), "--out", str(tmp_path), "--jobs", "1"])
    for name in names:
        assert "relative error" in (tmp_path / name / "table.md").read_text()
        runs = pd.read_csv(tmp_path / name / "runs.csv")
        assert set(runs["data_set"]) == {name.split("/")[1]}
        assert len(runs) == 2 * (2 + 2)
    overview = (tmp_path / "pair" / "overview.md").read_text()
    assert all(word in overview for word in ("convection-5", "poisson", "AdamW", "L-BFGS"))
    assert (tmp_path / "pair" / "overview.png").stat().st_size > 10_000

    shutil.rmtree(tmp_path / "pair" / "convection-5")  # as before it has been run
    main([str(file), "--plot-only", "--out", str(tmp_path)])
    assert "convection-5: no table yet, there is no such folder" in capsys.readouterr().out
    overview = (tmp_path / "pair" / "overview.md").read_text()
    assert "convection-5" not in overview
    assert "poisson" in overview


def test_an_experiment_of_several_batch_sizes():
    experiments = read_experiments(find_experiment("batch-size"))
    assert [(e.name, e.task["batch_size"]) for e in experiments] == [
        ("batch-size/batch-512", 512),
        ("batch-size/batch-128", 128),
        ("batch-size/batch-32", 32),
    ]
    assert all(e.title.endswith(f"batch {e.task['batch_size']}") and e.group == "batch-size" for e in experiments)
