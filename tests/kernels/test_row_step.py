"""`mfac_row_step_` in Triton against the definition, and that against dense algebra."""

import pytest
import torch

from efcp.kernels import reference
from efcp.perf.gpu.gpusim import simulate, why_unavailable
from tests.kernels.row_steps import CASES, DAMPING, ROUNDING, check_row_steps, new_state

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from efcp.kernels import triton as triton_ops


@pytest.mark.parametrize("case", CASES)
def test_row_steps_agree_with_the_definition(case):
    with simulate(90, check_races=True, schedule=0):
        check_row_steps(triton_ops.mfac_row_step_, case)


def test_the_definition_is_the_inverse_times_the_newest_row():
    window, finite = 6, torch.tensor(True)
    rows = torch.randn(window, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = new_state(window)
    for number in range(window):
        held = torch.where(torch.arange(window)[:, None] <= number, rows, 0.0)
        reference.mfac_row_step_(state, held @ rows[number], torch.tensor([number]), finite, DAMPING, ROUNDING)
    F = DAMPING * torch.eye(4, dtype=torch.float64) + rows.t() @ rows / window
    u = torch.linalg.solve(F, rows[-1])
    torch.testing.assert_close(rows.t() @ state.weights, u)
    torch.testing.assert_close(state.update_norm, u.norm())
    torch.testing.assert_close(state.inner_product, u @ rows[-1])


def test_a_missing_barrier_would_be_noticed():
    """Between what is written of R and of vectors, and what is read of them."""

    def steps(**options):
        with simulate(90, schedule=1, **options) as simulator:
            check_row_steps(triton_ops.mfac_row_step_, "few rows")
        return simulator

    noticed = 0
    for barrier in range(steps().launches[-1].barrier_sites):
        try:
            steps(drop_barriers=[barrier])
        except Exception:  # a wrong result, or a race that the simulator finds
            noticed += 1
    assert noticed
