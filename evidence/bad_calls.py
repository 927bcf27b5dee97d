"""Wrong calls over the whole public surface, and how each is refused, with the figures."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from itertools import product
from pathlib import Path

from tests.bad_calls import outcomes, parameters_of, public_callables
from tests.bad_options import prepared, unclear, wrong_options
from tests.good_calls import good_calls
from tests.test_bad_calls import (
    DTYPES,
    WRONG,
    test_honest_rounding_is_no_false_alarm,
    test_operators_that_are_no_symmetric_matrix_are_refused_before_their_first_use,
)

from .tables import Row, holds

SCALES = (1e-30, 1e-8, 1.0, 1e8, 1e30)
SPECTRA = ("random", "decaying", "one large", "rank one", "zero", "identity", "indefinite")


def wrong_arguments() -> list[Row]:
    """Every parameter of every public callable, with every wrong value of its type."""
    counts: Counter[str] = Counter()
    callables, parameters = public_callables(), 0
    with tempfile.TemporaryDirectory() as folder:
        good = good_calls(Path(folder))
        for name in callables:
            place = Path(folder) / name.replace(" ", "-")
            place.mkdir()
            parameters += len(parameters_of(name, good[name][0]))
            for outcome in outcomes(name, place):
                counts[outcome.kind] += 1
                if outcome.kind in ("raw", "accepted"):
                    print(outcome)
    wrong = counts["clear"] + counts["raw"] + counts["accepted"]
    missing = sorted(set(callables) ^ set(good))
    return [
        (
            f"wrong calls: {len(callables)} public callables and probes, {parameters} parameters",
            f"clear {counts['clear']:,} of {wrong:,}, raw {counts['raw']}, accepted {counts['accepted']}; {counts['fine']} more values are right, with a reason",
            "all clear",
            wrong > 0 and counts["clear"] == wrong,
        ),
        (
            "public callables that the walk leaves out",
            ", ".join(missing) or "none",
            "none",
            not missing,
        ),
    ]


def plain_operators() -> list[Row]:
    """Operators of a user's own that are no symmetric matrix, and honest ones."""
    tried = test_operators_that_are_no_symmetric_matrix_are_refused_before_their_first_use
    refused = [holds(partial(tried, name)) for name in WRONG]
    cases = product(SPECTRA, SCALES, DTYPES)
    honest = [holds(partial(test_honest_rounding_is_no_false_alarm, *case)) for case in cases]
    return [
        (
            "operators that are not symmetric, linear, repeatable, or change their input, in 5 uses each",
            f"refused {sum(refused)} of {len(refused)}",
            "all",
            all(refused),
        ),
        (
            "false alarms: 7 spectra x scales from 1e-30 to 1e30 x float64, float32, bfloat16, also with a half-precision model",
            f"{len(honest) - sum(honest)} of {len(honest)}",
            "none",
            all(honest),
        ),
    ]


def wrong_command_lines() -> list[Row]:
    """Every option and argument of every command, with wrong values."""
    tried = [arguments for _, _, arguments in wrong_options()]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        prepared(Path(folder))
        faults = [fault for arguments in tried if (fault := unclear(arguments))]
    for fault in faults:
        print(fault)
    clear = len(tried) - len(faults)
    return [("wrong options of the command line", f"clear {clear} of {len(tried)}", "all clear", not faults)]


SECTIONS: list[Callable[[], list[Row]]] = [wrong_arguments, plain_operators, wrong_command_lines]
