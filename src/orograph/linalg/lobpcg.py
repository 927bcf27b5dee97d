"""LOBPCG: a block of vectors, their residuals and their last steps; its memory does not grow with the iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Report
from .lanczos import orthogonalise
from .operator import LinearOperator
from .search import Goal

GUARD = 2  # vectors beyond those asked for, which keep a cluster at the edge of the block from slowing it down
BLOCKS = 17  # held at the worst, as measured
NEGLIGIBLE = 1e-3  # share of a residual that must be new, or it gives no direction


def lobpcg_vectors(op: LinearOperator, goal: Goal, budget: int, start: Tensor | None, seed: int, report: Report) -> tuple[Tensor, float]:
    r"""Rows (c, n) and the largest |Ritz value| seen. The rows are the best of $\operatorname{span}(X, R, P)$ over and over, X the block, $R = AX - X\Lambda$, P the part of the last step outside X.

    Locally optimal, without a preconditioner. One product per vector that is not yet good. P is made
    orthogonal in the coordinates of an orthonormal basis (Hetmaniuk and Lehoucq 2006, doi:10.1016/j.jcp.2006.02.007), so that AP follows without a product. Knyazev 2001,
    doi:10.1137/S1064827500366124.
    """
    ends = {"both": (1.0, -1.0), "magnitude": (1.0, -1.0), "largest": (1.0,), "smallest": (-1.0,)}[goal.which]
    found = torch.zeros(0, op.size, dtype=op.dtype, device=op.device)
    spent, largest, floor = 0, 0.0, 0.0
    for turn, sign in enumerate(ends):
        share = (budget - spent) // (len(ends) - turn)
        rows, values, used, largest = _end(op, goal, sign, share, start, seed + turn, largest, floor, report)
        found, spent = torch.cat([found, rows]), spent + used
        floor = float(values.abs().min()) if goal.which == "magnitude" else 0.0  # what is smaller will not be among the k
    return found, largest


def _end(
    op: LinearOperator, goal: Goal, sign: float, budget: int, start: Tensor | None, seed: int, largest: float, floor: float, report: Report
) -> tuple[Tensor, Tensor, int, float]:
    """(k rows at one end of the spectrum, their values, products, largest |Ritz value|)."""
    k = goal.k
    block = min(k + GUARD, op.size, max(budget, 1))
    guess = [] if start is None else list(start.reshape(op.size, -1).T.to(op.device, op.dtype))
    X = _independent(op, [], [*guess, *(op.space.sample(seed, i, "normal") for i in range(block))], block)
    AX = (op @ X.T).T
    P = AP = X[:0]
    used = block
    while True:
        values = _gram(op, X, AX).diagonal() * sign
        R = AX - (values * sign).to(X)[:, None] * X
        residuals = torch.stack([op.space.norm(row) for row in R]).cpu()
        largest = max(largest, float(values.abs().max()))
        open_ = residuals > torch.maximum(0.5 * goal.threshold(values.abs().clamp(min=floor), largest), torch.tensor(goal.noise * largest))
        report(used, budget, f"{sign * float(values[0]):.4g}, {int((~open_[:k]).sum())} of {k} converged")
        left = budget - used
        if not bool(open_[:k].any()) or left < 1:
            return X[:k], values[:k], used, largest
        W = _independent(op, [X, P], [R[i] for i in torch.nonzero(open_)[:, 0]][:left], left)
        if not len(W):
            return X[:k], values[:k], used, largest
        S, AS = torch.cat([X, P, W]), torch.cat([AX, AP, (op @ W.T).T])
        used, size = used + len(W), len(X)
        del X, AX, P, AP, R, W  # S and AS hold them all
        G = _gram(op, S, AS)
        ritz, vectors = torch.linalg.eigh(sign * (G + G.T) / 2)
        largest = max(largest, float(ritz.abs().max()))
        C = vectors.flip(1)[:, :size]  # (3 blocks, block), the best first
        D = C.clone()
        D[:size] = 0
        D = D - C @ (C.T @ D)
        U, lengths, _ = torch.linalg.svd(D, full_matrices=False)
        D = U[:, lengths > 1e-10 * lengths.max().clamp(min=1e-300)] if float(lengths.max()) > 0 else U[:, :0]
        C, D = C.to(S), D.to(S)
        X, P = C.T @ S, D.T @ S
        del S
        AX, AP = C.T @ AS, D.T @ AS
        del AS


def _gram(op: LinearOperator, S: Tensor, AS: Tensor) -> Tensor:
    return op.space.inner(S.T, AS.T).cpu()


def _independent(op: LinearOperator, against: list[Tensor], rows: list[Tensor], most: int) -> Tensor:
    """Orthonormal rows from those given, orthogonal to all in `against`; what is nearly in their span is left out."""
    basis = torch.cat([*against, torch.zeros(0, op.size, dtype=op.dtype, device=op.device)])
    first = len(basis)
    for row in rows:
        length = float(op.space.norm(row))
        new, _ = orthogonalise(op, basis, row / length) if length > 0 else (row, None)
        rest = float(op.space.norm(new))
        if length > 0 and rest > NEGLIGIBLE * torch.finfo(op.dtype).eps ** 0.5 and len(basis) - first < most:
            new, _ = orthogonalise(op, basis, new / rest)
            basis = torch.cat([basis, (new / op.space.norm(new).to(op.dtype))[None]])
    return basis[first:]
