"""The products behind `spectrum`: a run for the ends, further starts for what it cannot have seen, forms for the trace.

One call of `advance` is one product, or one block of forms; everything between two calls is in `state`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import OutOfBudget
from ..memory import size_text
from ..results import Estimate
from .checkpoints import Keep, State
from .operator import LinearOperator
from .remainder import MOST, Deflation, more_forms, no_forms, remainder_moments, worth_a_vector
from .runs import COLUMNS, PILOTS, Runs, share_memory
from .search import CONFIDENT, Goal
from .trace_methods import grow, moments, start_state
from .traces import GROWTH, judge

Phase = Literal["ends", "starts", "forms", "columns", "done"]
PHASES: tuple[Phase, ...] = ("ends", "starts", "forms", "columns", "done")
STARTS, STEPS = 2, 20  # further random starts, and products of each at least
PATIENCE = 3  # times the products of the top that the bottom may take


class OnePass:
    """Where the work stands: Krylov runs, forms, and the phase."""

    def __init__(self, op: LinearOperator, k: int, rel_error: float, max_products: int, seed: int, state: State | None, keep: Keep) -> None:
        self.op, self.k, self.rel_error, self.room, self.seed, self.tol = op, k, rel_error, max_products - k - 1, seed, 1e-3
        self.keep = keep
        room = share_memory(op, min(MOST, op.size), 7 * (k + 1), state)
        capacity, self.columns = room.capacity, room.columns
        if capacity < min(op.size, 2 * (k + 1) + STEPS + 5):
            raise OutOfBudget(
                f"spectrum(k={k}) keeps at least {2 * (k + 1) + STEPS + 5} vectors beside those of a product, and {capacity} of {op.size} entries fit into what is left "
                f"of the operator's memory, {size_text(op.memory)}. Ask for fewer pairs, use eigenpairs and trace, or give the operator a larger memory=."
            )
        self.runs = Runs.resumed(op, room, state)
        self.forms = no_forms() if state is None else {name: state[name] for name in (*no_forms(), "total", "drawn") if name in state}
        if room.forms_lost:
            self.forms |= no_forms()
        numbers = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0] if state is None else state["numbers"].tolist()
        self.products: int = int(numbers[0])
        self.phase: Phase = PHASES[int(numbers[1])]
        if self.phase == "done":  # a finished job read again: judge once more, and go on if more is asked now
            self.phase = "columns" if "total" in self.forms else "forms"
        self.top_took: float = numbers[2]  # vectors until the top had converged
        self.missed_above: float = numbers[3]
        self.missed_below: float = numbers[4]
        self.look: float = numbers[5]  # forms at which the trace is judged next
        op.products += self.products
        self.trace = Estimate(value=math.nan)
        self.expected = 0
        self.out: Deflation | None = None

    def state(self) -> State:
        """For a checkpoint."""
        numbers = [self.products, PHASES.index(self.phase), self.top_took, self.missed_above, self.missed_below, self.look]
        return {**self.runs.state(), **self.forms, "numbers": torch.tensor(numbers, dtype=torch.float64)}

    def advance(self) -> bool:
        """One product or block of forms; False when all that was asked is there."""
        before = self.op.products
        while self.op.products == before and self.phase != "done":  # a phase that has nothing to do passes on
            {"ends": self._ends, "starts": self._starts, "forms": self._forms, "columns": self._columns}[self.phase]()
        self.products += self.op.products - before
        return self.phase != "done"

    # -- phases ---------------------------------------------------------------------------------------------------------------

    def _ends(self) -> None:
        """Grow the first run until the ends have converged and another vector is not worth its product."""
        runs = self.runs
        if runs.pilots is None and self.op.size > 8 * PILOTS:
            runs.watch(self.seed)
            return
        if runs.each and self._look_now() and self._ends_met():
            self._next()
            return
        if (not runs.each or runs.exhausted) and not runs.begin(self.seed):
            self._next()
            return
        if self.products >= self.room // 2:
            self._next()
            return
        if runs.size >= self._room_for_ends():
            if len(runs.each) > 1 or runs.last.size <= 2 * (self.k + 1):
                self._next()
                return
            self.keep(self.state(), now=True)  # the basis is overwritten in its place
            runs.last.compress(self._survivors())
        runs.step()

    def _room_for_ends(self) -> int:
        """Vectors of the basis that the first phase may take; the starts need theirs, unless all of the space has a place."""
        capacity = self.runs.capacity
        return capacity if capacity >= self.op.size else max(capacity - STARTS * STEPS, min(2 * (self.k + 1) + 5, capacity))

    def _ends_met(self) -> bool:
        runs = self.runs
        values, _, residuals = runs.union()
        if len(values) < min(self.k + 1, self.op.size):
            return False
        top, bottom = self._open(values, residuals, "largest"), self._open(values, residuals, "smallest")
        if top:
            return False
        self.top_took = self.top_took or runs.size
        if bottom and runs.size < PATIENCE * self.top_took + STEPS:
            return False
        return runs.pilots is None or not worth_a_vector(runs, lambda trace: self.rel_error * abs(trace), self.room - self.products)

    def _starts(self) -> None:
        """Further starts, each in the complement of all before, until one has seen enough to say that nothing is missing."""
        runs = self.runs
        fresh = sum(run.size > 0 for run in runs.each[1:])
        if len(runs.each) == 1 or self._start_is_done():
            enough = fresh >= STARTS and (self.missed_above <= CONFIDENT or fresh >= STARTS + self.k)
            if enough or self.products + STEPS > self.room or runs.full or not runs.begin(self.seed):
                self._next()
                return
        runs.step()

    def _start_is_done(self) -> bool:
        run = self.runs.last
        ended = self.runs.full or run.exhausted or self.products >= self.room
        if not run.size or (not ended and (run.size < STEPS or run.size % 5)):
            return False
        values, _, residuals = self.runs.union()
        self._note_missed(values)
        return ended or (not self._open(values, residuals, "largest") and self.missed_above <= CONFIDENT) or run.size >= PATIENCE * STEPS

    def _note_missed(self, values: Tensor) -> None:
        run, scale = self.runs.last, float(values.abs().max())
        (above, _), (below, _) = (Goal(k, which, self.tol, self.op.noise).fences(values, scale)[0] for k, which in ((self.k, "largest"), (1, "smallest")))  # type: ignore[arg-type]
        complete = self.runs.size >= self.op.size
        self.missed_above = 0.0 if complete else run.unseen(above, above=True)
        self.missed_below = 0.0 if complete else run.unseen(below, above=False)

    def _forms(self) -> None:
        """Forms on what is left, until the trace's interval is as short as asked; all columns instead, where that is cheaper."""
        drawn, complete = len(self.forms["forms"]), self.runs.size >= self.op.size
        if complete:
            rounding = 4 * torch.finfo(self.op.dtype).eps * float(self.runs.union()[0].abs().sum())
            self.trace = Estimate(value=self.runs.captured, sem=rounding, products=self.products, label="trace")
            self.phase = "done"
            return
        if drawn >= max(self.look, COLUMNS):
            self._judge(drawn)
        count = min(self.columns, max(math.ceil(self.look), COLUMNS) - drawn, self.room - self.products)
        if self.phase != "forms":
            return
        if count < 1:
            if not drawn:
                self.trace = Estimate(value=self.runs.captured, sem=math.inf, products=self.products, status="budget-limited", label="trace")
            else:
                self._judge(drawn)
            self.phase = "done"
            return
        self.forms = self.forms | more_forms(self.op, self._deflation(), self.forms, count, self.seed)

    def _judge(self, drawn: int) -> None:
        """The trace as it stands, and when to look again."""
        now = remainder_moments(self.op, self._deflation(), self.forms)
        status, need = judge(now, "krylov", self.rel_error, self.products, drawn)
        self.trace = Estimate(value=now.value, sem=now.sem, dof=now.dof, skew=now.skew, products=self.products, status=status, label="trace")
        self.expected = math.ceil(min(need, self.room))
        wanted = drawn + need - self.products
        if status != "budget-limited":
            self.phase = "done"
            return
        self.look = math.ceil(min(max(1.02 * wanted, GROWTH[0] * drawn), GROWTH[1] * drawn))
        if wanted >= self.op.size and self.products + self.op.size <= self.room:
            self.phase = "columns"

    def _deflation(self) -> Deflation:
        self.out = self.out or Deflation(*self.runs.deflation())
        return self.out

    def _columns(self) -> None:
        """The trace exactly, from columns of the identity."""
        if "total" not in self.forms:
            self.forms = self.forms | {name: t for name, t in start_state(self.op, "exact", 0).items() if name != "products"}
        grown = grow(self.op, "exact", self.forms | {"products": torch.tensor(0)}, 0, self.seed)
        if grown is None:
            now = moments(self.op, "exact", self.forms, self.seed)
            self.trace = Estimate(value=now.value, sem=now.sem, products=self.products, label="trace")
            self.phase = "done"
            return
        self.forms = {name: tensor for name, tensor in grown.items() if name != "products"}

    @property
    def moments(self) -> tuple[float, float, float, float]:
        r"""Tr A and $\|A\|_F^2$, and the standard errors of both; NaN for the second where the forms were drawn part by part."""
        trace, error = float(self.trace.value), float(self.trace.sem) if math.isfinite(float(self.trace.sem)) else 0.0
        drawn = self.forms["squares"]
        if self.op.has_parts or len(drawn) < 2:
            return trace, math.nan, error, 0.0
        values, _, residuals = self.runs.union()
        return trace, float((values**2 + 2 * residuals**2).sum() + drawn.mean()), error, float(drawn.std()) / math.sqrt(len(drawn))

    # -- judgements -----------------------------------------------------------------------------------------------------------

    def _look_now(self) -> bool:
        size = self.runs.last.size
        return size > 0 and (size % (2 if size <= 40 else 5) == 0 or self.runs.exhausted)  # the small eigenproblem is not free

    def _open(self, values: Tensor, residuals: Tensor, which: Literal["largest", "smallest"]) -> bool:
        """Whether a wanted pair at this end has not converged yet."""
        goal = Goal(min(self.k, len(values)) if which == "largest" else 1, which, self.tol, self.op.noise)
        chosen, largest = goal.choose(values), float(values.abs().max())
        limits = torch.maximum(0.5 * goal.threshold(values, largest), torch.full_like(values, 0.5 * self.op.noise * largest))
        return bool((residuals[chosen] > limits[chosen]).any())

    def _survivors(self) -> Tensor:
        """Ritz vectors that a full basis is compressed to: the wanted ones and half of the others, from the ends."""
        size = self.runs.last.size
        keep = min(self.k + 1 + (size - self.k - 1) // 2, size - 2)
        order = self.runs.last.ritz()[0].argsort(descending=True)
        return torch.cat([order[: keep - 2], order[-2:]])

    def _next(self) -> None:
        self.phase = PHASES[PHASES.index(self.phase) + 1]
