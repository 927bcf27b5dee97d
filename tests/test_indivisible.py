"""A batch that cannot be cut is one micro-batch everywhere, its numbers are those of the whole batch, and sane models are not taken for such."""

import warnings

import pytest
import torch

from orograph import OrographWarning, OutOfBudget, fisher, ggn, hessian
from orograph.variants import joined, pieces

from .families import rotating
from .oracles import relative
from .uncut import as_single, cases, dense, sane

CASES = cases()
SANE = {f"{name}, {precision}": (case, precision) for name, case in sane().items() for precision in ("float64", "float32", "bfloat16") if (name, precision) != ("constants in float32", "bfloat16")}
MATRICES = {"hessian": hessian, "ggn": ggn, "mc": lambda o, **s: fisher(o, kind="mc", **s), "empirical": lambda o, **s: fisher(o, kind="empirical", **s)}
DEFINED = [(name, matrix) for name, case in CASES.items() for matrix in MATRICES if matrix == "hessian" or (case.curved and matrix == "ggn") or matrix in case.fisher]
UNDEFINED = [(name, matrix) for name, case in CASES.items() for matrix in MATRICES if (name, matrix) not in DEFINED]


def check_matrix(name, matrix):
    case = CASES[name]
    objective = case.objective()
    op = MATRICES[matrix](objective)
    assert objective.value() == pytest.approx(float(dense(case, "value")), rel=1e-12)
    assert relative(op.dense(), dense(case, matrix)) < 1e-10
    assert op.about["preflight"] == "proven" and objective.divisible == case.divisible


def check_undefined(name, matrix):
    with pytest.raises(TypeError, match=r"needs|need one tensor"):
        MATRICES[matrix](CASES[name].objective())


def check_budgets(name):
    """Under every budget the matrix is right, or there is none and the message says why the batch is not cut."""
    case = CASES[name]
    objective, expected = case.objective(), dense(case, "hessian")
    refusals = []
    for memory in (2**10, 2**14, 2**16, 2**18, 2**22):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OrographWarning)  # that differences are taken
                op = hessian(objective, memory=memory, check=False)
        except OutOfBudget as error:
            refusals.append(str(error))
            continue
        found = torch.cat([op @ column for column in torch.eye(op.size, dtype=op.dtype).split(1, dim=1)], dim=1)
        assert relative(found, expected) < (1e-10 if op.about["engine"] != "difference" else 1e-5)
    assert len(refusals) < 5 and all(case.divisible or "cannot be cut" in message for message in refusals)


def check_whole(name):
    """Wherever micro-batches are made, the batch is one of them; choosing examples is refused."""
    case = CASES[name]
    objective = case.objective()
    if case.divisible:
        return
    assert objective.indivisible and joined(objective, 1) is objective
    ((weight, piece),) = pieces(objective, 1)
    assert weight == 1 and piece.value() == objective.value() and piece.indivisible == objective.indivisible
    for choose in (lambda: objective.sample(1, seed=0), lambda: objective.split(2, seed=0), lambda: objective.picked(torch.arange(1))):
        with pytest.raises(ValueError, match=r"would cut batches that must stay whole|needs [12] <= "):
            choose()


@pytest.mark.parametrize(("name", "matrix"), rotating(DEFINED, 30))
def test_matrices_are_those_of_the_whole_batch(name, matrix):
    check_matrix(name, matrix)


@pytest.mark.parametrize(("name", "matrix"), rotating(UNDEFINED, 6))
def test_what_has_no_ggn_or_fisher_says_so(name, matrix):
    check_undefined(name, matrix)


@pytest.mark.parametrize("name", rotating(list(CASES), 8))
def test_no_budget_cuts_the_batch(name):
    check_budgets(name)


@pytest.mark.parametrize("name", rotating(list(CASES), 15))
def test_the_batch_is_whole_everywhere(name):
    check_whole(name)


def check_sane(name):
    """Batches of sane models may be cut, whatever their rounding."""
    case, precision = SANE[name]
    objective = as_single(case, getattr(torch, precision))
    assert objective.indivisible == ""


@pytest.mark.parametrize("name", rotating(list(SANE), 20))
def test_batches_of_sane_models_may_be_cut(name):
    check_sane(name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", rotating([name for name in CASES if not CASES[name].divisible and "tiny" not in name and "nested" not in name], 8))
def test_couplings_show_in_low_precision(name, precision):
    assert as_single(CASES[name], getattr(torch, precision)).indivisible
