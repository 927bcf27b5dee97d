"""Claims that nothing of the user's is harmed, each with its measured figure: twins, interrupts, threads and contexts."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tests import test_contexts, test_interrupts, test_threads, test_unharmed
from tests.every_module import KINDS, LOSSES
from tests.interrupting import RESTORING, Interrupter

from .tables import Row, holds

MOMENTS = {"copied": 500, "in place": 100}  # of every measurement, at which it is interrupted
DEAR = ("connect", "connectivity", "conditioning", "layers", "noise", "sharpness", "stability", "basins")  # measurements that take most of the time


def _row(claim: str, checks: Iterable[Callable[[], object]], bar: str = "all") -> Row:
    """How many of some tests hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = [holds(check) for check in checks]
    return claim, f"{sum(held)} of {len(held)}", bar, all(held)


def twin_rows() -> list[Row]:
    """A measured network and an unmeasured copy train on and stay equal to the last bit."""
    measurements = list(dict.fromkeys(test_unharmed.MEASUREMENTS))
    cheap = [name for name in measurements if name not in DEAR]
    twin = test_unharmed.twin_stays_equal
    turns = itertools.product(enumerate(KINDS), enumerate(DEAR))
    return [
        _row("every class of torch.nn is in the table, or in a list of reasons", [test_unharmed.test_no_module_class_of_torch_is_forgotten]),
        _row(f"twins equal: {len(KINDS)} networks x {len(cheap)} measurements x 1, 2, 3 times", [partial(twin, *case) for case in itertools.product(KINDS, cheap, (1, 2, 3))]),
        _row(f"twins equal: {len(KINDS)} networks, each with one of {len(DEAR)} long measurements, 1, 2 or 3 times in turn",
             [partial(twin, kind, name, 1 + i // len(DEAR) % 3) for (i, kind), (j, name) in turns if i % len(DEAR) == j]),
        _row("losses that count their calls and keep what they saw are left alone", [partial(test_unharmed.test_a_loss_with_a_memory_is_left_alone, name) for name in LOSSES]),
    ]  # fmt: skip


def interrupt_rows() -> list[Row]:
    """Ctrl-C at every line that sets or restores, and at random moments of every measurement."""
    rows = []
    for way in test_interrupts.WAYS:
        checks: list[Callable[[], object]] = []
        for use in test_interrupts.USES:
            model, objective, value, act, moments = test_interrupts.case(way, use)
            checks += [partial(test_interrupts.leaves_nothing_behind, model, objective, value, act, Interrupter(RESTORING, moment)) for moment in moments]
        rows.append(_row(f"interrupted at every line that sets or restores, {way}: state back, next value right", checks))
        failed, count = 0, 0
        for name in dict.fromkeys(test_unharmed.MEASUREMENTS):
            bad, tried = test_interrupts.random_moments(name, way, MOMENTS[way])
            failed, count = failed + len(bad), count + tried
        rows.append((f"interrupted at {MOMENTS[way]} random moments of every measurement, {way}: state back, next value right", f"{count - failed} of {count}", "all", failed == 0))
    return rows


def thread_rows() -> list[Row]:
    """Threads that measure together, and beside training."""
    acts = [name for name in test_threads.ACTS if name != "construct and evaluate"]
    return [
        _row("2 and 4 threads on one module and on two, copied and in place: the numbers of each alone", [partial(test_threads.right_in_threads, *case) for case in test_threads.CASES]),
        _row("training in another thread beside a measurement is what it is alone", [partial(test_threads.right_beside_training, act, 20) for act in acts]),
    ]


def context_rows() -> list[Row]:
    """What a caller has switched on changes no number."""
    cases: list[tuple[Any, ...]] = test_contexts.CASES
    check = test_contexts.test_a_callers_context_changes_no_number
    return [_row(f"{len(test_contexts.CONTEXTS)} contexts x {len(test_contexts.ACTS)} measurements, made outside and inside: equal to the last bit", [partial(check, *case) for case in cases])]


SECTIONS: list[Callable[[], list[Row]]] = [twin_rows, interrupt_rows, thread_rows, context_rows]
