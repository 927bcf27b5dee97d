"""Surfaces of planted functions, their samples and errors, and what is said beside a picture."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import orograph as og
from orograph.chebyshev import Interpolant, interpolation_matrix, nodes
from orograph.crowds import losses_of
from orograph.grids import Scale, sample_square
from orograph.planes import plane_through, principal_plane, random_direction
from orograph.renormalise import renormalised, renormalised_all
from orograph.studies.networks import cnn, mlp
from orograph.topology import basins_of

from .networks import loss_cases
from .quadratics import quadratic, random_quadratic

DOUBLE = {"dtype": torch.float64}


def facts(record):
    return {row["quantity"]: row["value"] for row in record["faithful"].rows}


def flat(seed, n):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), **DOUBLE)


class TestPlantedQuadratic:
    def test_slices_along_eigenvectors_are_half_their_eigenvalue_times_the_square(self):
        A, _, _ = random_quadratic(9)
        record = og.measure(quadratic(A, torch.zeros(len(A), **DOUBLE)), "surface", axes="eigenvectors", resolution=11)
        lam = torch.linalg.eigvalsh(A).flip(0)
        s = record["surface"]
        expected = 0.5 * lam[0] * s.x[:, None] ** 2 + 0.5 * lam[1] * s.y[None] ** 2
        assert float((s.z - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
        rows = facts(record)
        assert rows["curvature along the first axis"] == pytest.approx(float(lam[0]), rel=1e-9) and abs(rows["cosine between the axes"]) < 1e-10

    def test_a_plane_of_any_directions_has_its_own_quadratic(self):
        A, g, _ = random_quadratic(4)
        u, v = flat(1, len(g)), 3 * flat(2, len(g))
        objective = quadratic(A, g)
        record = og.measure(objective, "surface", plane=og.Plane(objective.point(), u, v), span=2.0, resolution=7)
        s, t = record["surface"].x[:, None], record["surface"].y[None]
        expected = s * (g @ u) + t * (g @ v) + 0.5 * (s**2 * (u @ A @ u) + 2 * s * t * (u @ A @ v) + t**2 * (v @ A @ v))
        assert float((record["surface"].z - expected).abs().max()) <= 1e-10 * float(expected.abs().max())  # [i, j] at (x_i, y_j): not transposed
        assert record["surface"].evaluations <= 33

    def test_the_quadratic_model_of_a_quadratic_never_fails(self):
        A, g, _ = random_quadratic(5)
        record = og.measure(quadratic(A, g, flat(3, len(g))), "surface", normalisation="whole", resolution=9)
        rows = facts(record)
        assert rows["radius at which the quadratic model fails"] == math.inf and torch.allclose(record["quadratic"].z, record["surface"].z, rtol=1e-8)


class TestPlanes:
    def test_filters_of_a_random_direction_have_the_networks_own_norms(self):
        net = cnn(seed=0, channels=(4, 6)).double()
        objective = og.Objective(net.eval(), nn.CrossEntropyLoss(), (torch.rand(20, 64, **DOUBLE), torch.arange(20) % 10))
        parts = dict(zip(objective.names, objective.layout.split(random_direction(objective, 3)), strict=True))
        for name, weight in net.named_parameters():
            if weight.ndim < 2:
                assert not parts[name].any()
            else:
                assert torch.allclose(parts[name].flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
        whole, layer = (random_direction(objective, 3, kind) for kind in ("whole", "layer"))
        assert float(whole.norm()) == pytest.approx(float(objective.theta.norm()))
        assert all(float(d.norm()) == pytest.approx(float(w.norm())) for d, w in zip(objective.layout.split(layer), objective.layout.split(objective.theta), strict=True))

    def test_random_axes_are_not_parallel(self):
        objective = loss_cases()["cross-entropy"].objective(100)
        cosines = [facts(og.measure(objective, "surface", normalisation="whole", resolution=3, seed=seed))["cosine between the axes"] for seed in range(5)]
        assert max(abs(c) for c in cosines) < 5 / math.sqrt(objective.size)

    def test_three_networks_lie_in_their_plane_and_within_the_picture(self):
        points = [og.Point(theta=flat(seed, 40), label=str(seed)) for seed in range(3)]
        plane = plane_through(points)
        assert abs(plane.cosine) < 1e-12
        for point in points:
            s, t, off = plane.coordinates(point)
            assert max(abs(s), abs(t)) <= 0.8 + 1e-9 and off < 1e-10
            assert torch.allclose(plane(s, t).theta, point.theta)
        with pytest.raises(ValueError, match="lie on one line"):
            plane_through([og.Point(theta=k * flat(1, 5)) for k in range(3)])

    def test_principal_plane_is_that_of_a_singular_value_decomposition(self):
        rows = torch.stack([flat(seed, 30) * torch.linspace(3, 0.1, 30, **DOUBLE) for seed in range(6)])
        plane, shares = principal_plane([og.Point(theta=row) for row in rows])
        _, S, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert shares == pytest.approx(((S**2) / (S**2).sum())[:2].tolist())
        for axis, vector in zip((plane.u, plane.v), V[:2], strict=True):
            assert abs(float(axis @ vector / axis.norm())) == pytest.approx(1.0)


class TestGrids:
    def test_interpolation_is_exact_for_polynomials_and_at_the_nodes(self):
        x = torch.linspace(-1, 1, 37, **DOUBLE)
        for m in (4, 8):
            p = lambda y: y**m - 3 * y**2 + 1  # noqa: B023
            assert torch.allclose(interpolation_matrix(x, m) @ p(nodes(m)), p(x))
            assert torch.allclose(interpolation_matrix(nodes(m), m), torch.eye(m + 1, **DOUBLE))
        assert all(bool((nodes(8) - node).abs().min() < 1e-15) for node in nodes(4))

    @pytest.mark.parametrize("name", ["smooth", "valley", "steep", "kinked", "walled", "corner", "flat"])
    def test_the_error_that_is_stated_holds_on_every_point_of_the_picture(self, name):
        f, most = {
            "smooth": (lambda s, t: math.sin(2 * s) * math.cos(t) + s * t, 100), "steep": (lambda s, t: math.exp(4 * s + 3 * t**2), 100),
            "valley": (lambda s, t: 0.01 + (s + 0.3) ** 2 + 4 * t**2 / (1 + abs(t) ** 3), 700), "kinked": (lambda s, t: abs(s + 0.3 * t) + 0.1 * t**2, 2000),
            "walled": (lambda s, t: math.inf if s > 0.9 else s**2, 1200), "corner": (lambda s, t: 1e6 * max(0.0, s + t - 1.5) ** 3 + s * s + t * t + 0.1, 1000), "flat": (lambda s, t: 3.0, 40),
        }[name]  # fmt: skip
        asked = []
        found = sample_square(lambda places: [asked.append(place) or f(*place) for place in places], resolution=51, tol=0.01, most=3500, seed=0)
        z, x = found.grid(lambda place: f(*place)), found.axis.tolist()
        truth = torch.tensor([[f(s, t) for t in x] for s in x], **DOUBLE)
        worst = found.scale().worst(z[truth.isfinite()], truth[truth.isfinite()])
        assert torch.equal(z.isfinite(), truth.isfinite()) and found.converged and max(found.errors) <= 0.05
        assert float(worst[0]) <= found.errors[0] + 1e-12 and float(worst[1]) <= found.errors[1] + 1e-12
        assert len(asked) == len(set(asked)) == len(found.seen) <= most

    def test_where_evaluations_run_out_the_error_says_so(self):
        noise = lambda places: [math.sin(1e4 * s) * math.cos(3e4 * t) for s, t in places]
        found = sample_square(noise, resolution=51, tol=0.01, most=500, seed=0)
        assert len(found.seen) <= 500 and not found.converged and found.errors[0] > 0.1
        holes = sample_square(lambda places: [math.nan if s > 0 else s for s, _ in places], resolution=51, tol=0.01, most=200, seed=0)
        assert math.isnan(holes.errors[0]) and not holes.converged

    def test_logarithms_count_where_a_picture_is_wide(self):
        f = lambda s, t: 1e-3 + s**4 + 30 * max(0.0, t) ** 4  # within 1 % of its range anything will do near the minimum
        found = sample_square(lambda places: [f(*place) for place in places], resolution=21, tol=0.01, most=3500, seed=0)
        z, x = found.grid(lambda place: f(*place)), found.axis.tolist()
        truth = torch.tensor([[f(s, t) for t in x] for s in x], **DOUBLE)
        assert bool((z > 0).all()) and float((z.log() - truth.log()).abs().max()) <= 0.05 * math.log(float(truth.max() / truth.min()))
        assert float(Scale(1.0, None).worst(torch.tensor([1.5]), torch.tensor([1.0]))[0]) == 0.5 and Scale(1.0, None).worst(torch.zeros(0), torch.zeros(0)).tolist() == [0, 0]

    def test_an_interpolant_is_not_transposed(self):
        x = nodes(4)
        f = Interpolant(x[:, None] ** 2 + 3 * x[None], (1.0, 0.0), 2.0)
        z = f(torch.tensor([2.0, 3.0], **DOUBLE), torch.tensor([0.0, 1.0, 2.0], **DOUBLE))
        assert z.shape == (2, 3) and float(z[1, 0]) == pytest.approx(1.0) and float(z[0, 2]) == pytest.approx(0.25 + 3)
        assert torch.allclose(f.at(torch.tensor([3.0, 2.0], **DOUBLE), torch.tensor([0.0, 2.0], **DOUBLE)), torch.stack([z[1, 0], z[0, 2]]))


    def test_a_picture_that_is_not_good_enough_says_what_to_do(self):
        net = nn.Linear(4, 3, **DOUBLE)
        rough = lambda output, target: output.mean() + (1e5 * output.mean()).sin()
        objective = og.Objective(net, rough, (torch.ones(8, 4, **DOUBLE), torch.zeros(8, 3, **DOUBLE)))
        record = og.measure(objective, "surface", max_evaluations=200)
        assert facts(record)["error asked for was reached"] is False and "raise max_evaluations" in record.says
        points = [objective.at(objective.theta + k * flat(k, objective.size)).point() for k in range(3)]
        assert "raise max_evaluations" in og.measure(objective, "trajectory", *points, max_evaluations=200).says
        calm = og.measure(loss_cases()["cross-entropy"].objective(100), "surface", resolution=5)
        assert facts(calm)["error asked for was reached"] is True and "raise" not in calm.says


class TestManyPointsPerBatch:
    @pytest.mark.parametrize("name", ["cross-entropy", "sum", "ignored class", "ignored tokens, dicts", "counted lambda", "batch loss"])
    def test_losses_are_those_of_one_point_at_a_time_to_the_bit(self, name):
        if name == "batch loss":
            x, net = torch.randn(30, 4, **DOUBLE), nn.Linear(4, 1).double()
            objective = og.Objective.from_batch_loss(net, lambda model, batch: (model(batch).square().sum(), len(batch)), list(x.split(7)))
        else:
            objective = loss_cases()[name].objective(7)
        points = [objective.point(objective.theta + 0.3 * k) for k in range(4)]
        told = []
        found = losses_of(objective, points, told.append)
        for point, (value, examples) in zip(points, found, strict=True):
            assert value == pytest.approx(objective.at(point).value(), rel=1e-12) and (examples is None) == (name in ("batch loss", "counted lambda"))
            assert losses_of(objective, [point])[0][0] == value
        assert told[-1] == pytest.approx(1.0)

    def test_a_batch_meets_all_points_before_the_next_one_is_loaded(self):
        loads = []

        class Costly(torch.utils.data.Dataset):
            def __len__(self):
                return 12

            def __getitem__(self, i):
                loads.append(i)
                return torch.full((3,), float(i), **DOUBLE), i % 2

        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
        objective = og.Objective(net, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(Costly(), batch_size=4))
        for statistics in ("frozen", "reestimated"):
            loads.clear()
            surface = og.measure(objective, "surface", statistics=statistics, resolution=5, tol=0.01)["surface"]
            assert surface.evaluations == 25 and len(loads) <= 12 * (12 if statistics == "frozen" else 16)

    def test_running_statistics_are_those_of_one_network_at_a_time(self):
        net = cnn(seed=0, channels=(4, 6)).eval()
        objective = og.Objective(net, nn.CrossEntropyLoss(), (torch.rand(40, 64), torch.arange(40) % 10), batch_size=16)
        points = [objective.point(objective.theta * scale) for scale in (0.5, 1.0, 1.5)]
        for point, found in zip(points, renormalised_all(objective, points), strict=True):
            alone = renormalised(objective, point)
            assert all(torch.equal(found.buffers[name], alone.buffers[name]) for name in found.buffers) and torch.equal(found.theta, point.theta)


class TestSeedsAndSamples:
    def test_several_seeds_show_their_spread(self):
        A, g, _ = random_quadratic(4)
        objective = quadratic(A, g, flat(3, len(g)))
        record = og.measure(objective, "surface", seeds=4, normalisation="whole", resolution=9)
        singles = [og.measure(objective, "surface", seed=seed, normalisation="whole", resolution=9)["surface"].z for seed in range(4)]
        assert torch.allclose(record["surface"].z, singles[0]) and torch.allclose(record["spread"].z, torch.stack(singles).std(0))
        lines = torch.stack([line for z in singles for line in (z[:, 4], z[4])])
        assert torch.allclose(record["directions"].y, lines.mean(0)) and torch.allclose(record["directions"].error, lines.std(0) / math.sqrt(8))
        for row, z in zip(record["seeds"].rows, singles, strict=True):
            assert row["lowest"] == pytest.approx(float(z.min())) and row["highest"] == pytest.approx(float(z.max()))
        u = random_direction(objective, 2, "whole")
        assert record["seeds"].rows[2]["first_curvature"] == pytest.approx(float(u @ A @ u / (u @ u)), rel=1e-9)

    def test_axes_are_slices_of_the_surface(self):
        objective = loss_cases()["cross-entropy"].objective(100)
        record = og.measure(objective, "surface", resolution=8)  # no point of the picture lies on an axis
        plane = og.Plane(objective.point(), random_direction(objective, 0), random_direction(objective, 1_000_003))
        for name, place in (("first_axis", lambda s: (s, 0.0)), ("second_axis", lambda s: (0.0, s))):
            direct = torch.tensor([objective.at(plane(*place(float(s)))).value() for s in record[name].x], **DOUBLE)
            assert float((record[name].y - direct).abs().max()) <= 0.02 * float(record["surface"].z.max() - record["surface"].z.min())

    def test_a_sample_of_the_data_is_said_on_the_picture(self):
        torch.manual_seed(0)
        x, net = torch.randn(3000, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        objective = og.Objective(net.eval(), nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()))
        whole = og.measure(objective, "surface", resolution=5)["surface"]
        record = og.measure(objective, "surface", resolution=5, examples=400)
        some = record["surface"]
        losses = objective.per_example()["loss"].total
        assert facts(record)["standard error of the data, of the loss in the middle"] == pytest.approx(float(losses.std()) / math.sqrt(400), rel=0.2)
        assert some.note.startswith("400 of 3,000 examples, running statistics of the middle") and whole.note == "running statistics of the middle"
        assert 2 < float(some.error.max() / whole.error.max()) < 4 and float((((some.z - some.z[2, 2]) - (whole.z - whole.z[2, 2])) / some.error.clamp(min=1e-9)).abs().max()) < 4
        enough = og.measure(objective, "surface", resolution=5, examples="enough", tol=0.05)["surface"]
        assert "of 3,000 examples" in enough.note and float(enough.error.max()) <= 1.3 * 0.05 * float(enough.z.max() - enough.z.min())
        assert og.measure(objective, "surface", resolution=5, examples="enough", tol=1e-4)["surface"].note == whole.note  # that takes all of them
        path = [objective.theta + k * flat(k, objective.size).float() for k in range(3)]
        networks = [objective.at(theta).point(label=str(k)) for k, theta in enumerate(path)]
        assert og.measure(objective, "trajectory", *networks, resolution=5, examples=100)["surface"].note.startswith("100 of 3,000")

    @pytest.mark.parametrize("settings", [{"seeds": 0}, {"seeds": 2, "axes": "gradient"}, {"examples": 1}, {"examples": "some"}])
    def test_what_makes_no_sense_is_refused(self, settings):
        with pytest.raises(ValueError, match=r"seeds=|examples="):
            og.measure(loss_cases()["cross-entropy"].objective(100), "surface", **settings)


def test_losses_that_are_not_finite_stay_holes():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, 0.5], **DOUBLE))

        def forward(self, x):
            return (self.w.sqrt().sum() + self.w @ self.w).expand(len(x))

    x = torch.zeros(2, 1, **DOUBLE)
    objective = og.Objective(Root(), lambda output, target: output.mean(), (x, x))
    plane = og.Plane(objective.point(), torch.tensor([1.0, 0.0], **DOUBLE), torch.tensor([0.0, 1.0], **DOUBLE))
    s = og.measure(objective, "surface", plane=plane, resolution=9)["surface"]
    inside = (s.x[:, None] >= -0.5) & (s.y[None] >= -0.5)
    assert bool(torch.isnan(s.z)[~inside].all()) and bool(torch.isfinite(s.z[inside]).all())


class TestTopology:
    def test_two_valleys_meet_at_their_pass(self):
        x = torch.linspace(-2, 2, 81, **DOUBLE)
        z = (x[:, None] ** 2 - 1) ** 2 + 0.3 * x[:, None] + x[None] ** 2
        deepest, other = basins_of(z)
        assert deepest.persistence == math.inf and float(x[deepest.minimum[0]]) == pytest.approx(-1.0, abs=0.1) and float(x[other.minimum[0]]) == pytest.approx(1.0, abs=0.1)
        assert other.into == deepest.minimum and deepest.into is None
        assert abs(float(x[other.pass_[1]])) < 1e-12 and other.persistence == pytest.approx(float(z[:, 40][20:61].max() - other.value), abs=0.05)

    @pytest.mark.parametrize("seed", range(20))
    def test_pairs_are_those_of_a_brute_force_computation(self, seed):
        z = torch.rand(9, 8, generator=torch.Generator().manual_seed(seed), **DOUBLE)
        if seed % 4 == 0:
            z[2, 3] = math.nan
        found = sorted((b.value, b.persistence, float(z[b.into]) if b.into else math.inf) for b in basins_of(z))
        assert torch.allclose(torch.tensor(found), torch.tensor(sorted(brute_force(z))), atol=1e-12)


def brute_force(z):
    """Components of every sublevel set, computed anew at each level: one that ends takes the higher of two minima with it."""
    rows, columns = z.shape
    alive, pairs = {}, []  # minimum -> its value
    for level in sorted(v for v in z.flatten().tolist() if v == v):
        seen, components = set(), []
        for start in ((i, j) for i in range(rows) for j in range(columns) if float(z[i, j]) <= level):
            if start in seen:
                continue
            stack, members = [start], []
            seen.add(start)
            while stack:
                i, j = stack.pop()
                members.append((i, j))
                for a in range(max(i - 1, 0), min(i + 2, rows)):
                    for b in range(max(j - 1, 0), min(j + 2, columns)):
                        if (a, b) not in seen and float(z[a, b]) <= level:
                            seen.add((a, b))
                            stack.append((a, b))
            components.append(members)
        for members in components:
            inside = sorted((value, place) for place, value in alive.items() if place in members)
            if not inside:
                lowest = min(members, key=lambda place: float(z[place]))
                alive[lowest] = float(z[lowest])
            for value, place in inside[1:]:
                pairs.append((value, level - value, inside[0][0]))
                del alive[place]
    return pairs + [(value, math.inf, math.inf) for value in alive.values()]


class TestTrajectory:
    def test_losses_and_residuals_are_those_of_direct_evaluations(self):
        objective = loss_cases()["cross-entropy"].objective(100)
        points = [objective.at(objective.theta + 0.3 * k * flat(1, objective.size) + 0.05 * flat(k + 2, objective.size)).point(label=f"step {k}") for k in range(6)]
        record = og.measure(objective, "trajectory", *points, resolution=9)
        rows = torch.stack([point.theta for point in points])
        _, _, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        for point, row in zip(points, record["path"].rows, strict=True):
            shadow = rows[-1] + V[:2].T @ (V[:2] @ (point.theta - rows[-1]))  # the plane goes through the last network
            assert row["loss"] == pytest.approx(objective.at(point).value(), rel=1e-12) and row["in_plane_loss"] == pytest.approx(objective.at(shadow).value(), rel=1e-9)
            assert row["residual"] == pytest.approx(float((point.theta - shadow).norm()), abs=1e-9)
        assert {"step", "s", "t", "loss", "in_plane_loss", "residual"} <= set(record["path"].rows[0])

    def test_a_plane_that_misleads_says_so(self):
        objective = loss_cases()["cross-entropy"].objective(100)
        points = [objective.at(objective.theta + 3 * flat(k, objective.size)).point() for k in range(8)]  # in all directions
        record = og.measure(objective, "trajectory", *points, resolution=5)
        assert any(row["doubtful"] for row in record["path"].rows) and "do not trust" in record.says


class TestStore:
    def test_samples_are_found_again_and_a_finer_picture_uses_them(self, tmp_path):
        objective = loss_cases()["cross-entropy"].objective(100)
        store = str(tmp_path / "samples.jsonl")
        first = og.measure(objective, "surface", tol=0.05, store=store)["surface"]
        second = og.measure(objective, "surface", tol=0.05, store=store)["surface"]
        finer = og.measure(objective, "surface", tol=0.001, store=store)["surface"]
        assert first.evaluations > 0 and second.evaluations == 0 and torch.equal(first.z, second.z)
        lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert len(lines) == first.evaluations + finer.evaluations
        smoothed = og.Objective(objective.recipe.model, nn.CrossEntropyLoss(label_smoothing=0.2), loss_cases()["cross-entropy"].data)
        assert smoothed.fingerprints() == objective.fingerprints()
        assert og.measure(smoothed, "surface", tol=0.05, store=store)["surface"].evaluations > 0  # another loss of the same network on the same data
        other = og.measure(objective.at(objective.theta + 1), "surface", tol=0.05, store=store)["surface"]
        assert other.evaluations > 0  # another network's samples are no samples of this one

    def test_samples_of_other_frozen_weights_are_not_taken(self, tmp_path):
        x, y = torch.randn(20, 3, **DOUBLE), torch.arange(20) % 2
        for k in range(2):  # the same parameters under study, other weights below them, and by chance nearly the same loss
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
            with torch.no_grad():
                net[0].weight.add_(1e-7 * k)
            objective = og.Objective(net, nn.CrossEntropyLoss(), (x, y), params="2.*")
            assert og.measure(objective, "surface", resolution=5, store=str(tmp_path / "s.jsonl"))["surface"].evaluations == 25

    @pytest.mark.parametrize("span", [1e-6, 0.3, 1e6])
    def test_any_span_has_its_surface(self, span):
        f = lambda s, t: 3 + (s / span) ** 4 - 2 * (s / span) * (t / span)
        weights = nn.ParameterDict({"w": torch.zeros(2, **DOUBLE)})
        objective = og.Objective.from_batch_loss(weights, lambda model, batch: (f(model["w"][0], model["w"][1]), 1.0), [torch.zeros(1)])
        plane = og.Plane(objective.point(), torch.tensor([1.0, 0.0], **DOUBLE), torch.tensor([0.0, 1.0], **DOUBLE))
        surface = og.measure(objective, "surface", plane=plane, span=span)["surface"]
        assert surface.evaluations <= 100 and torch.allclose(surface.z, f(surface.x[:, None], surface.y[None]), rtol=1e-9)

    def test_an_unfinished_line_is_no_sample(self, tmp_path):
        objective = loss_cases()["cross-entropy"].objective(100)
        store = tmp_path / "samples.jsonl"
        whole = og.measure(objective, "surface", tol=0.05, store=str(store))["surface"]
        store.write_text(store.read_text()[:-20])
        again = og.measure(objective, "surface", tol=0.05, store=str(store))["surface"]
        assert again.evaluations == 1 and torch.equal(again.z, whole.z)

    @pytest.mark.slow
    def test_killed_at_20_random_moments_the_samples_are_the_same_bit_for_bit(self, tmp_path):
        script = tmp_path / "surface.py"
        script.write_text(SCRIPT)
        whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
        began = time.monotonic()
        subprocess.run([sys.executable, str(script), str(whole)], check=True, timeout=120, capture_output=True)
        takes = time.monotonic() - began
        for moment in torch.rand(20, generator=torch.Generator().manual_seed(1)).tolist():
            with subprocess.Popen([sys.executable, str(script), str(broken)], stdout=subprocess.PIPE) as process:
                process.stdout.readline()
                time.sleep(moment * takes / 6)
                process.kill()
        subprocess.run([sys.executable, str(script), str(broken)], check=True, timeout=120, capture_output=True)
        samples = [{(row["s"], row["t"]): row["loss"] for line in path.read_text().splitlines() if (row := readable(line))} for path in (whole, broken)]
        assert samples[0] == samples[1]


def readable(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


SCRIPT = """
import sys, torch
import orograph as og
from torch import nn
from orograph.studies.networks import mlp
from orograph.studies.problems import digits
x, y = digits().train
objective = og.Objective(mlp(64, 32, 10, seed=0), nn.CrossEntropyLoss(), (x, y), batch_size=100)
print("ready", flush=True)
og.measure(objective, "surface", tol=1e-6, max_evaluations=400, resolution=51, store=sys.argv[1])
"""


def test_batchnorm_policies_differ_and_agree_without_batchnorm():
    torch.manual_seed(0)
    net = cnn(seed=0, channels=(4, 6))
    x, y = torch.rand(60, 64), torch.arange(60) % 10
    net.train()(x)
    objective = og.Objective(net.eval(), nn.CrossEntropyLoss(), (x, y))
    frozen, fresh = (og.measure(objective, "surface", resolution=3, tol=0.5, statistics=policy)["surface"].z for policy in ("frozen", "reestimated"))
    assert not torch.allclose(frozen, fresh)
    plain = og.Objective(mlp(64, 5, 10, seed=0), nn.CrossEntropyLoss(), (x, y))
    frozen, fresh = (og.measure(plain, "surface", resolution=3, tol=0.5, statistics=policy)["surface"].z for policy in ("frozen", "reestimated"))
    assert torch.equal(frozen, fresh)


@pytest.mark.parametrize(
    ("points", "settings", "error", "message"),
    [
        (2, {}, TypeError, "or three, got 2"), (0, {"axes": "pca"}, ValueError, "choose axes"), (0, {"span": 0}, ValueError, "needs positive numbers"),
        (0, {"statistics": "fresh"}, ValueError, "choose from frozen"), (0, {"plane": 3}, TypeError, "needs an orograph.Plane"),
    ],
)  # fmt: skip
def test_surface_refuses_what_is_no_plane(points, settings, error, message):
    objective = loss_cases()["cross-entropy"].objective(100)
    with pytest.raises(error, match=message):
        og.measure(objective, "surface", *[objective.theta + k for k in range(points)], **settings)
    if points:
        with pytest.raises(TypeError, match="three networks or more"):
            og.measure(objective, "trajectory", objective.theta)


class TestExports:
    def test_every_format_has_z_at_its_place(self, tmp_path):
        x, y = torch.tensor([0.0, 1.0], **DOUBLE), torch.tensor([5.0, 6.0, 7.0], **DOUBLE)
        z = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 6.0]], **DOUBLE)
        surface = og.Surface(x=x, y=y, z=z, label="loss\nof a network")
        arrays = np.load(og.save_surface(surface, tmp_path / "s.npz"))
        assert np.array_equal(arrays["z"], z.numpy(), equal_nan=True)
        rows = np.genfromtxt(og.save_surface(surface, tmp_path / "s.csv"), delimiter=",", names=True)
        assert rows["x"].tolist() == [0, 0, 0, 1, 1, 1] and rows["y"].tolist() == [5, 6, 7, 5, 6, 7] and rows["z"][3] == 4.0 and math.isnan(rows["z"][4])
        lines = og.save_surface(surface, tmp_path / "s.vtk").read_text().splitlines()
        assert lines[1] == "loss of a network" and lines[4] == "DIMENSIONS 2 3 1" and lines[6:9] == ["0 5 1", "1 5 4", "0 6 2"] and lines[9] == "1 6 0"
        assert torch.equal(og.load_surface(tmp_path / "s.npz").z.nan_to_num(9), z.nan_to_num(9))
        with pytest.raises(ValueError, match="knows"):
            og.save_surface(surface, tmp_path / "s.jpeg")
        with pytest.raises(ValueError, match="choose from contours, relief"):
            og.save_surface(surface, tmp_path / "s.png", view="top")

    @pytest.mark.parametrize("view", ["contours", "relief"])
    def test_figures_for_papers_are_the_same_every_time(self, tmp_path, view):
        x, y = torch.linspace(-1, 1, 9, **DOUBLE), torch.linspace(-2, 2, 5, **DOUBLE)
        z = 0.01 + x[:, None] ** 2 + 3 * y[None] ** 2
        z[0, 0] = math.nan
        surface = og.Surface(x=x, y=y, z=z, label="loss", note="running statistics of the middle", evaluations=45)
        marks = og.Table(rows=[{"name": "a<b>$x_$", "s": 0.5, "t": -1.0}, {"name": "nowhere", "s": math.nan, "t": 0.0}])
        for ending in (".png", ".svg", ".pdf"):
            first, second = (og.save_surface(surface, tmp_path / f"{name}{ending}", marks=marks, view=view).read_bytes() for name in "ab")
            assert first == second and len(first) > 3000
        text = (tmp_path / "a.svg").read_text()
        assert "<svg" in text and "45 evaluations" in text

    def test_surfaces_of_an_older_tool_are_put_right(self, tmp_path):
        import h5py

        f = lambda x, y: x + 10 * y
        x, y = np.array([0.0, 1.0, 2.0]), np.array([5.0, 6.0])
        losses = -np.ones((len(x), len(y)))  # as that tool writes it: an array of shape (x, y), filled in the order of meshgrid(x, y)
        rows, columns = np.meshgrid(x, y)
        losses.ravel()[:5] = f(rows.ravel(), columns.ravel())[:5]
        with h5py.File(tmp_path / "old.h5", "w") as file:
            file["xcoordinates"], file["ycoordinates"], file["train_loss"] = x, y, losses
        surface = og.load_surface(tmp_path / "old.h5")
        expected = f(torch.tensor(x)[:, None], torch.tensor(y)[None])
        expected[2, 1] = math.nan
        assert torch.equal(surface.z.nan_to_num(-7), expected.nan_to_num(-7)) and surface.label == "train loss"
        with h5py.File(tmp_path / "line.h5", "w") as file:
            file["xcoordinates"], file["train_acc"] = x, np.array([1.0, 2.0, 3.0])
        assert og.load_surface(tmp_path / "line.h5", quantity="train_acc").z.tolist() == [[1.0], [2.0], [3.0]]
        with pytest.raises(ValueError, match="holds no 'train_loss', but train_acc, xcoordinates"):
            og.load_surface(tmp_path / "line.h5")
        with pytest.raises(FileNotFoundError, match="no file"):
            og.load_surface(tmp_path / "none.h5")
        (tmp_path / "s.txt").write_text("")
        with pytest.raises(ValueError, match=r"reads .npz and .h5"):
            og.load_surface(tmp_path / "s.txt")

    def test_the_command_line_draws_and_goes_on_from_its_samples(self, tmp_path):
        from typer.testing import CliRunner

        from orograph.cli import app

        task = tmp_path / "task.py"
        task.write_text(
            "import torch\nfrom torch import nn\nfrom orograph import Objective\n\n\ndef objective():\n    torch.manual_seed(0)\n"
            "    return Objective(nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(30, 4), torch.arange(30) % 3))\n"
        )
        for evaluations in (49, 0):
            result = CliRunner().invoke(app, ["surface", str(task), "--out", str(tmp_path / "out"), "--set", "surface.resolution=7"])
            assert result.exit_code == 0, result.output
            drawn = og.load_records(tmp_path / "out" / "records")[-1]["surface"]
            assert drawn.evaluations <= evaluations and (drawn.evaluations > 0) == (evaluations > 0)
        assert all((tmp_path / "out" / f"surface.{ending}").exists() for ending in ("npz", "csv", "vtk", "png", "svg")) and (tmp_path / "out" / "report.html").exists()
