r"""Trace of what Krylov subspaces leave: $\operatorname{tr} A = \operatorname{tr} T + \operatorname{tr} P A P$ with $P = I - Q Q^\top$.

The first part is known from the runs. The second is a mean of quadratic forms; where A is a sum of parts (micro-batches), every part
gets a vector of its own: $\sum_b x_b^\top A_b x_b$ has variance $\sum_b 2 \|P A_b P\|^2$ in place of $2 \|\sum_b P A_b P\|^2$, which is
less wherever parts agree, at the price of the same product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import State
from .intervals import Moments, combine, spread
from .operator import LinearOperator
from .runs import COLUMNS, PER_COLUMN, PILOT_STREAM, PILOTS, Room, Runs, share_memory
from .trace_methods import (
    ROUNDINGS,
    dots,
    excess_noise,
    extend_sketch,
    start_state,
    xtrace_forms,
)

LEAST = 8  # vectors before a run is judged: a random start sees the ends of the spectrum only after a few
MOST = 400  # vectors in a basis: beyond, its own algebra costs more than products
FORMS_WORTH_A_SKETCH = 16  # forms still needed, below which no sketch is begun
PER_SAMPLE = 5  # vectors of a sketch: Q, A Q, their old copies while they grow, and E = (I - QQ')AQ
LEAVE_ONE_OUT = 0.5  # of a form: what a leave-one-out estimate is worth, since they depend on each other
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
    return runs.gain(mean) > form_worth(square, target(trace), left)


def form_worth(square: float, target: float, left: int) -> float:
    r"""What $\|PAP - \mu P\|_F^2$ may grow by for one form less, at the half-width `target` and `left` products."""
    return max(square / max(left, 1), target**2 / (2 * 1.96**2))


class KrylovTrace:
    r"""The trace by runs, a block sketch and forms: the estimator behind `trace(method="auto")`.

    A Krylov run first: it finds a vector of each large eigenvalue at one product per vector. It finds no more
    than one, so that of many equal eigenvalues all others stay in the rest. Where the pilots say that much
    is left, their images begin a block sketch of the rest, which grows while its vectors pay (XTrace in
    the run's complement, at two products per vector and sample). Forms on what both leave make up the trace,
    weighted with the sketch's leave-one-out estimates. A state that grows by a few products at a time.
    """

    def __init__(self, op: LinearOperator, seed: int, rel_error: float | None, max_products: int, state: State | None) -> None:
        self.op, self.seed, self.rel_error, self.room = op, seed, rel_error, max_products
        room = share_memory(op, min(max_products // 2, MOST, max(op.size - 2, 0)), 0, state)
        self.columns, self.forms_lost = room.columns, room.forms_lost
        self.sketch: BlockSketch | None = None
        self.out: Deflation | None = None
        self.closed = state is not None and bool(state["closed"])
        self.runs = Runs.resumed(op, room, state)
        if state is not None and "R" in state:
            names = ("Q", "AQ", "R", "drawn", "rest")
            self.sketch = BlockSketch(self.runs, seed, {name: state[name] for name in names}, self.columns)

    def grow(self, state: State, budget: int) -> State | None:
        """The state after one more vector in the basis, or a few more forms; None if `budget` is spent."""
        before, spent = self.op.products, int(state["products"])
        if not self.closed and self.runs.pilots is None and self.runs.capacity > LEAST:
            self.runs.watch(self.seed)
        elif not self.closed:
            self.closed = self.runs.pilots is None or not self._extend(self.room - spent)
        if self.op.products == before:
            drawn = len(state["forms"])
            least = spent - drawn + (COLUMNS if self.sketch is None else drawn)  # the basis may have taken what was meant for the first look
            count = min(self.columns, max(budget, min(least, self.room)) - spent)
            if count < 1:
                return None
            state = state | more_forms(self.op, self._deflation(), state, count, self.seed)
        gone = {"products": state["products"] + (self.op.products - before), "closed": torch.tensor(self.closed)}
        return state | self.runs.state() | (self.sketch.state if self.sketch else {}) | gone

    def _extend(self, left: int) -> bool:
        """A few more vectors in the basis; False if none is worth its products."""
        if self.sketch is not None:
            return self.sketch.pays(self._target, left) and self.sketch.grow(min(PILOTS, left // 2))
        runs = self.runs
        if not runs.each:
            runs.begin(self.seed)
        run = runs.last
        judged = run.size >= LEAST or (run.size and run.exhausted)
        if not runs.full and not (run.size and run.exhausted) and (not judged or worth_a_vector(runs, self._target, left)):
            runs.step()
            return True
        trace, _, square = runs.remainder()
        if left < PILOTS or square < FORMS_WORTH_A_SKETCH * form_worth(square, self._target(trace), left):
            return False
        closed = Runs.resumed(self.op, Room(runs.size, runs.spare, self.columns), runs.state())  # gives back the memory that it has not used
        self.sketch = BlockSketch.begun(closed, self.seed, self.columns)
        if self.sketch is not None:
            self.runs = closed
        return self.sketch is not None

    def _deflation(self) -> Deflation:
        if self.out is None:
            known = Deflation(*self.runs.deflation())
            self.out = known if self.sketch is None else self.sketch.deflation(known)
        return self.out

    def moments(self, state: State) -> tuple[Moments, float]:
        """What the state says of the trace, and how many forms would say as much."""
        found: list[Moments] = []
        square = 0.0
        if self.sketch is not None:
            sketched, square = self.sketch.moments()
            found.append(sketched)
        if len(state["forms"]):
            found.append(remainder_moments(self.op, self._deflation(), state))
            square = float(state["tangents"].mean())
        now = found[0] if len(found) == 1 else combine(*found)
        return now, 2 * square / now.sem**2 if now.sem else math.inf

    def _target(self, trace: float) -> float:
        return self.rel_error * abs(trace) if self.rel_error is not None else 0.0


class BlockSketch:
    """XTrace on the complement of the runs, P A P; the pilots are its first samples.

    The state holds the sketch, and in "rest" what its last samples said: the squared norm and the mean
    eigenvalue of what was left before them, and how much each of their vectors took off the squared norm.
    """

    def __init__(self, runs: Runs, seed: int, state: State, columns: int) -> None:
        self.op, self.seed, self.state, self.captured = runs.op, seed, state, runs.captured
        fits = runs.op.memory // (runs.op.size * torch.finfo(runs.op.dtype).bits // 8)
        held = 2 * len(runs.buffer) + 2 * PILOTS + PER_COLUMN * columns
        self.room = (fits - held) // PER_SAMPLE
        self.magnitude = sum(float(run.T.abs().diagonal().sum()) for run in runs.each)
        rows = runs.rows

        def rest(V: Tensor) -> Tensor:
            return _outside(self.op, rows.T, self.op @ _outside(self.op, rows.T, V))

        op = self.op
        self.rest = LinearOperator(rest, op.size, op.dtype, op.device, op.space, memory=op.memory, noise=op.noise)

    @classmethod
    def begun(cls, runs: Runs, seed: int, columns: int) -> BlockSketch | None:
        """With the images of the pilots, which are known, as its first ones: one product per pilot. None where memory is short."""
        assert runs.pilots is not None
        start = {name: t for name, t in start_state(runs.op, "xtrace", 0).items() if name != "products"}
        sketch = cls(runs, seed, start, columns)
        if sketch.room < PILOTS:
            return None
        _, mean, square = runs.remainder()
        sketch._extend(runs.pilots[1], mean, square)
        return sketch

    def pays(self, target: Callable[[float], float], left: int) -> bool:
        """Whether a further vector, with the form that its sample gives, is worth two products."""
        gain, square, mean = self.state["rest"].tolist()
        rank = self.state["Q"].shape[1]
        trace = self.captured + self._trace() + mean * (self.op.size - rank)
        worth = form_worth(square, target(trace), left)
        return bool(left >= 2 and gain > (2 - LEAVE_ONE_OUT) * worth)

    def grow(self, count: int) -> bool:
        """`count` further samples, at two products each; False if memory holds no more."""
        Q, AQ, drawn = self.state["Q"], self.state["AQ"], int(self.state["drawn"])
        count = min(count, self.room - drawn)
        if count < 1:
            return False
        indices = range(PILOT_STREAM + drawn, PILOT_STREAM + drawn + count)
        V = self.op.space.samples(self.seed, indices, "sphere")
        images = self.rest @ V
        along = self.op.space.inner(Q, V)
        outside = V - Q @ along.to(V.dtype)
        left = _outside(self.op, Q, images - AQ @ along.to(V.dtype))
        forms, dimension = dots(self.op, outside, left), self.op.size - Q.shape[1]
        squares = dots(self.op, left, left) - forms**2 / dimension
        self._extend(images, float(forms.mean()) / dimension, max(float(squares.mean()), 0.0))
        return True

    def _extend(self, images: Tensor, mean: float, square: float) -> None:
        old = self.state["Q"].shape[1]
        grown = extend_sketch(self.rest, self.state, images)
        Q, fresh, image = grown["Q"], grown["Q"][:, old:], grown["AQ"][:, old:]
        inside = self.op.space.inner(Q, image)
        core = inside[old:].cpu() - mean * torch.eye(fresh.shape[1], dtype=torch.float64)
        coupled = (self.op.space.norm(image) ** 2).sum() - (inside**2).sum()
        gain = (float((core**2).sum()) + 2 * float(coupled)) / max(fresh.shape[1], 1)
        rest = torch.tensor([gain, square, mean], dtype=torch.float64)
        self.state = {name: tensor.contiguous() for name, tensor in grown.items()} | {"rest": rest}

    def _trace(self) -> float:
        """Of the rest on the span of the sketch."""
        return float(dots(self.op, self.state["Q"], self.state["AQ"]).sum())

    def deflation(self, out: Deflation) -> Deflation:
        """What is known exactly, of the runs and of the sketch."""
        Q, known = self.state["Q"], dots(self.op, self.state["Q"], self.state["AQ"])
        rows = torch.cat([out.rows, Q.T])
        return Deflation(rows, out.trace + float(known.sum()), out.magnitude + float(known.abs().sum()))

    def moments(self) -> tuple[Moments, float]:
        """The trace of A by the sketch's leave-one-out estimates, and the squared norm of what they leave."""
        values, tangents, dependence, scale = xtrace_forms(self.rest, self.state, self.seed, PILOT_STREAM)
        epsilon = max(ROUNDINGS * torch.finfo(self.op.dtype).eps, excess_noise(self.op))
        noise = epsilon * (self.magnitude + scale)
        return spread(self.captured + values, tangents, dependence, noise), float(tangents.mean())


def _outside(op: LinearOperator, Q: Tensor, V: Tensor) -> Tensor:
    """The part of V (n, k) outside the span of the orthonormal columns Q, in two passes."""
    for _ in range(2 if Q.shape[1] else 0):
        V = V - Q @ op.space.inner(Q, V).to(V.dtype)
    return V
