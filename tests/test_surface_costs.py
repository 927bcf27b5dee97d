"""What a surface costs, counted in the user's own model: never more forward passes than the plain grid has points, and as many as the record says."""

import math
import queue
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import orograph as og
from orograph.planes import Plane, random_direction

from .families import rotating

EXAMPLES = 60  # more than a preflight looks at, so that a forward of all of them is one of the surface's
PASSES = queue.SimpleQueue()  # one entry for every forward of all examples without a gradient, in any copy of a model; not a list, whose content would be part of what the model is


class Counted(nn.Module):
    """A network whose forwards of the whole data are counted."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        if len(x) == EXAMPLES and not torch.is_grad_enabled():
            PASSES.put(1)
        return self.layers(x)


def network(kind, seed):
    """A network of a kind, a little trained."""
    torch.manual_seed(seed)
    layers = {
        "linear": [nn.Linear(6, 3)],
        "tanh": [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)],
        "relu": [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)],
        "norms": [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)],
        "attention": [nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(24, 3)],
    }[kind]
    net, (x, y) = Counted(*layers), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def data():
    x = torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def rough(output, target):
    """A loss that no polynomial tells."""
    return nn.functional.cross_entropy(output, target) + 0.1 * (1e4 * output).sin().mean()


def walled(output, target):
    """A loss that is not finite in a part of the plane."""
    return nn.functional.cross_entropy(output, target) + 0 * (output.mean() + 0.3).log()


KINDS = ("linear", "tanh", "relu", "norms", "attention")
PLANES = ("random", "layer", "whole", "eigenvectors", "gradient", "three networks", "given", "trajectory")
CASES = [
    *((kind, plane, nn.functional.cross_entropy, {}) for kind in KINDS for plane in PLANES),
    *((kind, plane, rough, {"resolution": resolution}) for kind in ("tanh", "norms") for plane in PLANES for resolution in (9, 12, 21)),
    *(("relu", plane, walled, {"resolution": 15}) for plane in PLANES),
    *(("relu", plane, nn.functional.cross_entropy, {"resolution": resolution}) for plane in PLANES for resolution in (3, 4, 5, 8)),
    *(("relu", plane, nn.functional.cross_entropy, {"tol": tol, "resolution": 15}) for plane in ("random", "eigenvectors", "three networks") for tol in (1e-9, 0.3)),
    *(("tanh", plane, rough, {"max_evaluations": most}) for plane in ("random", "three networks") for most in (8, 30, 60, 200)),
    *(("tanh", plane, nn.functional.cross_entropy, {"span": span}) for plane in ("random", "eigenvectors", "given") for span in (0.01, 30.0)),
    *(("norms", plane, nn.functional.cross_entropy, {"statistics": policy, "resolution": 11}) for plane in ("random", "eigenvectors", "three networks") for policy in ("frozen", "reestimated")),
    *(("relu", "random", loss, {"seeds": 3, "resolution": 11}) for loss in (nn.functional.cross_entropy, rough)),
]


@dataclass
class Cost:
    """A measurement, and the forwards that were counted in the meantime."""

    record: og.Record
    counted: int
    limit: int  # evaluations
    facts: dict = field(init=False)

    def __post_init__(self):
        self.facts = {row["quantity"]: row["value"] for row in self.record["faithful"].rows}

    @property
    def evaluations(self):
        return self.record["surface"].evaluations

    @property
    def counts_right(self):
        """Whether the record has the number of forwards that there were; several seeds have a sum for all planes."""
        if "spread" in self.record.results:
            return self.record["spread"].evaluations == self.counted
        return self.facts["evaluations of the loss"] == self.evaluations and self.facts["forward passes of the data for them"] == self.counted

    @property
    def within(self):
        return self.evaluations <= self.limit


def measured(kind, plane, loss, settings, store=None):
    """The cost of one case."""
    settings = {"resolution": 31} | settings
    torch.set_num_threads(1)
    objective = og.Objective(network(kind, 0), loss, data(), batch_size=EXAMPLES)
    points, probe = (), "surface"
    if plane in ("three networks", "trajectory"):
        points, probe = [network(kind, seed) for seed in range(3)], "trajectory" if plane == "trajectory" else "surface"
    elif plane == "given":
        settings["plane"] = Plane(objective.at(objective.theta + 0.1).point(), random_direction(objective, 5), random_direction(objective, 6, "whole"))
    elif plane in ("layer", "whole"):
        settings["normalisation"] = plane
    else:
        settings["axes"] = plane
    before = PASSES.qsize()
    record = og.measure(objective, probe, *points, store=store, **settings)
    return Cost(record, PASSES.qsize() - before, min(settings["resolution"] ** 2, settings.get("max_evaluations", math.inf)))


def told(case):
    kind, plane, loss, settings = case
    return " ".join([kind, plane, loss.__name__, *(f"{name}={value}" for name, value in settings.items())])


@pytest.mark.parametrize("case", rotating(CASES, 8), ids=told)
def test_no_surface_costs_more_than_the_plain_grid_and_the_record_says_what_it_did(case):
    cost = measured(*case)
    surface = cost.record["surface"]
    assert cost.counts_right, (cost.counted, cost.evaluations, cost.facts)
    assert cost.within, (cost.evaluations, cost.limit)
    assert surface.status == "converged" or "raise max_evaluations" in cost.record.says
    assert cost.facts["error asked for was reached"] == (surface.status == "converged")


RESUMED = [("tanh", "random", rough, {"resolution": 11}), ("relu", "three networks", nn.functional.cross_entropy, {"resolution": 21}), ("norms", "eigenvectors", walled, {"resolution": 9})]


@pytest.mark.parametrize("case", rotating(RESUMED, 1), ids=told)
def test_after_a_kill_the_rest_is_counted_and_all_runs_together_stay_within_the_grid(tmp_path, case):
    whole = measured(*case, store=str(tmp_path / "whole.jsonl"))
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (1, 2, len(lines) // 2, len(lines)):
        store = tmp_path / f"{kept}.jsonl"
        store.write_text("".join(lines[:kept]))
        rest = measured(*case, store=str(store))
        assert rest.counts_right and rest.within and rest.evaluations <= whole.evaluations - kept + 3 + 1
        assert torch.equal(rest.record["surface"].z.nan_to_num(-1), whole.record["surface"].z.nan_to_num(-1))


def test_samples_of_another_loss_in_the_file_do_not_lead_beyond_the_grid(tmp_path):
    store, case = str(tmp_path / "s.jsonl"), ("tanh", "random", {"resolution": 15})
    for steep in (1e4, 2e4, 3e4):
        own = lambda output, target, steep=steep: nn.functional.cross_entropy(output, target) + 0.1 * (steep * output).sin().mean()
        cost = measured(*case[:2], own, case[2], store=store)
        assert cost.counts_right and cost.within and cost.evaluations > 200


def test_data_in_another_order_every_time_take_their_references_off_the_picture(monkeypatch):
    monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)
    torch.manual_seed(0)

    class OwnDice(torch.utils.data.Sampler):
        def __init__(self):
            self.dice = torch.Generator().manual_seed(0)

        def __len__(self):
            return EXAMPLES

        def __iter__(self):
            return iter(torch.randperm(EXAMPLES, generator=self.dice).tolist())

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=EXAMPLES, sampler=OwnDice())
    objective = og.Objective(network("tanh", 0), rough, loader)
    before = PASSES.qsize()
    record = og.measure(objective, "surface", resolution=11, tol=1e-6)
    facts = {row["quantity"]: row["value"] for row in record["faithful"].rows}
    assert PASSES.qsize() - before == facts["forward passes of the data for them"] <= 121 and record.status == "budget-limited"


def test_points_that_cannot_be_paid_for_are_told_from_their_neighbours_with_an_error():
    cost = measured("tanh", "three networks", nn.functional.cross_entropy, {"resolution": 5, "tol": 1e-6})
    objective = og.Objective(network("tanh", 0), nn.functional.cross_entropy, data(), batch_size=EXAMPLES)
    plane = og.planes.plane_through([objective.point(network("tanh", seed)) for seed in range(3)])
    surface = cost.record["surface"]
    truth = torch.tensor([[objective.at(plane(float(s), float(t))).value() for t in surface.y] for s in surface.x], dtype=torch.float64)
    off = (surface.z - truth).abs()
    assert cost.evaluations == 25 and int((off > 1e-5).sum()) == 3 and surface.status == "budget-limited"  # three networks, three points of the picture
    assert float(off.max()) <= cost.facts["error of the picture, share of its range"] * float(truth.max() - truth.min())


def test_the_axes_of_eigenvectors_rise_by_what_has_been_learnt():
    cost = measured("tanh", "eigenvectors", nn.functional.cross_entropy, {})
    objective = og.Objective(network("tanh", 0), nn.functional.cross_entropy, data(), batch_size=EXAMPLES)
    largest = float(og.eigenpairs(og.hessian(objective), 1).values[0])
    learnt = abs(objective.at(torch.zeros_like(objective.theta)).value() - objective.value())
    length = cost.facts["length of the first axis"]
    assert length == pytest.approx(math.sqrt(2 * max(learnt, objective.value()) / largest), rel=1e-3) and cost.facts["length of the second axis"] == pytest.approx(length, rel=1e-5)
    assert cost.facts["rise of the quadratic model over the top eigenvector's axis"] == pytest.approx(largest * length**2 / 2, rel=1e-3)
    assert "axes of a rise of" in cost.record["surface"].note


@pytest.mark.slow
def test_a_surface_killed_at_a_random_moment_goes_on_with_the_samples_it_has(tmp_path):
    script = "import sys; from tests.test_surface_costs import *; c = measured('relu', 'random', rough, {'resolution': 21}, store=sys.argv[1]); print(c.evaluations, c.counted, c.counts_right)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "s.jsonl")], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not (tmp_path / "s.jsonl").exists() or len((tmp_path / "s.jsonl").read_text().splitlines()) < 40):
            pass
        process.kill()
    stored = sum(line.endswith("}\n") for line in (tmp_path / "s.jsonl").read_text().splitlines(keepends=True))
    cost = measured("relu", "random", rough, {"resolution": 21}, store=str(tmp_path / "s.jsonl"))
    assert cost.counts_right and cost.evaluations <= 441 - stored + 3 and stored >= 40
