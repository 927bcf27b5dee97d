"""Critical learning rates against closed forms, and running gradient descent on either side."""

import math

import pytest
import torch

import orograph as og

from .networks import loss_cases
from .quadratics import quadratic, random_quadratic


def positive(seed=1):
    A, g, _ = random_quadratic(4 * seed + 1)  # positive definite
    return A, g / g.norm()


def test_on_a_quadratic_the_forward_rate_is_two_over_the_curvature_along_the_gradient():
    A, g = positive()
    record = og.measure(quadratic(A, g), "stability", learning_rate=0.3)
    bent, top = float(g @ A @ g), float(torch.linalg.eigvalsh(A)[-1])
    assert record["directional"].value == pytest.approx(bent, rel=1e-9)
    assert record["critical_rate"].value == pytest.approx(2 / bent, abs=4 * record["critical_rate"].sem) and record["critical_rate"].sem < 0.01 * 2 / bent
    assert record["edge_ratio"].value == pytest.approx(0.3 * top / 2, rel=1e-6)
    rows = {row["measure"]: row for row in record["rates"].rows}
    assert rows["largest stable learning rate"]["value"] == pytest.approx(2 / top, rel=1e-6) and rows["2 / curvature along the update"]["agrees"]


@pytest.mark.parametrize("times", [0.97, 1.03])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_edge_ratio_of_an_optimiser_tells_contraction_from_divergence(times, momentum):
    A, g = positive(2)
    rate = times * 2 * (1 + momentum) / float(torch.linalg.eigvalsh(A)[-1])
    objective = quadratic(A, g)
    model = objective.snapshot.users.model
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    record = og.measure(objective, "stability", optimizer=optimiser)
    assert record["edge_ratio"].value == pytest.approx(times, rel=1e-3) and record.settings["optimizer"] == "<SGD>"
    start = float((A @ model.w.detach() + g).norm())
    for _ in range(3000):
        optimiser.zero_grad()
        (g @ model.w + 0.5 * model.w @ A @ model.w).backward()
        optimiser.step()
        if not float(model.w.detach().norm()) < 1e9:
            break
    end = float((A @ model.w.detach() + g).norm())
    assert (end > 1e3 * start) == (times > 1)


def test_without_a_rate_the_ratio_is_missing_and_the_rest_is_there():
    record = og.measure(loss_cases()["cross-entropy"].objective(100), "stability")
    assert "edge_ratio" in record.missing and {"critical_rate", "directional", "rates"} <= set(record.results)


def test_at_a_critical_point_there_is_no_update():
    A, g = positive(3)
    record = og.measure(quadratic(A, torch.zeros_like(g)), "stability", learning_rate=0.1)
    assert {"critical_rate", "directional"} <= set(record.missing) and record["edge_ratio"].value > 0


def test_a_loss_that_falls_for_ever_has_no_critical_rate():
    A, g = positive(4)
    record = og.measure(quadratic(-A, g), "stability")
    assert record["critical_rate"].value == math.inf and record["critical_rate"].status == "budget-limited"


def test_stability_refuses_two_sources_of_a_rate():
    A, g = positive()
    objective = quadratic(A, g)
    with pytest.raises(ValueError, match="give one of them"):
        og.measure(objective, "stability", learning_rate=0.1, optimizer=torch.optim.SGD(objective.snapshot.users.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="above 0"):
        og.measure(objective, "stability", learning_rate=-1.0)
