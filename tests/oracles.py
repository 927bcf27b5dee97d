"""Independent references: dense derivatives by torch.func of the plain loss over the whole data set, and planted spectra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from orograph import LinearOperator, Objective


def dense_hessian(objective: Objective, model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
    """Hessian (n, n) of `loss(call)` in the objective's parameters, where `call(*args)` runs the model with them."""

    def whole(theta: Tensor) -> Tensor:
        parts = {name: theta[objective.layout[name]].view(shape) for name, shape in zip(objective.names, objective.layout.shapes, strict=True)}
        return loss(lambda *args, **kwargs: functional_call(model, parts, args, kwargs))

    training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return hessian(whole)(objective.theta)
    finally:
        model.train(training)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with the given eigenvalues and random eigenvectors, float64."""
    n = len(values)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    matrix = (basis * values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def planted(values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> LinearOperator:
    """The operator of `rotated(values)`."""
    return LinearOperator.from_dense(rotated(values, seed).to(dtype))


def planted_spectra(n: int = 300) -> dict[str, Tensor]:
    """Spectra that break careless eigensolvers."""
    return {
        "geometric": 0.9 ** torch.arange(n, dtype=torch.float64),
        "step with multiplicities": torch.cat([torch.full((5,), 10.0), torch.full((3,), 4.0), torch.full((n - 8,), 1.0)]).double(),
        "multiplicities over a bulk": torch.cat([torch.full((5,), 10.0), torch.full((3,), 4.0), torch.linspace(-1, 1, n - 8)]).double(),
        "clustered top": torch.cat([1 - 1e-6 * torch.arange(5, dtype=torch.float64), torch.linspace(-0.5, 0.8, n - 5, dtype=torch.float64)]),
        "lambda_min = -0.9995 lambda_max": torch.cat([torch.tensor([1.0, -0.9995]), torch.linspace(-0.5, 0.5, n - 2)]).double(),
        "rank-deficient": torch.cat([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.zeros(n - 5)]).double(),
    }


def expected_pairs(values: Tensor, k: int, which: str) -> Tensor:
    """What `eigenpairs(k, which=which)` should find."""
    down = values.sort(descending=True).values
    if which == "magnitude":
        return values[values.abs().argsort(descending=True)][:k]
    return {"largest": down[:k], "smallest": down.flip(0)[:k], "both": torch.cat([down[:k], down[-k:]])}[which]
