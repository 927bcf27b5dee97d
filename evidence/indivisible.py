"""Claims about batches that cannot be cut, each with its measured figure: a part of `make evidence-6`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from tests import test_indivisible, test_loaders
from tests.oracles import relative
from tests.uncut import COUPLED, as_single, dense

from .tables import Row, holds, show

CASES = test_indivisible.CASES
EXACT = 1e-10


def matrix_rows() -> list[Row]:
    """H, GGN and Fisher of one batch against dense ones by plain torch on the whole batch."""
    rows: list[Row] = []
    kinds = [name for name in CASES if not CASES[name].divisible]
    for matrix, operator in test_indivisible.MATRICES.items():
        names = [name for name, defined in test_indivisible.DEFINED if defined == matrix and name in kinds]
        errors = [_error(name, matrix, operator) for name in names]
        good = sum(error < EXACT for error in errors)
        rows.append((f"batches that cannot be cut: {matrix} against the dense one of the whole batch", f"{good} of {len(names)} kinds, largest error {max(errors):.1e}", "1e-10, all", good == len(names)))
    refused = _count(partial(test_indivisible.check_undefined, name, matrix) for name, matrix in test_indivisible.UNDEFINED)
    rows.append(("what has no GGN or Fisher: one clear error", *_of(refused, len(test_indivisible.UNDEFINED))))
    plain = [name for name in CASES if CASES[name].divisible]
    right = _count(partial(test_indivisible.check_matrix, name, "hessian") for name in plain)
    rows.append(("sparse embeddings, parameters without axes, complex inputs: Hessian, and the batch may be cut", *_of(right, len(plain))))
    return rows


def _error(name: str, matrix: str, operator: Callable[..., Any]) -> float:
    """Relative error of a matrix; infinite where it is not proven, or the batch is taken for one that may be cut."""
    objective = CASES[name].objective()
    op = operator(objective)
    return relative(op.dense(), dense(CASES[name], matrix)) if op.about["preflight"] == "proven" and not objective.divisible else float("inf")


def budget_rows() -> list[Row]:
    """Budgets, samples, micro-batches, several batches."""
    budgets = _count(partial(test_indivisible.check_budgets, name) for name in CASES)
    whole = _count(partial(test_indivisible.check_whole, name) for name in CASES)
    several = _count(partial(test_indivisible.check_several, name) for name in CASES)
    return [
        ("under five memory budgets: the right product, or a refusal that says why the batch is not cut", *_of(budgets, len(CASES))),
        ("one micro-batch everywhere; choosing examples is refused", *_of(whole, len(CASES))),
        ("several such batches: weighed by their units, or refused with advice", *_of(several, len(CASES))),
    ]


def divisibility_rows() -> list[Row]:
    """Coupled batches are seen, sane ones are not taken for such."""
    sane = _count(partial(test_indivisible.check_sane, name) for name in test_indivisible.SANE)
    names = [f"coupled rows: {name}" for name in COUPLED if "tiny" not in name]
    seen = sum(bool(as_single(CASES[name], dtype).indivisible) for name in names for dtype in (torch.float64, torch.float32, torch.bfloat16))
    tiny = as_single(CASES["coupled rows: tiny centring"], torch.float64).indivisible
    return [
        ("one batch with coupled examples (a gate of zero, the last two rows) is not cut; float64, float32 and bfloat16", *_of(seen, 3 * len(names))),
        ("the proof that one batch may be cut costs at most two forwards of it", *_of(_count(partial(test_indivisible.check_cost, name) for name in ("one batch", "coupled")), 2)),
        ("a coupling of 1e-8 in float64", tiny.split(", so that")[0] or "not seen", "seen", bool(tiny)),
        ("batches of sane models in float64, float32 and bfloat16 may be cut", *_of(sane, len(test_indivisible.SANE))),
    ]


def loader_rows() -> list[Row]:
    """Loaders that repeat or drop examples, and those that do not."""
    refused = _count(partial(test_loaders.check_refused, name) for name in test_loaders.REFUSED)
    accepted = _count(partial(test_loaders.check_accepted, name, 0) for name in test_loaders.ACCEPTED)
    return [
        ("loaders that repeat, drop or promise examples that do not come: refused with the cause", *_of(refused, len(test_loaders.REFUSED))),
        ("loaders that give every example once, duplicates in the data included: read", *_of(accepted, len(test_loaders.ACCEPTED))),
    ]


def _count(checks: Iterable[Callable[[], object]]) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return sum(map(holds, checks))


def _of(held: int, count: int) -> tuple[str, str, bool]:
    return f"{held} of {count}", "all", held == count


SECTIONS: list[Callable[[], list[Row]]] = [matrix_rows, budget_rows, divisibility_rows, loader_rows]


if __name__ == "__main__":
    show("Batches that cannot be cut", SECTIONS)
