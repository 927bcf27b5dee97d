"""Spectral density and spectrum against known spectra."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from orograph import LinearOperator, OutOfBudget, eigenpairs, spectral_density, spectrum
from orograph.linalg.density import match_moments

from .oracles import planted, planted_spectra, relative

SPECTRA = {
    **planted_spectra(500),
    "flat": torch.linspace(1, 2, 500, dtype=torch.float64),
    "slow decay": torch.arange(1, 501, dtype=torch.float64) ** -2,
    "outliers over an indefinite bulk": torch.cat([torch.linspace(50, 3, 7), 0.05 * torch.randn(493, generator=torch.Generator().manual_seed(0))]).double(),
}


def wasserstein(density, values):
    """W1 distance between a density and a list of eigenvalues, relative to their range."""
    nodes = torch.cat([density.nodes.flatten(), density.atoms])
    weights = torch.cat([density.weights.flatten() / len(density.weights), torch.full((len(density.atoms),), 1 / density.size, dtype=torch.float64)])
    return wasserstein_distance(nodes.numpy(), values.numpy(), weights.numpy()) / float(values.max() - values.min())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_density_is_within_one_percent_of_the_range_at_the_defaults(name, seed):
    density = spectral_density(planted(SPECTRA[name]), seed=seed)
    assert wasserstein(density, SPECTRA[name]) < 0.01
    masses = density.weights.sum(dim=1) + len(density.atoms) / density.size
    assert torch.allclose(masses, torch.ones_like(masses))


def test_outliers_are_verified_atoms():
    values = SPECTRA["outliers over an indefinite bulk"]
    op = planted(values)
    density = spectral_density(op)
    assert relative(density.atoms.sort(descending=True).values, values[:7]) < 1e-6
    assert float(density.nodes.max()) < 1 and density.products == op.products


def test_pdf_integrates_to_one_and_cdf_counts():
    values = SPECTRA["flat"]
    density = spectral_density(planted(values))
    x = torch.linspace(0.5, 2.5, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(density.pdf(x), x)) == pytest.approx(1, abs=1e-6)
    assert float(density.cdf(torch.tensor(3.0))) == pytest.approx(1) and float(density.cdf(torch.tensor(0.0))) == 0
    share = density.mass(1.0, 1.5)
    low, high = share.interval()
    assert low < 0.5 < high and share.sem < 0.05


def test_early_end_of_a_sample_keeps_its_weight():
    density = spectral_density(planted(SPECTRA["step with multiplicities"]))
    assert wasserstein(density, SPECTRA["step with multiplicities"]) < 0.01
    assert spectral_density(LinearOperator.from_dense(torch.eye(30).double())).nodes.unique().numel() <= 2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_operators(n):
    values = torch.arange(1, n + 1).double()
    density = spectral_density(planted(values))
    assert float(density.cdf(torch.tensor(n + 1.0))) == pytest.approx(1)


def test_matched_moments_are_matched_and_impossible_ones_left_alone():
    nodes = torch.linspace(0, 1, 20, dtype=torch.float64)
    weights = torch.full((20,), 1 / 20, dtype=torch.float64)
    tilted = match_moments(nodes, weights, torch.tensor([0.48, 0.32], dtype=torch.float64))
    assert float(tilted @ nodes) == pytest.approx(0.48) and float(tilted @ nodes**2) == pytest.approx(0.32) and float(tilted.min()) > 0
    assert torch.equal(match_moments(nodes, weights, torch.tensor([2.0, 0.1], dtype=torch.float64)), weights)


def test_density_resumes_from_its_checkpoint(tmp_path):
    op = planted(SPECTRA["flat"])
    calls = []

    def failing(V):
        calls.append(1)
        if len(calls) > 150:
            raise KeyboardInterrupt
        return op.matmat(V)

    with pytest.raises(KeyboardInterrupt):
        spectral_density(LinearOperator(failing, 500, about=op.about), checkpoint=tmp_path / "d.safetensors")
    resumed = spectral_density(LinearOperator(op.matmat, 500, about=op.about), checkpoint=tmp_path / "d.safetensors")
    whole = spectral_density(op)
    assert torch.equal(resumed.nodes, whole.nodes) and torch.equal(resumed.weights, whole.weights) and resumed.products == whole.products


def test_memory_is_asked_before_it_is_taken():
    with pytest.raises(OutOfBudget, match="Use fewer steps"):
        spectral_density(LinearOperator(lambda V: V, 1000, memory=10_000))


def test_spectrum_gathers_everything():
    values = SPECTRA["outliers over an indefinite bulk"]
    op = planted(values)
    s = spectrum(op, k=8, rel_error=0.02)
    down = values.sort(descending=True).values
    assert relative(s.top.values, down[:8]) < 1e-4 and relative(s.bottom.values, down[-1:]) < 1e-3
    low, high = s.trace.interval()
    assert low <= float(values.sum()) <= high and s.trace.status == "converged"
    low, high = s.negative_mass.interval()
    assert low <= float((values < -s.density.width).double().mean()) <= high
    z = 1.0
    exact = float((values[values > 0] / (values[values > 0] + z)).sum())
    assert s.effective_dimension(z) == pytest.approx(exact, rel=0.05)
    assert s.products == op.products and s.status == "converged"
    condition = dict(s.condition)
    assert condition["lambda_1 / lambda_8"] == pytest.approx(float(down[0] / down[7]), rel=1e-3)
    assert condition["trace / lambda_max"] == pytest.approx(float(values.sum() / down[0]), rel=0.02)
    assert condition["trace^2 / (n * sum of squares)"] == pytest.approx(float(values.sum() ** 2 / (values**2).sum() / 500), rel=0.05)
    assert math.isnan(condition["lambda_max / lambda_min (positive definite only)"])


def test_spectrum_of_a_positive_definite_operator_has_its_kappa():
    s = spectrum(planted(SPECTRA["flat"]), k=2)
    assert s.condition["lambda_max / lambda_min (positive definite only)"] == pytest.approx(2, rel=1e-3)
    assert float(s.negative_mass.value) == 0


def test_spectrum_asks_for_no_more_pairs_than_there_are():
    s = spectrum(planted(torch.tensor([3.0, 2.0, 1.0]).double()), k=10)
    assert relative(s.top.values, torch.tensor([3.0, 2.0, 1.0]).double()) < 1e-12
    assert relative(eigenpairs(planted(torch.tensor([3.0, 2.0, 1.0]).double()), 3).values, s.top.values) < 1e-12
