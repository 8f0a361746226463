"""Cases of `mfac_row_step_`, for all backends: steps in a row, against the definition."""

from collections.abc import Collection

import torch

from efcp.kernels import RowStep, reference

ROUNDING = torch.finfo(torch.float32).eps
CASES = {
    "one row": (1, 1.0, {}),
    "few rows": (3, 1.0, {}),
    "limited": (20, 1.0, {"longest": 0.5}),
    "normalised": (20, 1.0, {"length": 3.0}),
    "both": (5, 1.0, {"longest": 1.0, "length": 3.0}),
    "dependent rows": (20, 1e5, {}),
    "more than float64 can solve": (20, 1e20, {}),
}
DAMPING = 1e-2


def new_state(window: int) -> RowStep:
    """Of a window of zero rows."""
    root = torch.eye(window, dtype=torch.float64) * (window * DAMPING) ** -0.5
    numbers = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    counters = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    gram, weights = torch.zeros(window, window, dtype=torch.float64), torch.zeros(window, dtype=torch.float64)
    return RowStep(gram, root, root[0] * root[0, 0], weights, *numbers, *counters)


def check_row_steps(operation, case: str, others: Collection[str] = ()) -> None:
    """Also with rows of zeros, and skipped steps.

    Args:
        others: fields that may differ from those of the definition.
    """
    window, size, limits = CASES[case]
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(window, 7, dtype=torch.float64)  # more rows than dimensions: they depend on each other
    states = new_state(window), new_state(window)
    for number in range(2 * window + 4):
        slot, finite = torch.tensor([number % window]), torch.tensor(number % 5 != 3)
        row = torch.randn(7, generator=generator, dtype=torch.float64) * size**0.5
        rows[slot] = row * (finite & (number != 1))
        dots = rows @ rows[slot[0]]
        for state, run in zip(states, (operation, reference.mfac_row_step_), strict=True):
            run(state, dots.clone(), slot, finite, DAMPING, ROUNDING, **limits)
        actual, expected = states
        assert actual.step == number + 1
        for name in RowStep._fields:
            if name in others:
                continue
            own, other = getattr(actual, name), getattr(expected, name)
            tolerance = 1e-6 * float(other.abs().max())
            torch.testing.assert_close(own, other, rtol=1e-6, atol=tolerance, msg=f"{name} of step {number}")
        for own, other in zip(actual, expected, strict=True):  # errors of one step, not of all
            own.copy_(other)
    assert (states[0].imprecise_steps > 0) == (size > 1)
