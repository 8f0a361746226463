"""Lightning shards a network, and trains it as a plain loop trains a whole one."""

import pytest

from tests.distributed.ranks import run


@pytest.mark.slow
def test_lightning_with_model_parallel_strategy(tmp_path):
    pytest.importorskip("pytorch_lightning.strategies")
    for rank in run(["frameworks:lightning"], 2, tmp_path / "ranks"):
        sharded, difference = rank["frameworks:lightning"]
        assert sharded
        assert difference <= 1e-14
