"""Definitions of sharpness and condition numbers against dense matrices and closed forms."""

import math

import pytest
import torch
from torch import nn

import orograph as og
from orograph.sharpness_zoo import DEFINITIONS
from orograph.studies.networks import mlp

from .networks import Pinn, loss_cases, pinn_loss
from .quadratics import quadratic, random_quadratic


def rows_of(record, name="sharpness"):
    return {row["definition"]: row for row in record[name].rows}


@pytest.fixture(scope="module")
def network():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (200,), generator=g)
    model = mlp(6, 7, 3, seed=2).double()
    objective = og.Objective(model, nn.CrossEntropyLoss(), (x, y), batch_size=64)
    return objective, og.hessian(objective).dense(), og.ggn(objective).dense()


def test_every_family_has_rows_with_the_fixed_columns(network):
    record = og.measure(network[0], "sharpness", dimension=50)
    assert len(record["sharpness"].rows) == 17
    assert all({"definition", "value", "error", "found", "quadratic", "radius", "kind"} <= set(row) for row in record["sharpness"].rows)
    assert {"lambda_max", "trace"} <= set(rows_of(record)) and math.isfinite(sum(row["value"] for row in record["sharpness"].rows))


def test_relative_flatness_is_its_sum_over_neurons(network):
    objective, H, _ = network
    expected = 0.0
    for name in ("0.weight", "2.weight"):
        where = objective.layout[name]
        W = objective.layout.split(objective.theta)[objective.names.index(name)]
        blocks = H[where, where].reshape(*W.shape, *W.shape)
        expected += float(torch.einsum("sk,tk,sjtj->", W, W, blocks))
    row = rows_of(og.measure(objective, "sharpness", definitions=["flatness"]))["relative flatness, sum over layers"]
    assert row["value"] == pytest.approx(expected, abs=4 * row["error"]) and row["error"] < 0.1 * abs(expected)


def test_relative_flatness_is_calibrated_where_nothing_is_known(network):
    """Forms of single vectors over 60 seeds scatter as their errors say."""
    from orograph.linalg.low_rank import LowRank
    from orograph.sharpness_zoo import Constants, flatness_rows
    from orograph.subject import Subject

    objective = network[0]
    subject = Subject(objective)
    op = subject.hessian()
    none = LowRank(op.space.sample(0, 0, "normal").new_zeros(0, op.size), torch.zeros(0, dtype=torch.float64))
    subject.low_rank = lambda: none
    found = [flatness_rows(subject, Constants(seed=seed))[0] for seed in range(60)]
    values = torch.tensor([row["value"] for row in found])
    claimed = torch.tensor([row["error"] for row in found]).square().mean().sqrt()
    assert 0.6 * claimed <= values.std() <= 1.5 * claimed  # a variance of 60 values is known to 18 %, and forms have long tails


def test_fisher_rao_norm_of_a_homogeneous_network_is_its_depth_squared_times_a_mean_over_outputs():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (100,), generator=g)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    value = rows_of(og.measure(og.Objective(net, nn.CrossEntropyLoss(), (x, y)), "sharpness", definitions=["fisher"]))["Fisher-Rao norm"]["value"]
    f = net(x).detach()
    p = f.softmax(1)
    assert value == pytest.approx(9 * float(((p * f**2).sum(1) - (p * f).sum(1) ** 2).mean()), rel=1e-9)  # w . grad f = 3 f


def test_information_geometric_sharpness_is_the_gradient_in_the_metric_of_predictions(network):
    objective, _, G = network
    g = objective.gradient()
    exact = float(g @ torch.linalg.pinv(G, rtol=1e-13, hermitian=True) @ g)
    few, many = (rows_of(og.measure(objective, "sharpness", definitions=["fisher"], steps=steps))["information-geometric"]["value"] for steps in (2, 200))
    assert few < many == pytest.approx(exact, rel=1e-6)


def test_average_case_on_a_quadratic_is_half_a_variance_times_the_trace():
    A, g, _ = random_quadratic(7)
    row = rows_of(og.measure(quadratic(A, g), "sharpness", definitions=["average"], sigma=0.3))["average case, Gaussian"]
    assert row["value"] == pytest.approx(0.045 * float(A.trace()), abs=4 * row["error"] + 1e-9) and row["quadratic"] == pytest.approx(0.045 * float(A.trace()), rel=1e-5)


def test_keskars_number_is_a_percentage_of_one_plus_the_loss():
    g, w = torch.randn(2, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    objective = quadratic(torch.zeros(9, 9, dtype=torch.float64), g, w)
    row = rows_of(og.measure(objective, "sharpness", definitions=["keskar"], epsilons=[2e-3]))["Keskar, box 0.002, whole space"]
    assert row["value"] == pytest.approx(100 * 2e-3 * float(((w.abs() + 1) * g.abs()).sum()) / (1 + objective.value()), rel=1e-6)


def test_sharpness_within_micro_batches_is_not_below_that_of_their_union(network):
    rows = rows_of(og.measure(network[0], "sharpness", definitions=["sam"], micro_batch=25))
    assert rows["SAM, one step, micro-batches of 25"]["value"] >= rows["SAM, one step"]["value"] - 4 * rows["SAM, one step, micro-batches of 25"]["error"]
    whole = rows_of(og.measure(network[0], "sharpness", definitions=["sam"], micro_batch=1000))
    assert whole["SAM, one step"]["value"] == pytest.approx(rows["SAM, one step"]["value"], rel=1e-9)


def test_small_batches_of_the_users_are_joined_to_micro_batches(network):
    x, y = network[0].terms().batches.kept[0]
    pairs = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]
    objective = og.Objective(network[0].snapshot.users.model, nn.CrossEntropyLoss(), pairs)
    whole = og.Objective(network[0].snapshot.users.model, nn.CrossEntropyLoss(), (x[:63], y[:63]))
    few, one = (rows_of(og.measure(o, "sharpness", definitions=["sam"], micro_batch=100)) for o in (objective, whole))
    name = "SAM, one step, micro-batches of 100"
    assert few[name]["value"] == pytest.approx(one[name]["value"], rel=1e-9) == one["SAM, one step"]["value"]


def test_a_batch_loss_leaves_out_what_needs_the_output():
    t = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    objective = og.Objective.from_batch_loss(Pinn(), pinn_loss, [t])
    record = og.measure(objective, "sharpness", definitions=["curvature", "sam", "worst", "fisher"])
    assert "Fisher-Rao norm" in record.missing and "SAM, one step" in rows_of(record)
    assert "Gauss-Newton" in og.measure(objective, "conditioning").missing


def test_sharpness_refuses_unknown_definitions_and_constants():
    objective = loss_cases()["cross-entropy"].objective(100)
    with pytest.raises(ValueError, match="choose from curvature"):
        og.measure(objective, "sharpness", definitions=["flat"])
    for name in ("radius", "gradients", "steps"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            og.measure(objective, "sharpness", **{name: 0})
    with pytest.raises(ValueError, match=r"pairs=.*at least 2"):
        og.measure(objective, "sharpness", pairs=1)
    regression = loss_cases()["regression"].objective(100)
    with pytest.raises(TypeError, match="classifier's logits"):
        og.measure(regression, "sharpness", definitions=["adaptive"], normalize_logits=True)
    assert set(DEFINITIONS) == {"curvature", "sam", "worst", "adaptive", "average", "keskar", "flatness", "fisher"}


def test_condition_numbers_match_the_dense_matrices(network):
    objective, H, G = network
    values = torch.linalg.eigvalsh(H)
    top, low, trace = float(values[-1]), float(values[0]), float(values.sum())
    record = og.measure_all(objective, ["spectrum", "conditioning"], settings={"spectrum": {"rel_error": 0.001}})[1]
    rows = {(row["operator"], row["definition"]): row for row in record["conditioning"].rows}
    expected = {
        "lambda_max / |lambda_min|": top / abs(low),
        "lambda_max / mean eigenvalue": top * len(values) / trace,
        "trace / lambda_max": trace / top,
        "(lambda_max + d) / (|lambda_min| + d)": (top + 1e-3 * top) / (abs(low) + 1e-3 * top),
        "stable rank, trace^2 / sum of squares": trace**2 / float((values**2).sum()),
        "effective dimension, sum of lambda / (lambda + z)": float((values.clamp(min=0) / (values.clamp(min=0) + 0.01 * top)).sum()),
    }
    for name, value in expected.items():
        row = rows["Hessian", name]
        assert row["value"] == pytest.approx(value, abs=4 * row["error"] + 1e-6 * value), name
        assert row["error"] < 0.1 * value, name
    g, vectors = objective.gradient(), torch.linalg.eigh(H)[1]
    share = float((vectors[:, -10:].T @ g).square().sum() / g.square().sum())
    assert rows["Hessian", "share of the gradient in the top 10 eigenvectors"]["value"] == pytest.approx(share, rel=1e-3)
    assert rows["Hessian", "lambda_max / curvature along the gradient"]["value"] == pytest.approx(top * float(g @ g) / float(g @ H @ g), rel=1e-5)
    first = float(torch.linalg.eigvalsh(G)[-1])
    assert rows["Gauss-Newton", "lambda_max"]["value"] <= first * (1 + 1e-9) and rows["Gauss-Newton", "lambda_max"]["value"] == pytest.approx(first, rel=0.02)
    assert rows["Gauss-Newton", "trace"]["value"] == pytest.approx(float(G.trace()), abs=4 * rows["Gauss-Newton", "trace"]["error"])


def test_the_gradients_own_spectrum_has_its_moments():
    A, g, _ = random_quadratic(6)
    density = og.measure(quadratic(A, g), "conditioning")["gradient_spectrum"]
    for power in range(6):  # 8 nodes integrate polynomials up to degree 15 exactly
        moment = float((density.weights[0] * density.nodes[0] ** power).sum())
        assert moment == pytest.approx(float(g @ torch.linalg.matrix_power(A, power) @ g / (g @ g)), rel=1e-6, abs=1e-9)


def test_a_preconditioner_of_a_live_optimiser_is_used(network):
    objective, H, _ = network
    model = objective.snapshot.users.model
    optimiser = torch.optim.RMSprop(model.parameters(), lr=0.0001, eps=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(model(torch.randn(50, 6, dtype=torch.float64)), torch.randint(0, 3, (50,))).backward()
        optimiser.step()
    P = torch.cat([optimiser.state[p]["square_avg"].sqrt().flatten() + 1e-3 for p in model.parameters()])
    expected = float(torch.linalg.eigvalsh(P.rsqrt()[:, None] * H * P.rsqrt())[-1])
    row = og.measure(objective, "conditioning", optimizer=optimiser)["conditioning"].rows[-1]
    assert row["operator"] == "preconditioned by RMSprop" and row["value"] == pytest.approx(expected, rel=0.02) and row["value"] <= expected * (1 + 1e-9)
