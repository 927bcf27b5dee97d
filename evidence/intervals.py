"""Do 95 % intervals of `trace` hold? Coverage over seeds, for three spectra, four methods and two budgets."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import Method, trace
from orograph.results import Estimate

SIZE = 500
METHODS: tuple[Method, ...] = ("hutchinson", "hutch++", "xtrace", "auto")
BUDGETS = (30, 100)
SPECTRA = ("decay", "flat", "outliers")
PART = 50  # seeds per task of a worker


def eigenvalues(spectrum: str, size: int = SIZE) -> Tensor:
    """Decay: 1/i^2. Flat: even in [1, 2]. Outliers: ten from 50 to 3 on an indefinite bulk of standard deviation 0.05."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    if spectrum == "decay":
        return index**-2
    if spectrum == "flat":
        return 1 + index / size
    bulk = 0.05 * torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bulk[:10] = torch.linspace(50, 3, 10, dtype=torch.float64)
    return bulk


def rotated(values: Tensor) -> Tensor:
    """Dense matrix with these eigenvalues and random eigenvectors."""
    gaussian = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Q, _ = torch.linalg.qr(gaussian)
    A: Tensor = (Q * values) @ Q.T
    return (A + A.T) / 2


def trace_coverage(seeds: int = 1000) -> list[dict[str, Any]]:
    """One row per cell: share of the intervals that hold the true trace, and their half-width against the errors made.

    `ratio`: median half-width over the 95 % quantile of |error|; 1 is as short as can be, far above 1 is coverage by vagueness.
    """
    parts = [range(start, min(start + PART, seeds)) for start in range(0, seeds, PART)]
    tasks = [(spectrum, part) for spectrum in SPECTRA for part in parts]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        done = list(workers.map(_runs, *zip(*tasks, strict=True)))
    rows = []
    for spectrum in SPECTRA:
        for method in METHODS:
            for products in BUDGETS:
                runs = [run for (name, _), cell in zip(tasks, done, strict=True) if name == spectrum for run in cell[method, products]]
                rows.append({"spectrum": spectrum, "method": method, "products": products, **_summary(torch.tensor(runs))})
    return rows


def _runs(spectrum: str, seeds: range) -> dict[tuple[str, int], list[tuple[float, float, float]]]:
    """Error, and the ends of the interval relative to the truth, of each seed, by method and budget."""
    torch.set_num_threads(1)
    A = rotated(eigenvalues(spectrum))
    truth = float(torch.trace(A))
    op = LinearOperator(lambda V: (V.T.contiguous() @ A).T, SIZE)  # A is symmetric; BLAS reads it faster from this side
    runs: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for method in METHODS:
        for products in BUDGETS:
            estimates = [trace(op, method=method, rel_error=None, max_products=products, seed=seed, progress=False) for seed in seeds]
            runs[method, products] = [_relative(e, truth) for e in estimates]
    return runs


def _relative(estimate: Estimate, truth: float) -> tuple[float, float, float]:
    lower, upper = estimate.interval(0.95)
    return float(estimate.value) - truth, float(lower) - truth, float(upper) - truth


def _summary(runs: Tensor) -> dict[str, float]:
    error, lower, upper = runs.double().unbind(dim=1)
    half, reach = float(((upper - lower) / 2).median()), float(error.abs().quantile(0.95))
    coverage = float(((lower <= 0) & (upper >= 0)).double().mean())
    return {"coverage": coverage, "half_width": half, "error_95": reach, "ratio": half / reach}


if __name__ == "__main__":
    for row in trace_coverage():
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else f"{value!s:10}" for value in row.values()))
