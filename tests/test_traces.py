import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orograph.errors import OutOfBudget
from orograph.linalg.checkpoints import checkpointing, load_checkpoint, save_checkpoint
from orograph.linalg.intervals import SketchAlgebra, leave_one_out
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import diagonal, trace
from orograph.results import Estimate

F64 = torch.float64
METHODS = ["hutchinson", "hutch++", "xtrace"]
BASIS_METHODS = ["hutch++", "xtrace"]


def rotated(values, dtype=F64):
    values = torch.as_tensor(values, dtype=F64)
    gaussian = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(5), dtype=F64)
    Q, _ = torch.linalg.qr(gaussian)
    A = (Q * values) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def decay(n):
    return torch.arange(1, n + 1, dtype=F64) ** -2


def operator(values, dtype=F64, **settings):
    A = rotated(values, dtype)
    return LinearOperator(lambda V: A @ V, len(A), dtype, **settings)


def low_rank(n, *values):
    return torch.cat([torch.tensor(values, dtype=F64), torch.zeros(n - len(values), dtype=F64)])


# the estimate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trace_of_known_spectrum_is_within_four_sem(method, dtype, seed):
    values = decay(200)
    estimate = trace(operator(values, dtype), method=method, rel_error=None, max_products=60, seed=seed)
    assert abs(estimate.value - float(values.sum())) < 4 * estimate.sem
    assert estimate.status == "converged"


@pytest.mark.parametrize("method", METHODS)
def test_relative_error_asked_for_is_met_and_reported(method):
    op = operator(1 + torch.arange(300, dtype=F64) / 300)
    estimate = trace(op, method=method, rel_error=0.01, seed=1)
    lower, upper = estimate.interval()
    assert estimate.status == "converged"
    assert (upper - lower) / 2 <= 0.01 * abs(estimate.value)
    assert lower < 300 * 1.5 < upper


@pytest.mark.parametrize("method", METHODS)
def test_products_are_those_of_the_operator_and_within_the_budget(method):
    op = operator(decay(150))
    op @ torch.ones(150, dtype=F64)
    estimate = trace(op, method=method, rel_error=None, max_products=47, seed=1)
    assert estimate.products == op.products - 1
    assert 46 <= estimate.products <= 47


def test_trace_near_zero_ends_budget_limited_with_its_interval():
    values = torch.linspace(-1, 1, 200, dtype=F64)
    estimate = trace(operator(values), max_products=100, seed=2)
    lower, upper = estimate.interval(0.999)
    assert estimate.status == "budget-limited"
    assert lower < 0 < upper


def test_operator_that_fits_in_the_budget_is_traced_exactly():
    values = decay(40)
    op = operator(values)
    estimate = trace(op, rel_error=None, max_products=40)
    assert estimate.value == pytest.approx(float(values.sum()), abs=1e-14)
    assert (estimate.sem, estimate.products, estimate.status) == (0.0, 40, "converged")
    assert estimate.interval() == (estimate.value, estimate.value)


def test_estimator_that_would_need_n_products_gives_way_to_the_exact_trace():
    op = operator(torch.linspace(-1, 1, 50, dtype=F64))
    estimate = trace(op, method="hutchinson", rel_error=1e-6, max_products=100)
    assert estimate.sem == 0.0
    assert op.products == estimate.products == 20 + 50


@pytest.mark.parametrize("n", [1, 2, 5])
def test_tiny_operators_are_exact(n):
    assert trace(operator(torch.ones(n))).value == pytest.approx(n)


@pytest.mark.parametrize("method", BASIS_METHODS)
def test_growing_the_budget_reuses_products_and_ends_at_the_same_estimate(method):
    op = operator(1 / torch.arange(1, 301, dtype=F64))
    in_steps = trace(op, method=method, rel_error=1e-9, max_products=150, seed=3)
    at_once = trace(op, method=method, rel_error=None, max_products=150, seed=3)
    assert in_steps.products == at_once.products == 150
    assert in_steps.value == pytest.approx(at_once.value, rel=1e-12)
    assert in_steps.sem == pytest.approx(at_once.sem, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides_the_estimate(method):
    runs = [trace(operator(decay(100)), method=method, rel_error=None, max_products=30, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].value != runs[2].value


# degenerate operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", BASIS_METHODS)
def test_low_rank_is_traced_to_rounding_once_the_sketch_holds_it(method, dtype):
    estimate = trace(operator(low_rank(120, 3.0, 2.0, -1.0, 0.5), dtype), method=method, rel_error=None, max_products=60, seed=1)
    assert abs(estimate.value - 4.5) < 4 * estimate.sem
    assert estimate.sem < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", BASIS_METHODS)
def test_zero_trace_of_low_rank_ends_noise_limited(method):
    estimate = trace(operator(low_rank(120, 1.0, -1.0)), method=method, seed=1)
    assert estimate.status == "noise-limited"
    assert abs(estimate.value) < 4 * estimate.sem < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_zero_operator_has_trace_zero_without_error(method):
    estimate = trace(operator(torch.zeros(100)), method=method)
    assert (estimate.value, estimate.sem, estimate.status) == (0.0, 0.0, "converged")


@pytest.mark.parametrize("method", METHODS)
def test_identity_is_traced_to_rounding(method):
    estimate = trace(LinearOperator.from_dense(3 * torch.eye(100, dtype=F64)), method=method, rel_error=None, max_products=20)
    assert estimate.value == pytest.approx(300, rel=1e-12)
    assert estimate.sem < 300 * 1e-8


# the interval


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
    change = lambda i, j: leave_out(A, G, [i, j], i)[0] - leave_out(A, G, [i], i)[0]  # noqa: E731
    pairs = sum(change(i, j) * change(j, i) for i in range(k) for j in range(k) if i != j)
    assert dependence == pytest.approx(1 + max(pairs, 0.0) / (2 * float(expected[:, 1].sum())))
    assert pairs > 0


@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth_as_often_as_they_say(method):
    values, seeds = decay(60), 200
    op = operator(values)
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
    with pytest.raises(ValueError, match="probability between 0 and 1"):
        Estimate(value=1.0).interval(95)


# memory


def vectors(count, n):
    return (count + 16) * n * 8  # 16 beside them for the products


def test_auto_takes_the_best_method_that_fits_in_memory():
    spent = {}
    for name, memory in {"xtrace": vectors(90, 200), "hutch++": vectors(80, 200), "hutchinson": vectors(60, 200)}.items():
        spent[name] = trace(operator(decay(200), memory=memory), rel_error=None, max_products=60, seed=1)
    for name in METHODS:
        explicit = trace(operator(decay(200), memory=vectors(90, 200)), method=name, rel_error=None, max_products=60, seed=1)
        assert spent[name].value == explicit.value


def test_hutchpp_keeps_its_sketch_within_memory_and_stays_right():
    values = decay(200)
    estimate = trace(operator(values, memory=vectors(20, 200)), method="hutch++", rel_error=1e-3, max_products=150, seed=1)
    assert estimate.products == 150
    assert abs(estimate.value - float(values.sum())) < 4 * estimate.sem


def test_method_that_cannot_fit_says_what_to_do():
    with pytest.raises(OutOfBudget, match=r"max_products=60\) keeps 90 vectors.*fewer max_products.*larger memory="):
        trace(operator(decay(200), memory=vectors(89, 200)), method="xtrace", max_products=60)
    with pytest.raises(OutOfBudget, match="keeps 4 vectors"):
        trace(operator(decay(200), memory=vectors(3, 200)), method="hutch++", max_products=60)


# checkpoints

JOB = """
import sys, time, torch
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import trace
path, method, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
values = torch.arange(1, 201, dtype=torch.float64) ** -1.0
def matmat(V):
    time.sleep(pause)
    return values[:, None] * V
def job(pause=0.0):
    op = LinearOperator(matmat, 200)
    return op, trace(op, method=method, rel_error=1e-9, max_products=150, checkpoint=path or None)
"""


@pytest.mark.parametrize("method", METHODS)
def test_job_killed_and_restarted_gives_the_same_bits(method, tmp_path):
    path = tmp_path / "trace.safetensors"
    child = subprocess.Popen([sys.executable, "-c", JOB + "job()", str(path), method, "0.05"])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    rerun = restarted(path, method)
    op, resumed = rerun["job"]()
    _, undisturbed = restarted("", method)["job"]()
    assert resumed == undisturbed
    assert 0 < op.products < resumed.products == 150
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".partial")] == [path.name]


def restarted(path, method):
    scope = {}
    argv, sys.argv = sys.argv, ["job", str(path), method, "0"]
    try:
        exec(JOB, scope)
    finally:
        sys.argv = argv
    return scope


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_interrupt_saves_what_was_spent(method, tmp_path):
    path = tmp_path / "deep" / "trace.safetensors"
    values, calls = decay(200), []

    def matmat(V):
        calls.append(V.shape[1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return values[:, None] * V

    settings = {"method": method, "rel_error": None, "max_products": 90, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        trace(LinearOperator(matmat, 200), **settings)
    op = LinearOperator(matmat, 200)
    resumed = trace(op, **settings)
    assert op.products < 90 == resumed.products
    assert resumed == trace(LinearOperator(matmat, 200), **{**settings, "checkpoint": None})
    again = LinearOperator(matmat, 200)
    assert trace(again, **settings) == resumed
    assert again.products == 0


def test_exact_trace_resumes_too(tmp_path):
    path = tmp_path / "trace.safetensors"
    settings = {"rel_error": None, "max_products": 100, "checkpoint": path}
    first = trace(operator(decay(30)), **settings)
    op = operator(decay(30))
    assert trace(op, **settings) == first
    assert op.products == 0


def test_checkpoint_of_another_job_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    trace(operator(decay(30)), max_products=20, checkpoint=path)
    with pytest.raises(ValueError, match=r"belongs to another job: seed is 0 there and 1 here. Delete it"):
        trace(operator(decay(30)), max_products=20, checkpoint=path, seed=1)
    with pytest.raises(ValueError, match=r"dtype is 'torch.float64' there.*size is 30 there and 31 here"):
        trace(operator(decay(31), torch.float32), max_products=20, checkpoint=path)
    with pytest.raises(ValueError, match="about is"):
        trace(operator(decay(30), about={"curvature": "ggn", "note": object()}), max_products=20, checkpoint=path)


def test_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no checkpoint of Orograph"):
        trace(operator(decay(30)), max_products=20, checkpoint=path)


def test_state_comes_back_to_the_last_bit(tmp_path):
    path = Path(tmp_path) / "state"
    state = {"a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T, "empty": torch.zeros(4, 0), "count": torch.tensor(3)}
    assert load_checkpoint(path, {"n": 1}) is None
    save_checkpoint(path, state, {"n": 1})
    loaded = load_checkpoint(path, {"n": 1})
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    saves, clock = [], [0.0]
    monkeypatch.setattr("orograph.linalg.checkpoints.time.monotonic", lambda: clock[0])

    def slow_save(path, state, job):
        saves.append(int(state["step"]))
        clock[0] += 1.0

    monkeypatch.setattr("orograph.linalg.checkpoints.save_checkpoint", slow_save)
    with checkpointing(tmp_path / "state", {}) as (_, keep):
        for step in range(100):
            clock[0] += 1.0
            keep({"step": torch.tensor(step)})
    assert saves[-1] == 99
    assert len(saves) <= 7


# arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "lanczos"}, ValueError, r"method='lanczos'.*'auto', 'hutchinson', 'hutch\+\+', 'xtrace'"),
        ({"rel_error": 0.0}, ValueError, r"rel_error=0.0\) needs a positive number"),
        ({"rel_error": math.nan}, ValueError, "needs a positive number"),
        ({"max_products": 2}, ValueError, r"max_products=2\) needs at least 3"),
        ({"max_products": 10.0}, TypeError, "needs an int, got float"),
        ({"seed": 1.0}, TypeError, r"seed=1.0\) needs an int"),
    ],
)
def test_bad_arguments_of_trace_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        trace(operator(decay(30)), **settings)


def test_trace_of_a_tensor_names_from_dense():
    with pytest.raises(TypeError, match=r"LinearOperator\.from_dense"):
        trace(torch.eye(3))


def test_bad_arguments_of_diagonal_are_named():
    with pytest.raises(ValueError, match=r"diagonal\(num_samples=1\) needs at least 2"):
        diagonal(operator(decay(30)), num_samples=1)
    with pytest.raises(TypeError, match="needs an int"):
        diagonal(operator(decay(30)), seed=None)
    with pytest.raises(TypeError, match=r"LinearOperator\.from_dense"):
        diagonal(torch.eye(3))


def test_progress_ends_at_what_was_spent():
    seen = []
    estimate = trace(operator(decay(200)), rel_error=1e-3, seed=1, progress=lambda done, total, note: seen.append((done, total)))
    assert seen[-1][0] == estimate.products
    assert all(done <= total <= 1000 for done, total in seen)


# the diagonal


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_diagonal_is_within_five_sem_of_every_entry(seed):
    A = rotated(decay(100))
    op = LinearOperator.from_dense(A)
    estimate = diagonal(op, num_samples=50, seed=seed)
    assert ((estimate.value - A.diagonal()).abs() < 5 * estimate.sem).all()
    assert estimate.products == op.products == 50


def test_diagonal_of_a_diagonal_operator_is_exact_at_once():
    values = torch.tensor([0.1, -3.0, 7.3, 0.0, 1e-9], dtype=F64)
    estimate = diagonal(LinearOperator(lambda V: values[:, None] * V, 5), num_samples=3)
    assert torch.equal(estimate.value, values)
    assert not estimate.sem.any()


def test_diagonal_with_n_samples_or_more_is_computed_exactly():
    A = rotated(decay(30), torch.float32)
    op = LinearOperator.from_dense(A)
    estimate = diagonal(op, num_samples=100)
    assert torch.equal(estimate.value, A.diagonal().double())
    assert op.products == estimate.products == 30
