"""The Lanczos search behind `eigenpairs`: pairs are locked as they converge, and looked for anew in their complement.

One random start cannot see a second eigenvector of an exactly multiple eigenvalue, and may be slow to tell a cluster from a single
value. So once all wanted pairs have converged they are locked, and a fresh random start in their complement goes on until it is
unlikely that it would not have seen a better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..progress import Report
from .checkpoints import State, checkpointing, job_description
from .lanczos import Krylov, orthogonalise
from .operator import LinearOperator

Which = Literal["largest", "smallest", "magnitude", "both"]
Outcome = Literal["go on", "lock", "done"]
CONFIDENT = 0.01  # a chance at which the search for unseen eigenvalues ends


@dataclass(frozen=True)
class Goal:
    """What is asked for, and when it is reached."""

    k: int
    which: Which
    tol: float
    noise: float

    def choose(self, values: Tensor) -> Tensor:
        """Indices of the wanted values, in the order of the result."""
        if self.which == "largest":
            return values.argsort(descending=True)[: self.k]
        if self.which == "smallest":
            return values.argsort()[: self.k]
        if self.which == "magnitude":
            return values.abs().argsort(descending=True)[: self.k]
        order = values.argsort(descending=True)
        return order if len(order) <= 2 * self.k else torch.cat([order[: self.k], order[-self.k :]])

    @property
    def count(self) -> int:
        return 2 * self.k if self.which == "both" else self.k

    def threshold(self, values: Tensor, largest: float) -> Tensor:
        """Residual below which a pair counts as converged."""
        return self.tol * values.abs().clamp(min=self.noise * largest)

    def fences(self, values: Tensor, largest: float) -> list[tuple[float, bool]]:
        """(value, above): what no unseen eigenvalue may lie beyond. The innermost wanted ones, widened by 10 tol, at most 1 %, and by round-off."""
        wanted = values[self.choose(values)]
        margin = min(10 * self.tol, 0.01)
        blur = 10 * self.noise * largest
        top, bottom = float(wanted[min(self.k, len(wanted)) - 1]), float(wanted[-1] if self.which == "smallest" else wanted[-self.k :][0])
        if self.which == "magnitude":
            reach = float(wanted.abs().min()) * (1 + margin) + blur
            return [(reach, True), (-reach, False)]
        up, down = top + margin * abs(top) + blur, bottom - margin * abs(bottom) - blur
        return {"largest": [(up, True)], "smallest": [(down, False)], "both": [(up, True), (down, False)]}[self.which]


class Forecast:
    """Expected number of products, from the rate at which the largest open residual falls."""

    def __init__(self, extra: int, report: Report) -> None:
        self.extra, self.report, self.first = extra, report, (0, 1.0)

    def show(self, products: int, ratio: float, value: float) -> None:
        ratio = max(ratio, 1.0)
        if not self.first[0] or ratio > self.first[1]:
            self.first = (products, ratio)
        steps, fall = products - self.first[0], math.log(self.first[1]) - math.log(ratio)
        left = math.log(ratio) * steps / fall if fall > 0 else 2 * products
        self.report(products, int(products + left) + self.extra, f"value {value:.4g}")


@dataclass
class Search:
    """Where a Lanczos search stands: pairs locked so far and the subspace at work in their complement."""

    krylov: Krylov
    values: Tensor  # of the locked pairs (c,)
    starts: int = 0  # random starts used
    products: int = 0

    @property
    def locked(self) -> Tensor:
        return self.krylov.deflated

    def state(self) -> State:
        k = self.krylov
        numbers = torch.tensor([self.starts, self.products, k.size, k.beta, k.log_betas, k.scale, k.capacity], dtype=torch.float64)
        return {
            "basis": k.basis[: k.size + 1], "T": k.T[: k.size, : k.size].clone(), "locked": self.locked, "values": self.values,
            "discarded": k.discarded, "numbers": numbers,
        }  # fmt: skip

    @classmethod
    def resumed(cls, op: LinearOperator, goal: Goal, capacity: int, state: State) -> Search:
        """With the capacity that it had, or with `capacity` where memory allows no more now."""
        starts, products, size, beta, log_betas, scale, earlier = state["numbers"].tolist()
        capacity = min(int(earlier), capacity)
        krylov = Krylov(op, max(capacity, int(size)), state["locked"].to(op.device), size=int(size), beta=beta, log_betas=log_betas, scale=scale, discarded=state["discarded"].cpu())
        krylov.basis[: krylov.size + 1] = state["basis"]
        krylov.T[: krylov.size, : krylov.size] = state["T"].cpu()
        op.products += int(products)
        search = cls(krylov, state["values"].cpu(), int(starts), int(products))
        while krylov.size >= capacity:
            krylov.compress(_survivors(search, goal))
        if krylov.capacity > capacity:
            krylov.basis, krylov.T, krylov.capacity = krylov.basis[: capacity + 1].clone(), krylov.T[:capacity, :capacity].clone(), capacity
        return search


def lanczos_search(
    op: LinearOperator, goal: Goal, capacity: int, budget: int, start: Tensor | None, seed: int, checkpoint: str | Path | None, report: Report
) -> tuple[Tensor, float, float]:
    """Rows (c, n) that span the wanted pairs, the chance that one was missed, and the largest |Ritz value| seen."""
    job = job_description(op, checkpoint, what="eigenpairs", method="lanczos", k=goal.k, which=goal.which, tol=goal.tol, seed=seed, start=start)
    with checkpointing(checkpoint, job) as (found, keep):
        if found is not None:
            search = Search.resumed(op, goal, capacity, found)
        else:
            empty = torch.zeros(0, op.size, dtype=op.dtype, device=op.device)
            search = Search(Krylov(op, capacity, empty), torch.zeros(0, dtype=torch.float64))
            _begin(search, start, seed)
        eta = Forecast(goal.count, report)
        while search.products < budget:
            search.krylov.step()
            search.products += 1
            outcome = _judge(search, goal, eta)
            if outcome == "done":
                break
            if outcome == "lock":
                if not _lock(search, goal, seed):
                    break
            elif search.krylov.size == search.krylov.capacity:
                search.krylov.compress(_survivors(search, goal))
            keep(search.state())
    return _collect(search, goal, 100.0 if start is not None and not search.starts else 1.0)


def _begin(search: Search, start: Tensor | None, seed: int) -> bool:
    """Start the subspace: from the user's guess with a random hundredth, or from a random vector."""
    op = search.krylov.op
    vector = op.space.sample(seed, search.starts, "normal")
    if start is not None and not search.starts:
        guess = start.reshape(op.size, -1).sum(dim=1)
        vector = guess / op.space.norm(guess).to(op.dtype) + 0.01 * vector / op.space.norm(vector).to(op.dtype)
    else:
        search.starts += 1
    return search.krylov.begin(vector)


def _judge(search: Search, goal: Goal, eta: Forecast) -> str:
    """What to do after a step: "go on", "lock" what has converged and start anew in its complement, or "done"."""
    krylov = search.krylov
    if krylov.size > 40 and krylov.size % 5 and not krylov.exhausted and krylov.size < krylov.capacity:
        return "go on"  # the small eigenproblem is not free
    values, _, estimates = krylov.ritz()
    both = torch.cat([search.values, values])
    if len(both) < goal.count and not krylov.exhausted:
        return "go on"
    largest = krylov.scale
    wanted = goal.choose(both)
    active = wanted[wanted >= len(search.values)] - len(search.values)
    limits = torch.maximum(0.5 * goal.threshold(values, largest), torch.full_like(values, 0.5 * goal.noise * largest))
    open_pairs = active[estimates[active] > limits[active]]
    eta.show(search.products, float((estimates[active] / limits[active]).max()) if len(active) else 1.0, float(both[wanted[0]]))
    if krylov.exhausted:
        complete = len(search.values) + krylov.size >= krylov.op.size
        enough = len(wanted) == goal.count and search.starts > 0 and (goal.count == 1 or not len(active))
        return "done" if complete or enough else "lock"
    if len(open_pairs):
        return "go on"
    if len(active):  # all wanted pairs have converged, some of them just now
        return "lock" if goal.count > 1 else "done"
    unseen = sum(krylov.unseen(fence, above=above) for fence, above in goal.fences(both, largest))
    ends = [int(values.argmax())] if goal.which == "largest" else [int(values.argmin())] if goal.which == "smallest" else [int(values.argmax()), int(values.argmin())]
    settled = all(float(estimates[end]) <= float(limits[end]) for end in ends)
    return "done" if unseen <= CONFIDENT or settled else "go on"


def _lock(search: Search, goal: Goal, seed: int) -> bool:
    """Move the wanted pairs of the subspace to the locked ones and start anew in their complement; False if that is empty."""
    krylov = search.krylov
    values, coefficients, _ = krylov.ritz()
    both = torch.cat([search.values, values])
    wanted = goal.choose(both)
    if krylov.exhausted:  # all are eigenpairs; those not wanted now may be later, when the complement gives no better
        room = max(krylov.capacity - len(search.values), 0)
        wanted = torch.cat([wanted, torch.tensor([i for i in range(len(search.values), len(both)) if i not in set(wanted.tolist())], dtype=torch.long)[:room]])
    old, new = wanted[wanted < len(search.values)], wanted[wanted >= len(search.values)] - len(search.values)
    if krylov.exhausted:
        old = torch.arange(len(search.values))
    rows = krylov.vectors(coefficients[:, new])
    locked = search.locked[old]
    for row in rows:  # round-off only: the subspace is orthogonal to the locked pairs
        clean, _ = orthogonalise(krylov.op, locked, row)
        locked = torch.cat([locked, (clean / krylov.op.space.norm(clean).to(clean.dtype))[None]])
    search.values = torch.cat([search.values[old], values[new]])
    search.krylov = Krylov(krylov.op, krylov.capacity, locked, scale=krylov.scale)
    return len(locked) < krylov.op.size and any(_begin(search, None, seed) for _ in range(3))


def _survivors(search: Search, goal: Goal) -> Tensor:
    """Indices of the Ritz vectors that a full basis is compressed to: the wanted ones and as many again toward the inside."""
    size = search.krylov.size
    values, _, _ = search.krylov.ritz()
    wanted = len(goal.choose(torch.cat([search.values, values])))
    keep = min(wanted + (size - wanted) // 2, size - 2)
    return Goal(keep if goal.which != "both" else max(keep // 2, 1), goal.which, goal.tol, goal.noise).choose(values)


def _collect(search: Search, goal: Goal, factor: float) -> tuple[Tensor, float, float]:
    krylov = search.krylov
    if not krylov.size:
        return search.locked[goal.choose(search.values)], 0.0 if len(search.locked) >= krylov.op.size else 1.0, krylov.scale
    values, coefficients, _ = krylov.ritz()
    both = torch.cat([search.values, values])
    wanted = goal.choose(both)
    old, new = wanted[wanted < len(search.values)], wanted[wanted >= len(search.values)] - len(search.values)
    rows = torch.cat([search.locked[old], krylov.vectors(coefficients[:, new])])
    chance = sum(krylov.unseen(fence, above=above) for fence, above in goal.fences(both, krylov.scale))
    return rows, min(1.0, factor * chance), krylov.scale
