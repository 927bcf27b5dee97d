"""Surfaces of planted functions, their samples and errors, and what is said beside a picture."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

import orograph as og
from orograph.chebyshev import Interpolant, interpolation_matrix, nodes
from orograph.crowds import losses_of
from orograph.evaluation import PerExample
from orograph.grids import Scale, score
from orograph.minima import minima_of
from orograph.pictures import basin_rows, draw, quadratic_model, sampled_data
from orograph.planes import plane_through, principal_plane, random_direction
from orograph.profiles import difference_sem
from orograph.refinement import _estimate, sample_square
from orograph.renormalise import renormalised, renormalised_all
from orograph.samples import Samples
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
        assert rows["curvature along the first axis, per squared distance"] == pytest.approx(float(lam[0]), rel=1e-9) and abs(rows["cosine between the axes"]) < 1e-10

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
        assert rows["length of (s, t) at which the quadratic model fails"] == math.inf and torch.allclose(record["quadratic"].z, record["surface"].z, rtol=1e-8)


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
            assert max(abs(s), abs(t)) <= 1 / 1.4 + 1e-9 and off < 1e-10
            assert torch.allclose(plane(s, t).theta, point.theta)
        with pytest.raises(ValueError, match="lie on one line"):
            plane_through([og.Point(theta=k * flat(1, 5)) for k in range(3)])
        thin = torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 0.0], [5.0, 1e-5, 0.0]], **DOUBLE)
        narrow = plane_through([og.Point(theta=row) for row in thin])
        assert float(narrow.v.norm()) == pytest.approx(1.4e-3 * 10)  # no axis is stretched by more than a thousand

    def test_coordinates_are_those_of_least_squares_and_the_same_to_the_bit_in_every_call(self):
        origin, u, v, place = (flat(seed, 5000) for seed in range(4))
        for second in (v, u + 0.01 * v):
            plane, kept, found = og.Plane(origin, u, second), [], set()
            for size in range(1, 2000, 10):  # memory at other addresses
                kept.append(bytearray(size))
                found.add(plane.coordinates(place))
            ((s, t, off),) = found
            expected = torch.linalg.lstsq(torch.stack([u, second], dim=1), (place - origin)[:, None]).solution[:, 0]
            assert (s, t) == pytest.approx(expected.tolist(), rel=1e-9) and off == pytest.approx(float((place - origin - s * u - t * second).norm()))
        assert og.Plane(origin, u, 2 * u).coordinates(origin + 3 * u)[:2] == pytest.approx((3.0, 0.0))

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
            assert torch.allclose(interpolation_matrix(x, nodes(m)) @ p(nodes(m)), p(x))
            assert torch.allclose(interpolation_matrix(nodes(m), nodes(m)), torch.eye(m + 1, **DOUBLE))
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

    def test_no_hole_is_interpolated_into_a_logarithmic_picture(self):
        f = lambda s, t: 1e-4 + s**2 * t**2 + 0.3 * max(0.0, s - 0.2) ** 2
        found = sample_square(lambda places: [f(*place) for place in places], resolution=41, tol=0.3, most=3500, seed=0)
        assert found.scale().logarithmic is not None and bool((found.grid(lambda place: f(*place)) > 0).all())

    def test_an_estimate_knows_a_hole_in_a_logarithmic_picture(self):
        x = nodes(4)
        dipping = Interpolant(torch.tensor([0.01, 0.01, 10.0, 0.01, 0.01], **DOUBLE)[:, None].expand(5, 5), x, x)  # its polynomial is below zero between the points
        assert float(dipping(torch.linspace(-1, 1, 41, **DOUBLE), x).min()) < 0
        wide, narrow = (_estimate(dipping, torch.zeros(2, **DOUBLE), Scale(1.0, logarithmic)) for logarithmic in (9.0, None))
        assert wide[1] == math.inf and float(narrow.max()) < 1e-12

    def test_logarithms_have_five_times_the_tolerance_and_no_more(self):
        assert float(score(torch.tensor([0.01, 0.04]))) == pytest.approx(0.01) and float(score(torch.tensor([0.01, 0.06]))) == pytest.approx(0.012)

    def test_networks_to_be_marked_are_checks(self):
        well = lambda s, t: s**2 + t**2 - 3 * math.exp(-((s - 0.31) ** 2 + (t + 0.47) ** 2) / 0.005)
        blind, seen = (sample_square(lambda places: [well(*place) for place in places], resolution=51, tol=0.01, most=3500, seed=0, also=also) for also in ((), [(0.31, -0.47)]))
        z, x = seen.grid(lambda place: well(*place)), seen.axis.tolist()
        truth = torch.tensor([[well(s, t) for t in x] for s in x], **DOUBLE)
        assert float(seen.scale().worst(z, truth)[0]) <= seen.errors[0] <= 0.01 and len(blind.seen) < len(seen.seen)

    def test_an_interpolant_is_not_transposed(self):
        x = nodes(4)
        f = Interpolant((2 * x[:, None]) ** 2 / 4 + 3 * x[None], 1 + 2 * x, 2 * x)
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

    def test_a_batch_meets_all_points_before_the_next_one_is_loaded(self, monkeypatch):
        monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)  # or the batches stay in memory, and nothing is loaded again
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
            plane = og.Plane(objective.point(), flat(1, objective.size), flat(2, objective.size))  # a given one: no Hessian, which reads the data too
            surface = og.measure(objective, "surface", plane=plane, statistics=statistics, resolution=5, tol=0.01)["surface"]
            # the reference, which is the network that is marked, alone, and the other 24 together; with statistics re-estimated one reading more for each, and the network's own loss
            readings = len(loads) / 12
            assert surface.evaluations == 25 and readings == (2 if statistics == "frozen" else 5)

    def test_examples_that_come_in_another_order_are_paired_all_the_same(self, monkeypatch):
        monkeypatch.setattr("orograph.batches.CACHE_BYTES", 0)
        x, y = torch.randn(60, 4, **DOUBLE), torch.arange(60) % 3
        net = nn.Linear(4, 3).double()

        class OwnDice(torch.utils.data.Sampler):  # another order in every pass, by a generator that nobody else sees
            def __init__(self):
                self.dice = np.random.default_rng(0)

            def __len__(self):
                return 60

            def __iter__(self):
                return iter(self.dice.permutation(60).tolist())

        loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, sampler=sampler) for sampler in (None, OwnDice())]
        ordered, shuffled = (
            og.measure(objective, "surface", plane=og.Plane(objective.point(), flat(1, objective.size), flat(2, objective.size)), resolution=11, tol=0.5)["surface"]
            for objective in (og.Objective(net, nn.CrossEntropyLoss(), loader) for loader in loaders)
        )
        assert torch.allclose(ordered.error, shuffled.error, rtol=1e-9) and float(ordered.error.max()) > 0

    def test_re_estimated_statistics_are_those_that_training_mode_would_keep(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)).double()
        x = torch.randn(30, 3, **DOUBLE)
        objective = og.Objective(net, nn.CrossEntropyLoss(), (x, torch.arange(30) % 2))
        found = renormalised(objective)
        net.train()(x)  # one batch, a cumulative average: its mean and unbiased variance
        assert torch.allclose(found.buffers["1.running_mean"], net[1].running_mean) and torch.allclose(found.buffers["1.running_var"], net[1].running_var)

    def test_running_statistics_are_those_of_one_network_at_a_time(self):
        net = cnn(seed=0, channels=(4, 6)).eval()
        objective = og.Objective(net, nn.CrossEntropyLoss(), (torch.rand(40, 64), torch.arange(40) % 10), batch_size=16)
        points = [objective.point(objective.theta * scale) for scale in (0.5, 1.0, 1.5)]
        for point, found in zip(points, renormalised_all(objective, points), strict=True):
            alone = renormalised(objective, point)
            assert all(torch.equal(found.buffers[name], alone.buffers[name]) for name in found.buffers) and torch.equal(found.theta, point.theta)


def test_a_loss_that_is_the_same_for_every_unit_has_no_error_however_many_units_an_example_has():
    counts = torch.tensor([1.0, 5.0, 2.0, 9.0], **DOUBLE)
    nothing = PerExample(torch.zeros(4, **DOUBLE), counts)
    assert difference_sem(nothing, nothing, PerExample(2 * counts, counts), 0.5) < 1e-15
    noisy = PerExample(2 * counts + torch.tensor([0.3, -0.3, 0.3, -0.3], **DOUBLE), counts)
    rest = noisy.total - noisy.total.sum() / counts.sum() * counts
    assert difference_sem(nothing, nothing, noisy, 0.5) == pytest.approx(float(rest.std()) * 2 / float(counts.sum()))


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

    def test_progress_knows_what_is_asked_for(self):
        told = []
        og.measure(loss_cases()["cross-entropy"].objective(20), "surface", resolution=5, seeds=2, progress=lambda done, total, note: told.append((done, total)))
        assert told[-1] == (50, 50) and all(done <= total for done, total in told) and [done for done, _ in told] == sorted(done for done, _ in told)
        assert max(total for _, total in told) == 50 and len({done for done, _ in told}) > 10

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
        assert facts(record)["standard error of the data, of the loss at Sequential"] == pytest.approx(float(losses.std()) / math.sqrt(400), rel=0.2)
        assert some.note.endswith("400 of 3,000 examples, running statistics of Sequential") and "examples" not in whole.note
        assert 2 < float(some.error.max() / whole.error.max()) < 4 and float((((some.z - some.z[2, 2]) - (whole.z - whole.z[2, 2])) / some.error.clamp(min=1e-9)).abs().max()) < 4
        enough = og.measure(objective, "surface", resolution=5, examples="enough", tol=0.05)["surface"]
        assert "of 3,000 examples" in enough.note and float(enough.error.max()) <= 1.3 * 0.05 * float(enough.z.max() - enough.z.min())
        finer = og.measure(objective, "surface", resolution=5, examples="enough", tol=0.02)["surface"]  # without the share of a finite set all 3,000 would be needed
        chosen = int(finer.note.split(" of 3,000")[0].split(", ")[-1].replace(",", ""))
        variance = float(finer.error.max()) ** 2 * (1 - chosen / 3000)  # what is not yet known of 3,000 examples
        assert 800 < chosen < 1500 and variance == pytest.approx((0.02 * float(finer.z.max() - finer.z.min())) ** 2, rel=0.3)
        assert og.measure(objective, "surface", resolution=5, examples="enough", tol=1e-4)["surface"].note.endswith(whole.note.split("range")[1])  # that takes all of them
        path = [objective.theta + k * flat(k, objective.size).float() for k in range(3)]
        networks = [objective.at(theta).point(label=str(k)) for k, theta in enumerate(path)]
        assert og.measure(objective, "trajectory", *networks, resolution=5, examples=100)["surface"].note.count("100 of 3,000 examples") == 1

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


def planted(f, n=2):
    """An objective over n weights w with loss f(w), and the plane of the first two."""
    weights = nn.ParameterDict({"w": torch.zeros(n, **DOUBLE)})
    objective = og.Objective.from_batch_loss(weights, lambda model, batch: (f(model["w"]), 1.0), [torch.zeros(1)])
    u, v = torch.eye(n, **DOUBLE)[:2]
    return objective, og.Plane(objective.point(), u, v)


class TestWhatIsSaid:
    def test_three_networks_with_statistics_of_their_own_have_their_losses_in_the_picture(self):
        x, y = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
        nets = []
        for seed in range(3):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(3 * seed + x), y).backward()
                optimizer.step()
            nets.append(net.eval())
        objective = og.Objective(nets[0], nn.CrossEntropyLoss(), (x, y), batch_size=90)
        fresh, frozen = (og.measure(objective, "surface", *nets, resolution=15, statistics=policy) for policy in ("auto", "frozen"))
        assert fresh["surface"].note.endswith("running statistics re-estimated at every point") and frozen["surface"].note.endswith("running statistics of Sequential 1")
        assert "through three networks, error" in fresh["surface"].note and "re-estimated ones" in fresh["points"].label
        assert any(row["doubtful"] for row in frozen["points"].rows[1:]) and "Do not trust it at Sequential" in frozen.says
        for row, net in zip(fresh["points"].rows, nets, strict=True):
            assert row["loss"] == pytest.approx(objective.at(net).value(), rel=1e-5)
            assert row["in_plane_loss"] == pytest.approx(objective.at(renormalised(objective, objective.point(net))).value(), rel=1e-4)
        way = og.measure(objective, "trajectory", *nets, resolution=5)
        assert way["surface"].note.startswith("principal components") and way["surface"].note.endswith("re-estimated at every point")

    def test_a_loss_that_the_plane_does_not_know_is_doubtful(self):
        objective, plane = planted(lambda w: (w[2] + 0.5).sqrt() + (w**2).sum(), 3)
        below = og.Plane(objective.at(torch.tensor([0.0, 0.0, -1.0], **DOUBLE)).point(), plane.u, plane.v)
        record = og.measure(objective, "surface", plane=below, span=10.0, resolution=5)
        row = record["points"].rows[0]
        assert row["loss"] == pytest.approx(math.sqrt(0.5)) and math.isnan(row["in_plane_loss"]) and row["residual"] == 1.0 and row["doubtful"]

    def test_networks_in_the_plane_by_place_but_not_by_loss_are_doubtful(self):
        objective, _ = planted(lambda w: w[0] ** 2 + w[1] ** 2 + 4000 * w[2] ** 2, 3)
        points = [objective.at(theta).point() for theta in torch.tensor([[-5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, -5.0, 0.5], [5.0, 0.0, 0.0]], **DOUBLE)]
        rows = og.measure(objective, "trajectory", *points, resolution=9)["path"].rows
        assert rows[2]["doubtful"] and not rows[0]["doubtful"] and max(row["residual"] for row in rows) < 1  # by its loss alone

    def test_a_corner_without_values_leaves_the_rest_and_the_budget(self):
        objective, plane = planted(lambda w: torch.where(w.sum() > 1.9, math.nan, (w**2).sum()))
        record = og.measure(objective, "surface", plane=plane, max_evaluations=60)
        assert "loss goes from" in record.says and "left out" in record.says and "raise max_evaluations" in record.says
        assert record["surface"].evaluations <= 60 and bool(record["surface"].z.isfinite().any())
        assert og.measure(objective, "surface", plane=plane, max_evaluations=100, resolution=200)["surface"].evaluations <= 100
        whole = og.measure(objective, "surface", plane=plane)
        s = whole["surface"]
        assert torch.equal(s.z.isnan(), s.x[:, None] + s.y[None] > 1.9) and facts(whole)["points of the picture left out"] == 0
        nothing = planted(lambda w: torch.where(w.abs().sum() > 0, math.nan, w.sum()))
        assert "No point" in og.measure(nothing[0], "surface", plane=nothing[1], resolution=4).says

    @pytest.mark.parametrize(
        ("settings", "params", "message"),
        [({}, "*.bias", "other parameters of one axis are not moved"), ({"axes": "gradient"}, None, "gradient is exactly zero"), ({"normalisation": "whole"}, None, "are all zero")],
    )
    def test_axes_that_lead_nowhere_are_refused(self, settings, params, message):
        net = nn.Sequential(nn.Linear(3, 2)).double()
        if params is None:
            nn.init.zeros_(net[0].weight)
            nn.init.zeros_(net[0].bias)
        objective = og.Objective(net, nn.CrossEntropyLoss(), (torch.ones(4, 3, **DOUBLE), torch.tensor([0, 1, 0, 1])), params=params)
        with pytest.raises(ValueError, match=message):
            og.measure(objective, "surface", **settings)

    def test_one_parameter_has_no_plane_of_eigenvectors_and_a_given_axis_must_lead_somewhere(self):
        objective = og.Objective(nn.Linear(1, 1, bias=False), nn.MSELoss(), (torch.ones(4, 1), torch.ones(4, 1)))
        with pytest.raises(ValueError, match="there is one parameter"):
            og.measure(objective, "surface", axes="eigenvectors")
        with pytest.raises(ValueError, match="zero or not finite"):
            og.measure(objective, "surface", plane=og.Plane(objective.point(), torch.ones(1), torch.zeros(1)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_average_of_two_networks_makes_no_plane_with_them_in_any_precision(self, dtype):
        a, b = flat(1, 500).to(dtype), flat(2, 500).to(dtype)
        with pytest.raises(ValueError, match="lie on one line"):
            plane_through([og.Point(theta=a), og.Point(theta=b), og.Point(theta=(a + b) / 2)])
        with pytest.raises(ValueError, match="lie on one line"):
            principal_plane([og.Point(theta=a + k * 0.01 * (b - a)) for k in range(5)])

    def test_batches_of_one_example_have_no_statistics(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        data = torch.randn(30, 3), torch.arange(30) % 2
        with pytest.raises(ValueError, match="batches of one example"):
            og.measure(og.Objective(net, nn.CrossEntropyLoss(), data, batch_size=1), "surface", statistics="reestimated")
        batch = og.Objective(net, nn.CrossEntropyLoss(), data, mode="batch", batch_size=10)
        assert og.measure(batch, "surface", resolution=5)["surface"].note.endswith("each batch's own statistics")
        some, spent = sampled_data(og.Objective(net, nn.CrossEntropyLoss(), data, batch_size=6), og.Plane(batch.point(), batch.theta, batch.theta), 12, span=1.0, tol=0.01, seed=0)
        assert spent == 0
        assert some.terms().batches.reading.sizes == (6, 6) or max(some.terms().batches.reading.sizes) > 3  # not the rests of every batch

    def test_errors_of_logarithms_are_told_where_the_picture_is_logarithmic(self):
        name = "error of its logarithms, share of their range"
        for offset, wide in ((1e-3, True), (1.0, False)):
            objective, plane = planted(lambda w, offset=offset: offset + (w**2).sum())
            record = og.measure(objective, "surface", plane=plane)
            assert (name in facts(record)) == wide == record["surface"].wide
        objective, plane = planted(lambda w: (w**2).sum())  # an exact zero in the middle
        for resolution in (20, 21):
            surface = og.measure(objective, "surface", plane=plane, resolution=resolution)["surface"]
            assert surface.wide and (float(surface.z.min()) == 0) == (resolution == 21) and surface.floor == pytest.approx(float(surface.z[surface.z > 0].min()))

    def test_errors_of_the_data_hold_between_the_samples(self):
        objective = loss_cases()["cross-entropy"].objective(100)
        plane = og.Plane(objective.point(), random_direction(objective, 0), random_direction(objective, 1_000_003))
        surface = og.measure(objective, "surface")["surface"]
        centre = objective.at(plane.origin).per_example()["loss"].total
        for i, j in ((25, 25), (27, 28), (30, 20), (3, 44), (25, 26)):
            difference = objective.at(plane(float(surface.x[i]), float(surface.y[j]))).per_example()["loss"].total - centre
            assert float(surface.error[i, j]) == pytest.approx(float(difference.std()) / math.sqrt(len(difference)), rel=0.1, abs=2e-4 * float(surface.error.max()))

    def test_a_minimum_counts_only_beyond_the_errors_of_data_and_picture(self):
        objective, plane = planted(lambda w: (w[0] ** 2 - 0.36) ** 2 + 0.02 * w[0] + 0.2 * w[1] ** 2)
        picture = draw(Samples(objective, plane, "frozen"), span=1.0, resolution=21, tol=0.01, most=3500, seed=0)
        depth = basins_of(picture.surface.z)[1].persistence

        def significant(error, own):
            spread = picture.sampled.scale().spread
            sampled = replace(picture.sampled, squares=[replace(square, errors=(own / spread, 0.0)) for square in picture.sampled.squares])
            data = torch.full_like(picture.surface.z, error)
            doubted = replace(picture, minima=minima_of(sampled, picture.surface.z, data))
            return [row["significant"] for row in basin_rows(doubted)]

        assert significant(0.0, 0.0) == [True, True] and significant(depth, 0.0) == [True, False] and significant(0.0, depth) == [True, False]
        assert significant(0.3 * depth, 0.0) == [True, True] and significant(0.0, 0.3 * depth) == [True, True] and significant(0.0, 10.0) == [False, False]
        for row in basin_rows(picture):
            assert row["loss"] == objective.at(plane(row["s"], row["t"])).value()

    def test_the_quadratic_model_fails_where_it_is_off_by_a_tenth_of_the_range(self):
        objective, plane = planted(lambda w: w[0] ** 2 + w[1] ** 2 + 0.25 * (w[0] ** 4))
        record = og.measure(objective, "surface", plane=plane, resolution=201)
        off = 0.1 * float(record["surface"].z.max() - record["surface"].z.min())  # s^4 / 4 = off
        assert facts(record).get("length of (s, t) at which the quadratic model fails") is None  # a given plane has no model of its own
        _, radius, bends = quadratic_model(og.hessian(objective), objective, plane, record["surface"])
        assert radius == pytest.approx((4 * off) ** 0.25, abs=0.011) and bends == pytest.approx((2.0, 2.0))
        holed = og.Surface(x=record["surface"].x, y=record["surface"].y, z=torch.where(record["surface"].x[:, None] > 0.2, math.nan, record["surface"].z))
        assert quadratic_model(og.hessian(objective), objective, plane, holed)[1] == pytest.approx(0.21, abs=0.011)

    def test_a_picture_that_is_not_good_enough_is_not_converged(self):
        objective, plane = planted(lambda w: 1 + (300 * w[0]).sin() * (200 * w[1]).cos())
        record = og.measure(objective, "surface", plane=plane, max_evaluations=100)
        assert record.status == record["surface"].status == "budget-limited" and facts(record)["lowest sample"] >= 0
        calm, plane = planted(lambda w: (w**2).sum())
        assert og.measure(calm, "surface", plane=plane).status == "converged"

    def test_doubt_is_read_on_the_pictures_own_scale(self):
        objective, plane = planted(lambda w: 1e-3 + w[0] ** 2 + w[1] ** 2 + w[2] ** 2, 3)
        off = replace(plane, origin=objective.at(torch.tensor([0.0, 0.0, 0.3], **DOUBLE)).point())  # in the plane the loss is 0.091 where the network has 0.001
        record = og.measure(objective, "surface", plane=off, span=10.0)
        row = record["points"].rows[0]
        assert record["surface"].wide and row["loss"] == pytest.approx(1e-3) and row["in_plane_loss"] == pytest.approx(0.091)
        assert row["doubtful"] == (math.log(91) > 0.25 * math.log(float(record["surface"].z.max() / record["surface"].z.min())))
        assert row["doubtful"] and "Do not trust it at" in record.says

    def test_errors_are_differences_to_a_network_and_not_to_the_hill_between(self):
        x, y = torch.randn(80, 4, generator=torch.Generator().manual_seed(0), **DOUBLE), torch.arange(80) % 3
        nets = []
        for seed in range(3):
            torch.manual_seed(seed)
            nets.append(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval())
        objective = og.Objective(nets[0], nn.CrossEntropyLoss(), (x, y))
        for policy in ("auto", "frozen"):
            record = og.measure(objective, "surface", *nets, statistics=policy, store=None)
            at = [row["s"] for row in record["points"].rows][:1] + [row["t"] for row in record["points"].rows][:1]
            i, j = (int((record["surface"].x - value).abs().argmin()) for value in at)
            assert float(record["surface"].error[i, j]) < 0.1 * float(record["surface"].error.max())
            samples = Samples(objective, plane_through([objective.point(net) for net in nets]), "reestimated" if policy == "auto" else policy, reference=(at[0], at[1]))
            assert samples.at([(at[0], at[1])])[0][1] == pytest.approx(0.0, abs=1e-12)
        assert "differences to Sequential 1" in str(record["faithful"])

    @pytest.mark.parametrize("settings", [{"axes": "eigenvectors"}, {"normalisation": "whole"}])
    def test_settings_that_a_given_plane_ignores_are_refused(self, settings):
        objective, plane = planted(lambda w: (w**2).sum())
        with pytest.raises(ValueError, match="the plane is given"):
            og.measure(objective, "surface", plane=plane, **settings)

    @pytest.mark.parametrize("settings", [{"span": "1"}, {"span": -1}, {"tol": math.nan}, {"resolution": 20.5}, {"resolution": 2}])
    def test_a_wrong_setting_is_named(self, settings):
        objective, _ = planted(lambda w: (w**2).sum())
        ((name, value),) = settings.items()
        with pytest.raises((TypeError, ValueError), match=re.escape(f"surface({name}={value!r}) needs a")):
            og.measure(objective, "surface", **settings)

    def test_two_networks_of_three_that_are_one_are_named(self):
        with pytest.raises(ValueError, match="two of the three networks have the same weights"):
            plane_through([og.Point(theta=flat(k, 9)) for k in (1, 1, 2)])

    def test_each_axis_has_its_own_slice(self):
        objective, plane = planted(lambda w: 1 + w[0] ** 2 + 3 * w[1] ** 2)
        record = og.measure(objective, "surface", plane=plane)
        assert torch.allclose(record["first_axis"].y, 1 + record["first_axis"].x ** 2) and torch.allclose(record["second_axis"].y, 1 + 3 * record["second_axis"].x ** 2)

    def test_what_to_know_of_the_axes_is_known(self):
        objective, plane = planted(lambda w: (w**2).sum())
        record = og.measure(objective, "surface", plane=og.Plane(plane.origin, plane.u, plane.u + plane.v), resolution=5)
        assert facts(record)["cosine between the axes"] == pytest.approx(math.sqrt(0.5)) and facts(record)["share of the first axis in biases and norms"] == 1.0
        net = nn.Linear(3, 2).double()
        linear = og.Objective(net, nn.CrossEntropyLoss(), (torch.ones(4, 3, **DOUBLE), torch.tensor([0, 1, 0, 1])))
        direction = random_direction(linear, 0, "layer")
        expected = float(net.bias.detach().norm() ** 2 / (net.bias.detach().norm() ** 2 + net.weight.detach().norm() ** 2))
        assert float(direction[linear.layout["bias"]].norm() ** 2 / direction.norm() ** 2) == pytest.approx(expected)
        assert facts(og.measure(linear, "surface", normalisation="layer", resolution=5))["share of the first axis in biases and norms"] == pytest.approx(expected)


class TestTopology:
    def test_a_plateau_is_one_basin(self):
        z = torch.zeros(6, 5, **DOUBLE)
        z[3] = 1.0
        assert sorted(basin.persistence for basin in basins_of(z)) == [1.0, math.inf] and len(basins_of(torch.ones(4, 4, **DOUBLE))) == 1
        assert len(basins_of(torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 0.0]], **DOUBLE))) == 1  # two ends of one plateau meet at its own height

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
        assert first.evaluations > 0 and second.evaluations == 3 and torch.equal(first.z, second.z)
        lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert len(lines) == first.evaluations + finer.evaluations - 3  # three are evaluated again, to know that they are of this loss
        smoothed = og.Objective(objective.snapshot.users.model, nn.CrossEntropyLoss(label_smoothing=0.2), loss_cases()["cross-entropy"].data)
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

    @pytest.mark.parametrize("case", ["Huber", "activation", "own loss", "batches"])
    def test_samples_of_another_function_are_not_taken_though_it_agrees_at_the_origin(self, tmp_path, case):
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)
        y = 0.1 * x[:, :1]

        def network(activation):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 1)).double()
            with torch.no_grad():
                net[2].weight.mul_(0.1)
            return net

        normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
        capped = lambda most: lambda output, target: (output - target).square().clamp(max=most).mean()
        first, second = {
            "Huber": [og.Objective(network(nn.ReLU()), nn.HuberLoss(delta=delta), (x, y)) for delta in (3.0, 2.0)],
            "activation": [og.Objective(network(activation), nn.MSELoss(), (x, y)) for activation in (nn.ReLU(), nn.Hardtanh(0.0, 50.0))],
            "own loss": [og.Objective(network(nn.ReLU()), capped(most), (x, y)) for most in (5.0, 8.0)],
            "batches": [og.Objective(normed, nn.MSELoss(), (x, y), batch_size=size) for size in (40, 10)],
        }[case]
        assert case == "batches" or first.value() == second.value()
        settings = {"normalisation": "layer", "span": 8.0, "resolution": 15, "statistics": "reestimated" if case == "batches" else "frozen"}
        for _ in range(2):  # the other way round too: both may be in one file
            for objective in (first, second):
                stored, fresh = (og.measure(objective, "surface", **settings, store=store)["surface"] for store in (str(tmp_path / "s.jsonl"), None))
                assert torch.allclose(stored.z, fresh.z, rtol=1e-9)
        assert og.measure(first, "surface", **settings, store=str(tmp_path / "s.jsonl"))["surface"].evaluations <= 6

    def test_policies_and_running_statistics_have_samples_of_their_own(self, tmp_path):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
        objective = og.Objective(net, nn.CrossEntropyLoss(), (torch.randn(30, 3, **DOUBLE), torch.arange(30) % 2))
        point = objective.point()
        moved = objective.at(og.Point(theta=point.theta, buffers={name: value * 1.0 + (name.endswith("mean")) for name, value in point.buffers.items()}, frozen=point.frozen))
        keys = {Samples(o, og.Plane(o.point(), flat(1, o.size), flat(2, o.size)), policy).key for o in (objective, moved) for policy in ("frozen", "reestimated")}
        assert len(keys) == 4

    def test_a_file_of_something_else_is_no_reason_to_fail(self, tmp_path):
        (tmp_path / "s.jsonl").write_text('{"key": "old", "s": 0.0}\n[1]\n"text"\n')
        with pytest.warns(og.OrographWarning, match="lines 1, 2, 3: damaged, or no samples"):
            assert og.measure(loss_cases()["cross-entropy"].objective(100), "surface", resolution=5, store=str(tmp_path / "s.jsonl"))["surface"].evaluations == 25

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
        with pytest.warns(og.OrographWarning, match="unfinished .the writer was stopped.. What is missing is evaluated anew"):
            again = og.measure(objective, "surface", tol=0.05, store=str(store))["surface"]
        assert again.evaluations == 1 + 3 and torch.equal(again.z, whole.z)

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
        (2, {}, TypeError, "or three, got 2"), (0, {"axes": "pca"}, ValueError, "needs \"random\", \"eigenvectors\""), (0, {"span": 0}, ValueError, r"span=0\) needs a finite number above 0"),
        (0, {"statistics": "fresh"}, ValueError, "needs \"auto\", \"frozen\""), (0, {"plane": 3}, TypeError, "needs a Plane or None"),
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
        with pytest.raises(TypeError, match=r"Pass record\['surface'\]"):
            og.save_surface(object(), tmp_path / "s.png")
        with pytest.raises(ValueError, match="needs a table with columns s and t"):
            og.save_surface(surface, tmp_path / "s.png", marks=og.Table(rows=[{"quantity": "a", "value": 1.0}]))
        with pytest.raises(ValueError, match='needs "contours" or "relief"'):
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
        assert "<svg" in text and "45 evaluations" in text and "a&lt;b&gt;$x_$" in text  # as letters, which can be searched and edited
        bare = og.save_surface(surface, tmp_path / "bare.png", view=view).read_bytes()
        assert bare != (tmp_path / "a.png").read_bytes()  # networks are marked
        with pytest.raises(ValueError, match=r"a line. Save it as .csv"):
            og.save_surface(og.Surface(x=x, y=y[:1], z=z[:, :1]), tmp_path / "line.png")

    def test_a_wide_surface_has_colours_by_decades(self, tmp_path):
        from matplotlib.colors import LogNorm, Normalize

        from orograph.paper import _colours

        x = torch.linspace(-1, 1, 5, **DOUBLE)
        z = 10.0 ** (3 * x[:, None] + 0 * x[None])
        for top, kind in ((z, LogNorm), (2 + x[:, None] + 0 * x[None], Normalize)):
            levels, norm = _colours(og.Surface(x=x, y=x, z=top), np.ma.masked_invalid(top.numpy()))
            assert type(norm) is kind and (np.allclose(np.diff(np.log(levels)), np.log(levels[1] / levels[0])) == (kind is LogNorm))

    def test_a_surface_comes_back_with_its_words(self, tmp_path):
        surface = og.Surface(x=torch.arange(3.0).double(), y=torch.arange(2.0).double(), z=torch.ones(3, 2, **DOUBLE), evaluations=7, label="loss", note="600 of 1,200 examples", xlabel="s")
        back = og.load_surface(og.save_surface(surface, tmp_path / "s.npz"))
        assert (back.evaluations, back.label, back.note, back.xlabel, back.unit) == (7, "loss", "600 of 1,200 examples", "s", "") and torch.equal(back.z, surface.z)

    @pytest.mark.parametrize("error", ["none", "unknown", "known"])
    def test_every_field_of_a_surface_comes_back(self, tmp_path, error):
        x, z = torch.arange(3.0).double(), torch.tensor([[1.0, math.nan, 3.0], [math.inf, 0.0, -1.0], [1.0, 2.0, 1e-300]], **DOUBLE)
        errors = {"none": None, "unknown": torch.full_like(z, math.nan), "known": z.abs()}[error]
        plain = og.Surface(x=x, y=x + 1, z=z, error=errors)
        others = {"evaluations": 7, "label": "null", "unit": "7", "xlabel": "s", "ylabel": "t", "note": "", "logarithmic": True, "status": "budget-limited"}
        assert {field.name for field in fields(og.Surface)} == {"x", "y", "z", "error", *others}  # a new field has to come back too
        for surface in (plain, replace(plain, **others), replace(plain, logarithmic=False)):
            back = og.load_surface(og.save_surface(surface, tmp_path / "s.npz"))
            for field in fields(og.Surface):
                before, after = getattr(surface, field.name), getattr(back, field.name)
                if isinstance(before, torch.Tensor):
                    assert torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
                else:
                    assert before == after and type(before) is type(after)

    def test_a_surface_of_version_0_1_is_read(self, tmp_path):
        z = np.ones((2, 2))
        np.savez_compressed(tmp_path / "s.npz", x=z[0], y=z[0], z=z, error=np.nan * z, evaluations=np.array(5), label=np.array("loss"), unit=np.array(""), xlabel=np.array("s"), ylabel=np.array("t"), note=np.array(""))
        back = og.load_surface(tmp_path / "s.npz")
        assert (back.evaluations, back.label, back.status, back.error, back.logarithmic) == (5, "loss", "converged", None, None)
        np.savez_compressed(tmp_path / "s.npz", x=z[0], y=z[0], z=z, error=z, status=np.array("splendid"))
        with pytest.raises(ValueError, match="status 'splendid'; known are converged"):
            og.load_surface(tmp_path / "s.npz")

    @pytest.mark.parametrize("lowest", [0.0, -1e-18, -1.0])
    def test_zeros_keep_the_logarithms_of_a_picture(self, tmp_path, lowest):
        x = torch.linspace(-1, 1, 9, **DOUBLE)
        z = 10.0 ** (3 * x[:, None].abs() + x[None].abs()) - 1
        z[4, 4] = lowest
        surface = og.Surface(x=x, y=x, z=z, label="loss")
        assert surface.wide == (lowest > -1) and surface.floor == (float(z[z > 0].min()) if lowest > -1 else None)
        assert replace(surface, logarithmic=True).wide and not replace(surface, logarithmic=False).wide
        page = og.write_report([og.Record(probe="surface", results={"surface": surface})], tmp_path / "report.html").read_text()
        text = og.save_surface(surface, tmp_path / "s.svg").read_text()
        drawn = f"values below {surface.floor:.2g} drawn like it" if lowest > -1 else None
        assert ("Logarithmic colours" in page) == ("drawn like it" in page) == (lowest > -1) and (drawn is None or drawn in text)

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
        assert surface.evaluations == 5 and surface.status == "budget-limited"
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
        for evaluations, more in ((49, []), (3, ["--again"])):
            result = CliRunner().invoke(app, ["surface", str(task), "--out", str(tmp_path / "out"), "--set", "surface.resolution=7", *more])
            assert result.exit_code == 0, result.output
            drawn = og.load_records(tmp_path / "out" / "records")[-1]["surface"]
            assert drawn.evaluations <= evaluations and (drawn.evaluations > 0) == (evaluations > 0)
        assert all((tmp_path / "out" / f"surface.{ending}").exists() for ending in ("npz", "csv", "vtk", "png", "svg")) and (tmp_path / "out" / "report.html").exists()
