"""Eigenpairs of planted spectra: right values, right residuals, right status, no ghosts, nothing missed."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from orograph import LinearOperator, OrographError, eigenpairs, hessian
from orograph.linalg.lanczos import Krylov
from orograph.memory import Meter

from .networks import loss_cases
from .oracles import expected_pairs, planted, planted_spectra, relative, rotated

SPECTRA = planted_spectra()
ENDS = ("largest", "smallest", "magnitude", "both")


def true_residuals(op, pairs):
    return (op @ pairs.vectors - pairs.vectors * pairs.values.to(op.dtype)).double().norm(dim=0)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", [n for n in SPECTRA if n != "geometric"])
def test_planted_spectra(name, which, scale):
    values = SPECTRA[name] * scale
    op = planted(values)
    pairs = eigenpairs(op, 5, which=which, tol=1e-6)
    expected = expected_pairs(values, 5, which)
    largest = float(values.abs().max())
    found = pairs.values.abs() if which == "magnitude" else pairs.values  # ties in magnitude have no order
    assert float((found - (expected.abs() if which == "magnitude" else expected)).abs().max()) < 1e-11 * largest
    assert torch.allclose(pairs.residuals, true_residuals(op, pairs), rtol=1e-3, atol=1e-13 * largest)
    if which != "magnitude":
        assert bool(((pairs.intervals[:, 0] <= expected) & (expected <= pairs.intervals[:, 1])).all())
    assert pairs.status == ("noise-limited" if name == "rank-deficient" and which in ("smallest", "both") else "converged")
    assert relative(pairs.vectors.T @ pairs.vectors, torch.eye(pairs.vectors.shape[1], dtype=torch.float64)) < 1e-12
    assert pairs.missed < 0.1


@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_geometric_spectrum_at_its_large_end(which):
    pairs = eigenpairs(planted(SPECTRA["geometric"]), 10, which=which, tol=1e-8)
    assert relative(pairs.values, SPECTRA["geometric"][:10]) < 1e-12 and pairs.status == "converged"


def test_the_end_that_round_off_hides_is_noise_or_budget_limited_and_says_so():
    for dtype in (torch.float32, torch.float64):
        pairs = eigenpairs(planted(SPECTRA["geometric"], dtype), 3, which="smallest", max_products=300)
        assert pairs.status in ("noise-limited", "budget-limited") and not bool(pairs.converged.any())
        assert bool((pairs.values.abs() < 1e-5).all())


def test_order_of_both_ends_and_fields():
    pairs = eigenpairs(planted(SPECTRA["clustered top"]), 2, which="both")
    assert pairs.values.shape == (4,) and bool((pairs.values.diff() <= 0).all())
    assert pairs.vectors.shape == (300, 4) and pairs.intervals.shape == (4, 2) and pairs.converged.shape == (4,)


def test_no_ghost_copies_at_300_steps_in_single_precision():
    values = torch.cat([torch.linspace(50, 3, 7), 0.05 * torch.randn(993, generator=torch.Generator().manual_seed(0))]).double()
    krylov = Krylov(planted(values, torch.float32), 300, torch.zeros(0, 1000))
    krylov.begin(torch.randn(1000, generator=torch.Generator().manual_seed(1)))
    for _ in range(300):
        krylov.step()
    ritz, _, _ = krylov.ritz()
    basis = krylov.basis[:300].double()
    assert float((basis @ basis.T - torch.eye(300)).abs().max()) < 1e-5
    assert int((ritz > 1).sum()) == 7
    assert relative(ritz[-7:].flip(0), values[:7]) < 1e-6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thick_restart_gives_what_an_unrestarted_run_gives(seed):
    values = torch.cat([1 + 0.01 * torch.arange(6), torch.linspace(-1, 1, 494)]).double()
    op = planted(values)
    small = LinearOperator(op.matmat, 500, memory=2 * 500 * 8 * (6 * 3 + 40))
    pairs = eigenpairs(small, 6, tol=1e-8, seed=seed)
    assert relative(pairs.values, values[:6].flip(0)) < 1e-12 and pairs.status == "converged"


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("which", ENDS)
def test_tiny_operators_give_all_their_eigenvalues(n, which):
    values = torch.arange(1, n + 1).double() - 2.25
    k = max(n // 2, 1) if which == "both" else n
    if which == "both" and n == 1:
        return
    pairs = eigenpairs(planted(values), k, which=which)
    assert relative(pairs.values, expected_pairs(values, k, which)) < 1e-12 and pairs.missed == 0


@pytest.mark.parametrize("matrix", [torch.zeros(20, 20), torch.eye(20), -torch.eye(20)], ids=["zero", "identity", "minus identity"])
def test_multiples_of_the_identity(matrix):
    pairs = eigenpairs(LinearOperator.from_dense(matrix.double()), 3)
    assert torch.allclose(pairs.values, matrix[0, 0].double().expand(3)) and float(pairs.residuals.max()) < 1e-14


def test_power_iteration_agrees_and_its_stall_is_seen():
    values = torch.cat([torch.tensor([-3.0, 2.0]), torch.linspace(-1, 1, 98)]).double()
    op = planted(values)
    for which, expected in (("magnitude", -3.0), ("largest", 2.0), ("smallest", -3.0)):
        pairs = eigenpairs(op, which=which, method="power", tol=1e-6)
        assert float(pairs.values[0]) == pytest.approx(expected, rel=1e-10) and pairs.status == "converged" and pairs.missed == 1
    two = eigenpairs(op, 2, which="magnitude", method="power", tol=1e-6)
    assert relative(two.values, torch.tensor([-3.0, 2.0], dtype=torch.float64)) < 1e-10
    stalled = eigenpairs(planted(SPECTRA["lambda_min = -0.9995 lambda_max"]), method="power", max_products=60)
    assert stalled.status == "budget-limited" and float(stalled.residuals[0]) > 0.1


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", [n for n in SPECTRA if n != "geometric"])
def test_lobpcg_finds_what_the_dense_matrix_has(name, which):
    values = SPECTRA[name]
    op = planted(values)
    pairs = eigenpairs(op, 5, which=which, method="lobpcg", tol=1e-6)
    assert pairs.products == op.products
    expected = expected_pairs(values, 5, which)
    found, expected = (x.abs() if which == "magnitude" else x for x in (pairs.values, expected))
    assert float((found - expected).abs().max()) < 1e-11 * float(values.abs().max())
    assert torch.allclose(pairs.residuals, true_residuals(op, pairs), rtol=1e-3, atol=1e-13) and pairs.missed == 1
    assert pairs.status == ("noise-limited" if name == "rank-deficient" and which in ("smallest", "both") else "converged")


def test_lobpcg_goes_on_from_a_start_and_keeps_its_budget():
    values = SPECTRA["clustered top"]
    cold = eigenpairs(planted(values), 3, method="lobpcg", tol=1e-6)
    warm = eigenpairs(planted(values), 3, method="lobpcg", tol=1e-6, start=cold.vectors)
    assert warm.products < 0.6 * cold.products and relative(warm.values, cold.values) < 1e-9
    for which in ENDS:
        op = planted(values)
        short = eigenpairs(op, 3, which=which, method="lobpcg", max_products=30, tol=1e-9)
        assert short.status == "budget-limited" and op.products <= 30
    with pytest.raises(OrographError, match="larger memory="):
        eigenpairs(LinearOperator(planted(values).matmat, 300, memory=16 * 5 * 300 * 8), 3, method="lobpcg")
    n = 20_000
    diagonal = torch.linspace(1, 3, n)[:, None] ** 3
    with Meter() as meter:
        eigenpairs(LinearOperator(lambda V: diagonal * V, n, dtype=torch.float32), 3, which="both", method="lobpcg", max_products=200)
    assert meter.peak <= 17 * 5 * n * 4
    for n in (1, 2, 3):
        tiny = eigenpairs(planted(torch.arange(1, n + 1).double()), n, method="lobpcg")
        assert relative(tiny.values, torch.arange(n, 0, -1).double()) < 1e-12
    single = eigenpairs(planted(values, torch.float32), 3, method="lobpcg")
    assert relative(single.values.double(), values.sort(descending=True).values[:3]) < 1e-5 and single.status == "converged"


def test_products_are_counted_and_the_budget_is_kept():
    op = planted(SPECTRA["multiplicities over a bulk"])
    pairs = eigenpairs(op, 4, which="smallest", max_products=30)
    assert pairs.products == op.products <= 30 and pairs.status == "budget-limited"
    again = eigenpairs(op, 4, which="smallest", max_products=30)
    assert torch.equal(again.values, pairs.values)
    assert not torch.equal(eigenpairs(op, 4, which="smallest", max_products=30, seed=1).values, pairs.values)


def test_a_start_that_is_another_eigenvector_does_not_mislead():
    matrix = rotated(SPECTRA["clustered top"] + torch.linspace(0, 0.01, 300))
    values, vectors = torch.linalg.eigh(matrix)
    op = LinearOperator.from_dense(matrix)
    cold = eigenpairs(op, tol=1e-6)
    for start in (vectors[:, 3], vectors[:, -1], vectors[:, -3:]):
        pairs = eigenpairs(op, start=start, tol=1e-6)
        assert float(pairs.values[0]) == pytest.approx(float(values[-1]), rel=1e-8)  # residual^2 / gap
    assert eigenpairs(op, start=vectors[:, -1] + 1e-3 * vectors[:, 0], tol=1e-3).products < cold.products


def test_missed_is_a_valid_p_value():
    """With an outlier present, the bound computed without having seen it falls below alpha in at most a share alpha of runs."""
    values = torch.cat([torch.tensor([1.3]), torch.linspace(-1, 1, 199)]).double()
    diagonal = LinearOperator(lambda V: values[:, None] * V, 200)  # a rotation changes nothing for a rotation-invariant start
    for steps in (4, 8, 12):
        chances = []
        for seed in range(300):
            krylov = Krylov(diagonal, steps, torch.zeros(0, 200, dtype=torch.float64))
            krylov.begin(diagonal.space.sample(seed, 0, "normal"))
            for _ in range(steps):
                krylov.step()
            if float(krylov.ritz()[0][-1]) < 1.2:
                chances.append(krylov.unseen(1.25, above=True))
        for alpha in (0.02, 0.1, 0.3):
            share = sum(chance <= alpha for chance in chances) / 300
            assert share <= alpha + 3 * (alpha * (1 - alpha) / 300) ** 0.5


@pytest.mark.parametrize("seed", range(8))
def test_missed_gives_no_certificate_when_the_budget_ends_before_a_second_copy_is_found(seed):
    values = torch.cat([torch.tensor([10.0, 10.0]), torch.linspace(0, 1, 198)]).double()
    pairs = eigenpairs(LinearOperator(lambda V: values[:, None] * V, 200), 2, max_products=16, seed=seed)
    assert float(pairs.values[1]) * 1.01 >= 10 or pairs.missed == 1


def test_missed_falls_below_the_a_priori_bound():
    n, steps = 500, 30
    values = torch.linspace(0, 1, n).double()
    krylov = Krylov(LinearOperator(lambda V: values[:, None] * V, n), steps, torch.zeros(0, n, dtype=torch.float64))
    krylov.begin(torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for _ in range(steps):
        krylov.step()
    top = float(krylov.ritz()[0][-1])
    for margin in (0.05, 0.1):
        a_priori = 1.648 * n**0.5 * torch.exp(torch.tensor(-(2 * steps - 1) * (margin / (1 + margin)) ** 0.5))
        assert krylov.unseen(top + margin, above=True) < float(a_priori)


def test_dense_hessian_of_a_network():
    objective = loss_cases()["cross-entropy"].objective(50)
    op = hessian(objective)
    values = torch.linalg.eigvalsh(op.dense())
    pairs = eigenpairs(op, 4, which="both", tol=1e-6)
    assert relative(pairs.values, torch.cat([values.flip(0)[:4], values.flip(0)[-4:]])) < 1e-10


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(OrographError, match="not finite: the operator overflowed"):
        eigenpairs(LinearOperator(lambda V: V * float("inf"), 10), 1)


def test_progress_is_reported_with_a_forecast():
    seen = []
    eigenpairs(planted(SPECTRA["clustered top"]), 3, progress=lambda done, total, note: seen.append((done, total, note)))
    assert seen and all(done <= total for done, total, _ in seen) and "value" in seen[-1][2]


JOB = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests.oracles import planted_spectra, planted
from orograph import LinearOperator, Objective, eigenpairs
inner = planted(planted_spectra()["multiplicities over a bulk"])
op = LinearOperator(lambda V: (time.sleep({pause}), inner @ V)[1], inner.size, memory=2 * 300 * 8 * (12 + 30))
pairs = eigenpairs(op, 4, tol=1e-8, checkpoint={path!r})
torch.save([pairs.values, pairs.vectors, pairs.residuals, torch.tensor(pairs.products)], {out!r})
"""


def test_killed_and_resumed_is_the_same_bit_for_bit(tmp_path):
    root = os.path.dirname(os.path.dirname(__file__))

    def start(path, out, pause):
        code = textwrap.dedent(JOB).format(root=root, path=str(tmp_path / path), out=str(tmp_path / out), pause=pause)
        return subprocess.Popen([sys.executable, "-c", code])

    whole = start("a.safetensors", "whole.pt", 0)
    broken = start("b.safetensors", "broken.pt", 0.05)
    deadline = time.monotonic() + 60
    while not (tmp_path / "b.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.6)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert not (tmp_path / "broken.pt").exists() and (tmp_path / "b.safetensors").exists()
    assert start("b.safetensors", "broken.pt", 0).wait(60) == 0 and whole.wait(60) == 0
    for a, b in zip(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "broken.pt"), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_another_job_is_refused(tmp_path):
    op = planted(SPECTRA["clustered top"])
    eigenpairs(op, 2, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="belongs to another job: k is 2 there and 3 here"):
        eigenpairs(op, 3, checkpoint=tmp_path / "c.safetensors")


def test_checkpoint_of_another_matrix_is_refused(tmp_path):
    eigenpairs(planted(SPECTRA["clustered top"]), 2, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="belongs to another job: product is"):
        eigenpairs(planted(SPECTRA["clustered top"], seed=1), 2, checkpoint=tmp_path / "c.safetensors")
