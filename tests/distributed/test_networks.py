"""Networks that PyTorch shards train as a whole one does."""

import pytest
import torch

from tests.distributed.ranks import run

networks = pytest.importorskip("tests.distributed.networks")
WORLD = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return [rank["networks:all_ways"] for rank in run(["networks:all_ways"], WORLD, tmp_path_factory.mktemp("ways"))]


@pytest.mark.parametrize("clip", [None, 0.05], ids=["as it is", "clipped"])
@pytest.mark.parametrize("way", networks.WAYS)
def test_a_sharded_network_trains_as_a_whole_one(way, clip, results):
    for rank in results:
        own = rank[way, clip]
        assert own["difference"] <= 1e-14
        assert torch.equal(own["gram"], results[0][way, clip]["gram"])
        assert own["has_state"]  # also of the layer that is not used: checkpoints expect it


def test_the_norm_of_a_sequence_parallel_network_has_gradients_to_be_summed(results):
    """Else the above would not test that they are."""
    for rank in results:
        assert rank["tensor parallel", None]["partial"]


def test_compiled_kernels_give_the_same(tmp_path):
    pytest.importorskip("numba")
    for rank in run(["networks:with_numba"], 2, tmp_path / "ranks", kernels="cpu"):
        difference, backend = rank["networks:with_numba"]
        assert difference <= 1e-14
        assert backend == "cpu"


def test_adamw_steps_some_parameters_or_all(tmp_path):
    for rank in run(["networks:with_adamw"], WORLD, tmp_path / "ranks"):
        for difference, divided_moments in rank["networks:with_adamw"]:
            assert difference <= 1e-14
            assert divided_moments
