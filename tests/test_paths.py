"""Paths, barriers on them, and curves trained between networks."""

import copy
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import orograph as og
from orograph.profiles import trace_path
from orograph.renormalise import Repair
from orograph.studies.networks import cnn, mlp
from orograph.studies.problems import digits
from orograph.studies.training import train_to_loss

from .quadratics import quadratic, random_quadratic

QUIET = lambda done, total, text: None


def flat(seed, n=9):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestPaths:
    def test_ends_are_exact_and_middles_are_mixtures(self):
        a, b, c = flat(1), flat(2), flat(3)
        for path in (og.Line(a, b), og.Bezier([a, c, b]), og.PolyChain([a, c, b])):
            assert torch.equal(path(0.0), a) and torch.equal(path(1.0), b)
            assert float(path.weights(0.3).sum()) == pytest.approx(1.0)
        assert torch.allclose(og.Bezier([a, c, b])(0.5), 0.25 * a + 0.5 * c + 0.25 * b) and torch.equal(og.PolyChain([a, c, b])(0.5), c)
        assert torch.allclose(og.PolyChain([a, c, b])(0.75), (c + b) / 2)

    def test_lengths_have_their_closed_forms(self):
        a, b, c = flat(1), flat(2), flat(3)
        assert og.Line(a, b).length() == pytest.approx(float((b - a).norm()))
        assert og.PolyChain([a, c, b]).length() == pytest.approx(float((c - a).norm() + (b - c).norm()))
        assert og.Bezier([a, (a + b) / 2, b]).length() == pytest.approx(float((b - a).norm()), rel=1e-8)
        t = torch.linspace(0, 1, 20001, dtype=torch.float64)
        curve = torch.stack([og.Bezier([a, c, b])(float(s)) for s in t])
        assert og.Bezier([a, c, b]).length() == pytest.approx(float((curve[1:] - curve[:-1]).norm(dim=1).sum()), rel=1e-6)

    def test_what_does_not_belong_together_is_refused(self):
        with pytest.raises(TypeError, match="all of one kind"):
            og.Line(flat(1), og.Point(theta=flat(2)))(0.5)
        with pytest.raises(ValueError, match="at least 2"):
            og.PolyChain([flat(1)])(0.0)


@pytest.mark.parametrize("seed", [4, 5, 7])
def test_a_planted_quadratic_has_the_barriers_of_its_closed_form(seed):
    A, g, _ = random_quadratic(seed)
    A = -A if seed == 5 else A  # concave: a barrier in the middle
    objective = quadratic(A, g)
    a, b = flat(seed, len(g)), flat(seed + 10, len(g))
    record = og.measure(objective, "barrier", a, b, resolution=401)
    la, lb, c = objective.at(a).value(), objective.at(b).value(), float((b - a) @ A @ (b - a))
    t = record["path"].x
    assert torch.allclose(record["path"].y, (1 - t) * la + t * lb - t * (1 - t) * c / 2, rtol=1e-10)
    rows = {row["definition"]: row["value"] for row in record["barriers"].rows}
    assert rows["over the chord"] == pytest.approx(max(-c / 8, 0.0), abs=1e-10 * abs(la))
    if c < 0:
        peak = min(max(0.5 + (la - lb) / c, 0.0), 1.0)
        height = (1 - peak) * la + peak * lb - peak * (1 - peak) * c / 2
        refined = 1e-10 * abs(la)
        assert rows["over the mean of the ends"] == pytest.approx(height - (la + lb) / 2, abs=refined) and rows["over the mean of the ends"] <= height - (la + lb) / 2 + 1e-10 * abs(la)
        assert rows["over the larger end"] == pytest.approx(height - max(la, lb), abs=refined)


def test_derivatives_along_the_line_of_a_quadratic():
    A, g, _ = random_quadratic(4)
    a, b = flat(1, len(g)), flat(2, len(g))
    record = og.measure(quadratic(A, g), "barrier", a, b, resolution=5, derivatives=True)
    d = (b - a) / (b - a).norm()
    assert torch.allclose(record["curvature"].y, (d @ A @ d).expand(5)) and record.products == 5 and record["length"].value == pytest.approx(float((b - a).norm()))
    assert float(record["gradient_norm"].y[2]) == pytest.approx(float((g + A @ (a + b) / 2).norm()))


class Bump(nn.Module):
    """A hill at 0.437."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return torch.exp(-(((self.w - 0.437) / 0.12) ** 2)).expand(len(x))


def test_an_elastic_band_gets_pivots_where_the_loss_rises_above_its_chords():
    x = torch.zeros(4, 1, dtype=torch.float64)
    objective = og.Objective(Bump(), lambda output, target: output.mean(), (x, x))
    ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    band = og.elastic_band(objective, *ends, cycles=[(1, 1e-12), (1, 1e-12)], weight_decay=0.0)
    assert len(band.points) in (6, 7)  # 3 pivots and the ends, and one or two more around the hill


def test_refinement_finds_a_peak_between_the_points_of_the_grid():
    x = torch.zeros(4, 1, dtype=torch.float64)
    objective = og.Objective(Bump(), lambda output, target: output.mean(), (x, x))
    ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    coarse, fine = (max(og.measure(objective, "barrier", *ends, resolution=9, refine=refine)["path"].y) for refine in (False, True))
    assert float(fine) == pytest.approx(1.0, abs=1e-3) and float(coarse) < 0.95


@pytest.fixture(scope="module")
def pair():
    x, y = digits().train
    nets = [mlp(64, 16, 10, seed=seed, activation=nn.ReLU) for seed in (0, 1)]
    for seed, net in enumerate(nets):
        train_to_loss(net, (x, y), batch_size=50, learning_rate=0.3, target=0.1, seed=seed)
    return og.Objective(nets[0], nn.CrossEntropyLoss(), (x, y), batch_size=300), nets


def test_barrier_intervals_cover_the_barrier_of_all_data(pair):
    """200 random tenths of the data; the interval of each should hold the barrier at the same t of the whole."""
    objective, nets = pair
    a, b = objective.point(nets[0]), objective.point(nets[1])
    whole = trace_path(objective, og.Line(a, b), statistics="interpolated", resolution=3, report=QUIET, refine=False)
    truth = whole.barriers("loss", "train")[0]
    assert truth["t"] == 0.5
    held = 0
    for seed in range(200):
        part = trace_path(objective.sample(120, seed), og.Line(a, b), statistics="interpolated", resolution=3, report=QUIET, refine=False).barriers("loss", "train")[0]
        held += part["lower"] <= truth["value"] <= part["upper"]
    assert 0.91 * 200 <= held <= 200


def test_a_curve_gets_around_the_barrier_and_keeps_its_ends(pair):
    objective, nets = pair
    a, b = objective.point(nets[0]), objective.point(nets[1])
    curve = og.fit_path(objective, a, b, epochs=150)
    line, bent = (trace_path(objective, path, statistics="interpolated", resolution=21, report=QUIET).barriers("loss", "train")[0] for path in (og.Line(a, b), curve))
    assert bent["value"] < 0.3 * line["value"] and torch.equal(curve(0.0).theta, a.theta) and torch.equal(curve(1.0).theta, b.theta)
    chain = og.fit_path(objective, a, b, kind="polychain", bends=2, epochs=3)
    assert len(chain.points) == 4 and chain.length() >= og.Line(a, b).length() * (1 - 1e-6)


def test_a_curve_of_a_batchnorm_network_leaves_the_model_alone():
    x, y = digits().train
    nets = [cnn(seed=seed, channels=(4, 6)) for seed in (0, 1)]
    for net in nets:
        net.train()(x[:200])
        net.eval()
    objective = og.Objective(nets[0], nn.CrossEntropyLoss(), (x[:200], y[:200]))
    before = copy.deepcopy(nets[0].state_dict())
    curve = og.fit_path(objective, nets[0], nets[1], epochs=2, batch_size=64)
    assert all(torch.equal(before[key], value) for key, value in nets[0].state_dict().items()) and not nets[0].training
    assert isinstance(curve(0.5), og.Point)


SCRIPT = """
import sys, torch
import orograph as og
from torch import nn
from orograph.studies.networks import mlp
from orograph.studies.problems import digits
x, y = digits().train
nets = [mlp(64, 12, 10, seed=seed) for seed in (0, 1)]
objective = og.Objective(nets[0], nn.CrossEntropyLoss(), (x[:300], y[:300]))
print("ready", flush=True)
og.fit_path(objective, nets[0], nets[1], epochs=120, batch_size=64, checkpoint=sys.argv[1])
"""


@pytest.mark.slow
def test_a_curve_killed_at_20_random_moments_is_the_same_bit_for_bit(tmp_path):
    script = tmp_path / "curve.py"
    script.write_text(SCRIPT)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    command = [sys.executable, str(script)]
    began = time.monotonic()
    subprocess.run([*command, str(whole)], check=True, timeout=120, capture_output=True)
    takes = time.monotonic() - began
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    for moment in moments:
        with subprocess.Popen([*command, str(broken)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(moment * takes / 4)
            process.kill()
    subprocess.run([*command, str(broken)], check=True, timeout=120, capture_output=True)
    assert torch.equal(load_file(whole)["inner"], load_file(broken)["inner"]) and int(load_file(broken)["epoch"]) == 120


def test_a_curve_continues_from_its_checkpoint_bit_for_bit(tmp_path, pair):
    objective, nets = pair
    whole = og.fit_path(objective, *nets, epochs=6, checkpoint=tmp_path / "a")

    def interrupted(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        og.fit_path(objective, *nets, epochs=6, checkpoint=tmp_path / "b", progress=interrupted)
    assert torch.equal(og.fit_path(objective, *nets, epochs=6, checkpoint=tmp_path / "b").points[1].theta, whole.points[1].theta)
    with pytest.raises(ValueError, match="belongs to another job: seed"):
        og.fit_path(objective, *nets, epochs=6, seed=1, checkpoint=tmp_path / "b")


class Passes(nn.Module):
    """Two minima at (-1, 0) and (1, 0) behind a wall at x = 0 that is lowest, a half, at y = 1."""

    def __init__(self, x):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([x, 0.0], dtype=torch.float64))

    def forward(self, data):
        x, y = self.w
        wall = torch.exp(-8 * x**2) * (0.5 + 2 * (y - 1) ** 2)
        return (wall + 0.2 * (x**2 - 1) ** 2 + 0.1 * y**2 * x**2).expand(len(data))


def test_an_elastic_band_finds_the_low_pass(tmp_path):
    data = torch.zeros(4, 1, dtype=torch.float64)
    objective = og.Objective(Passes(-1.0), lambda output, target: output.mean(), (data, data))
    ends = objective.point(Passes(-1.0)), objective.point(Passes(1.0))
    cycles = [(150, 0.02), (150, 0.02), (150, 0.01)]
    band = og.elastic_band(objective, *ends, cycles=cycles, momentum=0.5, weight_decay=0.0)
    highest = max(objective.at(band(t)).value() for t in torch.linspace(0, 1, 201).tolist())
    assert highest == pytest.approx(0.7, abs=0.03) and len(band.points) >= 5  # 0.5 of the wall and 0.2 of the ridge; 2.7 on the straight line

    def interrupted(done, total, text):
        if done == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        og.elastic_band(objective, *ends, cycles=cycles, momentum=0.5, weight_decay=0.0, checkpoint=tmp_path / "band", progress=interrupted)
    again = og.elastic_band(objective, *ends, cycles=cycles, momentum=0.5, weight_decay=0.0, checkpoint=tmp_path / "band")
    assert all(torch.equal(x.theta, y.theta) for x, y in zip(again.points, band.points, strict=True))
    with pytest.raises(ValueError, match=r"cycles=\[\].*It is empty"):
        og.elastic_band(objective, *ends, cycles=[])


def test_fit_path_refuses_what_is_no_curve(pair):
    objective, nets = pair
    with pytest.raises(ValueError, match='needs "bezier" or "polychain"'):
        og.fit_path(objective, *nets, kind="spline")
    with pytest.raises(ValueError, match=r"bends=0.*at least 1"):
        og.fit_path(objective, *nets, bends=0)
    normed = [cnn(seed=seed, channels=(4, 6)).eval() for seed in (0, 1)]
    with pytest.raises(ValueError, match="one example at a time"):
        og.fit_path(og.Objective(normed[0], nn.CrossEntropyLoss(), (torch.rand(4, 64), torch.arange(4))), *normed, batch_size=1)
    with pytest.raises(ValueError, match='needs "interpolated"'):
        og.measure(objective, "barrier", *nets, statistics="fresh")


def test_repair_gives_every_unit_the_statistics_between_those_of_the_ends(pair):
    objective, nets = pair
    a, b = objective.point(nets[0]), objective.point(nets[1])
    fixed = Repair(objective, a, b).at(og.Line(a, b)(0.5), 0.5)
    x = digits().train[0]
    first = [nn.functional.linear(x, point.theta[objective.layout["0.weight"]].view(16, 64), point.theta[objective.layout["0.bias"]]) for point in (a, b, fixed)]
    assert torch.allclose(first[2].mean(0), (first[0].mean(0) + first[1].mean(0)) / 2, atol=1e-4)
    assert torch.allclose(first[2].std(0), (first[0].std(0) + first[1].std(0)) / 2, rtol=1e-3)
    assert objective.at(fixed).value() < objective.at(og.Line(a, b)(0.5)).value()
    same = Repair(objective, a, a).at(a, 0.5)
    assert torch.allclose(same.theta, a.theta, atol=1e-5)


class TestConnect:
    def test_stages_curves_and_the_merged_network(self, pair, tmp_path):
        objective, nets = pair
        held_out = objective.on(digits().held_out)
        record = og.connect(objective, *nets, held_out=held_out, curve_epochs=60)
        rows = {row["stage"]: row for row in record["stages"].rows}
        assert set(rows) == {"straight line", "aligned by weights", "aligned by activations", "aligned and renormalised", "curve with one bend"}
        assert all({"barrier", "lower", "upper", "length", "seconds"} <= set(row) for row in rows.values())
        assert rows["aligned by weights"]["barrier"] < rows["straight line"]["barrier"] and rows["aligned by weights"]["length"] < rows["straight line"]["length"]
        merged = record["merged"]
        net = mlp(64, 16, 10, seed=3, activation=nn.ReLU)
        net.load_state_dict(objective.state_dict(merged))
        x, y = digits().held_out
        accuracy = float((net(x).argmax(1) == y).double().mean())
        assert accuracy == pytest.approx(record["merged_metrics"].rows[1]["accuracy"]) and accuracy > 0.8 and "merged" in merged.label
        og.save_records(record, tmp_path)
        assert torch.equal(og.load_records(tmp_path)[0]["merged"].theta, merged.theta)

    def test_what_cannot_be_aligned_is_missing_and_the_rest_is_there(self):
        t = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        nets = [nn.Linear(1, 1).double() for _ in range(2)]
        objective = og.Objective.from_batch_loss(nets[0], lambda model, batch: (((model(batch) - 2) ** 2).sum(), len(batch)), [t])
        record = og.connect(objective, *nets, curve_epochs=0)
        assert "aligned by weights" in record.missing and record["stages"].rows[0]["barrier"] == pytest.approx(0.0, abs=1e-12)
        assert math.isnan(record["stages"].rows[0]["error_barrier"])


def test_connect_on_the_command_line_writes_the_merged_network(tmp_path):
    from typer.testing import CliRunner

    from orograph.cli import app

    task = Path("examples/digits_task.py").resolve()
    subprocess.run([sys.executable, str(task)], cwd=tmp_path, check=True, timeout=120, capture_output=True)
    weights = [str(tmp_path / f"seed-{seed}.pt") for seed in (0, 1)]
    result = CliRunner().invoke(app, ["connect", str(task), *weights, "--out", str(tmp_path / "out"), "--set", "connectivity.curve_epochs=2"])
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "out" / "merged.safetensors").keys() == torch.load(weights[0], weights_only=True).keys() and (tmp_path / "out" / "report.html").exists()
