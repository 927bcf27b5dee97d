"""What is said of two networks that are compared: one policy for statistics along a path, and their own losses."""

import pytest
import torch
from torch import nn

import orograph as og
from orograph.profiles import trace_path
from orograph.renormalise import renormalised

from .families import rotating


def data(count=120):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=g, dtype=torch.float64)
    return x, (x[:, :3] * torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)).argmax(1)


def network(seed, steps, norm):
    x, y = data()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8)] if norm else []
        net = nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def objective_of(net):
    return og.Objective(net, nn.CrossEntropyLoss(), data(), batch_size=40)


POLICIES = ("interpolated", "reestimated", "repaired")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["line", "chain", "curve"])
def test_a_path_has_one_policy_from_end_to_end(policy, kind):
    """Every point of the profile, its ends among them, is the loss of one function of the weights there."""
    a, b = network(0, 30, True), network(1, 30, True)
    objective = objective_of(a)
    first, last = objective.point(a), objective.point(b)
    middle = objective.point(network(2, 30, True))
    path = {"line": og.Line(first, last), "chain": og.PolyChain([first, middle, last]), "curve": og.Bezier([first, middle, last])}[kind]
    profile = trace_path(objective, path, statistics=policy, resolution=5, report=lambda *_: None, refine=False)
    for t in profile.sums:
        place = path(t) if policy == "interpolated" else renormalised(objective, path(t))
        assert profile.sums[t]["loss"] == pytest.approx(objective.at(place).value(), rel=1e-12)
    row = profile.barriers("loss", "train")[0]
    t, y = profile.curve("loss")
    assert row["value"] == pytest.approx(float((y - (1 - t) * y[0] - t * y[-1]).max()), rel=1e-12)
    assert ("re-estimated" in row["statistics"]) == (policy != "interpolated")


@pytest.mark.parametrize("probe", ["barrier", "basins", "connectivity"])
def test_the_policy_is_said_wherever_barriers_are(probe):
    a, b = network(0, 30, True), network(1, 30, True)
    settings = {"curve_epochs": 0} if probe == "connectivity" else {"statistics": "reestimated"}
    record = og.measure(objective_of(a), probe, a, b, resolution=3, **settings)
    assert "re-estimated at every point, the ends too" in record.says
    plain = og.measure(objective_of(network(0, 30, False)), probe, network(0, 30, False), network(1, 30, False), resolution=3)
    assert "running statistics" not in plain.says


PROBES = {
    "barrier": lambda o, a, b: og.measure(o, "barrier", a, b, resolution=3),
    "basins": lambda o, a, b: og.measure(o, "basins", a, b, resolution=3),
    "connectivity": lambda o, a, b: og.measure(o, "connectivity", a, b, resolution=3, curve_epochs=0),
    "connect": lambda o, a, b: og.connect(o, a, b, resolution=3, curve_epochs=0),
    "surface": lambda o, a, b: og.measure(o, "surface", a, b, network(2, 60, False), resolution=5, tol=0.2),
}


def losses_are_said(probe, steps):
    a, b = network(0, 60, False), network(1, steps, False)
    objective = objective_of(a)
    losses = [objective.at(net).value() for net in (a, b)]
    record = PROBES[probe](objective, a, b)
    unequal = abs(losses[0] - losses[1]) > 0.05 * max(losses)
    if probe != "surface":  # it has a third network
        assert ("unequal losses" in record.says) == unequal
    if unequal:
        assert "unequal losses" in record.says and all(f"{loss:.3g} (" in record.says for loss in losses)


CASES = [(probe, steps) for probe in PROBES for steps in (5, 30, 58)]


@pytest.mark.parametrize("case", rotating(CASES, 5), ids=str)
def test_unequal_losses_are_said(case):
    losses_are_said(*case)


@pytest.mark.parametrize("probe", ["spectrum", "sharpness", "gradient"])
def test_a_report_of_two_networks_says_that_their_losses_are_unequal(probe, tmp_path):
    a, b = network(0, 60, False), network(1, 5, False)
    settings = {"definitions": ["sam"]} if probe == "sharpness" else {}
    records = [og.measure(objective_of(net), probe, tags={"run": name}, **settings) for name, net in (("one", a), ("two", b))]
    extra = [og.measure(objective_of(net), "gradient", tags={"run": name}) for name, net in (("one", a), ("two", b))]
    page = og.write_report([*records, *extra], tmp_path / "report.html").read_text()
    assert "unequal losses" in page
    same = [og.measure(objective_of(a), probe, tags={"run": name}, **settings) for name in ("one", "two")]
    assert "unequal losses" not in og.write_report(same, tmp_path / "same.html").read_text()


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("name", ["loss", "error", "norm", "layers", "accuracy"])
def test_a_metric_replaces_no_quantity_that_is_measured(criterion, name):
    x, y = data()
    target = y if isinstance(criterion, nn.CrossEntropyLoss) else torch.rand(len(x), 3, dtype=torch.float64)
    metrics = {name: lambda output, target: 0.5}
    if name == "accuracy" and isinstance(criterion, nn.MSELoss):  # nothing of that name is measured
        assert og.Objective(nn.Linear(6, 3).double(), criterion, (x, target), metrics=metrics).metrics()[name] == 0.5
        return
    with pytest.raises(ValueError, match=f"'{name}'.* would replace a quantity of that name.*Call it otherwise"):
        og.Objective(nn.Linear(6, 3).double(), criterion, (x, target), metrics=metrics)


@pytest.mark.parametrize("name", ["loss", "error"])
def test_nor_does_one_of_a_batch_loss(name):
    net = nn.Linear(6, 3).double()
    with pytest.raises(ValueError, match="would replace a quantity"):
        og.Objective.from_batch_loss(net, lambda model, batch: (model(batch).sum(), len(batch)), [data()[0]], metrics={name: lambda model, batch: 0.0})
