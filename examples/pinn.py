"""Solves a differential equation with a network: convection, u_t + 30 u_x = 0, on which Adam fails.

    python examples/pinn.py

A small network of x and t is trained until it fulfils the equation, the initial condition u(x, 0) = sin x and
periodicity. The loss has no noise, so its gradients can be trusted, and dense rows with a small relative damping reach
far. The program trains the same network by Adam, by L-BFGS and by dense M-FAC, prints the error of each against the
solution sin(x − 30t), and draws it against time in pinn.png, with the network's solution.
"""

import argparse
import math
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from efcp import DenseMFAC

SPEED = 30.0
TURN = 2 * math.pi


def on_line(x: float | None, t: float | None) -> Tensor:
    """128 points (128, 2) with this x, or with this t."""
    along = torch.linspace(0, 1, 128)
    return torch.stack([along * TURN if x is None else along * 0 + x, along if t is None else along * 0 + t], dim=1)


class Network(nn.Module):
    """Points (n, 2), x in [0, 2π] and t in [0, 1], to u (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()),
            *(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
        )

    def forward(self, points: Tensor) -> Tensor:
        u: Tensor = self.layers(points * torch.tensor([2 / TURN, 2.0]) - 1).squeeze(1)
        return u


def loss_of(network: nn.Module, points: Tensor) -> Tensor:
    """How far the network is from a solution: the mean squares of what the equation and its conditions lack."""
    points = points.clone().requires_grad_()
    gradient = torch.autograd.grad(network(points).sum(), points, create_graph=True)[0]
    equation = gradient[:, 1] + SPEED * gradient[:, 0]
    start = on_line(None, 0.0)
    initial = network(start) - start[:, 0].sin()
    periodic = network(on_line(0.0, None)) - network(on_line(TURN, None))
    return equation.square().mean() + initial.square().mean() + periodic.square().mean()


@torch.no_grad()
def error_of(network: nn.Module) -> float:
    """The error relative to the solution, on a grid."""
    x, t = torch.meshgrid(torch.linspace(0, TURN, 64), torch.linspace(0, 1, 64), indexing="ij")
    points = torch.stack([x.flatten(), t.flatten()], dim=1)
    solution = (points[:, 0] - SPEED * points[:, 1]).sin()
    return ((network(points) - solution).norm() / solution.norm()).item()


def make_optimizer(name: str, network: nn.Module) -> tuple[torch.optim.Optimizer, int]:
    """An optimizer, and how often it evaluates the loss in a step, at least."""
    if name == "Adam":
        return torch.optim.Adam(network.parameters(), lr=0.003), 1
    if name == "L-BFGS":
        search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.0, "tolerance_change": 0.0}
        return torch.optim.LBFGS(network.parameters(), max_iter=20, history_size=100, **search), 22
    options = {"direction": "momentum", "momentum": 0.9, "update_rms": 0.2, "relative_damping": True, "damping": 1e-6}
    return DenseMFAC(network.parameters(), lr=0.03, window=256, **options), 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=2000, help="of loss and gradient, for each optimizer")
    parser.add_argument("--plot", default="pinn.png", help="file of the plot")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # such a network is too small for more
    points = SobolEngine(2, scramble=True, seed=0).draw(1024, dtype=torch.float64) * torch.tensor([TURN, 1.0])

    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in ("Adam", "L-BFGS", "dense M-FAC"):
        torch.manual_seed(0)
        network = Network()
        optimizer, evaluations = make_optimizer(name, network)
        steps = max(1, arguments.evaluations // evaluations)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 if name == "L-BFGS" else 0.0, steps)

        def closure(network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(network, points)
            loss.backward()
            return loss

        seconds, errors, spent = [], [], 0.0
        for step in tqdm(range(steps), desc=name, unit="step"):
            start = time.perf_counter()
            optimizer.step(closure)
            schedule.step()
            spent += time.perf_counter() - start
            if (step + 1) % max(1, steps // 50) == 0:
                seconds.append(spent)
                errors.append(error_of(network))
        curves[name] = seconds, errors
        print(f"{name:<12} error {errors[-1]:.2g} after {spent:.0f} s")

    draw(network, curves, arguments.plot)


def draw(network: nn.Module, curves: dict[str, tuple[list[float], list[float]]], file: str) -> None:
    """The solution of the network that was trained last, and the errors of all against time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    x, t = torch.meshgrid(torch.linspace(0, TURN, 200), torch.linspace(0, 1, 200), indexing="ij")
    with torch.no_grad():
        u = network(torch.stack([x.flatten(), t.flatten()], dim=1)).view_as(x)
    image = left.pcolormesh(t, x, u, cmap="gray", rasterized=True)
    left.set(xlabel="t", ylabel="x", title=f"u, as found by {list(curves)[-1]}")
    figure.colorbar(image, ax=left)
    for (name, (seconds, errors)), style in zip(curves.items(), ("-", "--", "-."), strict=True):
        right.plot(seconds, errors, style, label=name)
    right.set(xlabel="seconds, one thread", ylabel="error relative to the solution", yscale="log")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(file, dpi=110)
    print(f"Written to {file}")


if __name__ == "__main__":
    main()
