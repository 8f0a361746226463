"""One thread for each test process: several are run side by side, and small tensors gain nothing from more."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gradients_stay_enabled():
    """No test leaves a mode of PyTorch behind for the next ones."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
