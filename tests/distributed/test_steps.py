"""A step over divided parameters is that of a single process, and exchanges m numbers."""

import pytest
import torch

from tests.distributed.ranks import run

steps = pytest.importorskip("tests.distributed.steps")
WORLD = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    names = ("all_ways", "shards_as_parameters", "no_elements")
    ranks = run([f"steps:{name}" for name in names], WORLD, folder)
    return tuple([rank[f"steps:{name}"] for rank in ranks] for name in names)


@pytest.mark.parametrize("way", steps.WAYS)
@pytest.mark.parametrize("name", steps.CLASSES)
def test_step_is_that_of_a_single_process(name, way, results):
    ranks = [rank[name, way] for rank in results[0]]
    for own in ranks:
        assert torch.equal(own["gram"], ranks[0]["gram"])
        assert torch.equal(own["weights"], ranks[0]["weights"])
        assert own["skipped"] == 1
        if way == "replicate" or name not in steps.LOW_RANK:
            assert own["difference"] <= 1e-14


@pytest.mark.parametrize("way", steps.WAYS)
@pytest.mark.parametrize("name", steps.CLASSES)
def test_diagnostics_are_those_of_a_single_process(name, way, results):
    for rank in results[0]:
        assert rank[name, way]["diagnostics"] == results[0][0][name, way]["diagnostics"]
        for key, value in rank[name, way]["alone"].items():
            own = rank[name, way]["diagnostics"][key]
            assert own == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-12)), key


@pytest.mark.parametrize("way", steps.WAYS)
@pytest.mark.parametrize("name", steps.CLASSES)
def test_a_step_exchanges_a_flag_and_m_numbers_along_each_dimension_of_a_mesh(name, way, results):
    m, dimensions = 5, {"hsdp": 2, "meshes": 3}.get(way, 1)  # of "meshes" one has one, another two
    numbers = {"MomentumMFAC": 2 * m + 1, "MFACW": 2 * m + 1, "MicroAdam": 0, "KroneckerW": 0}.get(name, m)
    for rank in results[0]:
        assert rank[name, way]["bytes"] == [4] * dimensions + [8 * numbers] * dimensions * (numbers > 0)


@pytest.mark.parametrize("name", steps.LOW_RANK)
def test_low_rank_takes_each_shard_as_a_matrix(name, results):
    for rank in results[1]:
        assert rank[name] <= 1e-14


@pytest.mark.parametrize("name", steps.CLASSES)
def test_ranks_without_elements_take_part(name, results):
    for rank in results[2]:
        difference, error_norm = rank[name]
        assert difference <= 1e-14
        assert error_norm == results[2][0][name][1]
