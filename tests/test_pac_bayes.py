"""Bounds against high precision and simulation, and what a certificate counts."""

import math

import pytest
import torch
from evidence.certificates import DELTA, arithmetic_gap, digits_certificate, linear_certificates, simulated_violations
from scipy.stats import binom
from torch import nn

import orograph as og
from orograph.bounds import (
    binary_kl,
    binomial_upper,
    catoni,
    chernoff_upper,
    gaussian_kl,
    kl_inverse,
    mcallester,
    monte_carlo_upper,
    seeger,
)

from .networks import loss_cases, small_mlp


def test_arithmetic_is_right_to_ten_digits():
    assert arithmetic_gap() < 1e-10


def test_published_numbers():
    assert round(seeger(0.028, 5144, 55_000, 0.025), 3) == 0.161  # Dziugaite and Roy 2017, T-600
    assert [round(monte_carlo_upper(0.028, draws, 0.01), 3) for draws in (100, 1000, 10_000)] == [0.117, 0.048, 0.034]


def test_bounds_are_ordered_and_have_their_limits():
    assert seeger(0.1, 30, 500, 0.05) < mcallester(0.1, 30, 500, 0.05)  # Pinsker
    assert kl_inverse(0.0, 0.1) == pytest.approx(1 - math.exp(-0.1), rel=1e-15) and kl_inverse(1.0, 0.5) == 1.0 and kl_inverse(0.3, 0.0) == 0.3
    assert binary_kl(0.3, 0.3) == 0.0 and binary_kl(0.5, 0.0) == math.inf
    assert catoni(0.0, 0.0, 100, 0.05, 1e-9) == pytest.approx(-math.expm1(-math.log(20) / 100) / 1e-9, rel=1e-6)


def test_gaussian_kl_is_torchs():
    g = torch.Generator().manual_seed(0)
    w, w0 = torch.randn(2, 7, generator=g, dtype=torch.float64)
    s, scale = torch.tensor([0.3] * 4 + [0.1] * 3, dtype=torch.float64), torch.tensor([0.2] * 4 + [0.4] * 3, dtype=torch.float64)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(w, s), torch.distributions.Normal(w0, scale)).sum()
    distances = [float((w - w0)[:4].square().sum()), float((w - w0)[4:].square().sum())]
    assert gaussian_kl(distances, [4, 3], [0.3, 0.1], [0.2, 0.4]) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("errors", "n"), [(0, 30), (3, 50), (49, 50), (50, 50)])
def test_binomial_bound_is_the_largest_risk_that_is_not_refuted(errors, n):
    upper = binomial_upper(errors, n, 0.05)
    assert upper == 1.0 if errors == n else binom.cdf(errors, n, upper) == pytest.approx(0.05, rel=1e-9)
    assert errors == n or upper <= chernoff_upper(errors / n, n, 0.05)


def test_simulated_certificates_are_violated_no_more_often_than_delta():
    violations = simulated_violations(1000)
    allowed = binom.ppf(0.999, 1000, DELTA)
    assert all((count > allowed) == name.startswith("wrong") for name, count in violations.items())  # and it finds the wrong ones


def test_certificates_of_the_probe_hold_for_classifiers_of_known_risk():
    assert linear_certificates(15) == 0


def test_a_data_dependent_prior_certifies_a_network_on_digits():
    value, test_error, useful = digits_certificate(0)
    assert test_error < value < 0.30 and useful


@pytest.fixture(scope="module")
def objective():
    return loss_cases()["cross-entropy"].objective(100)


def fresh(objective, count):
    """Examples that training has not seen, most of them with the labels that the network gives."""
    model = small_mlp()
    model.load_state_dict(objective.state_dict(objective.theta))
    x = some(count)[0] + 0.01
    y = model(x).argmax(1).detach()
    y[:5] = (y[:5] + 1) % 3
    return x, y


def some(count):
    """The first examples."""
    x, y = loss_cases()["cross-entropy"].data
    return x[:count], y[:count]


def test_a_network_is_no_prior_of_itself(objective):
    with pytest.raises(ValueError, match="the prior is this network itself"):
        og.measure(objective, "pac_bayes", prior=objective.point())


def certificate(record, posterior="isotropic", bound="kl-inverse"):
    return next(row for row in record["certificates"].rows if (row["bound"], row["posterior"]) == (bound, posterior))


def test_the_record_has_everything_to_compute_the_bound_again(objective):
    prior = objective.at(objective.theta + 0.01).point(label="start")
    record = og.measure(objective, "pac_bayes", prior=prior, prior_samples=101, draws=20, sigmas=[0.1, 1.0], seed=3, held_out=objective.on(fresh(objective, 250)))
    row = certificate(record)
    assert row["n"] == 200 and row["draws"] == 20 and row["seed"] == 3 and row["prior"] == "start" and row["delta"] == 0.035
    assert row["kl"] == pytest.approx(objective.size * 0.01**2 / (2 * row["sigma"] ** 2), rel=1e-9)
    assert row["value"] == pytest.approx(seeger(monte_carlo_upper(row["empirical"], 20, 0.01 / 2), row["kl"], 200, 0.025 / 2 / 2), rel=1e-12)  # two sigmas, two posteriors
    x, y = loss_cases()["cross-entropy"].data
    errors, model = [], small_mlp()
    for index in range(20):  # the same draws, by hand, on the examples that did not make the prior
        model.load_state_dict(objective.state_dict(objective.theta + row["sigma"] * objective.space.sample(3, index, "normal")))
        errors.append(float((model(x[101:]).argmax(1) != y[101:]).double().mean()))
    assert row["empirical"] == pytest.approx(sum(errors) / 20, rel=1e-12)
    assert record["test_bound"].value == pytest.approx(binomial_upper(5, 250, 0.035))
    assert {row["bound"] for row in record["certificates"].rows} == {"kl-inverse", "McAllester", "Catoni", "test set, the same noise", "test set, the network as it is", "trivial"}
    assert record.settings["prior"].startswith("Point 'start', weights ") and "certificate is" in record.says


def test_layerwise_noise_takes_its_shape_from_the_prior_alone(objective):
    prior = objective.at(objective.theta * 2).point()
    row = certificate(og.measure(objective, "pac_bayes", prior=prior, draws=20, sigmas=[0.5]), "layerwise")
    parts = objective.layout.split(prior.theta)
    shares = [float((part / 2).square().sum()) / float(part.square().mean()) for part in parts]
    assert row["kl"] == pytest.approx(sum(shares) / (2 * 0.25), rel=1e-9)


def test_tokens_are_not_counted_as_examples():
    case = loss_cases()["ignored tokens, dicts"]
    here = case.objective(100)
    labels = case.data[1]
    record = og.measure(here, "pac_bayes", draws=10, sigmas=[1.0])
    assert certificate(record)["n"] == int((labels != -100).any(1).sum()) < here.units


def test_tokens_in_rows_of_their_own_make_no_certificate():
    case = loss_cases()["ignored tokens, dicts"]
    here = og.Objective(case.model, case.criterion, case.batches(100), forward=lambda model, batch: (model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()))
    record = og.measure(here, "pac_bayes")
    assert "1806 rows for 301 examples" in record.missing["certificates"] and "certificates" not in record.results


def test_held_out_data_with_another_loss_give_no_test_bound(objective):
    record = og.measure(objective, "pac_bayes", draws=10, held_out=loss_cases()["regression"].objective(100))
    assert "no classification" in record.missing["test_bound"] and "certificates" in record.results


NO_BOUND = {
    "examples of training": (lambda o: some(200), "200 of 200 held-out examples are among those of training"),
    "one of training": (lambda o: tuple(torch.cat(p) for p in zip(fresh(o, 50), some(1), strict=True)), "1 of 51"),
    "no target that counts": (lambda o: (fresh(o, 20)[0], torch.full((20,), -100)), "no held-out example has a target"),
    "too few": (lambda o: tuple(part[5:7] for part in fresh(o, 7)), "2 held-out examples allow for an error of"),
    "all wrong": (lambda o: (fresh(o, 99)[0], (fresh(o, 99)[1] + 1) % 3), "99 held-out examples allow for an error of"),
}


@pytest.mark.parametrize("case", NO_BOUND)
def test_a_test_bound_that_is_none_is_not_told_as_one(objective, case):
    data, reason = NO_BOUND[case]
    x, y = loss_cases()["cross-entropy"].data
    if case == "no target that counts":
        mixed = torch.cat([x[:1] + 0.5, data(objective)[0]]), torch.cat([y[:1], data(objective)[1]])
        assert og.measure(objective, "pac_bayes", draws=10, held_out=objective.on(mixed)).missing["test_bound"].startswith("1 held-out")
        return
    record = og.measure(objective, "pac_bayes", draws=10, held_out=objective.on(data(objective)))
    assert reason in record.missing["test_bound"] and "test_bound" not in record.results
    assert "held-out data give 0" not in record.says and "held-out data give 1" not in record.says
    own = [row for row in record["certificates"].rows if row["bound"] == "test set, the network as it is"]
    assert all(row["vacuous"] for row in own) and (not own or "Held-out data give no bound" in record.says)


def test_what_the_certificate_takes_on_trust_is_said(objective):
    part = loss_cases()["cross-entropy"]
    here = og.Objective(part.model, part.criterion, part.data, params="2.*")
    record = og.measure(here, "pac_bayes", prior=here.at(here.theta + 0.1).point(), draws=10)
    assert {"proof that the prior is independent", "noise on the parameters outside the study"} <= set(record.missing)
    assert "layerwise" in og.measure(objective, "pac_bayes", draws=10).missing


def test_the_sentence_gives_the_bound_chosen_beforehand_and_the_networks_own_test_bound(objective):
    record = og.measure(objective, "pac_bayes", prior=objective.at(objective.theta * 1.01).point(), draws=30, held_out=objective.on(fresh(objective, 200)))
    best = min(row["value"] for row in record["certificates"].rows if row["bound"] == "kl-inverse")
    assert f"at most {best:.3g}" in record.says and f"held-out data give {record['test_bound'].value:.3g}" in record.says
    assert "probability 0.965" in record.says


def test_running_statistics_are_those_of_the_prior():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = loss_cases()["cross-entropy"].data
    net(3 * x + 1)
    here = og.Objective(net.eval(), nn.CrossEntropyLoss(), (x, y))
    tiny = certificate(og.measure(here, "pac_bayes", draws=20, sigmas=[1e-6]))
    fresh = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    fresh.load_state_dict(net.state_dict() | {"1.running_mean": torch.zeros(5), "1.running_var": torch.ones(5)})
    assert tiny["empirical"] == pytest.approx(float((fresh(x).argmax(1) != y).double().mean()), abs=0.01)
    record = og.measure(here, "pac_bayes", draws=10)
    assert "those of the prior (zero)" in record.missing["the network's own running statistics"]


def test_predictions_that_depend_on_the_batch_make_no_certificate():
    x, y = loss_cases()["cross-entropy"].data
    for mode, tracked in (("batch", True), ("eval", False)):
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=tracked), nn.Tanh(), nn.Linear(5, 3)).double()
        record = og.measure(og.Objective(net, nn.CrossEntropyLoss(), [(x, y)], mode=mode), "pac_bayes")
        assert "depend on the others" in record.missing["certificates"] and "certificates" not in record.results


def test_a_certificate_without_a_prior_is_vacuous_and_says_so(objective):
    record = og.measure(objective, "pac_bayes")
    assert certificate(record)["prior"] == "zero" and "vacuous" in record.says and "test_bound" in record.missing
    trivial = next(row for row in record["certificates"].rows if row["bound"] == "trivial")
    assert trivial["value"] == pytest.approx(2 / 3)


def test_a_regression_has_no_certificate():
    record = og.measure(loss_cases()["regression"].objective(100), "pac_bayes")
    assert "certificates" in record.missing and record["distance"].value > 0 and "No certificate" in record.says


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_samples": 10}, "no prior= was given"), ({"prior_samples": 301}, "from 0 to 300"), ({"posterior": "diagonal"}, "needs \"both\""),
        ({"delta": 0.0}, "between 0 and 1"), ({"delta": 0.6, "delta_draws": 0.5}, "two probabilities"), ({"draws": 0}, "draws=0.*at least 1"), ({"sigmas": [-1.0]}, "Entry 0 is -1.0"),
    ],
)  # fmt: skip
def test_pac_bayes_refuses_settings_that_make_no_sense(objective, settings, message):
    with pytest.raises(ValueError, match=message):
        og.measure(objective, "pac_bayes", **settings)


def test_too_few_examples_are_not_certified(objective):
    record = og.measure(objective, "pac_bayes", prior=objective.point(), prior_samples=296)
    assert "5 examples are left" in record.missing["certificates"] and "certificates" not in record.results


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_kl(1.5, 0.5), "two probabilities"), (lambda: kl_inverse(0.5, -1.0), "c >= 0"), (lambda: seeger(0.1, -1.0, 10, 0.05), "KL >= 0"),
        (lambda: catoni(0.1, 1.0, 10, 0.05, 0.0), "C > 0"), (lambda: binomial_upper(3, 2, 0.05), "mean in"),
    ],
)  # fmt: skip
def test_arithmetic_refuses_what_is_no_probability(call, message):
    with pytest.raises(ValueError, match=message):
        call()
