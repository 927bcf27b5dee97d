"""Disks without room, processes that are killed, and two processes on one file."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

import orograph as og
from orograph import OrographWarning
from orograph.durable import HOST, remove_leftovers, sole_owner
from orograph.linalg.checkpoints import checkpointing, load_checkpoint, save_checkpoint
from orograph.records import RecordKeeper

from . import jobs
from .test_jobs import interrupted

STATE = {"numbers": torch.arange(20_000, dtype=torch.float64)}  # 160 kB


@contextlib.contextmanager
def small_disk(kilobytes):
    """A file system of that size, where one may be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip("no file system can be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def names(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def kept(path, states, then=lambda: None, now=True):
    """A job that keeps these states, the first of them at once, and does something at its end."""
    with checkpointing(path, {"n": 1}) as (_, keep):
        for i, state in enumerate(states):
            keep(state, now=now and i == 0)
        then()


# -- no room -----------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_no_job_and_keeps_the_last_state_that_had_room():
    with small_disk(300) as disk:
        states = [{"small": torch.ones(3)}, *(STATE | {"more": STATE["numbers"] + 1, "step": torch.tensor(step)} for step in range(3))]
        with pytest.warns(OrographWarning) as caught:
            kept(disk / "c", states)
        said = [str(w.message) for w in caught]
        assert len(said) == 2 and re.search("cannot be saved .No space left on device.. The job goes on, and saving is tried again", said[0])
        assert re.search("could not be saved .*: what was computed in the last .* s is not on disk, and would be computed again. Make room", said[1])
        assert names(disk) == ["c"] and torch.equal(load_checkpoint(disk / "c", {"n": 1})["small"], torch.ones(3))


def test_where_there_is_room_again_everything_is_saved():
    with small_disk(300) as disk:
        (disk / "ballast").write_bytes(b"\1" * 250_000)
        with pytest.warns(OrographWarning, match="cannot be saved") as caught:
            kept(disk / "c", [STATE], (disk / "ballast").unlink, now=False)
        assert len(caught) == 1 and torch.equal(load_checkpoint(disk / "c", {"n": 1})["numbers"], STATE["numbers"])


@pytest.mark.parametrize("job", ["trace by auto", "spectrum", "eigenpairs by LOBPCG", "fit_path", "surface"])
def test_a_job_on_a_full_disk_gives_the_same_numbers(job):
    with small_disk(16) as disk:
        for i in range(8):
            with contextlib.suppress(OSError):
                (disk / f"ballast{i}").write_bytes(b"\1" * 4096)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OrographWarning)
            numbers, _ = jobs.run(job, {}, disk / "c")
        assert numbers == jobs.undisturbed(job)[0]
        said = [str(w.message) for w in caught if issubclass(w.category, OrographWarning)]
        assert len(said) == 2 and "cannot be saved" in said[0] and ("is on disk" in said[1] or "are not in store" in said[1])


def test_a_file_without_permission_ends_no_job(tmp_path, monkeypatch):
    for number in (13, 30, 28, 122):  # EACCES, EROFS, ENOSPC, EDQUOT

        def refusing(path, tensors, metadata, number=number):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr("orograph.linalg.checkpoints.write_tensors", refusing)
        with pytest.warns(OrographWarning, match=re.escape(os.strerror(number))) as caught:
            numbers, _ = jobs.run("trace by hutchinson", {}, tmp_path / "c")
        assert len(caught) == 2 and numbers == jobs.undisturbed("trace by hutchinson")[0]


def test_records_that_do_not_fit_are_kept_and_told():
    record = og.Record(probe="big", label="net", results={"curve": og.Curve(x=STATE["numbers"], y=STATE["numbers"] + 1)})
    with small_disk(300) as disk:
        keeper = RecordKeeper(disk / "records")
        keeper.save([og.Record(probe="small", results={})])
        with pytest.warns(OrographWarning, match="records cannot be saved in .*No space left on device.*Measuring goes on"):
            keeper.save([record])
        keeper.save([og.Record(probe="later", results={})])  # no second warning
        assert re.search(r"Not saved in .* \(No space left on device\): big of net, later of ", keeper.lost)
        assert names(disk) == ["records.jsonl"] and [r.probe for r in og.load_records(disk / "records")] == ["small"]
        keeper.unsaved = keeper.unsaved[1:]
        keeper.save()
        assert not keeper.lost and [r.probe for r in og.load_records(disk / "records")] == ["small", "later"]


# -- killed, and two at a time -----------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def running(function, folder):
    """A process that is killed at the end; inside, it has said that it is ready."""
    process = FORK.Process(target=function, args=(folder,))
    process.start()
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    (folder / "ready").unlink()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _write_forever(folder):
    with checkpointing(folder / "c", {"n": 1}) as (_, keep):
        (folder / "ready").touch()
        step = 0
        while True:
            step += 1
            keep({"numbers": torch.full((300_000,), float(step))}, now=True)
            og.save_records(og.Record(probe="p", results={"x": og.Curve(x=torch.full((100_000,), float(step)), y=torch.zeros(2))}), folder / "records")


@pytest.mark.filterwarnings("ignore::orograph.errors.OrographWarning")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_in_the_middle_of_writing_nothing_is_left_over(tmp_path):
    left = 0
    for attempt, moment in enumerate(torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()):
        if attempt >= 12 and left:
            break
        with running(_write_forever, tmp_path):
            time.sleep(0.1 * moment)
        left += sum(name.endswith(".partial") for name in names(tmp_path))
        with checkpointing(tmp_path / "c", {"n": 1}) as (found, _):
            assert found is None or len(found["numbers"].unique()) == 1
        og.save_records(og.Record(probe="after", results={}), tmp_path / "records")
        assert not [name for name in names(tmp_path) if name.endswith((".partial", ".lock"))]
        assert og.load_records(tmp_path / "records")[-1].probe == "after"
    assert left > 0, "no kill came in the middle of a write: the test has shown nothing"


def test_leftovers_are_those_of_the_dead(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    fates = {f".c.{HOST}-{dead.pid}-0123abcd.partial": False, f".c.{HOST}-{os.getppid()}-0123abcd.partial": True, f".c.{HOST}-{os.getpid()}-0123abcd.partial": False,
             ".c.elsewhere-12-0123abcd.partial": True, "c.partial": True, ".mine.partial": True, f".old.elsewhere-{os.getppid()}-0123abcd.partial": False}  # fmt: skip
    for name in fates:
        (tmp_path / name).touch()
    os.utime(tmp_path / f".old.elsewhere-{os.getppid()}-0123abcd.partial", (0, 0))
    remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in fates} == fates


def _hold(folder):
    with checkpointing(folder / "c", {"n": 1}):
        (folder / "ready").touch()
        time.sleep(60)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_checkpoint_has_one_job_at_a_time(tmp_path):
    path = tmp_path / "c"
    with running(_hold, tmp_path) as process, pytest.raises(ValueError, match=rf"checkpoint='.*c' is in use by another process \({process.pid} on .*\)\. Wait until it ends, or give another path"):
        jobs.run("trace by auto", {}, path)
    with checkpointing(path, {"n": 1}), pytest.raises(ValueError, match="is in use by another job of this process"), checkpointing(path, {"n": 2}):  # a dead one holds nothing
        pass
    assert names(tmp_path) == []


def _fork_and_wait(folder):
    with sole_owner(folder / "c", "checkpoint"):
        worker = os.fork()
        if worker:
            (folder / "worker").write_text(str(worker))
            (folder / "ready").touch()
        time.sleep(30)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_of_a_killed_process_hold_no_lock(tmp_path):
    with running(_fork_and_wait, tmp_path):
        pass
    with sole_owner(tmp_path / "c", "checkpoint"):
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def _draw(path, seed):
    jobs.run("surface", {"job": {"seed": seed}}, Path(path))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_share_a_store_of_samples(tmp_path):
    store, context = tmp_path / "samples.jsonl", FORK
    both = [context.Process(target=_draw, args=(store, seed)) for seed in (0, 0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0, 0]
    for seed in (0, 1):  # any unreadable line would be a warning, and so an error here
        numbers, spent = jobs.run("surface", {"job": {"seed": seed}}, store)
        assert spent == 3 and numbers == jobs.run("surface", {"job": {"seed": seed}}, None)[0]


def test_an_interrupt_after_a_basis_was_overwritten_saves_no_mixture(tmp_path):
    """`keep(state, now=True)` comes before tensors of the last state are changed in their place."""
    numbers = torch.zeros(5)

    def overwrite_and_interrupt():
        numbers.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "c", [{"numbers": numbers}], overwrite_and_interrupt)
    assert not load_checkpoint(tmp_path / "c", {"n": 1})["numbers"].any()


def test_files_that_no_checkpoint_can_stand_at_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"checkpoint=.*file.* is no folder"):
        jobs.run("trace by auto", {}, tmp_path / "file" / "c")
    with pytest.raises(ValueError, match=r"checkpoint=.*(a folder|a path of a file)"):
        jobs.run("trace by auto", {}, tmp_path)


def test_a_relative_path_and_a_long_name_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c", "x" * 230):
        save_checkpoint(name, STATE, {"n": 1})
        assert torch.equal(load_checkpoint(name, {"n": 1})["numbers"], STATE["numbers"])
        interrupted("trace by auto", Path(name + "2"))
    assert not [name for name in names(tmp_path) if name.startswith(".")]
