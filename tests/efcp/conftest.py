"""Every compressor with every preconditioner, and the same random numbers in every test."""

import pytest
import torch

from tests.efcp.problems import COMPRESSORS, PRECONDITIONERS


@pytest.fixture(params=COMPRESSORS)
def compressor(request):
    return COMPRESSORS[request.param]


@pytest.fixture(params=PRECONDITIONERS)
def preconditioner(request):
    return PRECONDITIONERS[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
