"""Nothing that is shown of a network, however degenerate, leaves what its quantity can be."""

import math
import re

import pytest
import torch
from torch import nn

import orograph as og
from orograph.ranges import range_of
from orograph.results import Table
from orograph.scalars import scalars

from .families import rotating


def network(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    y = torch.arange(12) % 2
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    criterion = nn.CrossEntropyLoss()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    if kind == "perfect":
        x[:, 0] = 40.0 * (2 * y - 1)
        net = nn.Linear(3, 2).double()
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]]))
            net.bias.zero_()
    elif kind == "zero weights":
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
    elif kind == "one parameter":
        net, criterion = nn.Linear(1, 1, bias=False).double(), nn.MSELoss()
        x, y = x[:, :1], x[:, :1] * 2
    elif kind == "one example":
        x, y = x[:1], y[:1]
    elif kind == "zero loss":
        net, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
        y = net(x).detach()
    return og.Objective(net, criterion, (x, y))


NETWORKS = ("plain", "perfect", "zero weights", "one parameter", "one example", "zero loss")
PROBES = {
    "gradient": {}, "spectrum": {}, "layers": {}, "conditioning": {}, "noise": {"pairs": 3}, "stability": {"learning_rate": 0.1},
    "sharpness": {"definitions": ["curvature", "sam", "worst", "average", "fisher"]}, "barrier": {"resolution": 5}, "basins": {"resolution": 3},
    "connectivity": {"resolution": 3, "curve_epochs": 0},
}  # fmt: skip
CASES = [(kind, probe) for kind in NETWORKS for probe in PROBES]


def record_of(kind, probe):
    objective = network(kind)
    shifted = objective.at(objective.theta + 0.1).point(label="other")
    points = [objective.point(), shifted] if probe in ("barrier", "basins", "connectivity") else []
    return og.measure(objective, probe, *points, **PROBES[probe])


def stays_within_its_range(kind, probe):
    record = record_of(kind, probe)
    assert not re.search(r"\bnan\b|-0\.0\b|e-1[6-9]\b", record.says), record.says
    for name, result in record.results.items():
        for one in scalars(result):
            text = [name] if not isinstance(result, Table) else [one.quantity]
            low, high = range_of(*text)
            for end in (one.value, one.lower, one.upper):
                assert math.isnan(end) or low <= end <= high, (name, one)


KINDS = {
    "gradient_norm": (0.0, math.inf), "share of the gradient in the top 8 eigenvectors": (0.0, 1.0), "accuracy": (0.0, 1.0), "accuracy_drop": (-math.inf, math.inf),
    "negative_mass": (0.0, 1.0), "trace": (-math.inf, math.inf), "sigma_at_drop": (0.0, math.inf), "fourth_order": (-math.inf, math.inf), "error_barrier": (0.0, math.inf),
    "critical_rate": (0.0, math.inf), "top_missed": (0.0, 1.0), "loss": (-math.inf, math.inf), "share of wrong predictions": (0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_name_tells_the_range_of_its_kind(name):
    assert range_of(name) == KINDS[name]


@pytest.mark.parametrize("case", rotating(CASES, 10), ids=str)
@pytest.mark.filterwarnings("ignore::orograph.OrographWarning")
def test_every_number_and_its_interval_stay_within_what_is_possible(case):
    stays_within_its_range(*case)


def test_a_value_far_outside_a_range_is_shown_as_it_is():
    from orograph.ranges import bound, corrected
    from orograph.scalars import cell_interval

    assert corrected(1 + 1e-12, ("share",)) == 1.0 and corrected(-2.8e-17, ("norm",)) == 0.0
    assert corrected(1e4, ("lambda_max", "chance of a larger one")) == 1e4
    assert corrected(1.02, ("share",), error=0.03) == 1.0 and corrected(1.02, ("share",)) == 1.02
    assert bound(-0.1, 0.2, ("share",)) == 0.0 and bound(-0.1, 5.0, ("share",)) == -0.1
    row = {"definition": "lambda_max", "kind": "chance of a larger one", "value": 1e4, "error": 1.0}
    lower, upper = cell_interval(row, "value")
    assert lower < 1e4 < upper


def test_a_remark_beside_a_value_does_not_name_it():
    from orograph.ranges import names_of, range_of

    row = {"definition": "lambda_max", "kind": "from below, chance of a larger one 0", "layer": "norm.weight"}
    assert range_of(*names_of(row, "value")) == (float("-inf"), float("inf"))
    assert range_of(*names_of({"quantity": "share of steps"}, "value")) == (0.0, 1.0)
