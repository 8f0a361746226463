"""Every optimizer, with options for a small window."""

import pytest
import torch

from tests.contract.optimizers import SETTINGS, small


@pytest.fixture(params=SETTINGS, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture
def options(cls):
    return small(cls)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
