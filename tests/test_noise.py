"""Weight noise against closed forms, and running statistics re-estimated."""

import copy
import math

import pytest
import torch
from torch import nn

import orograph as og
from orograph.linalg.low_rank import LowRank
from orograph.perturbations import Noise
from orograph.renormalise import renormalised
from orograph.studies.networks import mlp
from orograph.studies.problems import digits
from orograph.studies.training import train_to_loss

from .networks import loss_cases
from .quadratics import quadratic, random_quadratic


def test_a_quadratic_loss_follows_its_trace_at_every_sigma():
    A, g, _ = random_quadratic(5)
    record = og.measure(quadratic(A, g), "noise", sigmas=[0.1, 0.5, 1.0, 10.0], pairs=20)
    assert torch.allclose(record["loss"].y, 0.5 * record["loss"].x ** 2 * A.trace(), rtol=1e-6)  # the control variate leaves nothing
    assert torch.allclose(record["quadratic"].y, record["loss"].y, rtol=1e-6)
    assert record["window"].value == 10.0 and record["window"].status == "budget-limited" and "at least" in record["window"].label
    assert abs(float(record["fourth_order"].value)) < 1e-6 and {"accuracy", "sigma_at_drop"} <= set(record.missing)


@pytest.mark.parametrize("kind", ["magnitude", "layerwise"])
def test_scaled_noise_has_the_trace_of_the_scaled_hessian(kind):
    A, g, _ = random_quadratic(9)
    w = torch.randn(len(g), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = w.abs() if kind == "magnitude" else w.square().mean().sqrt().expand(len(w))
    record = og.measure(quadratic(A, g, w), "noise", sigmas=[0.5], pairs=20, kind=kind)
    expected = 0.5 * 0.25 * float((scale**2 * A.diagonal()).sum())
    base = float(g @ w + 0.5 * w @ A @ w)
    assert float(record["loss"].y) - base == pytest.approx(expected, abs=4 * float(record["loss"].error) + 1e-9)
    assert float(record["loss"].error) < 0.01 * expected and float(record["quadratic"].y) - base == pytest.approx(expected, rel=1e-5)


def test_means_over_pairs_are_calibrated_with_a_control_that_knows_half():
    """100 intervals of the mean increase of a quadratic hold the truth about as often as they say."""
    A, g, _ = random_quadratic(13)
    values, vectors = torch.linalg.eigh(A)
    known, objective, held = LowRank(vectors[:, ::2].T.contiguous(), values[::2]), quadratic(A, g), 0
    plain, helped = [], []
    for seed in range(100):
        found = Noise(objective, 12, seed, known=known).at(1.0, 0.0).mean_increase()
        low, high = found.interval()
        held += low <= 0.5 * float(A.trace()) <= high
        helped.append(found.sem)
        plain.append(Noise(objective, 12, seed).at(1.0, 0.0).mean_increase().sem)
    assert held >= 87  # 95 % less four standard deviations
    assert sum(helped) < sum(plain)


def test_tanh_network_leaves_the_quadratic_at_the_window_and_not_before():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 10, generator=g, dtype=torch.float64), torch.randint(0, 3, (300,), generator=g)
    objective = og.Objective(mlp(10, 8, 3, seed=0).double(), nn.CrossEntropyLoss(), (x, y))
    spectrum, record = og.measure_all(objective, ["spectrum", "noise"], settings={"spectrum": {"rel_error": 0.002, "max_products": 3000}, "noise": {"pairs": 60}})
    trace, window = float(og.hessian(objective).dense().trace()), float(record["window"].value)
    assert spectrum["spectrum"].trace.value == pytest.approx(trace, rel=0.005) and record["window"].status == "converged"
    for sigma, loss, error in zip(record["loss"].x, record["loss"].y, record["loss"].error, strict=True):
        model = 0.5 * float(sigma) ** 2 * trace
        off, sem = abs(float(loss) - objective.value() - model) / abs(model), float(error) / abs(model)
        if sigma <= 0.4 * window:
            assert off <= 0.02 + 2 * sem
        if sigma <= window:
            assert off <= 0.1 + 2 * sem
    assert record.products == 0 and record.reused == spectrum.products


def test_sigma_at_drop_is_where_the_mean_accuracy_has_fallen(objective_of_digits):
    objective = objective_of_digits
    record = og.measure(objective, "noise", pairs=8, drop=0.2)
    at = float(record["sigma_at_drop"].value)
    work = Noise(objective, 8, 0)
    error = work.at(at, 0.0).mean_error().value
    assert error - (1 - objective.metrics()["accuracy"]) == pytest.approx(0.2, abs=0.02)
    other = og.measure(objective, "noise", pairs=8, drop=0.2, seed=9)["sigma_at_drop"]
    sem = math.hypot(float(record["sigma_at_drop"].sem), float(other.sem))
    assert abs(at - float(other.value)) <= 4 * sem


@pytest.fixture(scope="module")
def objective_of_digits():
    x, y = digits(dtype=torch.float64).train
    net = mlp(64, 10, 10, seed=0).double()
    train_to_loss(net, (x, y), batch_size=50, learning_rate=0.5, target=0.3)
    return og.Objective(net, nn.CrossEntropyLoss(), (x[:300], y[:300]))


def test_noise_in_one_layer_alone(objective_of_digits):
    record = og.measure(objective_of_digits, "noise", pairs=16, sigmas=[0.01, 0.02])
    H, layout = og.hessian(objective_of_digits).dense(), objective_of_digits.layout
    for row in record["layers"].rows:
        sigma, where = row["sigma"], layout[row["name"]]
        assert row["value"] == pytest.approx(0.5 * sigma**2 * float(H[where, where].trace()), rel=0.5, abs=5 * row["error"] + 1e-9)


def normalised(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    net(x)
    return net.eval(), x, torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(1))


def test_renormalised_statistics_are_those_of_torchs_own_update():
    net, x, y = normalised()
    objective = og.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=50)
    point = renormalised(objective, objective.theta * 1.3)
    other = copy.deepcopy(net)
    other.load_state_dict(objective.state_dict(objective.theta * 1.3))
    torch.optim.swa_utils.update_bn(list(x.split(50)), other)
    for name, buffer in other.named_buffers():
        if "running" in name:
            assert torch.allclose(point.buffers[name], buffer, rtol=1e-9), name
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), normalised()[0].state_dict().values(), strict=True))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_batchnorm_policies_differ_under_noise_and_agree_without_batchnorm():
    net, x, y = normalised()
    objective = og.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=50)
    frozen, fresh = (Noise(objective, 4, 0, batchnorm=policy).at(0.5, 0.0).increase for policy in ("frozen", "reestimated"))
    assert not torch.allclose(frozen, fresh)
    plain = loss_cases()["cross-entropy"].objective(100)
    frozen, fresh = (Noise(plain, 4, 0, batchnorm=policy).at(0.5, 0.0).increase for policy in ("frozen", "reestimated"))
    assert torch.equal(frozen, fresh)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sigmas": [0.0]}, "finite number above 0"), ({"pairs": 1}, "pairs=1.*at least 2"), ({"kind": "uniform"}, "needs \"isotropic\""), ({"drop": 2}, "between 0 and 1")],
)
def test_noise_refuses_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        og.measure(loss_cases()["cross-entropy"].objective(100), "noise", **settings)
