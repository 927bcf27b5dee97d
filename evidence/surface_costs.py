"""Surfaces cost what they promise: claims about evaluations and stated errors, counted in the model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tests import test_surface_costs, test_surfaces
from torch import Tensor, nn

from orograph import Objective, Point, Surface, measure
from orograph.pictures import draw
from orograph.planes import Plane
from orograph.probes.surface import Axes, _planes
from orograph.samples import Samples, chosen_policy
from orograph.studies.networks import GPT, cnn, mlp
from orograph.studies.problems import digits, topics
from orograph.studies.training import train_to_loss
from orograph.subject import Subject

from .tables import Row, holds, show

RESOLUTION = 31
KINDS_OF_AXES: dict[str, Axes | None] = {"random": "random", "eigenvectors": "eigenvectors", "gradient": "gradient", "three networks": None}
KINDS: dict[str, tuple[Callable[[int], nn.Module], float]] = {  # how a network is made, and the loss that it is trained to
    "tanh MLP": (lambda seed: mlp(64, 32, 10, seed=seed), 0.05),
    "ReLU MLP": (lambda seed: mlp(64, 32, 32, 10, seed=seed, activation=nn.ReLU), 0.05),
    "ReLU BatchNorm CNN": (lambda seed: cnn(seed=seed, channels=(4, 8)), 0.1),
    "CNN away from its minimum": (lambda seed: cnn(seed=seed, channels=(4, 8)), 1.0),
}


class Counting(nn.Module):
    """A network whose forwards of the whole data, without a gradient, are counted, in every copy of it."""

    passes: list[int] = []  # noqa: RUF012  (shared on purpose)

    def __init__(self, net: nn.Module, examples: int) -> None:
        super().__init__()
        self.net, self.examples = net, examples

    def forward(self, x: Tensor) -> Any:
        """The network's own output."""
        if len(x) == self.examples and not torch.is_grad_enabled():
            self.passes.append(1)
        return self.net(x)


def _networks(seed: int) -> Iterator[tuple[str, Objective, list[Point]]]:
    """Five networks, and for each of them itself and two others of its kind."""
    x, y = digits().train
    data = x[:300], y[:300]
    for name, (make, target) in KINDS.items():
        nets = [make(seed + k) for k in range(3)]
        for k, net in enumerate(nets):
            train_to_loss(net, data, batch_size=32, learning_rate=0.1, target=target, seed=seed + k)
        yield name, *_objective(nets, data)
    tokens = topics(length=16, examples=20).train
    yield "GPT", *_objective([GPT(width=24, layers=1, heads=2, length=16, seed=seed + k) for k in range(3)], tokens)


def _objective(nets: list[nn.Module], data: tuple[Tensor, Tensor]) -> tuple[Objective, list[Point]]:
    counting = [Counting(net.eval(), len(data[0])) for net in nets]
    objective = Objective(counting[0], nn.CrossEntropyLoss(), data, batch_size=len(data[0]))
    return objective, [objective.point(net) for net in counting]


def _plane(objective: Objective, points: list[Point], axes: Axes | None) -> Plane:
    """The very plane that a surface of these axes, or through these networks, has: no other sign or digit of an eigenvector."""
    return _planes(Subject(objective), tuple(points) if axes is None else (), None, axes or "random", "filter", range(1))[0][0]


@cache
def _costs(seed: int) -> list[tuple[str, int, bool, bool, bool]]:
    """For every network and kind of plane: its name, evaluations, whether they were counted right and met the tolerance, and whether the stated errors hold on all points."""
    found: list[tuple[str, int, bool, bool, bool]] = []
    for name, objective, points in _networks(seed):
        for axes, chosen in KINDS_OF_AXES.items():
            before = len(Counting.passes)
            three = chosen is None
            settings: dict[str, Any] = {} if three else {"axes": chosen}
            record = measure(objective, "surface", *(points if three else ()), resolution=RESOLUTION, **settings)
            counted, surface = len(Counting.passes) - before, record["surface"]
            assert isinstance(surface, Surface)
            facts: dict[str, Any] = {row["quantity"]: row["value"] for row in record["faithful"].rows}  # type: ignore[union-attr]  # a table
            statistics = chosen_policy("auto", objective, len(points) if three else 0)
            held = _holds(Samples(objective, _plane(objective, points, chosen), statistics), surface, facts)
            right = counted == facts["forward passes of the data for them"] and surface.evaluations == facts["evaluations of the loss"]
            found.append((f"{name}, {axes}", surface.evaluations, right, surface.status == "converged", held))
    return found


def _holds(samples: Samples, surface: Surface, facts: dict[str, Any]) -> bool:
    """Whether the errors stated hold on all points of the picture, of values and of logarithms."""
    truth = torch.tensor(samples.losses([(s, t) for s in surface.x.tolist() for t in surface.y.tolist()]), dtype=torch.float64).view_as(surface.z)
    plain = float((surface.z - truth).abs().max() / (truth.max() - truth.min()))
    logs = float((surface.z.log() - truth.log()).abs().max() / (truth.max() / truth.min()).log()) if surface.wide else 0.0
    stated = [float(facts.get(name, 0.0)) for name in ("error of the picture, share of its range", "error of its logarithms, share of their range")]
    return plain <= stated[0] + 1e-9 and logs <= stated[1] + 1e-9


def grid_rows() -> list[Row]:
    """Five networks and four kinds of planes, of two seeds: evaluations, and the error stated."""
    found = [one for seed in (101, 202) for one in _costs(seed)]
    grid, n = RESOLUTION**2, len(found)
    within, right, held = (sum(values) for values in ([cost <= grid for _, cost, *_ in found], [one[2] for one in found], [one[4] for one in found]))
    by_axes = "; ".join(f"{axes} {min(costs)} to {max(costs)}" for axes in KINDS_OF_AXES if (costs := [cost for name, cost, *_ in found if name.endswith(axes)]))
    failing = [name for name, *_, ok in found if not ok]
    return [
        (f"{n} pictures of {RESOLUTION} x {RESOLUTION} points, five networks x four kinds of planes x two seeds: evaluations (plain grid: {grid})", f"{within} of {n} within it; {by_axes}", "all", within == n),
        ("the same: forward passes counted in the model are those of the record", f"{right} of {n}", "all", right == n),
        ("the same: the stated error of values and logarithms holds on all points", f"{held} of {n}{'; not: ' if failing else ''}{'; '.join(failing)}", ">= 95 %", held >= 0.95 * n),
    ]


def length_rows() -> list[Row]:
    """What the length of axes along eigenvectors costs."""
    _, objective, points = next(one for one in _networks(303) if one[0] == "ReLU BatchNorm CNN")
    plane = _plane(objective, points, "eigenvectors")
    length, weights = float(plane.u.norm()), float(objective.theta.norm())
    found = {}
    for name, scale in {"by curvature": 1.0, "unit vectors": 1 / length, "as long as the weights": weights / length}.items():
        samples = Samples(objective, Plane(plane.origin, scale * plane.u, scale * plane.v), "frozen")
        draw(samples, span=1.0, resolution=RESOLUTION, tol=0.01, most=3500, seed=0)
        found[name] = samples.evaluations
    text = ", ".join(f"{name} {cost}" for name, cost in found.items())
    return [("CNN along its top eigenvectors: evaluations by the length of the axes", text, "the first is least, all within the grid", min(found, key=lambda name: found[name]) == "by curvature" and max(found.values()) <= RESOLUTION**2)]


def family_rows() -> list[Row]:
    """Every case of the tests' family: small and odd grids, losses that no polynomial tells, walls, tight budgets, several seeds, trajectories."""
    held = [holds(partial(test_surface_costs.test_no_surface_costs_more_than_the_plain_grid_and_the_record_says_what_it_did, case)) for case in test_surface_costs.CASES]
    rows: list[Row] = [("networks x planes x losses x resolutions, tolerances, budgets, spans, policies: never beyond the plain grid, counted right", f"{sum(held)} of {len(held)}", "all", all(held))]
    with tempfile.TemporaryDirectory() as folder:
        checks: list[Callable[[], object]] = []
        for k, case in enumerate(test_surface_costs.RESUMED):
            (Path(folder) / str(k)).mkdir()
            checks.append(partial(test_surface_costs.test_after_a_kill_the_rest_is_counted_and_all_runs_together_stay_within_the_grid, Path(folder) / str(k), case))
        checks.append(partial(test_surface_costs.test_samples_of_another_loss_in_the_file_do_not_lead_beyond_the_grid, Path(folder)))
        resumed = [holds(check) for check in checks]
    return [*rows, ("resumed after a kill at 4 moments each, and with another loss's samples in the file: counted right, the same picture", f"{sum(resumed)} of {len(resumed)}", "all", all(resumed))]


def file_rows() -> list[Row]:
    """What files keep, and pictures with zeros."""
    cases = test_surfaces.TestExports()
    with tempfile.TemporaryDirectory() as folder:
        kept = [holds(partial(cases.test_every_field_of_a_surface_comes_back, Path(folder), error)) for error in ("none", "unknown", "known")]
        zeros = [holds(partial(cases.test_zeros_keep_the_logarithms_of_a_picture, Path(folder), lowest)) for lowest in (0.0, -1e-18, -1.0)]
    return [
        (".npz: every field of a surface comes back", f"{sum(kept)} of {len(kept)}", "all", all(kept)),
        ("pictures with an exact zero, one up to rounding, a negative value: logarithmic, logarithmic, linear", f"{sum(zeros)} of {len(zeros)}", "all", all(zeros)),
    ]


SECTIONS: list[Callable[[], list[Row]]] = [grid_rows, length_rows, family_rows, file_rows]

if __name__ == "__main__":
    show("Surfaces cost what they promise", SECTIONS)
