"""Physics-informed networks (Raissi et al., 2019): a network of the coordinates that is trained to solve an equation.

Nothing is learned from examples, but in the inverse problem: the loss is the mean square of the equation's residual at
points inside, and of what boundary and initial conditions lack. How good a network is, is measured where the solution
is known: the error relative to it, ‖u − u*‖ / ‖u*‖ over points; in the inverse problem |ν − ν*| / ν*.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from efcp.analysis.data import DataSet, Split
from efcp.analysis.equations import EQUATIONS, Equation, equation

SINGLE = "-float32"
"""The end of the name of a data set in float32. All others are in float64."""
DATA_SETS = (*EQUATIONS, *(f"{name}{SINGLE}" for name in EQUATIONS))
POINTS = 1024
_HELD_OUT = 2000  # points of validation; the test has twice as many
_TIMES = 101  # at which solutions are known


class PINN(nn.Module):
    """Points (n, 2) to u (n,): a network of hidden layers with tanh, for coordinates scaled to [−1, 1].

    Args:
        problem: the equation. Where it has harmonics, sines and cosines of x take the place of x.
        width: of hidden layers.
        layers: hidden ones.
    """

    def __init__(self, problem: Equation, width: int, layers: int) -> None:
        super().__init__()
        self.harmonics, self.low, self.high = problem.harmonics, problem.low, problem.high
        sizes = [2 * self.harmonics + 1 if self.harmonics else 2, *[width] * layers, 1]
        layers_made = [nn.Linear(*both) for both in pairwise(sizes)]
        self.layers = nn.ModuleList(layers_made)
        for layer in layers_made:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_coefficient: nn.Parameter | None = None
        if problem.unknown:
            self.log_coefficient = nn.Parameter(torch.tensor(math.log(0.05)))

    def coefficient(self) -> Tensor:
        """The coefficient that is to be found, > 0: ()."""
        assert self.log_coefficient is not None
        return self.log_coefficient.exp()

    def forward(self, points: Tensor) -> Tensor:
        low, high = points.new_tensor(self.low), points.new_tensor(self.high)
        scaled = (2 * points - low - high) / (high - low)
        if self.harmonics:
            k = math.pi * torch.arange(1, self.harmonics + 1, dtype=points.dtype)
            angles = scaled[:, :1] * k
            scaled = torch.cat([angles.sin(), angles.cos(), scaled[:, 1:]], dim=1)
        for layer in self.layers[:-1]:
            scaled = layer(scaled).tanh()
        u: Tensor = self.layers[-1](scaled).squeeze(1)
        return u


def pinn(data_set: str, width: int, layers: int) -> PINN:
    """The network for an equation, in the data set's dtype."""
    return PINN(equation(data_set.removesuffix(SINGLE)), width, layers).to(_dtype(data_set))


def load_points(data_set: str, train_size: int | None = None) -> DataSet:
    """Points (n, 2) inside, evenly spread and the same for all runs; validation and test have the solution (n,) there.

    Args:
        data_set: one of `DATA_SETS`.
        train_size: the number of points at which the residual counts; None for 1,024.
    """
    problem, dtype = equation(data_set.removesuffix(SINGLE)), _dtype(data_set)
    inside = SobolEngine(2, scramble=True, seed=0).draw(train_size or POINTS, dtype=torch.float64)
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (problem.low, problem.high))
    generator = np.random.default_rng(0)

    def held_out(count: int) -> Split:
        x = generator.uniform(problem.low[0], problem.high[0], count)
        t = problem.low[1] + (problem.high[1] - problem.low[1]) * generator.integers(1, _TIMES, count) / (_TIMES - 1)
        points = np.stack([x, t], axis=1)
        return Split(*(torch.as_tensor(array, dtype=dtype) for array in (points, problem.solution(points))))

    train = Split((low + (high - low) * inside).to(dtype), torch.zeros(len(inside), dtype=dtype))
    return DataSet(data_set, train, held_out(_HELD_OUT), held_out(2 * _HELD_OUT))


def loss(data_set: str, model: nn.Module, points: Tensor) -> Tensor:
    """The loss that training minimises: ()."""
    return equation(data_set.removesuffix(SINGLE)).loss(model, points)


@torch.no_grad()
def relative_error(data_set: str, model: nn.Module, split: Split) -> float:
    """‖u − u*‖ / ‖u*‖ over the points of a split; in an inverse problem that of the coefficient."""
    problem = equation(data_set.removesuffix(SINGLE))
    if problem.unknown:
        assert isinstance(model, PINN)
        return abs(model.coefficient().item() / problem.unknown - 1)
    difference = model(split.inputs).double() - split.labels.double()
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(split.labels.double())).item()


def _dtype(data_set: str) -> torch.dtype:
    return torch.float32 if data_set.endswith(SINGLE) else torch.float64
