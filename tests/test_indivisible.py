"""A batch that cannot be cut is one micro-batch everywhere, its numbers are those of the whole batch, and sane models are not taken for such."""

import warnings

import pytest
import torch

from orograph import Objective, OrographWarning, OutOfBudget, fisher, ggn, hessian, measure
from orograph.variants import joined, pieces

from .families import rotating
from .oracles import relative
from .uncut import (
    CE,
    GRAPH,
    ON_GRAPH,
    By,
    TokenModel,
    X,
    Y,
    as_single,
    built,
    by_criterion,
    cases,
    dense,
    gnn,
    labels,
    rows_of,
    sane,
)

CASES = cases()
TOGETHER = ("model output", "shared mask and words", "position from the end", "values and offsets", "an unbatched sequence", "a number as target", "no target")  # refused where there are several
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
        columns = op.space.sample(0, 0, "normal")[:, None]
        assert relative(op @ columns, expected @ columns) < (1e-10 if op.about["engine"] != "difference" else 1e-5)
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


@pytest.mark.parametrize("engine", ["retained", "fresh", "blockwise", "difference"])
def test_sparse_embeddings_are_right_with_every_engine(engine):
    layers = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    make = lambda sparse: built(lambda: By(lambda m, x: m.layers(m.a(x)), a=torch.nn.Embedding(7, 4, sparse=sparse), layers=layers()))
    data = (labels(7, 9, 3), Y)
    found, expected = (hessian(Objective(make(sparse), CE, data), engine=engine if sparse else "auto").dense() for sparse in (True, False))
    assert relative(found, expected) < (1e-6 if engine == "difference" else 1e-12)


@pytest.mark.parametrize(("name", "matrix"), rotating(DEFINED, 20))
def test_matrices_are_those_of_the_whole_batch(name, matrix):
    check_matrix(name, matrix)


@pytest.mark.parametrize(("name", "matrix"), rotating(UNDEFINED, 6))
def test_what_has_no_ggn_or_fisher_says_so(name, matrix):
    check_undefined(name, matrix)


@pytest.mark.parametrize("name", rotating(list(CASES), 5))
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
@pytest.mark.parametrize("name", rotating([name for name in CASES if not CASES[name].divisible and "tiny" not in name and "nested" not in name and "CSR" not in name], 8))
def test_couplings_show_in_low_precision(name, precision):
    assert as_single(CASES[name], getattr(torch, precision)).indivisible


def check_several(name):
    """Several batches are weighed by their units where torch alone keeps them whole, and refused with advice where their examples are coupled."""
    case = CASES[name]
    several = lambda: Objective(built(case.make), case.criterion, [case.batch, case.batch], forward=case.forward)
    if name.startswith("coupled rows") or name in by_criterion() or name in TOGETHER:
        with pytest.raises((ValueError, TypeError), match=r"give the whole set as one batch|Pass count="):
            several()
        return
    objective = several()
    assert objective.value() == pytest.approx(float(dense(case, "value")), rel=1e-12) and objective.divisible == case.divisible
    assert relative(hessian(objective, check=False).dense(), dense(case, "hessian")) < 1e-10


@pytest.mark.parametrize("name", rotating(list(CASES), 8))
def test_several_batches_are_weighed_by_their_units_or_refused(name):
    check_several(name)


def unequal_batches():
    """name -> (model, batches, forward): two batches of different sizes each."""
    flat = lambda m, b: (m(b["x"]).reshape(-1, 7), b["y"])
    tokens = [{"x": labels(7, n, 6, seed=n), "y": labels(7, n * 6, seed=n + 9)} for n in (5, 3)]
    graphs = [{"x": X[:n], "A": GRAPH[:n, :n], "y": Y[:n]} for n in (9, 6)]
    return {"flattened targets": (TokenModel, tokens, flat), "graphs": (gnn, graphs, ON_GRAPH)}


@pytest.mark.parametrize("name", unequal_batches())
def test_batches_of_different_sizes_are_weighed_by_their_units(name):
    make, batches, forward = unequal_batches()[name]
    objective, model = Objective(built(make), CE, batches, forward=forward), built(make)
    pairs = [forward(model, batch) for batch in batches]
    loss = CE(torch.cat([output for output, _ in pairs]), torch.cat([target for _, target in pairs]))
    parameters = list(model.parameters())
    assert objective.value() == pytest.approx(loss.item(), rel=1e-12)
    assert relative(hessian(objective).dense(), rows_of(rows_of(loss, parameters, graph=True), parameters)) < 1e-10


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (4, 5), (1, 8)])
def test_batch_statistics_are_seen_in_batches_of_any_size(sizes):
    x, y = X.split(list(sizes) + [9 - sum(sizes)] * (sum(sizes) < 9)), Y.split(list(sizes) + [9 - sum(sizes)] * (sum(sizes) < 9))
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5, track_running_stats=False), torch.nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"give the whole set as one batch|Expected more than 1 value"):
        Objective(net, CE, list(zip(x, y, strict=True)))


def check_cost(name):
    """Two forwards of the batch at most."""
    seen = []

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 3).double()

        def forward(self, x):
            seen.append(len(x))
            return self.a(x) - (self.a(x).mean(0) if name == "coupled" else 0)

    Objective(Counted(), CE, [(X, Y)])
    rows = sum(seen) / 9
    seen.clear()
    Objective(Counted(), CE, [(X, Y)], mode="batch")  # nothing is cut
    assert rows - sum(seen) / 9 <= 2


@pytest.mark.parametrize("name", ["one batch", "coupled"])
def test_proving_that_a_batch_may_be_cut_costs_two_forwards_of_it(name):
    check_cost(name)


def test_a_network_without_a_batch_axis_is_connected_to_another():
    objective = CASES["one point cloud"].objective()
    record = measure(objective, "connectivity", objective.point(), objective.theta * 0.9, curve_epochs=2)
    assert record["merged"] is not None


@pytest.mark.parametrize("name", rotating(list(CASES), 5))
def test_losses_of_examples_are_those_of_the_whole_batch(name):
    objective = CASES[name].objective()
    if found := objective.per_example().get("loss"):
        assert found.mean == pytest.approx(objective.value(), rel=1e-12)
