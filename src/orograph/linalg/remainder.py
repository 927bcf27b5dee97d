r"""Trace of what Krylov subspaces leave: $\operatorname{tr} A = \operatorname{tr} T + \operatorname{tr} P A P$ with $P = I - Q Q^\top$.

The first part is known from the runs. The second is a mean of quadratic forms; where A is a sum of parts (micro-batches), every part
gets a vector of its own: $\sum_b x_b^\top A_b x_b$ has variance $\sum_b 2 \|P A_b P\|^2$ in place of $2 \|\sum_b P A_b P\|^2$, which is
less wherever parts agree, at the price of the same product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import State
from .intervals import Moments, spread
from .operator import LinearOperator
from .runs import COLUMNS, Runs, share_memory
from .trace_methods import ROUNDINGS, dots, excess_noise

LEAST = 8  # vectors before a run is judged: a random start sees the ends of the spectrum only after a few
MOST = 400  # vectors in a basis: beyond, its own algebra costs more than products
PART_STRIDE = 1 << 32  # between the sample indices of one part and the next


def no_forms() -> State:
    """Nothing drawn yet."""
    none = torch.zeros(0, dtype=torch.float64)
    return {"forms": none, "tangents": none, "squares": none}


@dataclass(frozen=True)
class Deflation:
    """What is known exactly: orthonormal rows Y (r, n), the trace on their span, and the size that its rounding is relative to."""

    rows: Tensor
    trace: float
    magnitude: float


def more_forms(op: LinearOperator, out: Deflation, state: State, count: int, seed: int) -> State:
    """`count` further forms on the complement of what is taken out, at one product each."""
    drawn, rows = len(state["forms"]), out.rows
    dimension = op.size - len(rows)
    totals = {name: torch.zeros(count, dtype=torch.float64) for name in ("forms", "tangents", "squares")}
    given: list[Tensor] = []  # the vectors of the part at work, and their squared norms

    def vectors(part: int) -> Tensor:
        indices = range(drawn + part * PART_STRIDE, drawn + part * PART_STRIDE + count)
        V = op.space.samples(seed, indices, "sphere")
        along = op.space.inner(rows.T, V).reshape(len(rows), count)
        X = torch.addmm(V.T, along.T.to(op.dtype), rows, alpha=-1).T if len(rows) else V  # each vector in one piece of memory
        given[:] = [X, op.size - (along**2).sum(dim=0).cpu()]
        return X

    def take(image: Tensor) -> None:
        stretch = dimension / given[1]
        inside = op.space.inner(rows.T, image).reshape(len(rows), count).cpu()
        forms = stretch * dots(op, given[0], image)
        squares = (stretch * (dots(op, image, image) - (inside**2).sum(dim=0))).clamp_min(0.0)
        totals["forms"] += forms
        totals["tangents"] += (squares - forms**2 / dimension).clamp_min(0.0)
        totals["squares"] += squares

    op.apart(vectors, take)
    return {name: torch.cat([state[name], total]) for name, total in totals.items()}


def remainder_moments(op: LinearOperator, out: Deflation, state: State) -> Moments:
    """The trace of A and the spread of its error."""
    epsilon = max(ROUNDINGS * torch.finfo(op.dtype).eps, excess_noise(op))
    noise = epsilon * (out.magnitude + float(state["squares"].mean().sqrt()))
    return spread(out.trace + state["forms"], state["tangents"], 1.0, noise)


def worth_a_vector(runs: Runs, target: Callable[[float], float], left: int) -> bool:
    r"""Whether one more vector in the basis takes more off the variance than a further form would.

    For a half-width $\tau$ = `target(trace)`, N = $2 z^2 \|PAP - \mu P\|_F^2 / \tau^2$ forms are needed: a vector is worth its product
    while it lowers N by more than one. Where only `left` products remain, the balance is with the last form that they allow.
    """
    trace, mean, square = runs.remainder()
    worth = square / max(left, 1)
    if (tau := target(trace)) > 0:
        worth = max(worth, tau**2 / (2 * 1.96**2))
    return runs.gain(mean) > worth


class KrylovTrace:
    """The trace by runs and forms together, as a state that grows: the estimator behind `trace(method="auto")`."""

    def __init__(self, op: LinearOperator, seed: int, rel_error: float | None, max_products: int, state: State | None) -> None:
        self.op, self.seed, self.rel_error, self.room = op, seed, rel_error, max_products
        room = share_memory(op, min(max_products // 2, MOST, max(op.size - 2, 0)), 0)
        self.columns = room.columns
        self.runs = Runs(op, room.capacity, spare=room.spare) if state is None else Runs.resumed(op, room.capacity, state, spare=room.spare)
        self.closed = state is not None and bool(state["closed"])
        self.out: Deflation | None = None

    def grow(self, state: State, budget: int) -> State | None:
        """The state after one more vector in the basis, or a few more forms; None if `budget` is spent."""
        before, spent = self.op.products, int(state["products"])
        if not self.closed and self.runs.pilots is None and self.runs.capacity > LEAST:
            self.runs.watch(self.seed)
        elif not self.closed:
            self.closed = self.runs.pilots is None or not self._extend(self.room - spent)
        if self.op.products == before:
            least = spent - len(state["forms"]) + COLUMNS  # the basis may have taken what was meant for the first look
            count = min(self.columns, max(budget, min(least, self.room)) - spent)
            if count < 1:
                return None
            self.out = self.out or Deflation(*self.runs.deflation())
            state = state | more_forms(self.op, self.out, state, count, self.seed)
        gone = {"products": state["products"] + (self.op.products - before), "closed": torch.tensor(self.closed)}
        return state | self.runs.state() | gone

    def _extend(self, left: int) -> bool:
        runs = self.runs
        if runs.full:
            return False
        if not runs.each or runs.exhausted:
            if not runs.begin(self.seed):
                return False
        elif runs.last.size >= LEAST and not worth_a_vector(runs, self._target, left):
            return False
        runs.step()
        return True

    def moments(self, state: State) -> Moments:
        """What the state says of the trace."""
        return remainder_moments(self.op, self.out or Deflation(*self.runs.deflation()), state)

    def _target(self, trace: float) -> float:
        return self.rel_error * abs(trace) if self.rel_error is not None else 0.0
