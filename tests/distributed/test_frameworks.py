"""Training loops of others, over several processes, train a network as a plain loop trains a whole one."""

import pytest

from tests.distributed.ranks import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "module"), [("lightning", "pytorch_lightning.strategies"), ("trainer", "transformers")]
)
def test_frameworks_over_two_processes(function, module, tmp_path):
    pytest.importorskip(module)
    for rank in run([f"frameworks:{function}"], 2, tmp_path / "ranks"):
        divided, difference = rank[f"frameworks:{function}"]
        assert divided
        assert difference <= 1e-14
