"""The peers behind one small surface, so that a benchmark can alternate them with Orograph. Versions: benchmarks/requirements.txt.

Vectors are flat, in the order of model.parameters(), tied weights once. Models are taken in the mode they are in, which is eval.
Cost is in operator products: one product is one pass over all batches.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .workloads import Batch, Workload

Pairs = tuple[Tensor, Tensor, int]  # values (k,) descending, vectors (n, k), products
Quadrature = tuple[Tensor, Tensor]  # nodes (steps,) and weights (steps,) that sum to 1
Stop = Literal["its own", "residual"]
RESIDUAL_CAP = 2000


class CurvlinopsOperator(Protocol):
    """What is used here of a curvlinops operator."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def __matmul__(self, x: Tensor, /) -> Tensor: ...
    def to_scipy(self) -> LinearOperator[Any]: ...


class EigenthingsOperator(Protocol):
    """What is used here of a hessian-eigenthings operator."""

    @property
    def size(self) -> int: ...
    def matvec(self, v: Tensor) -> Tensor: ...


class MathAttention(nn.Module):
    """The same model with plain attention: the fused kernels have neither a second derivative nor a forward one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            output: Tensor = self.model(x)
            return output


class InChunks:
    """A curvlinops operator that takes the columns of a matrix a few at a time; by itself it takes all at once."""

    def __init__(self, operator: CurvlinopsOperator, chunk: int) -> None:
        self.operator, self.chunk = operator, chunk
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def __matmul__(self, x: Tensor, /) -> Tensor:
        """(n,) or (n, k) -> the same shape."""
        if x.ndim == 1:
            return self.operator @ x
        return torch.cat([self.operator @ columns for columns in x.split(self.chunk, dim=1)], dim=1)


def curvlinops_operator(workload: Workload) -> CurvlinopsOperator:
    """Curvlinops' Hessian over all batches, each weighted by its number of examples: the Hessian of the mean over the data.

    For targets (examples, length) that is right only because all sequences are equally long. Through LayerNorm it is another
    operator, and not symmetric: jvp of jacrev loses a part of the rows of the norm's weight (torch 2.13; jvp of grad keeps it).
    Construction costs two gradients and two products: its check for determinism is on, as by default, and does not see that.
    """
    model = MathAttention(workload.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        operator: CurvlinopsOperator = import_module("curvlinops").HessianLinearOperator(
            model, workload.criterion, list(model.parameters()), workload.batches
        )
    return operator


def arpack(operator: CurvlinopsOperator, k: int, tol: float) -> Pairs:
    """The k algebraically largest pairs by the solver that curvlinops' documentation recommends; raises if it does not converge.

    Products in the model's dtype, basis in float64 (to_scipy's default), max(2k + 1, 20) vectors. At least that many products.
    """
    inner = operator.to_scipy()
    products = 0

    def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal products
        products += 1
        product: np.ndarray[Any, Any] = inner.matvec(v)
        return product

    start = np.random.default_rng(0).standard_normal(inner.shape[0])
    counted = LinearOperator(inner.shape, matvec=matvec, dtype=inner.dtype)
    values, vectors = eigsh(counted, k=k, which="LA", tol=tol, v0=start)
    order = np.argsort(values)[::-1].copy()
    return torch.from_numpy(values[order]).float(), torch.from_numpy(vectors[:, order]).float(), products


def curvlinops_xtrace(operator: CurvlinopsOperator, m: int, *, chunk: int | None = None, seed: int = 0) -> float:
    """XTrace in m products, m even, without an error. Takes m / 2 columns at once, or `chunk` of them.

    Infinite or NaN if the sketch loses rank.
    """
    return _curvlinops_trace("xtrace", operator, m, chunk, seed)


def curvlinops_hutchpp(operator: CurvlinopsOperator, m: int, *, chunk: int | None = None, seed: int = 0) -> float:
    """Hutch++ in m products, m divisible by 3, without an error. Takes m / 3 columns at once, or `chunk` of them."""
    return _curvlinops_trace("hutchpp_trace", operator, m, chunk, seed)


def curvlinops_density(operator: CurvlinopsOperator, repeats: int, steps: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grid and smoothed density (1024,) in repeats x steps products by Lanczos without reorthogonalisation.

    On top come 20 products or more: ARPACK finds both ends of the spectrum to 1%, from a start that cannot be seeded.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        grid, density = import_module("curvlinops").lanczos_approximate_spectrum(operator, steps, num_repeats=repeats)
    return grid, density


def eigenthings_operator(workload: Workload) -> EigenthingsOperator:
    """Hessian-eigenthings' Hessian over all batches. Construction costs nothing.

    Another operator where batches are ragged: it weighs batches, and not examples, equally.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        with sdpa_kernel(SDPBackend.MATH):
            value: Tensor = workload.criterion(model(x), y)
            return value

    operator: EigenthingsOperator = import_module("hessian_eigenthings").HessianOperator(workload.model, workload.batches, loss)
    return operator


def eigenthings_lanczos(operator: EigenthingsOperator, k: int, steps: int, *, seed: int = 0) -> Pairs:
    """The k algebraically largest Ritz pairs after that many steps, converged or not (its default: 2k). One product a step.

    Of another operator, see above. Its default of full reorthogonalisation up to 50 steps and none beyond is kept, and its norms in
    fp32, which put the value 3e-4 too high for the GPT.
    """
    result = import_module("hessian_eigenthings").lanczos(operator, k=k, max_iter=steps, which="LA", seed=seed)
    return result.eigenvalues, result.eigenvectors.T, result.iterations


def eigenthings_trace(operator: EigenthingsOperator, m: int, *, seed: int = 0) -> tuple[float, float]:
    """Its Hutch++ in 3 (m // 3) products, one by one, with a standard error from the last third. Of another operator, see above."""
    result = import_module("hessian_eigenthings").hutch_plus_plus(operator, num_matvecs=m, seed=seed)
    return result.estimate, result.stderr


def eigenthings_density(operator: EigenthingsOperator, runs: int, steps: int, *, seed: int = 0) -> list[Quadrature]:
    """Quadrature of each run in runs x steps products, fully reorthogonalised. Of another operator, see above."""
    result = import_module("hessian_eigenthings").spectral_density(operator, num_runs=runs, lanczos_steps=steps, seed=seed)
    return list(zip(result.raw_eigenvalues, result.raw_weights, strict=True))


class PyHessianAlgorithm:
    """PyHessian's algorithms over a data loader, written anew: a product differentiates each batch afresh, weighted by size.

    Kinder than the original: no reference cycles, a symmetric eigensolver, value and vector of one iterate.
    """

    def __init__(self, workload: Workload) -> None:
        self.model, self.criterion, self.batches = workload.model, workload.criterion, workload.batches
        self.parameters = list(workload.model.parameters())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.examples = sum(len(x) for x, _ in self.batches)

    def product(self, v: Tensor) -> Tensor:
        """(n,) -> (n,): the Hessian of the mean over the data (of equally long sequences, if of sequences). One product."""
        parts = v.split([parameter.numel() for parameter in self.parameters])
        directions = [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]
        total = torch.zeros_like(v)
        for x, y in self.batches:
            with sdpa_kernel(SDPBackend.MATH):
                loss = self.criterion(self.model(x), y)
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
            products = torch.autograd.grad(gradients, self.parameters, directions)
            total.add_(torch.cat([product.flatten() for product in products]), alpha=len(x) / self.examples)
        return total

    def power_iteration(
        self, tol: float = 1e-3, max_iter: int = 100, stop: Stop = "its own", seed: int = 0
    ) -> tuple[float, Tensor, int]:
        """Value, vector and products for the eigenvalue largest in magnitude, of either sign. One product an iteration.

        Its own rule stops on a small change of the value, which bounds no error, and after max_iter; "residual" stops when
        ||Hv - value v|| <= tol |value|, and after 2000. Running into either limit shows in the products alone.
        """
        v = self._normal(seed)
        value = float("nan")  # no change counts as small against it
        limit = max_iter if stop == "its own" else RESIDUAL_CAP
        for products in range(1, limit + 1):
            v = v / _norm(v)
            image = self.product(v)
            before, value = value, float(_dot(v, image))
            if stop == "its own":
                done = abs(value - before) / (abs(before) + 1e-6) < tol
            else:
                done = float(_norm(image - value * v)) <= tol * abs(value)
            if done or products == limit:
                break
            v = image
        return value, v, products

    def trace(self, samples: int, seed: int = 0) -> list[float]:
        """v'Hv of that many random signs, whose mean estimates the trace. One product each; its stopping rule is left out."""
        generator = torch.Generator().manual_seed(seed)
        signs = (self._signs(generator) for _ in range(samples))
        return [float(_dot(v, self.product(v))) for v in signs]

    def density(self, runs: int, steps: int, seed: int = 0) -> list[Quadrature]:
        """Quadrature of each run from random signs, fully reorthogonalised, in fp32. runs x steps products."""
        generator = torch.Generator().manual_seed(seed)
        return [lanczos_quadrature(self.product, self._signs(generator), steps) for _ in range(runs)]

    def _normal(self, seed: int) -> Tensor:
        return torch.randn(self.size, generator=torch.Generator().manual_seed(seed))

    def _signs(self, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 2, (self.size,), generator=generator).mul_(2).sub_(1).float()


def lanczos_quadrature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Quadrature:
    """Nodes and weights after that many Lanczos steps, each orthogonalised against all before; fewer if the Krylov space ends."""
    basis = torch.zeros(steps, len(start))
    diagonal, beside = torch.zeros(steps), torch.zeros(steps)
    v = start / _norm(start)
    for step in range(steps):
        basis[step] = v
        image = product(v)
        size = _norm(image)
        diagonal[step] = _dot(v, image)
        for earlier in basis[: step + 1]:  # modified Gram-Schmidt, as in the original
            image = image - _dot(earlier, image) * earlier
        beside[step] = _norm(image)
        if beside[step] <= 1e-6 * size:
            break
        v = image / beside[step]
    off = beside[:step]
    nodes, vectors = torch.linalg.eigh(torch.diag(diagonal[: step + 1]) + torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()  # as in the original; sums pairwise, where norm() in fp32 is off by 2e-4 for the GPT


def _norm(v: Tensor) -> Tensor:
    return _dot(v, v).sqrt()


def _curvlinops_trace(name: str, operator: CurvlinopsOperator, m: int, chunk: int | None, seed: int) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        estimator = getattr(import_module("curvlinops"), name)
        return float(estimator(operator if chunk is None else InChunks(operator, chunk), m))
