r"""Diagonal blocks of one operator, and how blocks couple: traces, Frobenius norms and top eigenvalues from a product or two for each.

A low-rank stand-in K is known exactly; only A - K is sampled, with vectors that live in one block: they see no other block's scatter,
and their images give the whole column of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..results import Estimate
from .intervals import spread
from .lanczos import Krylov
from .low_rank import LowRank
from .operator import LinearOperator, Space, in_full_precision
from .runs import COLUMNS
from .trace_methods import ROUNDINGS, excess_noise

LIKELY = 0.05  # chance of a missed eigenvalue at which a run ends
BLOCK_STREAM = -(1 << 42)  # indices of samples that nothing else uses


@dataclass(frozen=True)
class BlockSums:
    r"""Of every block: `traces`; of every pair: `squares` $\|A_{ij}\|_F^2$ (b, b), symmetric, a rough standard error `squares_sem`, and `left`, $\|(A - K)_{ij}\|_F^2$."""

    traces: list[Estimate]
    squares: Tensor
    squares_sem: Tensor
    left: Tensor


@in_full_precision
def block_sums(op: LinearOperator, known: LowRank, blocks: Sequence[slice], *, num_samples: int, seed: int, report: Callable[[int], None]) -> BlockSums:
    r"""Traces and Frobenius norms of all blocks of A, from `num_samples` products per block.

    For z uniform on the sphere of radius $\sqrt{n_i}$ in block i: $\operatorname{tr} A_{ii} = \operatorname{tr} K_{ii} + \mathbb{E}\, z^\top (A - K)
    z$, $\|A_{ji}\|_F^2 = \|K_{ji}\|_F^2 + \mathbb{E}\, (\|(A z)_j\|^2 - \|(K z)_j\|^2)$. The trace's error is that of quadratic forms (see
    `intervals`); that of the squares is estimated by $\operatorname{Var} z^\top B z \le 2 \|B\|_F^2$, with norms from the same few samples.
    """
    count = len(blocks)
    jobs = [(i, s) for i in range(count) for s in range(num_samples)]
    forms, tangents = torch.zeros(count, num_samples, dtype=torch.float64), torch.zeros(count, num_samples, dtype=torch.float64)
    excess, left = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, len(jobs), COLUMNS):
        chosen = jobs[start : start + COLUMNS]
        V = torch.stack([_sample(op, blocks[i], i * num_samples + s, seed) for i, s in chosen], dim=1)
        image, there = op @ V, known @ V
        for column, (i, s) in enumerate(chosen):
            y, k = image[:, column].double(), there[:, column].double()
            rest = y - k
            where, size = blocks[i], blocks[i].stop - blocks[i].start
            forms[i, s] = float(V[where, column].double() @ rest[where])
            tangents[i, s] = max(float(rest[where] @ rest[where]) - float(forms[i, s]) ** 2 / size, 0.0)
            for j, other in enumerate(blocks):
                left[j, i] += float(rest[other] @ rest[other]) / num_samples
                excess[j, i] += float(y[other] @ y[other] - k[other] @ k[other]) / num_samples
        report(min(start + COLUMNS, len(jobs)))
    grams = torch.stack([known.block(where).gram() for where in blocks])  # (b, r, r)
    squares = torch.einsum("i,j,aij,bij->ab", known.values, known.values, grams, grams).clamp(min=0)
    sem = math.sqrt(2 / num_samples) * (left + 2 * (left * squares).sqrt())
    traces = []
    for i, where in enumerate(blocks):
        noise = max(ROUNDINGS * torch.finfo(op.dtype).eps, excess_noise(op)) * float(squares[i, i].sqrt() + left[i, i].sqrt())
        now = spread(float(known.values @ grams[i].diagonal()) + forms[i], tangents[i] * (where.stop - where.start > 1), 1.0, noise)
        traces.append(Estimate(value=now.value, sem=now.sem, dof=now.dof, skew=now.skew))
    total = (squares + excess).clamp(min=0)
    return BlockSums(traces, (total + total.T) / 2, (sem + sem.T) / 2, (left + left.T) / 2)


@dataclass(frozen=True)
class TopPair:
    """The Rayleigh quotient `value` of a block's best vector, never above the largest eigenvalue; its `residual`; and the chance that a larger one was `missed`."""

    value: float
    residual: float
    missed: float


@in_full_precision
def block_top(op: LinearOperator, known: LowRank, where: Tensor | None, *, unknown: float, tol: float, max_products: int) -> TopPair:
    r"""Largest eigenvalue of the block of the entries `where` (m,), None for all, by Lanczos until residual <= tol |value| and no larger one is likely.

    `unknown`: about $\|A - K\|_F$ on the block. What K does not see is no larger than that: where K's own top is twice as large it is the start, and a product is
    mostly enough. Elsewhere half of the start is random, and the run goes on until `Krylov.unseen` says that a larger eigenvalue would have shown.
    """
    part = known if where is None else LowRank(known.rows[:, where], known.values)
    size = op.size if where is None else len(where)
    top, start = part.top() if part.rows.numel() and bool(part.rows.any()) else (0.0, torch.zeros(size).to(part.rows))
    clear = top > 2 * unknown

    def matmat(V: Tensor) -> Tensor:
        if where is None:
            return op @ V
        whole = V.new_zeros(op.size, V.shape[1])
        whole[where] = V
        return (op @ whole)[where]

    inner = LinearOperator(matmat, size, op.dtype, op.device, Space((("", size),), op.dtype, op.device), memory=op.memory, noise=op.noise, check=False)
    krylov = Krylov(inner, min(max_products, size), start.new_zeros(0, size))
    share = 1e-3 if clear else 1.0 if top > 0 else math.inf  # of a random vector, beside K's top
    noise = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(start) / math.sqrt(size)
    krylov.begin(noise if math.isinf(share) else start + share * noise)
    while True:
        krylov.step()
        values, _, residuals = krylov.ritz()
        value, residual = float(values[-1]), float(residuals[-1])
        missed = 0.0 if clear else min(1.0, math.sqrt(2) * krylov.unseen(value + 2 * tol * abs(value), above=True))
        if krylov.exhausted or krylov.size >= min(max_products, size) or (residual <= tol * abs(value) and missed <= LIKELY):
            return TopPair(value, 0.0 if krylov.exhausted else residual, 0.0 if size <= krylov.size else missed)


def _sample(op: LinearOperator, where: slice, index: int, seed: int) -> Tensor:
    """Uniform on the sphere of radius sqrt(entries) of one block, zero elsewhere."""
    whole = torch.zeros(op.size, dtype=op.dtype, device=op.device)
    size = where.stop - where.start
    z = op.space.sample(seed, BLOCK_STREAM + index, "normal")[where]
    whole[where] = z * (math.sqrt(size) / float(op.space.norm(z)))
    return whole
