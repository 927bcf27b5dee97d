"""Cases in which an operator can be wrong although symmetric and repeatable, each with an independent truth; and what comes of each.

Written before the proofs were mended, by somebody who did not know how they would be. Families: a loss whose own gradient autograd
cannot differentiate ("loss"), examples on which every product is zero ("zero"), branches that few examples take ("branch"), batches
whose examples are coupled ("coupled"), blocks behind a tiny gate ("gate"). `python -m tests.wrong_operators` prints the table.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orograph import block, hessian, measure
from orograph.errors import OrographError

from .wrong_cases import BRANCHES, COUPLED, GATES, LOSSES, ZEROS
from .wrong_setups import KINDS, Setup, as_double

FAMILIES = ("loss", "zero", "branch", "coupled", "gate")
RIGHT = {
    "autograd": 1e-6,
    "difference": 1e-5,
    "float32": 1e-3,
    "probe": 2e-2,
}  # relative error up to which products are right


@dataclass(frozen=True)
class WrongOperator:
    """A case: `make()` builds everything anew."""

    name: str
    family: str
    make: Callable[[], Setup]

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


@dataclass(frozen=True)
class Finding:
    """What came of a case: the error of the products relative to the truth, and what the operator says of its own proof."""

    error: float
    right: bool
    certificate: str  # op.about["preflight"], or "refused: ..." by Orograph, or "raw: ..." by torch
    said: tuple[str, ...] = ()  # warnings
    how: str = ""  # engine and micro-batches

    @property
    def proven(self) -> bool:
        return self.certificate.startswith("proven")

    @property
    def good(self) -> bool:
        """Right, refused with a clear error, or wrong and said to be unproven."""
        return self.right or (not self.proven and not self.certificate.startswith("raw"))

    @property
    def outcome(self) -> str:
        if self.certificate.startswith(("refused", "raw")):
            return "refused" if self.good else "RAW ERROR"
        if self.right:
            return "right, proven" if self.proven else "right, unproven"
        return "WRONG, PROVEN" if self.proven else "wrong, unproven"


def verdict(case: WrongOperator) -> Finding:
    """Build the operator as a user would, and compare two of its products with the truth."""
    setup = case.make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, expected, about = _layers(setup) if setup.probe else _products(setup)
        except (OrographError, ValueError, TypeError) as error:
            return Finding(
                float("nan"), False, f"refused: {type(error).__name__}: {error}", _texts(caught)
            )
        except (RuntimeError, IndexError, NotImplementedError, AssertionError) as error:
            return Finding(
                float("nan"),
                False,
                f"raw: {type(error).__name__}: {str(error)[:200]}",
                _texts(caught),
            )
    error = float(
        (found.double() - expected).norm()
        / max(float(expected.norm()), float(found.norm()), 1e-300)
    )
    how = (
        "probe"
        if setup.probe
        else "difference"
        if about.get("engine") == "difference"
        else "autograd"
        if found.dtype == torch.float64
        else "float32"
    )
    engine = " ".join(
        str(about[key]) for key in ("engine", "micro_batch", "joined") if key in about
    )
    return Finding(error, error < RIGHT[how], str(about["preflight"]), _texts(caught), engine)


def _products(setup: Setup) -> tuple[Tensor, Tensor, dict[str, Any]]:
    op = setup.build()
    V = torch.randn(
        op.size, 2, generator=torch.Generator().manual_seed(11), dtype=torch.float64
    ).to(op.dtype)
    return op @ V, setup.truth(V), dict(op.about)


def _layers(setup: Setup) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The block's largest eigenvalue as the layers probe gives it; the certificate is its row's where there is one, else the operator's."""
    objective = setup.objective()
    record = measure(objective, "layers", tol=1e-3, max_products=60)
    (row,) = (
        row
        for row in record.results["layers"].rows
        if row["name"] == setup.names.rstrip(".*") and row["kind"] == "module"
    )
    dense = setup.truth(torch.eye(int(setup.entries().sum()), dtype=torch.float64))
    top = torch.linalg.eigvalsh((dense + dense.T) / 2)[-1]
    words = row.get("preflight", hessian(objective).about["preflight"])
    return (
        torch.tensor([row["top_eigenvalue"]], dtype=torch.float64),
        top[None],
        {"preflight": words},
    )


def _texts(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    return tuple(str(one.message) for one in caught)


CASES = [
    WrongOperator(name, family, make)
    for family, cases in zip(FAMILIES, (LOSSES, ZEROS, BRANCHES, COUPLED, GATES), strict=True)
    for name, make in cases.items()
]


def plain_products(case: WrongOperator) -> tuple[Tensor, Tensor]:
    """(autograd's products of the plain network, truth): a check of the truth on what nothing is wrong with."""
    setup = case.make()
    criterion = setup.criterion if "isher" in setup.kind else setup.honest
    batches = [(as_double(x), as_double(y)) for x, y in setup.batches]
    whole = replace(setup, model=setup.twin(), criterion=criterion, batches=batches, memory=None)
    objective = whole.objective()
    op = KINDS[setup.kind](objective, engine="fresh", check=False)
    op = block(op, objective, setup.names) if setup.names else op
    V = torch.randn(op.size, 2, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    return op @ V, setup.truth(V)


def table(cases: list[WrongOperator] = CASES) -> str:
    """One line per case: what came of it, the error of the products, and what the operator says of its proof."""
    rows = []
    for case in cases:
        found = verdict(case)
        rows.append(
            f"{found.outcome:16} {found.error:9.2e}  {case!s:75} [{found.how}] {found.certificate[:90]}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
