import math

import pytest
import torch

from orograph.linalg.intervals import SketchAlgebra, leave_one_out
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import trace
from orograph.results import Estimate

F64 = torch.float64
METHODS = ["hutchinson", "hutch++", "xtrace"]


def rotated(values):
    gaussian = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(5), dtype=F64)
    Q, _ = torch.linalg.qr(gaussian)
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def test_variance_of_a_spherical_form_is_twice_the_mean_tangential_part():
    # five points on a circle integrate degree 4 exactly, so both sides are exact means over the sphere
    angles = 2 * math.pi * torch.arange(5, dtype=F64) / 5
    V = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()])
    B = torch.tensor([[2.0, 0.7], [0.7, -1.3]], dtype=F64)
    forms = (V * (B @ V)).sum(dim=0)
    tangents = ((B @ V) ** 2).sum(dim=0) - forms**2 / 2
    assert float(forms.mean()) == pytest.approx(float(B.trace()))
    assert float(forms.var(correction=0)) == pytest.approx(2 * float(tangents.mean()))


def leave_out(A, G, out, i):
    """Estimate i with the samples `out` left out of the basis, and its tangential part, by dense linear algebra."""
    n = len(A)
    kept = [j for j in range(G.shape[1]) if j not in out]
    Q, _ = torch.linalg.qr(A @ G[:, kept])
    P = torch.eye(n, dtype=F64) - Q @ Q.T
    v = P @ G[:, i]
    v = v * math.sqrt(n - Q.shape[1]) / v.norm()
    form = v @ A @ v
    return float((Q.T @ A @ Q).trace() + form), float((P @ A @ v).norm() ** 2 - form**2 / (n - Q.shape[1]))


def test_leave_one_out_and_its_dependence_equal_their_definitions():
    A, k = rotated(1 / torch.arange(1, 41, dtype=F64)), 6
    G = torch.randn(40, k, generator=torch.Generator().manual_seed(1), dtype=F64)
    Q, R = torch.linalg.qr(A @ G)
    H, E = Q.T @ A @ Q, A @ Q - Q @ (Q.T @ A @ Q)
    radius = ((G - Q @ (Q.T @ G)) ** 2).sum(dim=0)
    values, tangents, dependence = leave_one_out(SketchAlgebra(40, H, R, Q.T @ G, E.T @ G, radius, E.T @ E))
    expected = torch.tensor([leave_out(A, G, [i], i) for i in range(k)], dtype=F64)
    torch.testing.assert_close(torch.stack([values, tangents], dim=1), expected, rtol=1e-9, atol=1e-11)
    change = lambda i, j: leave_out(A, G, [i, j], i)[0] - leave_out(A, G, [i], i)[0]
    pairs = sum(change(i, j) * change(j, i) for i in range(k) for j in range(k) if i != j)
    assert dependence == pytest.approx(1 + max(pairs, 0.0) / (2 * float(expected[:, 1].sum())))
    assert pairs > 0


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth_as_often_as_they_say(method):
    values, seeds = torch.arange(1, 61, dtype=F64) ** -2, 200
    op = LinearOperator.from_dense(rotated(values))
    covered = 0
    for seed in range(seeds):
        lower, upper = trace(op, method=method, rel_error=None, max_products=18, seed=seed).interval(0.95)
        covered += lower <= float(values.sum()) <= upper
    assert covered / seeds > 0.95 - 3 * math.sqrt(0.95 * 0.05 / seeds)


def test_interval_reaches_farther_on_the_side_of_the_long_tail():
    lower, upper = Estimate(value=1.0, sem=1.0, skew=0.6).interval()
    assert 1 - lower == pytest.approx(1.959964, abs=1e-6)
    assert upper - 1 == pytest.approx(1.959964 + 0.6 * (1.959964**2 + 2) / 12, abs=1e-6)
    assert Estimate(value=1.0, sem=1.0, skew=-0.6).interval() == pytest.approx((2 - upper, 2 - lower))


def test_interval_of_a_tensor_is_elementwise():
    value = torch.tensor([1.0, 2.0], dtype=F64)
    lower, upper = Estimate(value=value, sem=torch.tensor([0.0, 1.0], dtype=F64), dof=9).interval(0.9)
    torch.testing.assert_close(upper - value, torch.tensor([0.0, 1.833113], dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(lower + upper, 2 * value)


def test_interval_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="number between 0 and 1"):
        Estimate(value=1.0).interval(95)
