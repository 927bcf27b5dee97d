"""What a cheap start cannot see must not go unseen, and what rounding, outliers or edge cases do must show in errors and not in values."""

import math

import pytest
import torch
from torch import nn

import orograph as og
from orograph.linalg.blocks import block_top
from orograph.linalg.low_rank import LowRank
from orograph.linalg.trust_region import dense_maximum
from orograph.perturbations import Draws, Noise

from .quadratics import quadratic
from .test_sharpness import rows_of

DOUBLE = {"dtype": torch.float64}


def rotated(values, seed=0):
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), **DOUBLE))
    A = Q @ torch.diag(values) @ Q.T
    return (A + A.T) / 2


class TestLargestEigenvalues:
    def test_outliers_that_are_all_negative_do_not_hide_a_positive_one(self):
        values = torch.cat([-100 - torch.arange(20, **DOUBLE), 0.5 * torch.rand(280, generator=torch.Generator().manual_seed(1), **DOUBLE)])
        objective = quadratic(rotated(values), torch.ones(300, **DOUBLE) / 20)
        optimiser = torch.optim.SGD(objective.snapshot.users.model.parameters(), lr=0.1)
        assert og.measure(objective, "stability", optimizer=optimiser)["edge_ratio"].value == pytest.approx(0.05 * float(values.max()), rel=1e-2)
        (row,) = og.measure(objective, "layers")["layers"].rows
        assert row["top_eigenvalue"] == pytest.approx(float(values.max()), rel=0.1)

    def test_a_preconditioner_that_lifts_a_flat_direction_is_seen(self):
        h = torch.full((200,), 0.01, **DOUBLE)
        h[0], h[1] = 100.0, 0.1
        objective = quadratic(torch.diag(h), torch.ones(200, **DOUBLE))
        model = objective.snapshot.users.model
        optimiser = torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-12)
        (model.g @ model.w).backward()
        optimiser.step()
        v = torch.ones(200, **DOUBLE)
        v[1] = 1e-10
        optimiser.state[model.w]["square_avg"] = v
        expected = float((h / v.sqrt()).max())
        assert og.measure(objective, "stability", optimizer=optimiser)["edge_ratio"].value == pytest.approx(expected * 1e-3 / 2, rel=1e-2)
        row = og.measure(objective, "conditioning", optimizer=optimiser)["conditioning"].rows[-1]
        assert row["value"] == pytest.approx(expected, rel=0.05)

    @pytest.mark.parametrize("seed", range(10))
    def test_an_eigenvalue_that_the_low_rank_part_lacks_is_found(self, seed):
        values = torch.cat([torch.tensor([3.0, 2.0, 1.0]), 0.1 * torch.rand(97, generator=torch.Generator().manual_seed(seed))]).double()
        A = rotated(values, seed)
        lam, Q = torch.linalg.eigh(A)
        known = LowRank(Q[:, -3:-1].T.contiguous(), lam[-3:-1])  # without the largest
        left = float((A - Q[:, -3:-1] @ torch.diag(lam[-3:-1]) @ Q[:, -3:-1].T).norm())
        top = block_top(og.LinearOperator.from_dense(A), known, None, unknown=left, tol=0.05, max_products=60)
        assert top.value == pytest.approx(3.0, rel=0.05) and top.missed <= 0.05

    def test_a_budget_that_ends_too_early_says_what_may_be_missed(self):
        A = rotated(torch.linspace(0, 1, 200, **DOUBLE))
        none = LowRank(torch.zeros(0, 200, **DOUBLE), torch.zeros(0, **DOUBLE))
        assert block_top(og.LinearOperator.from_dense(A), none, None, unknown=10.0, tol=0.01, max_products=3).missed > 0.5

    def test_top_of_a_negative_low_rank_matrix_is_zero(self):
        Y, _ = torch.linalg.qr(torch.randn(20, 2, generator=torch.Generator().manual_seed(0), **DOUBLE))
        known = LowRank(Y.T.contiguous(), torch.tensor([-1.0, -2.0], **DOUBLE))
        assert known.top()[0] == 0.0
        assert LowRank(torch.eye(2, **DOUBLE), known.values).top()[0] == pytest.approx(-1.0)


def test_a_parameter_of_one_entry_is_a_layer_like_any_other():
    objective = og.Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.randn(9, 2), torch.randn(9, 1)))
    rows = {row["name"]: row for row in og.measure(objective, "layers")["layers"].rows}
    assert rows["bias"]["trace"] == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("pairs", [5, 10, 20])
def test_means_under_noise_are_calibrated_where_one_direction_decides(pairs):
    """sqrt(1 + 25 (v.w)^2): far from quadratic along one direction, whose control has a long tail."""

    class Cone(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(20, **DOUBLE))

        def forward(self, x):
            return ((1 + 25 * self.w[0] ** 2).sqrt() - 1 + 0.005 * self.w @ self.w).expand(len(x))

    x = torch.zeros(2, 1, **DOUBLE)
    objective = og.Objective(Cone(), lambda output, target: output.mean(), (x, x))
    known = LowRank(torch.eye(20, **DOUBLE)[:1], torch.tensor([25.0], **DOUBLE))
    u = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), **DOUBLE)
    truth = float(((1 + 0.25 * u**2).sqrt() - 1).mean()) + 0.005 * 20 * 0.01
    held, plain = 0, 0
    for seed in range(200):
        draws = Noise(objective, pairs, seed, known=known).at(0.1, 0.0)
        low, high = draws.mean_increase().interval()
        held += low <= truth <= high
        low, high = Draws(0.1, draws.increase, draws.error, 0 * draws.control, 0.0).mean_increase().interval()
        plain += low <= truth <= high
    assert held >= plain - 25 and held >= 155  # means of few draws with long tails: plain ones reach about 90 %


class TestCriticalRates:
    @pytest.mark.parametrize("size", [1e-5, 1e-3])
    def test_rounding_of_the_loss_does_not_decide(self, size):
        class Bowl(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(size * torch.ones(20))

            def forward(self, x):
                return (1 + 0.5 * self.w @ self.w).expand(len(x))

        x = torch.zeros(2, 1)
        record = og.measure(og.Objective(Bowl(), lambda output, target: output.mean(), (x, x)), "stability")
        assert record["critical_rate"].value == pytest.approx(2.0, rel=0.02)

    def test_a_rate_that_does_not_exist_agrees_with_nothing(self):
        objective = quadratic(-torch.eye(5, **DOUBLE), torch.ones(5, **DOUBLE))
        assert not any(row["agrees"] for row in og.measure(objective, "stability")["rates"].rows)


class TestMicroBatches:
    @pytest.fixture
    def labelled(self):
        g = torch.Generator().manual_seed(0)
        y = torch.randint(0, 4, (2000,), generator=g).sort().values
        x = torch.randn(2000, 6, generator=g, **DOUBLE) + y[:, None]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(6, 4).double(), (x, y)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_part_of_the_data_has_an_error_and_is_drawn_at_random(self, labelled, reduction):
        model, data = labelled
        objective = og.Objective(model, nn.CrossEntropyLoss(reduction=reduction), data)
        few, all_of_it = (rows_of(og.measure(objective, "sharpness", definitions=["sam"], micro_batch=50, most_batches=most))["SAM, one step, micro-batches of 50"] for most in (6, 40))
        assert few["error"] > 0 and abs(few["value"] - all_of_it["value"]) <= 5 * few["error"] + 0.1 * all_of_it["value"]


def test_one_logit_has_no_normalised_form():
    x = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    objective = og.Objective(nn.Linear(10, 1), nn.BCEWithLogitsLoss(), (x, (x[:, :1] > 0).float()))
    with pytest.raises(TypeError, match="classification losses"):
        og.measure(objective, "sharpness", definitions=["adaptive"], normalize_logits=True)


def test_a_bfloat16_network_has_all_of_its_sharpness():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    objective = og.Objective(net, nn.CrossEntropyLoss(), (torch.randn(60, 6, generator=g).bfloat16(), torch.randint(0, 3, (60,), generator=g)))
    assert rows_of(og.measure(objective, "sharpness", definitions=["worst", "sam"]))["worst case, L2 ball"]["found"] > 0


class TestWindows:
    @pytest.mark.parametrize("seed", range(6))
    def test_noise_of_few_draws_is_no_failure_of_a_quadratic(self, seed):
        values = torch.rand(200, generator=torch.Generator().manual_seed(seed), **DOUBLE)
        record = og.measure(quadratic(torch.diag(values), torch.zeros(200, **DOUBLE)), "noise", pairs=4, seed=seed, sigmas=[0.01, 0.1, 1.0])
        assert record["window"].value == 1.0 and "at least" in record["window"].label

    def test_a_loss_that_is_not_finite_ends_the_window(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(3, **DOUBLE))

            def forward(self, x):
                return (0.5 * ((self.w - 1) ** 2).sum() + 1 + 0 * self.w.sqrt().sum()).expand(len(x))

        x = torch.zeros(2, 1, **DOUBLE)
        record = og.measure(og.Objective(Root(), lambda output, target: output.mean(), (x, x)), "noise", seed=3)
        assert 0 < record["window"].value < 1 and record["loss"].x[-1] < 2

    def test_noise_in_proportion_to_weights_of_zero_is_refused(self):
        with pytest.raises(ValueError, match="all of them are zero"):
            og.measure(quadratic(torch.eye(4, **DOUBLE), torch.ones(4, **DOUBLE)), "noise", kind="magnitude")


def test_a_nearly_linear_model_goes_to_the_edge_of_the_ball():
    value, step = dense_maximum(torch.tensor([[-1e-14]]), torch.tensor([1.0]), 0.05)
    assert value == pytest.approx(0.05) and float(step) == pytest.approx(0.05)


@pytest.mark.parametrize("probe", ["conditioning", "sharpness", "noise", "layers", "stability", "spectrum"])
def test_a_loss_without_curvature_is_measured(probe):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), **DOUBLE)
    objective = og.Objective(nn.Linear(4, 1).double(), lambda output, target: output.mean(), (x, x[:, :1]))
    record = og.measure(objective, probe)
    assert record.results and isinstance(str(record), str)
    if probe == "sharpness":
        row = rows_of(record)["worst case, L2 ball"]
        assert row["found"] == pytest.approx(0.05 * float(objective.gradient().norm())) == row["quadratic"]


def test_a_last_batch_of_one_example_is_left_out_of_statistics():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net(torch.randn(20, 4))
    g = torch.Generator().manual_seed(0)
    objective = og.Objective(net.eval(), nn.CrossEntropyLoss(), (torch.randn(33, 4, generator=g), torch.randint(0, 3, (33,), generator=g)), batch_size=16)
    record = og.measure(objective, "noise", batchnorm="reestimated", pairs=2, sigmas=[0.1])
    assert math.isfinite(float(record["loss"].y))


def test_a_certificate_that_cannot_leave_out_the_priors_examples_is_missing():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)) for _ in range(2)]
    objective = og.Objective(nn.Linear(4, 3), nn.CrossEntropyLoss(), data, mode="batch")
    assert "cannot be left out" in og.measure(objective, "pac_bayes", prior=objective.point(), prior_samples=20).missing["certificates"]
