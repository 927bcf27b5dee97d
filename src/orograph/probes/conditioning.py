"""Condition numbers that mean something for a singular, indefinite matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import AtLeastOne, Positive, Seed
from ..curvature import preconditioned
from ..linalg.blocks import TopPair, block_top
from ..linalg.intervals import Moments, spread
from ..linalg.lanczos import Krylov
from ..linalg.low_rank import LowRank
from ..linalg.operator import LinearOperator
from ..objective import Objective
from ..optimizers import preconditioner
from ..registry import Results, probe
from ..results import Density, Result, Spectrum, Table
from ..subject import Subject
from ..variants import random_pieces

Row = dict[str, Any]
MOST_PIECES = 32  # micro-batches whose gradients make a second moment
EPSILON = 1e-8  # Adam's own
MOST_FORMS = 12
FORM_STREAM = -(1 << 43)  # indices of samples that nothing else uses


def _says(results: Results) -> str:
    table = results["conditioning"]
    assert isinstance(table, Table)
    values = {(row["operator"], row["definition"]): float(row["value"]) for row in table.rows}
    spread_out = values["Hessian", "lambda_max / mean eigenvalue"]
    share = next((row for row in table.rows if row["definition"].startswith("share of the gradient")), None)
    gradient = f" {share['value']:.0%} of the squared gradient lies in the span of the top {share['definition'].split()[-2]} eigenvectors." if share else ""
    kind = "undefined: the Hessian is not positive definite" if math.isnan(values["Hessian", "lambda_max / lambda_min (positive definite only)"]) else "defined"
    return f"The condition number lambda_max / lambda_min is {kind}; the largest eigenvalue is {spread_out:.3g} times the mean one.{gradient}"


@probe(says=_says)
def conditioning(
    subject: Subject, *, optimizer: Optimizer | None = None, damping: Positive | None = None, z: Positive | None = None, batch_size: AtLeastOne = 32, steps: AtLeastOne = 8, tol: Positive = 0.05, seed: Seed = 0
) -> dict[str, Result]:
    r"""Condition numbers by name, of the Hessian, the Gauss-Newton matrix and the preconditioned Hessian; and where the gradient lies.

    A trained network's Hessian is singular and indefinite, so that $\lambda_{max} / \lambda_{min}$ is undefined: every row names what stands in
    for it. `error`: a standard error, or for eigenvalues the distance that the residual allows · `damping`: d of the damped ratio, default
    $10^{-3} \lambda_{max}$ · `z`: curvature below which a direction counts as flat, default $10^{-2} \lambda_{max}$ · `optimizer`: whose preconditioner P
    to use; without one, Adam's at rest here, $P = \sqrt{v} + 10^{-8}$ with v the mean squared gradient of at most 32 random batches of `batch_size` (the error of v is not in `error`).
    `gradient_spectrum`: Lanczos started at the gradient, whose nodes and weights are the quadrature of $\sum_i (v_i^\top g)^2 / \|g\|^2\, \delta(x - \lambda_i)$.
    Costs `steps` products from the gradient, one for the sum of squares, two and more with the Gauss-Newton matrix and with $P^{-1/2} H P^{-1/2}$, beside the shared spectrum.
    """
    s, op = subject.spectrum(), subject.hessian()
    rows = hessian_rows(s, _squares(op, subject.low_rank(), seed), damping, z)
    krylov = subject.gradient_krylov(steps)
    results: dict[str, Result] = {}
    if krylov is None:
        subject.missing["gradient_spectrum"] = "the gradient is exactly zero"
    else:
        rows += _gradient_rows(op, s, krylov, subject.gradient())
        results["gradient_spectrum"] = _gradient_density(krylov)
    if subject.objective.recipe.batch_loss is not None:
        subject.missing["Gauss-Newton"] = "a batch_loss hides the network's output; pass forward= to Objective"
    else:
        rows += _ggn_rows(subject.ggn(), subject.low_rank(), tol, seed)
    P, name = _scale(subject.objective, optimizer, batch_size, seed)
    rows += _preconditioned_rows(op, subject.low_rank(), P, name, tol, seed)
    return {"conditioning": Table(rows=rows, x="definition", y="value", label="conditioning")} | results


def _squares(op: LinearOperator, known: LowRank, seed: int) -> tuple[float, float]:
    r"""$\|A\|_F^2 = \|K\|_F^2 + \mathbb{E}\,(\|A v\|^2 - \|K v\|^2)$ from one product, and a bound on its standard error."""
    v = op.space.sample(seed, FORM_STREAM - 1, "sphere")
    image, there = (op @ v).double(), (known @ v).double()
    square, left = float((known.values**2).sum()), float(((image - there) ** 2).sum())
    return max(square + float(image @ image - there @ there), left, 1e-300), math.sqrt(2) * (left + 2 * math.sqrt(left * square))


def hessian_rows(s: Spectrum, squares: tuple[float, float], damping: float | None, z: float | None) -> list[Row]:
    """What follows from the spectrum alone."""
    top, trace = float(s.top.values[0]), s.trace
    size, low = s.density.size, float(s.bottom.values[0])
    reach = [float(pairs.intervals[0, 1] - pairs.values[0]) for pairs in (s.top, s.bottom)]
    z = z if z is not None else 1e-2 * abs(top)
    damping = damping if damping is not None else 1e-3 * abs(top)
    relative = math.hypot(reach[0] / abs(top), float(trace.sem) / abs(float(trace.value))) if top and trace.value else math.nan
    flat = _over_rows(s.density, lambda nodes, weights: float((weights * nodes.clamp(min=0) / (nodes.clamp(min=0) + z)).sum()) * size)
    medians = _over_rows(s.density, lambda nodes, weights: _median(nodes.abs(), weights))
    errors = {
        "lambda_max / lambda_min (positive definite only)": _ratio_error(top, low, *reach),
        f"lambda_1 / lambda_{len(s.top.values)}": _ratio_error(top, float(s.top.values[-1]), reach[0], float(s.top.intervals[-1, 1] - s.top.values[-1])),
        "lambda_max / |lambda_min|": _ratio_error(top, low, *reach),
        "lambda_max / mean eigenvalue": abs(s.condition["lambda_max / mean eigenvalue"]) * relative,
        "lambda_max / median |eigenvalue|": _ratio_error(top, medians[0], reach[0], medians[1]),
        "trace / lambda_max": abs(s.condition["trace / lambda_max"]) * relative,
        "trace^2 / (n * sum of squares)": float(trace.value) ** 2 / squares[0] / size * math.hypot(2 * relative, squares[1] / squares[0]),
    }
    stable = float(trace.value) ** 2 / squares[0]
    condition = dict(s.condition) | {"trace^2 / (n * sum of squares)": stable / size}
    rows = [_row("Hessian", name, value, errors.get(name, math.nan) if value == value else math.nan) for name, value in condition.items()]
    damped = _ratio(top + damping, abs(low) + damping)
    return [
        *rows,
        _row("Hessian", "(lambda_max + d) / (|lambda_min| + d)", damped, _ratio_error(top + damping, abs(low) + damping, *reach)) | {"d or z": damping},
        _row("Hessian", "stable rank, trace^2 / sum of squares", stable, stable * math.hypot(2 * relative, squares[1] / squares[0])),
        _row("Hessian", "effective dimension, sum of lambda / (lambda + z)", s.effective_dimension(z) if z > 0 else math.nan, flat[1]) | {"d or z": z},
        _row("Hessian", "negative mass, share of eigenvalues below -z", float(s.negative_mass.value), float(s.negative_mass.sem)) | {"d or z": s.density.width},
    ]


def _gradient_rows(op: LinearOperator, s: Spectrum, krylov: Krylov, g: Tensor) -> list[Row]:
    """How much of the gradient is in the steepest directions, and how curved its own direction is."""
    length, curvature = float(op.space.norm(g)), float(krylov.T[0, 0])
    rows = [_row("Hessian", "lambda_max / curvature along the gradient", _ratio(float(s.top.values[0]), curvature), 0.0)]
    if s.top.vectors is not None:
        shares = (op.space.inner(s.top.vectors, g.to(op.dtype)).cpu() / length) ** 2
        gaps = s.top.residuals / s.top.values.abs().clamp(min=1e-300)
        rows.append(_row("Hessian", f"share of the gradient in the top {len(shares)} eigenvectors", float(shares.sum()), float((2 * shares.sqrt() * gaps).max())))
    return rows


def _gradient_density(krylov: Krylov) -> Density:
    """Gauss quadrature of the spectrum as the gradient weighs it (Golub and Welsch 1969)."""
    values, vectors, _ = krylov.ritz()
    width = max(float(values.max() - values.min()) / 20, 1e-6 * float(values.abs().max()), 1e-300)
    none = torch.zeros(0, dtype=torch.float64)
    return Density(
        nodes=values[None], weights=vectors[0][None] ** 2, atoms=none, size=krylov.op.size, width=width, products=0,
        label="spectrum as the gradient weighs it", ylabel="density of the squared gradient",
    )  # fmt: skip


def _ggn_rows(ggn: LinearOperator, known: LowRank, tol: float, seed: int) -> list[Row]:
    """Largest eigenvalue from the Hessian's outliers as a start, trace from what these leave."""
    now, unknown = _trace_beside(ggn, known, seed)
    top = block_top(ggn, known, None, unknown=unknown, tol=tol, max_products=60)
    relative = math.hypot(top.residual / abs(top.value), now.sem / abs(now.value)) if top.value and now.value else math.nan
    mean = now.value / ggn.size
    return [
        _row("Gauss-Newton", "lambda_max", top.value, top.residual) | _below(top),
        _row("Gauss-Newton", "trace", now.value, now.sem),
        _row("Gauss-Newton", "lambda_max / mean eigenvalue", _ratio(top.value, mean), abs(_ratio(top.value, mean)) * relative),
        _row("Gauss-Newton", "trace / lambda_max", _ratio(now.value, top.value), abs(_ratio(now.value, top.value)) * relative),
    ]


def _trace_beside(op: LinearOperator, known: LowRank, seed: int) -> tuple[Moments, float]:
    """Trace of an operator near another one's outliers, to a tenth or from `MOST_FORMS` products; and about the norm of what these leave."""
    forms, tangents = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    squares = torch.zeros(0, dtype=torch.float64)
    while True:
        v = op.space.sample(seed, FORM_STREAM + len(forms), "sphere")[:, None]
        rest = (op @ v - known @ v).double()
        form = (v.double() * rest).sum(dim=0).cpu()
        squares = torch.cat([squares, (rest**2).sum(dim=0).cpu()])
        forms, tangents = torch.cat([forms, form]), torch.cat([tangents, squares[-1:] - form**2 / op.size])
        now = spread(float(known.values @ known.gram().diagonal()) + forms, tangents, 1.0, op.noise * float(known.values.abs().sum()))
        if now.sem <= 0.05 * abs(now.value) or len(forms) >= MOST_FORMS:
            return now, float(squares.mean().sqrt())


def _scale(objective: Objective, optimizer: Any, batch_size: int, seed: int = 0) -> tuple[Tensor, str]:
    """The diagonal of P (n,), and what to call it."""
    if optimizer is not None:
        return preconditioner(optimizer, objective), f"preconditioned by {type(optimizer).__name__}"
    total, weights = torch.zeros(objective.size, dtype=torch.float64, device=objective.device), 0.0
    for weight, piece in random_pieces(objective, batch_size, MOST_PIECES, seed):
        total += weight * piece.gradient().double() ** 2
        weights += weight
    return ((total / weights).sqrt() + EPSILON).to(objective.dtype), f"preconditioned by Adam at rest, batches of {batch_size}"


def _preconditioned_rows(op: LinearOperator, known: LowRank, P: Tensor, name: str, tol: float, seed: int) -> list[Row]:
    """Of the symmetric form, which has the eigenvalues of the inverse of P times H."""
    scaled, inner = LowRank(known.rows * P.to(known.rows).rsqrt(), known.values), preconditioned(op, P)
    v = inner.space.sample(seed, FORM_STREAM - 2, "sphere")
    unknown = float(inner.space.norm(inner @ v - scaled @ v))
    top = block_top(inner, scaled, None, unknown=unknown, tol=tol, max_products=100)
    return [_row(name, "lambda_max", top.value, top.residual) | _below(top)]


def _below(top: TopPair) -> Row:
    """What kind of number a largest eigenvalue is."""
    return {"kind": f"from below, chance of a larger one {top.missed:.2g}"}


def _row(operator: str, definition: str, value: float, error: float) -> Row:
    return {"operator": operator, "definition": definition, "value": value, "error": error}


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _ratio_error(a: float, b: float, error_a: float, error_b: float) -> float:
    return abs(a / b) * math.hypot(error_a / a, error_b / b) if a and b else math.nan


def _over_rows(density: Density, quantity: Callable[[Tensor, Tensor], float]) -> tuple[float, float]:
    """Mean and standard error over the samples of the density, atoms included."""
    atoms, each = density.atoms.double(), torch.full((len(density.atoms),), 1 / density.size, dtype=torch.float64)
    found = torch.tensor([quantity(torch.cat([n, atoms]), torch.cat([w, each])) for n, w in zip(density.nodes.double(), density.weights.double(), strict=True)], dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def _median(points: Tensor, masses: Tensor) -> float:
    order = points.argsort()
    below = masses[order].cumsum(0)
    return float(points[order][(below >= 0.5 * below[-1]).nonzero()[0, 0]])
