"""`spectrum`: both ends, trace and density of one operator from one set of products, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import AtLeastOne, File, Positive, Seed
from ..checks import refusal
from ..progress import Progress, progress_bar
from ..results import Density, Eigenpairs, Estimate, Spectrum, worst_status
from .checkpoints import checkpointing, job_description
from .density import match_moments
from .eigen import certified
from .low_rank import LowRank, low_rank_of
from .one_pass import STEPS, OnePass
from .operator import LinearOperator, in_full_precision
from .runs import PILOTS, Runs
from .search import Goal


@in_full_precision
def spectrum(
    op: LinearOperator,
    *,
    k: AtLeastOne = 10,
    rel_error: Positive = 0.01,
    max_products: AtLeastOne | None = None,
    seed: Seed = 0,
    checkpoint: File | None = None,
    progress: Progress = None,
) -> Spectrum:
    r"""The `k` largest eigenpairs (all, where the operator is smaller), the smallest, the trace to `rel_error`, the density, and what follows.

    One set of products serves all: a first Krylov subspace grows until the ends have converged (as `eigenpairs` with tol = 1e-3 has
    it) and while each further vector is worth its product to the trace; further starts in its complement look for what it
    cannot have seen and give the density; quadratic forms on what is left make up the trace (see `trace`); one product per reported pair
    gives its true residual. It stops when the asked errors are met, or after `max_products` (default 1000 + 20 k).

    `density`: reported pairs are atoms, all other Ritz values single eigenvalues, the rest is quadrature, moved to the mean that the
    trace leaves for it. `negative_mass`: share of eigenvalues below -`density.width`; nearer to zero the density cannot tell their
    sign. `condition`, by definition: kappa of a singular or indefinite matrix is undefined, so each entry names what stands in for it.
    `checkpoint`: a file. Raises OutOfBudget where the basis for `k` pairs does not fit `op.memory`.
    """
    return _one_pass(op, k=k, rel_error=rel_error, max_products=max_products, seed=seed, checkpoint=checkpoint, progress=progress)[0]


@in_full_precision
def spectrum_and_low_rank(op: LinearOperator, *, k: int, rel_error: float, max_products: int | None = None, seed: int = 0, progress: Progress = None) -> tuple[Spectrum, LowRank]:
    """`spectrum`, and what its products have told of the operator's largest part, for whoever needs more of it."""
    found, runs = _one_pass(op, k=k, rel_error=rel_error, max_products=max_products, seed=seed, checkpoint=None, progress=progress)
    fits = op.memory // (op.size * torch.finfo(op.dtype).bits // 8)
    held = len(runs.buffer) + 2 * PILOTS + len(runs.following) + 2 * (k + 1) + 2  # vectors that are there beside it
    return found, low_rank_of(runs, max(min(fits // 4, fits - held), 0))


def _one_pass(
    op: LinearOperator, *, k: int, rel_error: float, max_products: int | None, seed: int, checkpoint: File | None, progress: Progress
) -> tuple[Spectrum, Runs]:
    if max_products is not None and max_products < 2 * min(k, op.size) + 2:
        least = 2 * min(k, op.size) + 2
        raise refusal("spectrum", "max_products", max_products, f"at least {least} for {min(k, op.size)} pair(s) at the top and one at the bottom. Ask for fewer pairs, or allow more.")
    before = op.products
    job = job_description(op, checkpoint, what="spectrum", k=k, seed=seed)
    with progress_bar(progress, "spectrum") as report, checkpointing(checkpoint, job) as (earlier, keep):
        work = OnePass(op, min(k, op.size), rel_error, max_products or 1000 + 20 * k, seed, earlier, keep)
        while work.advance():
            keep(work.state())
            report(work.products, max(work.expected, work.products), work.phase)
        keep(work.state())
    top = _pairs(op, work, Goal(work.k, "largest", work.tol, op.noise), work.missed_above)
    bottom = _pairs(op, work, Goal(1, "smallest", work.tol, op.noise), work.missed_below)
    total = work.trace
    density = _density(op, work, top, bottom, work.moments[:2])
    floor = max(density.width, op.noise * max(abs(float(top.values[0])), abs(float(bottom.values[0]))))
    found = Spectrum(
        top=top,
        bottom=bottom,
        trace=total,
        density=density,
        negative_mass=_negative_mass(op, work, top, bottom, density, floor),
        condition=condition_numbers(top, bottom, total, density),
        products=op.products - before,
        status=worst_status([top.status, bottom.status, total.status]),
    )
    return found, work.runs


def _pairs(op: LinearOperator, work: OnePass, goal: Goal, missed: float) -> Eigenpairs:
    """The wanted Ritz pairs of the joint basis, with one product each for their true residuals."""
    values, coefficients, _ = work.runs.union()
    chosen = coefficients[:, goal.choose(values)].T.to(op.device, op.dtype)
    return certified(op, goal, chosen @ work.runs.rows, missed, float(values.abs().max()), op.products)


def _negative_mass(op: LinearOperator, work: OnePass, top: Eigenpairs, bottom: Eigenpairs, density: Density, floor: float) -> Estimate:
    """Share of eigenvalues below -floor; its error is the scatter of the rows and what the errors of the moments do to all of them alike."""
    mass = density.mass(-torch.inf, -floor)
    trace, squares, *errors = work.moments
    moved = [_density(op, work, top, bottom, moments).mass(-torch.inf, -floor) for moments in ((trace + errors[0], squares), (trace, squares + errors[1]))]
    sem = math.hypot(float(mass.sem), *(float(other.value) - float(mass.value) for other in moved)) if math.isfinite(float(mass.sem)) else float(mass.sem)
    return replace(mass, sem=sem, label=f"share of eigenvalues below {-floor:.2g}", least=0.0, most=1.0)


def _density(op: LinearOperator, work: OnePass, top: Eigenpairs, bottom: Eigenpairs, moments: Sequence[float]) -> Density:
    """Atoms; and per run one row: the other Ritz values of all runs before it, and its own quadrature for what these leave."""
    runs, n = work.runs, op.size
    values = runs.union()[0]
    atoms = _once(torch.cat([top.values[top.converged], bottom.values[bottom.converged]]), torch.cat([top.residuals[top.converged], bottom.residuals[bottom.converged]]), values)
    rows = [_row(op, work.runs, index, atoms, moments) for index, run in enumerate(runs.each) if run.size and not (run.restarted and len(runs.each) > 1)]
    rows = [row for row in rows if float(row[1].sum()) > 0] or rows[:1]  # a start that has met nothing but atoms says nothing of the rest
    width = max(len(places) for places, _, _ in rows)
    nodes, weights = torch.zeros(len(rows), width, dtype=torch.float64), torch.zeros(len(rows), width, dtype=torch.float64)
    for row, (places, shares, _) in enumerate(rows):  # a shorter row is padded with nodes of weight zero
        nodes[row, : len(places)], weights[row, : len(places)] = places, shares / shares.sum().clamp(min=1e-300) * (1 - len(atoms) / n)
        nodes[row, len(places) :] = places[-1] if len(places) else 0.0
    bulks = [places[single:] for places, _, single in rows[min(1, len(rows) - 1) :] if len(places) > single]  # the first run's own reaches to the ends
    spread = max((float(bulk.max() - bulk.min()) for bulk in bulks), default=0.0)
    scale = max(float(values.abs().max()), torch.finfo(torch.float64).tiny)
    return Density(nodes=nodes, weights=weights, atoms=atoms, size=n, width=max(spread / STEPS, 1e-6 * scale), products=sum(run.size for run in runs.each))


def _row(op: LinearOperator, runs: Runs, index: int, atoms: Tensor, moments: Sequence[float]) -> tuple[Tensor, Tensor, int]:
    """(nodes, weights, how many of them are single Ritz values) of one run: A is the direct sum of what earlier runs know and of what it started in."""
    n = op.size
    run, slack = runs.each[index], 1e-3 * atoms.abs()
    single = _others(runs.union(index)[0], atoms, slack) if index else atoms[:0]
    left = n - len(atoms) - len(single)
    if sum(other.size for other in runs.each[: index + 1]) >= n or left < 1:  # nothing is left to guess
        single, left = _others(runs.union(index + 1)[0], atoms, slack), 0
    values, coefficients, residuals = run.ritz()
    near = ((values[:, None] - atoms).abs() <= residuals[:, None] + slack).any(dim=1)
    places, shares = values[~near], coefficients[0, ~near] ** 2
    if not left or not float(shares.sum()) > 0:
        return single, torch.full_like(single, 1 / n), len(single)
    shares = shares / shares.sum()
    mean = (moments[0] - float(atoms.sum()) - float(single.sum())) / left
    square = (moments[1] - float((atoms**2).sum()) - float((single**2).sum())) / left
    if not math.isfinite(square):  # unknown: keep the run's own variance
        square = float(shares @ places**2 - (shares @ places) ** 2) + mean**2
    shares = match_moments(places, shares, torch.tensor([mean, square], dtype=torch.float64)) * (left / n)
    return torch.cat([single, places]), torch.cat([torch.full_like(single, 1 / n), shares]), len(single)


def _once(found: Tensor, residuals: Tensor, values: Tensor) -> Tensor:
    """Verified eigenvalues, each as often as there are Ritz values for it: the top and the bottom of a small operator overlap."""
    free = torch.ones(len(values), dtype=torch.bool)
    kept = []
    for value, reach in zip(found, residuals + 1e-3 * found.abs(), strict=True):
        distance = (values - value).abs().masked_fill(~free, math.inf)
        if len(values) and float(distance.min()) <= float(reach):
            free[distance.argmin()] = False
            kept.append(float(value))
    return torch.tensor(kept, dtype=torch.float64)


def _others(values: Tensor, atoms: Tensor, slack: Tensor) -> Tensor:
    """The Ritz values that are no atoms."""
    free = torch.ones(len(values), dtype=torch.bool)
    for atom, reach in zip(atoms, slack, strict=True):
        distance = (values - atom).abs().masked_fill(~free, math.inf)
        if len(values) and float(distance.min()) <= float(reach):
            free[distance.argmin()] = False
    return values[free]


def condition_numbers(top: Eigenpairs, bottom: Eigenpairs, total: Estimate, density: Density) -> dict[str, float]:
    """Stand-ins for kappa, by the name of their definition; NaN where one is undefined."""
    first, last, smallest = float(top.values[0]), float(top.values[-1]), float(bottom.values[0])
    points = torch.cat([density.nodes.double().flatten(), density.atoms.double()])
    masses = torch.cat([density.weights.double().flatten() / len(density.weights), torch.full((len(density.atoms),), 1 / density.size, dtype=torch.float64)])
    squares = float((masses * points**2).sum()) * density.size
    trace_value, middle = float(total.value), _median(points.abs(), masses)
    return {
        "lambda_max / lambda_min (positive definite only)": _ratio(first, smallest) if smallest > 0 else float("nan"),
        f"lambda_1 / lambda_{len(top.values)}": _ratio(first, last),
        "lambda_max / |lambda_min|": _ratio(first, abs(smallest)),
        "lambda_max / mean eigenvalue": _ratio(first, trace_value / density.size),
        "lambda_max / median |eigenvalue|": _ratio(first, middle) if middle > density.width else float("nan"),  # nearer to zero than the density resolves
        "lambda_max / larger of median |eigenvalue| and density width": _ratio(first, max(middle, density.width)),
        "trace / lambda_max": _ratio(trace_value, first),
        "trace^2 / (n * sum of squares)": _ratio(trace_value**2, squares * density.size),
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _median(points: Tensor, masses: Tensor) -> float:
    order = points.argsort()
    below = masses[order].cumsum(0)
    return float(points[order][(below >= 0.5 * below[-1]).nonzero()[0, 0]])
