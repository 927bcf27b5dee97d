"""Claims about surfaces and trajectories, each with its measured figure: `make evidence-5`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests import test_surfaces
from torch import nn
from torch.nn import functional as F

from orograph import Objective, Point, Record, Surface, Table, measure
from orograph.pictures import draw
from orograph.planes import Normalisation, Plane, plane_through, principal_plane, random_direction
from orograph.samples import Samples
from orograph.studies.networks import GPT, cnn, mlp
from orograph.studies.problems import digits, topics
from orograph.studies.training import train_to_loss

from .tables import Row, holds, show

FRESH = 200


def planted_rows() -> list[Row]:
    """Slices of a quadratic along eigenvectors and along any directions."""
    cases = test_surfaces.TestPlantedQuadratic()
    held = [holds(check) for check in (cases.test_slices_along_eigenvectors_are_half_their_eigenvalue_times_the_square, cases.test_a_plane_of_any_directions_has_its_own_quadratic)]
    return [("planted quadratics: slices along eigenvectors and any directions, not transposed", f"{sum(held)} of 2", "1e-10", all(held))]


def _networks() -> dict[str, Objective]:
    problem = digits()
    found = {}
    for name, net in {"digits MLP, tanh": mlp(64, 32, 10, seed=0), "ReLU BatchNorm CNN": cnn(seed=0, channels=(8, 16))}.items():
        train_to_loss(net, problem.train, batch_size=32, learning_rate=0.1, target=0.05)
        found[name] = Objective(net.eval(), nn.CrossEntropyLoss(), problem.train, batch_size=1200)
    return found


def surface_rows() -> list[Row]:
    """51 x 51 surfaces: error on points never used, evaluations, and time against the plain grid."""
    rows: list[Row] = []
    for (name, objective), most, share in zip(_networks().items(), (100, 400), (0.15, 0.2), strict=True):
        plane = _random(objective, 0)
        fast = float("inf")
        for _ in range(2):  # the first one warms kernels up, which the grid then has
            began = time.perf_counter()
            record = measure(objective, "surface", tol=0.01)
            fast = min(fast, time.perf_counter() - began)
        picture = record["surface"]
        assert isinstance(picture, Surface)
        grid = [(float(s), float(t)) for s in picture.x for t in picture.y]
        began = time.perf_counter()
        truth = torch.tensor([objective.at(plane(s, t)).value() for s, t in grid], dtype=torch.float64).view(51, 51)  # one point after the other, as plain grids do
        slow = time.perf_counter() - began
        pick = torch.randperm(51 * 51, generator=torch.Generator().manual_seed(77))[:FRESH]
        off, centre = (picture.z - truth).abs(), slice(13, 38)
        spread, inner = float(truth.max() - truth.min()), float(truth[centre, centre].max() - truth[centre, centre].min())
        whole, every, central = float(off.flatten()[pick].max()) / spread, float(off.max()) / spread, float(off[centre, centre].max()) / inner
        stated = _stated(record)
        good = whole <= 0.01 and every <= stated and central <= 0.05 and picture.evaluations <= most and fast <= share * slow
        text = f"{whole:.2%}; on all points {every:.2%}, stated {stated:.2%}; central quarter {central:.1%} of its own range; {picture.evaluations}; {fast:.1f} / {slow:.1f} s = {fast / slow:.2f}"
        rows.append((f"{name}, 51 x 51 at tol = 0.01: largest error on {FRESH} points of the grid; evaluations; time / plain grid", text, f"1 %, stated, 5 %, {most}, {share}", good))
    return rows


def _stated(record: Record) -> float:
    table = record["faithful"]
    assert isinstance(table, Table)
    return float(next(row["value"] for row in table.rows if row["quantity"] == "error of the picture, share of its range"))


def other_planes() -> list[Row]:
    """Three networks, eigenvectors, PCA, a transformer, a plain ReLU network, a corner where the loss blows up; and planes of many networks."""
    problem = digits()
    nets = [mlp(64, 32, 10, seed=seed, activation=nn.ReLU) for seed in range(3)]
    for seed, net in enumerate(nets):
        train_to_loss(net, problem.train, batch_size=32, learning_rate=0.1, target=0.1, seed=seed)
    relu = Objective(nets[0], nn.CrossEntropyLoss(), problem.train, batch_size=1200)
    points = [relu.point(net) for net in nets]
    tanh, convolutional = _networks().values()
    x, y = topics(length=16, examples=40).train
    gpt = Objective(GPT(width=24, layers=1, heads=2, length=16, seed=0), nn.CrossEntropyLoss(), (x, y))
    steps = _trajectory()
    planes: dict[str, tuple[Objective, Plane, float]] = {
        "three networks": (relu, plane_through(points), 1.0), "three networks, others": (relu, plane_through(points[::-1]), 1.0), "ReLU MLP": (relu, _random(relu, 3), 1.0),
        "ReLU MLP, whole": (relu, Plane(relu.point(), random_direction(relu, 1, "whole"), random_direction(relu, 2, "whole")), 1.0), "eigenvectors": (tanh, _eigen(tanh), 2.0),
        "tanh, layers": (tanh, Plane(tanh.point(), random_direction(tanh, 4, "layer"), random_direction(tanh, 5, "layer")), 1.0), "PCA": (steps[0], principal_plane(steps[1])[0], 1.0),
        "GPT": (gpt, _random(gpt, 6), 1.0), "CNN, near": (convolutional, _random(convolutional, 8), 0.5), "a corner that blows up": (tanh, _random(tanh, 7), 6.0),
    }  # fmt: skip
    named = [_held(*place) for place in planes.values()]
    failing = [f"{name}: {found:.3%} against {stated:.3%}" for name, (held, found, stated, _) in zip(planes, named, strict=True) if not held]
    text = f"{sum(held for held, *_ in named)} of {len(planes)}; {min(n for *_, n in named)} to {max(n for *_, n in named)} evaluations{'; ' if failing else ''}{'; '.join(failing)}"
    rows: list[Row] = [(f"{len(planes)} other planes: the error stated holds on all 51 x 51 points", text, "all", not failing)]
    many = [_held(*place) for seed in (21, 22) for place in _many(seed)]
    worst = max(found / stated for _, found, stated, _ in many)
    held = sum(ok for ok, *_ in many)
    rows.append((f"{len(many)} planes of other networks, seeds never looked at before: the same", f"{held} of {len(many)}; largest error / stated {worst:.2f}", ">= 95 %", held >= 0.95 * len(many)))
    return rows


def _held(objective: Objective, plane: Plane, span: float) -> tuple[bool, float, float, int]:
    """Whether the stated errors of values and of logarithms hold at every point of the picture; the error, the one stated, and evaluations."""
    samples = Samples(objective, plane, "frozen")
    picture = draw(samples, span=span, resolution=51, tol=0.01, most=3500, seed=0)
    spent, x, sampled = samples.evaluations, picture.surface.x.tolist(), picture.sampled
    truth = torch.tensor(samples.losses([(s, t) for s in x for t in x]), dtype=torch.float64).view(51, 51)
    found = sampled.scale().worst(picture.surface.z, truth)
    held = all(float(one) <= stated + 1e-12 for one, stated in zip(found, sampled.errors, strict=True))
    return held, float(found[0]), max(sampled.errors[0], 1e-12), spent


def _many(seed: int) -> Iterator[tuple[Objective, Plane, float]]:
    """Planes of five networks, random and through three points."""
    x, y = digits().train
    nets = [cnn(seed=seed, channels=(8, 16)), mlp(64, 32, 10, seed=seed), mlp(64, 32, 32, 32, 10, seed=seed, activation=nn.ReLU)]
    objectives = []
    for net in nets:
        train_to_loss(net, (x, y), batch_size=32, learning_rate=0.1, target=0.05, seed=seed)
        objectives.append(Objective(net.eval(), nn.CrossEntropyLoss(), (x[:400], y[:400]), batch_size=400))
    tokens = topics(length=16, examples=40).train
    objectives.append(Objective(GPT(width=24, layers=1, heads=2, length=16, seed=seed), nn.CrossEntropyLoss(), tokens))
    settings: list[tuple[Normalisation, float]] = [("filter", 1.0), ("layer", 1.0), ("filter", 0.4), ("whole", 1.5)]
    for objective in objectives:
        for kind, span in settings:
            yield objective, Plane(objective.point(), random_direction(objective, seed, kind), random_direction(objective, seed + 1_000_003, kind)), span
        others = [objective.point(objective.theta + 0.5 * random_direction(objective, k)) for k in (91, 92)]
        yield objective, plane_through([objective.point(), *others]), 1.0


def _random(objective: Objective, seed: int) -> Plane:
    return Plane(objective.point(), random_direction(objective, seed), random_direction(objective, seed + 1_000_003))


def _eigen(objective: Objective) -> Plane:
    from orograph import eigenpairs, hessian

    vectors = eigenpairs(hessian(objective), 2).vectors
    assert vectors is not None
    return Plane(objective.point(), vectors[:, 0], vectors[:, 1])


def _trajectory() -> tuple[Objective, list[Point]]:
    """The demo's kind of training, a checkpoint every 20 steps."""
    x, y = digits(dtype=torch.float64).train
    net = mlp(64, 32, 10, seed=0).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=1200)
    optimiser, generator, points = torch.optim.SGD(net.parameters(), lr=0.2), torch.Generator().manual_seed(0), [objective.now().point(label="step 0")]
    for step in range(1, 201):
        rows = torch.randint(0, len(x), (16,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()
        if step % 20 == 0:
            points.append(objective.now().point(label=f"step {step}"))
    return objective, points


def trajectory_rows() -> list[Row]:
    """Residuals and in-plane losses of the demo's training against direct evaluation."""
    objective, points = _trajectory()
    record = measure(objective, "trajectory", *points)
    table = record["path"]
    assert isinstance(table, Table)
    thetas = torch.stack([point.theta.double() for point in points])
    _, _, V = torch.linalg.svd(thetas - thetas.mean(0), full_matrices=False)
    worst = 0.0
    for point, row in zip(points, table.rows, strict=True):
        shadow = thetas[-1] + V[:2].T @ (V[:2] @ (point.theta.double() - thetas[-1]))
        direct: dict[str, Any] = {"loss": objective.at(point).value(), "in_plane_loss": objective.at(shadow).value(), "residual": float((point.theta.double() - shadow).norm())}
        worst = max(worst, *(abs(row[key] - value) / max(abs(value), 1e-3) for key, value in direct.items()))
    return [("trajectory of the demo's training: residuals and losses against direct evaluation", f"<= {worst:.0e}", "round-off (1e-9)", worst <= 1e-9)]


def topology_rows() -> list[Row]:
    """Merge trees against brute force."""
    tests = test_surfaces.TestTopology()
    held = sum(holds(partial(tests.test_pairs_are_those_of_a_brute_force_computation, seed)) for seed in range(20))
    analytic = holds(tests.test_two_valleys_meet_at_their_pass)
    return [("merge tree: 20 random surfaces against brute force; two valleys", f"{held} of 20; {'right' if analytic else 'WRONG'}", "all", held == 20 and analytic)]


def kill_rows() -> list[Row]:
    """A surface killed 20 times."""
    with tempfile.TemporaryDirectory() as folder:
        same = holds(partial(test_surfaces.TestStore().test_killed_at_20_random_moments_the_samples_are_the_same_bit_for_bit, Path(folder)))
    return [("surface killed at 20 random moments and resumed", "the same samples" if same else "DIFFERENT", "the same", same)]


def main() -> None:
    """Measure every row and print the table."""
    sections: list[Callable[[], list[Row]]] = [planted_rows, surface_rows, other_planes, trajectory_rows, topology_rows, kill_rows]
    show("Evidence 5: pictures that can be believed", sections if "--quick" not in sys.argv else sections[:5])


if __name__ == "__main__":
    main()
