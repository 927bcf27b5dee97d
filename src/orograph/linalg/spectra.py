"""`spectrum`: both ends, trace and density of one operator, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..progress import Progress
from ..results import Density, Eigenpairs, Estimate, Spectrum, worst_status
from .density import spectral_density
from .eigen import eigenpairs
from .operator import LinearOperator, in_full_precision
from .traces import trace


@in_full_precision
def spectrum(
    op: LinearOperator,
    *,
    k: int = 10,
    rel_error: float = 0.01,
    max_products: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress = None,
) -> Spectrum:
    r"""The `k` largest eigenpairs (all, where the operator is smaller), the smallest, the trace to `rel_error`, the density, and what follows.

    `negative_mass`: share of eigenvalues below -`density.width`; nearer to zero the density cannot tell their sign. `condition`, by definition: kappa of a singular or
    indefinite matrix is undefined, so each entry names what stands in for it. `max_products` bounds the trace (default 1000), whose
    share of the cost is the largest; see `eigenpairs`, `trace` and `spectral_density` for the other parts. `checkpoint`: a folder.
    """
    before = op.products
    file = (lambda name: Path(checkpoint) / f"{name}.safetensors") if checkpoint is not None else (lambda name: None)
    top = eigenpairs(op, min(k, op.size), which="largest", seed=seed, checkpoint=file("top"), progress=progress)
    bottom = eigenpairs(op, 1, which="smallest", seed=seed, checkpoint=file("bottom"), progress=progress)
    total = trace(op, rel_error=rel_error, max_products=max_products or 1000, seed=seed, checkpoint=file("trace"), progress=progress)
    density = spectral_density(op, seed=seed, checkpoint=file("density"), progress=progress)
    floor = max(density.width, op.noise * max(abs(float(top.values[0])), abs(float(bottom.values[0]))))
    return Spectrum(
        top=top,
        bottom=bottom,
        trace=total,
        density=density,
        negative_mass=replace(density.mass(-torch.inf, -floor), label=f"share of eigenvalues below {-floor:.2g}"),
        condition=condition_numbers(top, bottom, total, density),
        products=op.products - before,
        status=worst_status([top.status, bottom.status, total.status]),
    )


def condition_numbers(top: Eigenpairs, bottom: Eigenpairs, total: Estimate, density: Density) -> dict[str, float]:
    """Stand-ins for kappa, by the name of their definition; NaN where one is undefined."""
    first, last, smallest = float(top.values[0]), float(top.values[-1]), float(bottom.values[0])
    points = torch.cat([density.nodes.double().flatten(), density.atoms.double()])
    masses = torch.cat([density.weights.double().flatten() / len(density.weights), torch.full((len(density.atoms),), 1 / density.size, dtype=torch.float64)])
    squares = float((masses * points**2).sum()) * density.size
    trace_value = float(total.value)
    return {
        "lambda_max / lambda_min (positive definite only)": _ratio(first, smallest) if smallest > 0 else float("nan"),
        f"lambda_1 / lambda_{len(top.values)}": _ratio(first, last),
        "lambda_max / |lambda_min|": _ratio(first, abs(smallest)),
        "lambda_max / mean eigenvalue": _ratio(first, trace_value / density.size),
        "lambda_max / median |eigenvalue|": _ratio(first, _median(points.abs(), masses)),
        "trace / lambda_max": _ratio(trace_value, first),
        "trace^2 / (n * sum of squares)": _ratio(trace_value**2, squares * density.size),
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _median(points: Tensor, masses: Tensor) -> float:
    order = points.argsort()
    below = masses[order].cumsum(0)
    return float(points[order][(below >= 0.5 * below[-1]).nonzero()[0, 0]])
