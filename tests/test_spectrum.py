"""One set of products for both ends, the density and the trace."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from orograph import Estimate, Objective, OutOfBudget, eigenpairs, hessian, spectrum, trace
from orograph.linalg.operator import LinearOperator
from orograph.memory import Meter
from orograph.studies.networks import mlp
from orograph.studies.problems import digits

from .networks import loss_cases
from .oracles import planted, planted_spectra, relative
from .test_density import SPECTRA, wasserstein

HARD = {  # ends that round-off hides, or that are too many to be told apart
    "geometric": "bottom", "slow decay": "bottom",
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_trace_and_density_of_known_spectra(name, seed):
    values = SPECTRA[name]
    op = planted(values)
    s = spectrum(op, seed=seed)
    down = values.sort(descending=True).values
    assert float((s.top.values - down[:10]).abs().max()) < 1e-5 * float(values.abs().max())
    assert float((s.bottom.values[0] - down[-1]).abs()) < 1e-4 * float(values.abs().max())
    assert s.top.status in ("converged", "noise-limited") and (s.bottom.status == "converged" or name in (*HARD, "rank-deficient"))
    assert s.products == op.products and s.top.missed <= 0.05
    reach = 4 * float(s.trace.sem) + 1e-9
    assert abs(float(s.trace.value) - float(values.sum())) <= reach
    low, high = s.trace.interval()
    assert float(high - low) / 2 <= 0.0101 * abs(float(s.trace.value)) + 1e-9
    assert wasserstein(s.density, values) < 0.01
    masses = s.density.weights.sum(dim=1) + len(s.density.atoms) / s.density.size
    assert torch.allclose(masses, torch.ones_like(masses))


def test_shared_products_cost_less_than_the_parts():
    values = SPECTRA["outliers over an indefinite bulk"]
    op = planted(values)
    apart = eigenpairs(op, 10).products + eigenpairs(op, 1, which="smallest").products + trace(op, rel_error=0.01).products + 4 * 60
    assert spectrum(op).products < 0.5 * apart


def test_negative_mass_counts_what_the_density_can_tell():
    values = torch.cat([torch.linspace(-2, -1, 300), torch.linspace(1, 4, 700)]).double()
    for seed in (1, 2, 3):
        mass = spectrum(planted(values), rel_error=0.05, seed=seed).negative_mass
        assert abs(float(mass.value) - 0.3) < 5 * float(mass.sem) < 0.2


@pytest.mark.parametrize("n", [1, 2, 3, 12, 40])
def test_small_operators_are_exact(n):
    values = torch.linspace(-1, 3, n, dtype=torch.float64) if n > 1 else torch.tensor([3.0], dtype=torch.float64)
    s = spectrum(planted(values), k=5)
    assert relative(s.top.values, values.flip(0)[:5]) < 1e-6 and float(s.trace.value) == pytest.approx(float(values.sum()), abs=1e-9)
    assert abs(s.effective_dimension(0.1) - float((values.clamp(min=0) / (values.clamp(min=0) + 0.1)).sum())) < 0.05 * n


def test_zero_operator():
    s = spectrum(LinearOperator.from_dense(torch.zeros(30, 30, dtype=torch.float64)), k=3)
    assert not s.top.values.any() and float(s.trace.value) == 0 and float(s.negative_mass.value) == 0


def test_network_in_parts_against_its_dense_hessian():
    objective = loss_cases()["class weights"].objective(50)
    op = hessian(objective)
    values = torch.linalg.eigvalsh(op.dense())
    for seed in range(5):
        s = spectrum(op, k=4, rel_error=0.05, seed=seed)
        assert op.has_parts and relative(s.top.values, values.flip(0)[:4]) < 1e-4
        assert abs(float(s.trace.value) - float(values.sum())) <= 4 * float(s.trace.sem) + 1e-9


def test_little_memory_restarts_and_still_finds_the_ends():
    values = SPECTRA["outliers over an indefinite bulk"]
    A = planted(values).dense()
    need = (10 * 8 + 2 * 6 + 20 + 6) * len(values) * 8
    s = spectrum(LinearOperator(lambda V: A @ V, len(A), memory=need), k=5)
    assert relative(s.top.values, values.sort(descending=True).values[:5]) < 1e-4 and s.top.status == "converged"
    assert abs(float(s.trace.value) - float(values.sum())) < 4 * float(s.trace.sem)
    with pytest.raises(OutOfBudget, match="Ask for fewer pairs, use eigenpairs and trace"):
        spectrum(LinearOperator(lambda V: A @ V, len(A), memory=need // 2), k=5)


def test_budget_is_kept_and_said():
    op = planted(planted_spectra()["lambda_min = -0.9995 lambda_max"])
    s = spectrum(op, max_products=120)
    assert s.products <= 120 and s.status == "budget-limited" and math.isfinite(float(s.trace.value))


JOB = """
import sys, time, torch
from orograph import LinearOperator, spectrum
path, pause = sys.argv[1], float(sys.argv[2])
values = torch.cat([torch.linspace(9, 5, 6), torch.linspace(-1, 1, 294)]).double()
base = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
A = (base * values) @ base.T
def matmat(V):
    time.sleep(pause)
    return A @ V
s = spectrum(LinearOperator(matmat, 300), k=5, rel_error=0.3, checkpoint=path or None, seed=3)
print(s.products, [x.hex() for x in (*s.top.values.tolist(), *s.bottom.values.tolist(), float(s.trace.value), float(s.trace.sem), float(s.negative_mass.value))])
"""


def run(path, pause="0"):
    return subprocess.run([sys.executable, "-c", JOB, str(path), pause], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("wait", [0.3, 1.2])
def test_killed_and_resumed_is_the_same_bit_for_bit(wait, tmp_path):
    path = tmp_path / "s.safetensors"
    child = subprocess.Popen([sys.executable, "-c", JOB, str(path), "0.02"])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert path.exists() and run(path) == run("")


@pytest.mark.parametrize("name", ["outliers over an indefinite bulk", "multiplicities over a bulk", "step with multiplicities"])
def test_finished_job_read_again_is_the_same_and_goes_on_where_more_is_asked(name, tmp_path):
    path, values = tmp_path / "s.safetensors", SPECTRA[name]
    first = spectrum(planted(values), rel_error=0.05, checkpoint=path)
    again = spectrum(planted(values), rel_error=0.05, checkpoint=path)
    assert (again.trace.value, again.trace.sem, again.products) == (first.trace.value, first.trace.sem, first.products)
    finer = spectrum(planted(values), rel_error=0.02, checkpoint=path)
    assert finer.products >= first.products and finer.trace.sem <= first.trace.sem
    assert abs(float(finer.trace.value) - float(values.sum())) <= 4 * float(finer.trace.sem) + 1e-9


def test_objective_needs_no_batches_of_its_own_size():
    case = loss_cases()["cross-entropy"]
    found = [float(spectrum(hessian(Objective(case.model, case.criterion, case.data, batch_size=size)), k=2, rel_error=0.2).top.values[0]) for size in (7, 301)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_share_has_an_interval_of_shares():
    values = torch.cat([torch.full((2,), -5.0), torch.linspace(0.5, 1, 98)]).double()
    for seed in range(5):
        share = spectrum(planted(values), k=1, seed=seed).negative_mass
        lower, upper = share.interval(0.999)
        assert 0 <= lower <= share.value <= upper <= 1
    wide = Estimate(value=0.01, sem=0.02, dof=3, least=0.0, most=1.0)
    assert wide.interval()[0] == 0.0 and wide.interval()[1] == pytest.approx(0.01 + 0.02 * 3.182446, rel=1e-5)
    both = Estimate(value=torch.tensor([0.01, 0.99]), sem=torch.tensor([0.02, 0.02]), least=0.0, most=1.0).interval()
    assert float(both[0][0]) == 0.0 and float(both[1][1]) == 1.0


def test_no_share_of_memory_is_passed():
    x, y = digits().train
    objective = Objective(mlp(64, 64, 64, 10, seed=0), torch.nn.CrossEntropyLoss(), (x[:300], y[:300]), batch_size=110)

    def peak(memory):
        with Meter() as meter:
            spectrum(hessian(objective, memory=memory), k=3, rel_error=0.2)
        return meter.peak

    free = peak(None)
    for share in (0.5, 0.6, 0.75):
        assert peak(int(share * free)) <= share * free
