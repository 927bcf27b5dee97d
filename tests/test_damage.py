"""Damaged files: every one is noticed, by one message that names the file, and none changes a result."""

import os
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

import orograph as og
from orograph import OrographWarning
from orograph.errors import RecordError
from orograph.linalg.checkpoints import load_checkpoint

from . import jobs
from .damage import PLANNED, RANDOM, damage
from .families import rotating
from .test_jobs import INTERRUPTED, interrupted
from .test_records import ALL_KINDS, same

CHECKPOINTS = ["eigenpairs by Lanczos", "trace by auto", "trace by hutchinson", "spectrum", "fit_path"]
FILES = [*CHECKPOINTS, "store", "store", "lines", "lines", "arrays", "arrays"]
DAMAGED = [(file, kind, seed) for seed, file in enumerate(FILES * 5) for kind in RANDOM]  # 220
# Samples and lines of others are no damage: a store or a folder may hold those of many.
REPLACED = [(file, kind) for file in ("trace by auto", "fit_path", "store", "arrays", "lines") for kind in PLANNED if file not in ("store", "lines") or not kind.startswith("another")]


@contextmanager
def not_root():
    """Permissions count for nothing where one is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("file", "kind", "seed"), rotating(DAMAGED, 40))
def test_damage_is_noticed(file, kind, seed, tmp_path):
    prepare, check = tools(file)
    path = prepare(tmp_path)
    before = path.read_bytes()
    damage(path, kind, seed)
    check(path, before)


@pytest.mark.parametrize(("file", "kind"), REPLACED)
def test_what_is_no_such_file_is_noticed(file, kind):
    prepare, check = tools(file)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # another user must come so far as to be refused the file
        mine, others = Path(folder, "mine"), Path(folder, "others")
        mine.mkdir()
        others.mkdir()
        path = prepare(mine)
        other = path if kind != "another's file in its place" else arrays(others) if file == "arrays" else another(file, others)
        before = path.read_bytes()
        PLANNED[kind](path, other)
        with not_root() if kind == "no permission" else nullcontext():
            check(path, before)


def tools(file):
    """What makes a file, and what must be said when it is damaged."""
    known = {"store": (store, store_tells), "lines": (records, records_tell), "arrays": (arrays, records_tell)}
    return known.get(file, (lambda folder: interrupted(file, folder / "c.safetensors"), checkpoint_tells(file)))


def another(file, folder):
    """The checkpoint of another job."""
    with pytest.raises(KeyboardInterrupt):
        jobs.run(file, {"job": {"seed": 5}}, folder / "c.safetensors", reports=INTERRUPTED.get(file, 4))
    return folder / "c.safetensors"


def checkpoint_tells(job):
    def check(path, before):
        with pytest.raises(ValueError, match=r"checkpoint=.* (is no checkpoint of Orograph|belongs to another job|cannot be read|needs a path of a file).*(Delete it or give another path|Give the name of a file|is a folder)"):
            jobs.run(job, {}, path)

    return check


def store(folder):
    jobs.run("surface", {}, folder / "samples.jsonl")
    return folder / "samples.jsonl"


def store_tells(path, before):
    """A warning, or a message; the picture is the same. Whole lines that are cut off leave no trace and do no harm."""
    fine = path.is_file() and os.access(path, os.R_OK) and os.geteuid() == 0 and before.startswith(path.read_bytes()) and path.read_bytes().endswith(b"\n")
    fine |= path.is_file() and not path.stat().st_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            numbers, problem = jobs.run("surface", {}, path)[0], ""
        except ValueError as error:
            numbers, problem = [], str(error)
    if problem:
        assert f"store='{path}'" in problem and ("cannot be read: " in problem or "a folder" in problem)
        return
    assert numbers == jobs.undisturbed("surface")[0]
    assert fine or any(issubclass(w.category, OrographWarning) and f"store='{path}', line" in str(w.message) for w in caught)


SAVED = [og.Record(probe=name, label="net", says="A sentence.", results=ALL_KINDS, products=i, settings={"seed": i, "rate": 0.1 * i}) for i, name in enumerate("abcd")]


def records(folder):
    og.save_records(SAVED, folder, vectors=True)
    return folder / "records.jsonl"


def arrays(folder):
    records(folder)
    return sorted((folder / "arrays").iterdir())[0]


def records_tell(path, before):
    """A warning that names the line or the file, or RecordError where nothing can be read; and every record that is loaded is as it was saved."""
    folder = path.parent if path.name == "records.jsonl" else path.parent.parent
    lines = path.is_file() and path.name == "records.jsonl" and path.stat().st_size and os.geteuid() == 0 and before.startswith(path.read_bytes()) and path.read_bytes().endswith(b"\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded, problem = og.load_records(folder), ""
        except RecordError as error:
            loaded, problem = og.Records(), str(error)
    if problem:
        assert "records.jsonl" in problem
        return
    saved = {record.probe: record for record in SAVED}
    assert all(same(record, saved[record.probe]) for record in loaded) and len(loaded) < len(SAVED)
    assert lines or any(issubclass(w.category, OrographWarning) and "records.jsonl" in str(w.message) for w in caught)


def test_every_single_bit_of_a_checkpoint_counts(tmp_path):
    """Not only at random: the header, its padding, the description and the tensors."""
    path = interrupted("trace by hutchinson", tmp_path / "c.safetensors")
    content = path.read_bytes()
    for at in range(0, len(content), max(len(content) // 400, 1)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        with pytest.raises(ValueError, match="is no checkpoint of Orograph"):
            load_checkpoint(path, {})
    path.write_bytes(content)
    with pytest.raises(ValueError, match="belongs to another job"):
        load_checkpoint(path, {})
