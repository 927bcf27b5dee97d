"""Networks whose way depends on the data keep their function when they are aligned, on examples that nobody has seen."""

import pytest
import torch
from torch import nn

import orograph as og
from orograph.alignment import align

from .branching_networks import BRANCHING, unseen_data, usual_data
from .families import rotating


def same_on_unseen_examples(kind, seed, method="weights"):
    """Whether the aligned network computes what it did, and the alignment."""
    torch.manual_seed(seed)
    nets = [BRANCHING[kind]().double() for _ in range(2)]
    x, y = usual_data()
    size = 90 if kind == "UntilSmall" else 30  # a decision of the whole batch couples its examples
    objective = og.Objective(nets[0], nn.CrossEntropyLoss(), (x.double(), y), batch_size=size)
    found = align(objective, *nets, method=method, seed=seed)
    moved = BRANCHING[kind]().double()
    moved.load_state_dict(objective.state_dict(found.point))
    with torch.no_grad():
        pairs = [(moved(batch.double()), nets[1](batch.double())) for batch in unseen_data(kind)]
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in pairs), found


CASES = [(kind, seed, method) for kind in BRANCHING for seed in range(3) for method in ("weights", "activations")]


@pytest.mark.parametrize(("kind", "seed", "method"), rotating(CASES, 8))
def test_the_function_is_the_same_on_unseen_examples(kind, seed, method):
    same, found = same_on_unseen_examples(kind, seed, method)
    assert same and (found.verified or kind == "UntilSmall")  # its one batch cannot be cut, so nothing is held out


def test_ways_that_are_not_taken_are_explored_and_what_may_read_units_stays():
    _, found = same_on_unseen_examples("EarlyExit", 0)
    assert len(found.permutations) == 2  # the early exit is run by turning the decision over
    _, found = same_on_unseen_examples("RareReversal", 0)
    assert list(found.permutations) == ["last.weight[1]"]
    assert "first.weight[0]" in found.left
    _, found = same_on_unseen_examples("ByLength", 0)
    assert not found.permutations and found.similarity is None and "never reach" in found.left["first.weight[0]"]
