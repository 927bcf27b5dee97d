import math

import pytest
import torch

from orograph.errors import OutOfBudget
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import diagonal, trace

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


# memory


def vectors(count, n):
    return (count + 16) * n * 8  # 16 beside them for the products


@pytest.mark.parametrize("room", [0, 20, 40, 200])
def test_auto_deflates_as_far_as_memory_allows_and_stays_right(room):
    values = decay(200)
    op = operator(values, memory=(room + 80) * 200 * 8)
    estimate = trace(op, rel_error=None, max_products=60, seed=1)
    assert abs(estimate.value - float(values.sum())) < 4 * estimate.sem and estimate.products == op.products == 60
    least = trace(operator(values), method="hutchinson", rel_error=None, max_products=60, seed=1)
    assert (estimate.sem < 0.5 * least.sem) == (room >= 20)


@pytest.mark.parametrize("values", [decay(2000), 1 + torch.arange(2000, dtype=F64) / 2000, torch.cat([torch.linspace(50, 3, 10), 0.05 * torch.randn(1990, generator=torch.Generator().manual_seed(1))]).double()])
def test_auto_needs_no_more_products_than_the_best_method_by_name(values):
    spent = {method: trace(operator(values), method=method, rel_error=0.002, seed=1, max_products=1500).products for method in ("auto", *METHODS)}
    assert spent["auto"] <= 1.5 * min(spent[method] for method in METHODS)  # flat spectra: a few products go to finding out that they are


FLAT = {
    "zero": torch.zeros(950, dtype=F64),
    "equal": torch.ones(950, dtype=F64) / 10,
    "both signs": torch.linspace(-1, 1, 950, dtype=F64),
    "one sign": torch.linspace(0, 1, 950, dtype=F64),
}


@pytest.mark.parametrize("bulk", FLAT)
@pytest.mark.parametrize("large", [10.0, 100.0])
def test_many_equal_eigenvalues_take_no_more_products_than_xtrace(bulk, large):
    values = torch.cat([torch.full((50,), large, dtype=F64), FLAT[bulk]])
    op = operator(values, memory="1GiB")
    spent = {}
    for method in ("auto", "xtrace", "hutchinson"):
        found = trace(op, method=method, rel_error=0.01, max_products=900, seed=1)
        assert found.status == "converged" or method == "hutchinson"
        assert abs(float(found.value) - float(values.sum())) < 4 * float(found.sem)
        spent[method] = found.products
    assert spent["auto"] <= spent["xtrace"] < spent["hutchinson"]


@pytest.mark.parametrize("multiplicity", [1, 2, 3, 5, 10, 25])
def test_equal_eigenvalues_of_any_multiplicity_cost_little_more_than_the_best_method(multiplicity):
    large = torch.linspace(50, 5, 50 // multiplicity, dtype=F64).repeat_interleave(multiplicity)
    bulk = 0.1 * torch.randn(500 - len(large), generator=torch.Generator().manual_seed(1), dtype=F64)
    op = operator(torch.cat([large, bulk]), memory="1GiB")
    methods = ("auto", "xtrace", "hutch++", "hutchinson")
    spent = {m: trace(op, method=m, rel_error=0.01, max_products=480, seed=1).products for m in methods}
    assert spent["auto"] <= 1.2 * min(spent.values())


@pytest.mark.parametrize("room", [20, 60, 100, 150, 300])
def test_a_block_sketch_stays_within_memory_and_stays_right(room):
    values = torch.cat([torch.full((30,), 10.0, dtype=F64), torch.linspace(-1, 1, 370, dtype=F64)])
    op = operator(values, memory=(room + 80) * 400 * 8)
    for seed in range(3):
        estimate = trace(op, rel_error=0.02, max_products=380, seed=seed)
        assert abs(float(estimate.value) - float(values.sum())) < 4 * float(estimate.sem)


@pytest.mark.parametrize("budget", [30, 60, 150])
def test_auto_is_as_sharp_as_xtrace_on_a_small_budget(budget):
    op = operator(torch.cat([torch.linspace(50, 3, 10), 0.05 * torch.randn(490, generator=torch.Generator().manual_seed(1))]).double())
    half = {method: max(trace(op, method=method, rel_error=None, max_products=budget, seed=seed).sem for seed in range(3)) for method in ("auto", "xtrace", "hutchinson")}
    assert half["auto"] <= 1.5 * half["xtrace"] and half["auto"] < 0.1 * half["hutchinson"]


def parted(matrices, **settings):
    """The sum of some matrices as an operator that knows its parts."""
    whole = sum(matrices)

    def apart(vectors, take):
        for index, matrix in enumerate(matrices):
            take(matrix @ vectors(index))

    return LinearOperator(lambda V: whole @ V, len(whole), apart=apart, **settings)


def test_parts_with_vectors_of_their_own_are_unbiased_and_tell_more():
    base = rotated(1 / torch.arange(1, 201, dtype=F64).sqrt())
    matrices = [base / 4 + 0.01 * rotated(torch.randn(200, generator=torch.Generator().manual_seed(i), dtype=F64)) for i in range(4)]
    truth = float(sum(matrices).trace())
    together = LinearOperator.from_dense(sum(matrices))
    errors = []
    for seed in range(30):
        op = parted(matrices)
        estimate = trace(op, rel_error=None, max_products=60, seed=seed)
        assert estimate.products == op.products == 60
        errors.append((estimate.value - truth) / estimate.sem)
        assert estimate.sem < 0.8 * trace(together, rel_error=None, max_products=60, seed=seed).sem
    spread = torch.tensor(errors, dtype=F64)
    assert abs(float(spread.mean())) < 3 / 30**0.5 and 0.6 < float(spread.std()) < 1.4


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


# arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "lanczos"}, ValueError, r"""method='lanczos'.*"auto", "hutchinson", "hutch\+\+" or "xtrace"."""),
        ({"rel_error": 0.0}, ValueError, r"rel_error=0.0\) needs a finite number above 0 or None"),
        ({"rel_error": math.nan}, ValueError, "needs a finite number above 0"),
        ({"max_products": 2}, ValueError, r"max_products=2\) needs a whole number of at least 3"),
        ({"max_products": 10.0}, TypeError, r"max_products=10.0\) needs a whole number"),
        ({"seed": 1.0}, TypeError, r"seed=1.0\) needs a whole number"),
    ],
)
def test_bad_arguments_of_trace_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        trace(operator(decay(30)), **settings)


def test_trace_of_a_tensor_names_from_dense():
    with pytest.raises(TypeError, match=r"LinearOperator\.from_dense"):
        trace(torch.eye(3))


def test_bad_arguments_of_diagonal_are_named():
    with pytest.raises(ValueError, match=r"diagonal\(num_samples=1\) needs a whole number of at least 2"):
        diagonal(operator(decay(30)), num_samples=1)
    with pytest.raises(TypeError, match="needs a whole number"):
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
