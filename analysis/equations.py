"""Differential equations for physics-informed networks, each with its residual, its conditions, and its solution.

name                equation                           on                 conditions
convection-β        u_t + β u_x = 0                    [0, 2π] × [0, 1]   u(x, 0) = sin x, periodic
burgers             u_t + u u_x = ν u_xx, ν = 0.01/π   [−1, 1] × [0, 1]   u(x, 0) = −sin πx, 0 at the ends
allen-cahn          u_t = 10⁻⁴ u_xx + 5 (u − u³)       [−1, 1] × [0, 1]   u(x, 0) = x² cos πx, periodic
poisson             −Δu = f                            [0, 1]²            0 at the edges
kdv                 u_t + u u_x + 0.0025 u_xxx = 0     [−1, 1] × [0, 1]   u(x, 0) = cos πx, periodic
wave                u_tt = 4 u_xx                      [0, 1]²            u(x, 0) given, at rest, 0 at the ends
reaction-diffusion  u_t = 3 u_xx + 5 u (1 − u)         [0, 2π] × [0, 1]   u(x, 0) a bump, periodic
burgers-inverse     as burgers, with ν to be found     the same           100 values of u instead

The first four and the wave equation are usual tests of such networks (Raissi et al., 2019; Krishnapriyan et al., 2021,
whose convection has β = 30). Points are (n, 2): x and t, or x and y. Residuals are divided by the size of their terms
where that is far from 1, so that residual and conditions count alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.floating[Any]]
Complex = NDArray[np.complexfloating[Any, Any]]
VISCOSITY = 0.01 / math.pi  # of Burgers' equation
_ON_EDGES = 128  # points on which a condition is asked for


@dataclass(frozen=True)
class Equation:
    """An equation on a rectangle.

    Attributes:
        low: the rectangle's corner with the smallest coordinates.
        high: that with the largest.
        residual: from u (n,) and points (n, 2), through which u was computed, and the network: (n,).
        conditions: from a network and the rectangle's edges, how far each condition is from fulfilled: a list of (n,).
        solution: the solution at points (n, 2): (n,).
        harmonics: the number of sines and cosines of x that the network sees in place of x. It is then periodic.
        weight: of the conditions in the loss.
        unknown: the true value of a coefficient that is to be found, if there is one.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    residual: Callable[[Tensor, Tensor, nn.Module], Tensor]
    conditions: Callable[[nn.Module, "Edges"], Sequence[Tensor]]
    solution: Callable[[Array], Array]
    harmonics: int = 0
    weight: float = 1.0
    unknown: float | None = None

    def loss(self, model: nn.Module, points: Tensor) -> Tensor:
        """The mean square of the residual at points (n, 2), and of what the conditions lack: ()."""
        points = points.detach().requires_grad_()
        residual = self.residual(model(points), points, model)
        edges = Edges(self.low, self.high, points.dtype)
        lacking = [part.square().mean() for part in self.conditions(model, edges)]
        return residual.square().mean() + self.weight * torch.stack(lacking).sum()


@dataclass(frozen=True)
class Edges:
    """Points on the edges of a rectangle, evenly spaced, as tensors (128, 2)."""

    low: tuple[float, float]
    high: tuple[float, float]
    dtype: torch.dtype

    def at(self, x: float | None = None, t: float | None = None) -> Tensor:
        """The points with this x, or with this t."""
        coordinates = []
        for fixed, low, high in zip((x, t), self.low, self.high, strict=True):
            line = torch.linspace(low, high, _ON_EDGES, dtype=self.dtype)
            coordinates.append(line if fixed is None else torch.full_like(line, fixed))
        return torch.stack(coordinates, dim=1)


def gradient(u: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """u_x and u_t at each point, (n,); they can be derived again."""
    both = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    return both[:, 0], both[:, 1]


def _convection(speed: float) -> Equation:
    def residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
        u_x, u_t = gradient(u, points)
        return u_t + speed * u_x

    def conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
        start = edges.at(t=0)
        return [model(start) - start[:, 0].sin(), model(edges.at(x=0)) - model(edges.at(x=2 * math.pi))]

    return Equation(
        (0.0, 0.0), (2 * math.pi, 1.0), residual, conditions, lambda points: np.sin(points[:, 0] - speed * points[:, 1])
    )


def _burgers_residual(u: Tensor, points: Tensor, viscosity: float | Tensor) -> Tensor:
    u_x, u_t = gradient(u, points)
    u_xx, _ = gradient(u_x, points)
    return u_t + u * u_x - viscosity * u_xx


def _burgers_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    start = edges.at(t=0)
    return [model(start) + (math.pi * start[:, 0]).sin(), model(edges.at(x=-1)), model(edges.at(x=1))]


def burgers_solution(points: Array, nodes: int = 200) -> Array:
    """Cole's and Hopf's formula for u(x, 0) = −sin πx, by Gauss–Hermite quadrature with this many nodes.

    With φ(y) = exp(−cos(πy)/(2πν)) and y = x − 2 √(νt) z,  u = −∫ sin(πy) φ(y) e^(−z²) dz / ∫ φ(y) e^(−z²) dz.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - 2 * np.sqrt(VISCOSITY * t) * z
    density = weights * np.exp(-(np.cos(math.pi * y) + 1) / (2 * math.pi * VISCOSITY))
    solution: Array = -(np.sin(math.pi * y) * density).sum(1) / density.sum(1)
    return solution


def _burgers_data() -> tuple[Array, Array]:
    """Returns the data of the inverse problem: 100 points (100, 2), and u there, (100,)."""
    points = np.random.default_rng(1).uniform((-1, 0.05), (1, 1), size=(100, 2))
    return points, burgers_solution(points)


def _burgers_inverse() -> Equation:
    points, values = _burgers_data()

    def residual(u: Tensor, points: Tensor, model: nn.Module) -> Tensor:
        return _burgers_residual(u, points, model.coefficient())  # type: ignore[operator]

    def conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
        known, there = (torch.as_tensor(array, dtype=edges.dtype) for array in (points, values))
        return [model(known) - there]

    return Equation((-1.0, 0.0), (1.0, 1.0), residual, conditions, burgers_solution, unknown=VISCOSITY, weight=10.0)


def _allen_cahn_residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
    u_x, u_t = gradient(u, points)
    u_xx, _t = gradient(u_x, points)
    return u_t - 1e-4 * u_xx - 5 * (u - u**3)


def _allen_cahn_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    start = edges.at(t=0)
    return [model(start) - start[:, 0] ** 2 * (math.pi * start[:, 0]).cos()]


_WAVES = 4  # of Poisson's solution along an edge, halved
_HARDNESS = 2 * (_WAVES * math.pi) ** 2


def _poisson_solution(points: Array) -> Array:
    solution: Array = np.sin(_WAVES * math.pi * points).prod(axis=1)
    return solution


def _poisson_residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
    u_x, u_y = gradient(u, points)
    laplacian = gradient(u_x, points)[0] + gradient(u_y, points)[1]
    return laplacian / _HARDNESS + (_WAVES * math.pi * points.detach()).sin().prod(dim=1)


def _poisson_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    return [model(edges.at(x=0)), model(edges.at(x=1)), model(edges.at(t=0)), model(edges.at(t=1))]


def _kdv_residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
    u_x, u_t = gradient(u, points)
    u_xx, _t = gradient(u_x, points)
    u_xxx, _t = gradient(u_xx, points)
    return u_t + u * u_x + 0.0025 * u_xxx


def _kdv_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    start = edges.at(t=0)
    return [model(start) - (math.pi * start[:, 0]).cos()]


_SPEED = 2.0  # of waves


def _wave_solution(points: Array) -> Array:
    x, t = math.pi * points[:, 0], math.pi * _SPEED * points[:, 1]
    solution: Array = np.sin(x) * np.cos(t) + 0.5 * np.sin(4 * x) * np.cos(4 * t)
    return solution


def _wave_residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
    u_x, u_t = gradient(u, points)
    return (gradient(u_t, points)[1] - _SPEED**2 * gradient(u_x, points)[0]) / (_SPEED * math.pi) ** 2


def _wave_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    start = edges.at(t=0).requires_grad_()
    x, u = math.pi * start.detach()[:, 0], model(start)
    return [
        u - x.sin() - 0.5 * (4 * x).sin(),
        gradient(u, start)[1] / (_SPEED * math.pi),
        model(edges.at(x=0)),
        model(edges.at(x=1)),
    ]


def _reaction_residual(u: Tensor, points: Tensor, _: nn.Module) -> Tensor:
    u_x, u_t = gradient(u, points)
    return u_t - 3 * gradient(u_x, points)[0] - 5 * u * (1 - u)


def _bump(x: Any, exp: Callable[[Any], Any]) -> Any:
    return exp(-((x - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))


def _reaction_conditions(model: nn.Module, edges: Edges) -> list[Tensor]:
    start = edges.at(t=0)
    return [model(start) - _bump(start[:, 0], torch.exp)]


@dataclass(frozen=True)
class Periodic:
    """A solution of û_t = λ(k) û + N(u)^ on a periodic interval, by a Fourier method and scipy's DOP853.

    What is integrated is exp(−i t Im λ) û, so that dispersion costs no small steps.

    Attributes:
        low: one end of the interval.
        length: of it.
        start: u at t = 0.
        linear: λ for wave numbers k, (n/2 + 1,) complex.
        nonlinear: the transform of N(u) from u (n,) and k.
        size: n, points of the grid; a power of 2.
    """

    low: float
    length: float
    start: Callable[[Array], Array]
    linear: Callable[[Array], Complex]
    nonlinear: Callable[[Array, Array], Complex]
    size: int = 512
    times: int = 101

    def __call__(self, points: Array) -> Array:
        """u at points: of each the transform at its time, which is one of those saved, summed at its x."""
        coefficients = self._coefficients
        step = np.rint(points[:, 1] * (self.times - 1)).astype(int)
        if not np.allclose(step / (self.times - 1), points[:, 1]):
            raise ValueError(f"times must be multiples of 1/{self.times - 1}")
        k = self._wave_numbers
        phases = np.exp(1j * k * (points[:, :1] - self.low))
        factors = np.where(k == 0, 1.0, 2.0) / self.size
        solution: Array = (coefficients[step] * phases * factors).sum(axis=1).real
        return solution

    @property
    def _wave_numbers(self) -> Array:
        k: Array = 2 * math.pi / self.length * np.arange(self.size // 2 + 1)
        return k

    @cached_property
    def _coefficients(self) -> Complex:
        """û at each of the times, (times, n/2 + 1)."""
        from scipy.integrate import solve_ivp

        k = self._wave_numbers
        rates = self.linear(k)
        kept = np.arange(len(k)) <= self.size // 3  # against aliasing of squares

        def change(t: float, v: Complex) -> Complex:
            turned = np.exp(1j * rates.imag * t)
            u = np.fft.irfft(v * turned, self.size)
            return rates.real * v + kept * self.nonlinear(u, k) / turned

        grid = self.low + self.length / self.size * np.arange(self.size)
        times = np.linspace(0, 1, self.times)
        start = np.fft.rfft(self.start(grid)).astype(complex)
        solved = solve_ivp(change, (0, 1), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9)
        result: Complex = solved.y.T * np.exp(1j * rates.imag * times[:, None])
        return result


def allen_cahn_solution(size: int = 1024) -> Periodic:
    return Periodic(
        -1.0,
        2.0,
        lambda x: x**2 * np.cos(math.pi * x),
        lambda k: -1e-4 * k**2 + 5 + 0j,
        lambda u, _: -5 * np.fft.rfft(u**3),
        size,
    )


def kdv_solution(size: int = 256) -> Periodic:
    return Periodic(
        -1.0,
        2.0,
        lambda x: np.cos(math.pi * x),
        lambda k: 0.0025j * k**3,
        lambda u, k: -0.5j * k * np.fft.rfft(u**2),
        size,
    )


def reaction_solution(size: int = 64) -> Periodic:
    return Periodic(
        0.0,
        2 * math.pi,
        lambda x: np.asarray(_bump(x, np.exp)),
        lambda k: -3 * k**2 + 5 + 0j,
        lambda u, _: -5 * np.fft.rfft(u**2),
        size,
    )


@lru_cache
def equation(name: str) -> Equation:
    """The equation of a name in `EQUATIONS`."""
    if name.startswith("convection-"):
        return _convection(float(name.removeprefix("convection-")))
    if name == "burgers-inverse":
        return _burgers_inverse()
    unit, symmetric, turn = ((0.0, 0.0), (1.0, 1.0)), ((-1.0, 0.0), (1.0, 1.0)), ((0.0, 0.0), (2 * math.pi, 1.0))
    made: dict[str, Callable[[], Equation]] = {
        "burgers": lambda: Equation(
            *symmetric, lambda u, x, _: _burgers_residual(u, x, VISCOSITY), _burgers_conditions, burgers_solution
        ),
        "allen-cahn": lambda: Equation(
            *symmetric,
            _allen_cahn_residual,
            _allen_cahn_conditions,
            allen_cahn_solution(),
            harmonics=5,
            weight=100.0,
        ),
        "poisson": lambda: Equation(*unit, _poisson_residual, _poisson_conditions, _poisson_solution),
        "kdv": lambda: Equation(*symmetric, _kdv_residual, _kdv_conditions, kdv_solution(), harmonics=5, weight=10.0),
        "wave": lambda: Equation(*unit, _wave_residual, _wave_conditions, _wave_solution, weight=10.0),
        "reaction-diffusion": lambda: Equation(
            *turn, _reaction_residual, _reaction_conditions, reaction_solution(), harmonics=1, weight=10.0
        ),
    }
    return made[name]()


EQUATIONS = (
    *(f"convection-{speed}" for speed in (5, 10, 20, 30, 50)),
    *("burgers", "allen-cahn", "poisson", "kdv", "wave", "reaction-diffusion", "burgers-inverse"),
)
"""The names of the equations."""
