"""A long job goes on from its own file whatever else has changed, and from no other one."""

import math

import pytest

from .families import rotating
from .jobs import ON_OPERATORS, SAME_JOB, right_jobs, run, undisturbed, wrong_jobs

INTERRUPTED = {"spectrum": 20, "spectral density": 12, "fit_path": 3, "elastic_band": 3, "surface": 5}  # reports of progress that a job lives to see
TOLERANCE = {"eigenpairs by power iteration": 1e-2, "eigenpairs by LOBPCG": 1e-6}  # of numbers that depend on when an iteration stops


def interrupted(job, path):
    """A file that a job has left when it was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        run(job, {}, path, reports=INTERRUPTED.get(job, 4))
    return path


@pytest.mark.parametrize(("job", "same"), rotating(right_jobs(), 12))
def test_the_right_job_goes_on_whatever_has_changed_beside_it(job, same, tmp_path):
    path = interrupted(job, tmp_path / "job.safetensors")
    numbers, spent = run(job, SAME_JOB[same], path)
    expected, whole = undisturbed(job)
    assert spent < whole
    allowed = TOLERANCE.get(job, 1e-6)
    assert len(numbers) == len(expected) and all(math.isclose(a, b, rel_tol=allowed, abs_tol=allowed) for a, b in zip(numbers, expected, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["job.safetensors"]


@pytest.mark.parametrize(("job", "what", "change"), rotating(wrong_jobs(), 25), ids=lambda value: value if isinstance(value, str) else "")
def test_the_file_of_another_job_is_refused(job, what, change, tmp_path):
    path = interrupted(job, tmp_path / "job.safetensors")
    before = path.read_bytes()
    if job == "surface":  # one file holds samples of many surfaces, and none of them is taken for another's
        with_file, spent = run(job, change, path)
        fresh, whole = run(job, change, None)
        assert spent == whole and with_file == fresh and path.read_bytes().startswith(before)
        return
    with pytest.raises(ValueError, match=r"belongs to another job: .*Delete it or give another path\."):
        run(job, change, path)
    assert path.read_bytes() == before


def test_families_are_large_enough():
    assert len(wrong_jobs()) >= 40 and len(ON_OPERATORS) == 9
