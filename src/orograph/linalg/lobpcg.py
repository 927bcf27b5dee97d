"""LOBPCG: a block of vectors, their residuals and their last steps; its memory does not grow with the iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..progress import Report
from .checkpoints import State, checkpointing, job_description
from .lanczos import orthogonalise
from .operator import LinearOperator
from .search import Goal

GUARD = 2  # vectors beyond those asked for, which keep a cluster at the edge of the block from slowing it down
BLOCKS = 17  # held at the worst, as measured
KEPT = 8  # more, where a checkpoint is written: the last state, and its copy while it is saved
NEGLIGIBLE = 1e-3  # share of a residual that must be new, or it gives no direction


@dataclass
class _Block:
    """Where one end of the spectrum stands: the block X, its last step P, their images, and products used."""

    X: Tensor
    AX: Tensor
    P: Tensor
    AP: Tensor
    used: int

    def state(self) -> State:
        return {"X": self.X, "AX": self.AX, "P": self.P, "AP": self.AP}


def lobpcg_vectors(op: LinearOperator, goal: Goal, budget: int, start: Tensor | None, seed: int, checkpoint: str | Path | None, report: Report) -> tuple[Tensor, float]:
    r"""Rows (c, n) and the largest |Ritz value| seen. The rows are the best of $\operatorname{span}(X, R, P)$ over and over, X the block, $R = AX - X\Lambda$, P the part of the last step outside X.

    Locally optimal, without a preconditioner. One product per vector that is not yet good. P is made
    orthogonal in the coordinates of an orthonormal basis (Hetmaniuk and Lehoucq 2006, doi:10.1016/j.jcp.2006.02.007), so that AP follows without a product. Knyazev 2001,
    doi:10.1137/S1064827500366124.
    """
    ends = {"both": (1.0, -1.0), "magnitude": (1.0, -1.0), "largest": (1.0,), "smallest": (-1.0,)}[goal.which]
    job = job_description(op, checkpoint, what="eigenpairs", method="lobpcg", k=goal.k, which=goal.which, tol=goal.tol, seed=seed, start=start)
    with checkpointing(checkpoint, job) as (earlier, keep):
        found = torch.zeros(0, op.size, dtype=op.dtype, device=op.device) if earlier is None else earlier["found"].to(op.device)
        first, spent, largest, floor, used = (0, 0, 0.0, 0.0, 0) if earlier is None else earlier["numbers"].tolist()
        op.products += int(spent + used)
        block = None if earlier is None or "X" not in earlier else _Block(**{name: earlier[name].to(op.device) for name in ("X", "AX", "P", "AP")}, used=int(used))
        for turn in range(int(first), len(ends)):
            share = int(budget - spent) // (len(ends) - turn)
            numbers = [turn, spent, largest, floor]

            def note(at: _Block, scale: float, found: Tensor = found, numbers: list[float] = numbers) -> None:
                keep({**at.state(), "found": found, "numbers": torch.tensor([*numbers[:2], scale, numbers[3], at.used], dtype=torch.float64)})

            rows, values, used, largest = _end(op, goal, ends[turn], share, block or _begin(op, goal, share, start, seed + turn), largest, floor, report, note)
            found, spent, block = torch.cat([found, rows]), spent + used, None
            floor = float(values.abs().min()) if goal.which == "magnitude" else 0.0  # what is smaller will not be among the k
            keep({"found": found, "numbers": torch.tensor([turn + 1, spent, largest, floor, 0], dtype=torch.float64)})
    return found, largest


def _begin(op: LinearOperator, goal: Goal, budget: int, start: Tensor | None, seed: int) -> _Block:
    """A block of guesses and random vectors, with its products."""
    size = min(goal.k + GUARD, op.size, max(budget, 1))
    guess = [] if start is None else list(start.reshape(op.size, -1).T.to(op.device, op.dtype))
    X = _independent(op, [], [*guess, *(op.space.sample(seed, i, "normal") for i in range(size))], size)
    return _Block(X, (op @ X.T).T, X[:0], X[:0], size)


def _end(
    op: LinearOperator, goal: Goal, sign: float, budget: int, block: _Block, largest: float, floor: float, report: Report, note: Callable[[_Block, float], None]
) -> tuple[Tensor, Tensor, int, float]:
    """(k rows at one end of the spectrum, their values, products, largest |Ritz value|)."""
    k, used = goal.k, block.used
    X, AX, P, AP = block.X, block.AX, block.P, block.AP
    del block
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
        note(_Block(X, AX, P, AP, used), largest)


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
