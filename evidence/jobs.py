"""Claims about stored work: jobs that go on, jobs that are refused, damage, records, disks without room. Part of `make evidence-6`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests import test_damage, test_jobs, test_records, test_storage, test_weights
from tests.jobs import right_jobs, wrong_jobs

from .tables import Row, holds


def _held(check: Callable[..., object], cases: Sequence[Any]) -> int:
    """How many cases of a family a test holds for, each in a folder of its own."""
    return sum(_alone(partial(check, *case)) for case in cases)


def _alone(check: Callable[..., object]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return holds(partial(check, tmp_path=Path(folder)))


def _row(claim: str, held: int, of: int) -> Row:
    return claim, f"{held} of {of}", "all", held == of


def resumed_jobs() -> list[Row]:
    """The right job goes on, whatever has changed beside it."""
    cases = right_jobs()
    held = _held(test_jobs.test_the_right_job_goes_on_whatever_has_changed_beside_it, cases)
    return [_row("jobs interrupted, and resumed after free memory, engine, threads or label have changed: fewer products, the same numbers", held, len(cases))]


def refused_jobs() -> list[Row]:
    """The file of another job is refused."""
    cases = wrong_jobs()
    held = _held(test_jobs.test_the_file_of_another_job_is_refused, cases)
    return [_row(f"{len({job for job, *_ in cases})} kinds of jobs x what changes their results, from 1e-3 of one weight on: files of another job refused", held, len(cases))]


def damaged_files() -> list[Row]:
    """Damage is noticed."""
    held = _held(test_damage.test_damage_is_noticed, test_damage.DAMAGED)
    replaced = sum(holds(partial(test_damage.test_what_is_no_such_file_is_noticed, *case)) for case in test_damage.REPLACED)
    return [
        _row("checkpoints, samples, records and arrays with bytes zeroed, bits flipped, ends cut off, blocks overwritten: noticed, no result changed", held, len(test_damage.DAMAGED)),
        _row("the same files emptied, swapped, replaced by folders or texts, or without permission: one message each", replaced, len(test_damage.REPLACED)),
    ]


def records() -> list[Row]:
    """Records are typed, and one that cannot be read costs only itself."""
    fields = [(field, value) for field, values in test_records.FIELDS.items() for value in values]
    typed = sum(_alone(lambda tmp_path, case=case: test_records.test_a_field_of_another_type_is_named_with_file_and_line(tmp_path, *case)) for case in fields)
    names = ["../x", "../../etc/passwd", "/etc/passwd", "A" * 32, "0" * 31, "0" * 33, "g" * 32, "", 7, ["0" * 32], True]
    ids = sum(_alone(lambda tmp_path, name=name: test_records.test_array_ids_are_32_hexadecimal_digits(tmp_path, name)) for name in names)
    alone = [test_records.test_missing_arrays_spoil_one_record, test_records.test_swapped_arrays_are_noticed, test_records.test_damage_elsewhere_names_file_and_line]
    stored = holds(test_records.test_stored_example_of_schema_1_loads)
    types = [(place, dtype) for place in test_weights.PLACES for dtype in test_weights.TYPES["other"]]
    refused = sum(_alone(lambda tmp_path, case=case: test_weights.test_weights_that_are_no_floating_point_numbers_are_refused(test_weights.make_objective(), *case, tmp_path)) for case in types)
    return [
        _row("fields of records with a value of another type: file, line and field named, the other records read", typed, len(fields)),
        _row("array ids that are not 32 hexadecimal digits, paths among them: refused", ids, len(names)),
        _row("arrays missing, swapped, a line damaged: one record lost, the others read", sum(map(_alone, alone)), len(alone)),
        _row("the stored example of schema 1 loads", int(stored), 1),
        _row("integer, quantised, boolean and complex weights where floating-point ones belong: refused by name and type", refused, len(types)),
    ]


def disks_and_processes() -> list[Row]:
    """Full disks, kills, two processes."""
    jobs = ["trace by auto", "spectrum", "eigenpairs by LOBPCG", "fit_path", "surface"]
    full = sum(holds(partial(test_storage.test_a_job_on_a_full_disk_gives_the_same_numbers, job)) for job in jobs)
    told = [test_storage.test_a_full_disk_ends_no_job_and_keeps_the_last_state_that_had_room, test_storage.test_where_there_is_room_again_everything_is_saved,
            test_storage.test_records_that_do_not_fit_are_kept_and_told]  # fmt: skip
    two = [test_storage.test_a_checkpoint_has_one_job_at_a_time, test_storage.test_workers_of_a_killed_process_hold_no_lock, test_storage.test_two_processes_share_a_store_of_samples]
    killed = [test_storage.test_killed_in_the_middle_of_writing_nothing_is_left_over, test_storage.test_leftovers_are_those_of_the_dead]
    return [
        _row("jobs on a disk that is full from the start to the end: two warnings, the same numbers", full, len(jobs)),
        _row("the last state that had room stays; where there is room again all is saved; what is not on disk is said", sum(map(holds, told)), len(told)),
        _row("killed 12 times while writing: no temporary file stays, every file is whole", sum(map(_alone, killed)), len(killed)),
        _row("two processes on one checkpoint or store: refused, or safe", sum(map(_alone, two)), len(two)),
    ]


SECTIONS: list[Callable[[], list[Row]]] = [resumed_jobs, refused_jobs, damaged_files, records, disks_and_processes]
