"""Checkpoints of sharded optimizers resume bit for bit, and on another number of ranks."""

import pytest

from tests.distributed.ranks import run

checkpoints = pytest.importorskip("tests.distributed.checkpoints")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Of 4 ranks that save, 2 that load this and save, and 4 that load that."""
    folder = tmp_path_factory.mktemp("checkpoints")
    own = ["save_and_resume", "before_the_first_step", "through_a_single_process", "several_optimizers"]
    own.append("dense_in_a_single_process")
    found = []
    for number, (world, functions) in enumerate([(4, own), (2, ["resume_on_another_number"])]):
        results = run([f"checkpoints:{name}" for name in functions], world, folder / str(number))
        found.append([{key.partition(":")[2]: value for key, value in rank.items()} for rank in results])
    names = ("resume_on_another_number", "resume_on_other_meshes")
    results = run([f"checkpoints:{name}" for name in names], 4, folder / "2")
    return [*found, [{name: rank[f"checkpoints:{name}"] for name in names} for rank in results]]


@pytest.mark.parametrize(("name", "form"), checkpoints.FORMS)
def test_resumes_bit_for_bit_on_the_same_mesh(name, form, launches):
    for rank in launches[0]:
        result = rank["save_and_resume"][name, form]
        assert result["loaded"]
        assert result["bitwise"]
        assert set(result["whole"]) <= {"error_draws"}


@pytest.mark.parametrize(("name", "form"), [own for own in checkpoints.FORMS if own[0] in checkpoints.RESHARDED])
def test_resumes_on_another_number_of_ranks(name, form, launches):
    expected = launches[0][0]["save_and_resume"][name, form]["parameters"]
    for launch in launches[1:]:
        for rank in launch:
            for p, q in zip(rank["resume_on_another_number"][name, form], expected, strict=True):
                assert float((p - q).abs().max()) <= 1e-14


@pytest.mark.parametrize("way", ["hsdp", "fsdp and tensor parallel"])
@pytest.mark.parametrize("name", ["SparseMFAC", "DenseMFAC"])
def test_resumes_on_a_mesh_of_two_dimensions(name, way, launches):
    expected = launches[0][0]["save_and_resume"][name, "nested"]["parameters"]
    for rank in launches[2]:
        found, bitwise = rank["resume_on_other_meshes"][name, way]
        assert bitwise
        for p, q in zip(found, expected, strict=True):
            assert float((p - q).abs().max()) <= 1e-14


def test_saves_before_the_first_step(launches):
    for rank in launches[0]:
        assert rank["before_the_first_step"] == (0, True)


def test_several_optimizers_resume(launches):
    for rank in launches[0]:
        assert rank["several_optimizers"] == (2, True)


def test_a_single_process_continues_and_gives_back(launches):
    for rank in launches[0]:
        continued, loaded, again = rank["through_a_single_process"]
        assert continued <= 1e-14
        assert loaded <= 1e-14
        assert again <= 1e-14


def test_a_single_process_takes_over_dense_rows(launches):
    for rank in launches[0]:
        difference, flat = rank["dense_in_a_single_process"]
        assert difference <= 1e-14
        assert flat
