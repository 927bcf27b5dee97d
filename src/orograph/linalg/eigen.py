"""`eigenpairs`: the extreme eigenvalues of a symmetric operator, with vectors, true residuals, intervals and a status."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import AtLeastOne, File, Seed, Share
from ..checks import refusal
from ..errors import OutOfBudget
from ..memory import size_text
from ..progress import Progress, progress_bar
from ..results import Eigenpairs, Status, worst_status
from .lobpcg import BLOCKS, GUARD, KEPT, lobpcg_vectors
from .operator import LinearOperator, in_full_precision
from .power import power_vectors
from .search import Goal, Which, lanczos_search

Method = Literal["lanczos", "power", "lobpcg"]


@in_full_precision
def eigenpairs(
    op: LinearOperator,
    k: AtLeastOne = 1,
    *,
    which: Which = "largest",
    method: Method = "lanczos",
    tol: Share = 1e-3,
    max_products: AtLeastOne | None = None,
    start: Tensor | None = None,
    seed: Seed = 0,
    checkpoint: File | None = None,
    progress: Progress = None,
) -> Eigenpairs:
    r"""Eigenvalues at the ends of the spectrum, with what is needed to trust them.

    `which`: "largest" (descending), "smallest" (ascending), "magnitude" (by |value|), or "both": k at each end, 2k in all,
    descending · `method`: "lanczos" (thick restart, full reorthogonalisation), "lobpcg" (a block of k + 2
    vectors, in the memory of 17 such blocks, 1 to 20 times the products) or "power", the textbook's baseline; with these two nothing is known of eigenvalues that they did not see (`missed` = 1) · `tol`: asked
    residual relative to |value| · `max_products`: budget, default 1000 + 20 per pair · `start` (n,) or (n, j): a guess, such as
    earlier eigenvectors · `checkpoint`: a file from which a killed run continues.

    A pair is `converged` when its *true* residual $\|A v - \lambda v\|$, from one product per pair at the end, is at most
    $tol \cdot \max(|\lambda|, \nu \lambda_{max})$ with the round-off level $\nu$ (1e-6 in float32); where round-off is reached first
    the status is "noise-limited". $[\lambda - r, \lambda + r]$, r the residual plus round-off, contains *an* eigenvalue; `missed`
    bounds the chance that one was not seen that lies farther out than the innermost one reported, by more than 10 tol (at most
    1 %) of it.
    For k > 1 a second random start in the complement of the pairs found looks for eigenvalues that a single
    start cannot see (exact multiplicities). Raises ValueError for bad arguments, OutOfBudget if the basis does not fit `op.memory`.
    """
    goal = _checked(op, Goal(k, which, float(tol), op.noise), max_products, start)
    before = op.products
    budget = max_products if max_products is not None else 1000 + 20 * goal.count
    with progress_bar(progress, f"{k} {which} eigenpair{'s' if goal.count > 1 else ''}") as report:
        if method == "power":
            vectors, missed, scale = power_vectors(op, goal.k, which, goal.tol, budget - goal.count, seed, checkpoint, report), 1.0, 0.0
        elif method == "lobpcg":
            _fits(op, goal, (BLOCKS + (KEPT if checkpoint is not None else 0)) * (goal.k + GUARD))
            last = 2 * goal.k if which == "magnitude" else goal.count  # products of the final check
            (vectors, scale), missed = lobpcg_vectors(op, goal, budget - last, start, seed, checkpoint, report), 1.0
        else:
            vectors, missed, scale = lanczos_search(op, goal, _capacity(op, goal), budget - goal.count, start, seed, checkpoint, report)
    return certified(op, goal, vectors, missed, scale, before)


def certified(op: LinearOperator, goal: Goal, rows: Tensor, missed: float, scale: float, before: int) -> Eigenpairs:
    """Rayleigh-Ritz on the found vectors with one product each, which gives true residuals; then status and intervals."""
    basis, _ = torch.linalg.qr(rows.T.double())
    basis = basis.to(op.dtype)  # (n, c)
    image = op @ basis
    gram = op.space.inner(basis, image).cpu()
    values, turn = torch.linalg.eigh((gram + gram.T) / 2)
    order = goal.choose(values)
    values, turn = values[order], turn[:, order].to(op.device, op.dtype)
    vectors, image = basis @ turn, image @ turn
    residuals = op.space.norm(image - vectors * values.to(op.device, op.dtype)).cpu()
    largest = max(scale, float(values.abs().max()))
    converged = residuals <= goal.threshold(values, largest)
    noise_only = residuals <= 10 * goal.noise * largest
    statuses: list[Status] = ["converged" if c else "noise-limited" if n else "budget-limited" for c, n in zip(converged, noise_only, strict=True)]
    reach = residuals + goal.noise * largest
    return Eigenpairs(
        values=values, vectors=vectors, residuals=residuals, converged=converged, missed=missed, products=op.products - before,
        intervals=torch.stack([values - reach, values + reach], dim=1), status=worst_status(statuses) if len(values) == goal.count else "budget-limited",
    )  # fmt: skip


def _capacity(op: LinearOperator, goal: Goal) -> int:
    """Vectors in the basis: what memory allows, between 2 per pair + 20 and 2 per pair + 200."""
    item = op.size * torch.finfo(op.dtype).bits // 8
    fits = op.memory // item // 2 - 3 * goal.count  # a restart holds two bases; locked pairs and their images come on top
    least = min(op.size, goal.count + 3)
    _fits(op, goal, 2 * (least + 3 * goal.count))
    return max(least, min(op.size, fits, 2 * goal.count + 200))


def _fits(op: LinearOperator, goal: Goal, vectors: int) -> None:
    """OutOfBudget if memory does not hold so many vectors."""
    need = vectors * op.size * torch.finfo(op.dtype).bits // 8
    if need > op.memory:
        raise OutOfBudget(f"eigenpairs(k={goal.k}) needs at least {size_text(need)} for its basis, the budget is {size_text(op.memory)}. Ask for fewer pairs or give the operator a larger memory=.")


def _checked(op: LinearOperator, goal: Goal, max_products: int | None, start: Tensor | None) -> Goal:
    """The goal, if the operator has so many pairs, the budget suffices for them, and the start is one."""
    if goal.count > op.size:
        raise ValueError(f"eigenpairs(k={goal.k}) needs {'2 k' if goal.which == 'both' else 'k'} <= op.size = {op.size}. Ask for fewer pairs, or use op.dense() for all of them.")
    if max_products is not None and max_products < 2 * goal.count + 1:
        raise ValueError(f"eigenpairs(max_products={max_products}) cannot give {goal.count} pair(s): it takes at least {2 * goal.count + 1}.")
    if start is not None and (start.shape[:1] != (op.size,) or start.ndim > 2 or not start.is_floating_point() or not bool(torch.isfinite(start).all()) or not bool(start.any())):
        raise refusal("eigenpairs", "start", start, f"a finite, non-zero tensor of shape ({op.size},) or ({op.size}, j).")
    return goal
