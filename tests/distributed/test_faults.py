"""Ranks agree on what goes wrong, replicas stay the same, and what cannot be divided is refused."""

import pytest
import torch

from tests.distributed.ranks import run

faults = pytest.importorskip("tests.distributed.faults")
checkpoints = pytest.importorskip("tests.distributed.checkpoints")
WORLD = 4
FUNCTIONS = ["nan_on_one_rank", "damaged_part", "wrong_states", "swapped_parameters", "refused", "divided_state"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    ranks = run([f"faults:{name}" for name in FUNCTIONS], WORLD, tmp_path_factory.mktemp("faults"))
    return {name: [rank[f"faults:{name}"] for rank in ranks] for name in FUNCTIONS}


def test_nan_on_one_rank_skips_the_step_on_all(results):
    assert results["nan_on_one_rank"] == [(True, True, 1)] * WORLD


def test_a_part_that_is_damaged_is_refused_on_all_ranks(results):
    for rank, (refusal, unchanged) in enumerate(results["damaged_part"]):
        expected = "values must be finite; the state is damaged" if rank == 1 else "another rank refuses it"
        assert expected in refusal
        assert unchanged


def test_states_are_divided_as_parameters_are_or_refused(results):
    for to_divided, to_other_blocks in results["wrong_states"]:
        assert "must be divided as it is" in to_divided
        assert "torch.distributed.checkpoint" in to_divided
        assert "ValueError" in to_other_blocks


def test_parameters_may_be_swapped_before_the_first_step(results):
    assert results["swapped_parameters"] == [(True, True)] * WORLD


def test_what_cannot_be_divided_is_refused(results):
    for rank, own in enumerate(results["refused"]):
        assert "ValueError: params must not be sums that are yet to be taken" in own["partial"]
        assert "density must be at least 0.062 for shape (12, 4), of which blocks have 4 elements" in own["narrow"]
        assert "param_groups[0], parameter 0" in own["narrow"]
        assert own["narrow by AdamW"]
        assert own["mesh"] == "TypeError: mesh must be a DeviceMesh or None, got 'cpu'"
        assert "ValueError: mesh must have one dimension" in own["grid"]
        assert rank < 2 or "params must be divided over ranks among which this one is" in own["outside"]
        assert "for its size" in own["replaced"] or "divided as it is" in own["replaced"]
        assert "params must not be of FullyShardedDataParallel, use fully_shard (FSDP2)" in own["first FSDP"]


@pytest.mark.parametrize("name", faults.CLASSES)
def test_replicas_with_divided_state_stay_the_same(name, results):
    first = results["divided_state"][0][name]
    for own in (rank[name] for rank in results["divided_state"]):
        assert all(map(torch.equal, own["parameters"], first["parameters"]))
        assert torch.equal(own["gram"], first["gram"])
        assert own["resumed"]
        assert own["skipped"] == 1
        assert own["exchanged"][0] == 4
        if name in checkpoints.RESHARDED:  # the others take each part as a matrix
            assert own["difference"] <= 1e-14
            assert own["norms"][0] == pytest.approx(own["norms"][1], rel=1e-12)


@pytest.mark.parametrize("name", faults.CLASSES)
def test_divided_state_takes_its_share_of_memory(name, results):
    """Of parameters of 3 and 5 rows the largest parts have 1 and 2 of these; what all share is on all ranks."""
    owns = [rank[name] for rank in results["divided_state"]]
    for own in owns:
        assert own["bytes"] <= 0.45 * own["bytes of whole state"] + 2000
        assert own["estimate"] == own["bytes"]


def test_others_fail_when_a_rank_dies(tmp_path):
    *others, dead = run(["faults:one_rank_dies"], WORLD, tmp_path / "ranks", check=False)
    assert not dead
    for own in others:
        refusal, seconds = own["faults:one_rank_dies"]
        assert "RuntimeError" in refusal
        assert seconds < 10
