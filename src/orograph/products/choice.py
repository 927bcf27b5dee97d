"""Which engine makes the products: measured on one and two examples, and chosen so that the memory budget is never passed.

The ladder, fastest first: "retained" (all first-backward graphs kept, or those that fit), "fresh" (each built anew), "fresh" on
smaller micro-batches, "blockwise" for a chain of blocks, "difference". What cannot be differentiated twice goes to "difference" at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import NotDifferentiable, OutOfBudget
from ..linalg.operator import Apart, Matmat
from ..memory import Meter, size_text
from ..objective import Objective
from ..variants import in_pieces, joined, on_few
from .blockwise import blockwise_of, find_chain
from .difference import Difference
from .sweeps import Build, Sweep

Engine = Literal["auto", "retained", "fresh", "blockwise", "difference"]
ALL = sys.maxsize
MARGIN = 1.2  # on measured bytes: shapes may differ from batch to batch
SMALL, JOINED = 2**20, 2**22  # bytes of a graph that is dominated by the cost of calling operations; and of what such ones are joined to
COLUMNS = 8  # in one backward
RESERVE = (16, 150)  # vectors that a basis gets before graphs do: at least, and at most


@dataclass(frozen=True)
class Kind:
    """A curvature matrix: how autograd builds it for one term, and how differences do for all."""

    build: Build
    difference: Callable[[Objective], Difference]
    blocks: bool  # a chain of blocks may be used


@dataclass(frozen=True)
class Plan:
    """How products are made, and the bytes that one takes at its worst."""

    engine: str
    build: Build | None
    keep: int = 0
    examples: int | None = None  # in a micro-batch; None: the batches as they are
    join: int | None = None  # small batches are put together to micro-batches of this many
    together: bool = False  # several columns in one backward
    bytes: int = 0
    note: str = ""
    proof: int = 1  # examples whose products in float64 fit too

    @property
    def about(self) -> dict[str, Any]:
        """For the record."""
        kept = {} if self.keep in (0, ALL) else {"graphs_kept": self.keep}
        return {"engine": self.engine, **kept, **({"joined": self.join} if self.join else {}), **({"micro_batch": self.examples} if self.examples else {}), **({"note": self.note} if self.note else {})}


def matmat_of(plan: Plan, kind: Kind, objective: Objective) -> Matmat:
    """The products that `plan` makes of `objective`."""
    if plan.build is None:
        return kind.difference(objective)
    if plan.join is not None:
        objective = joined(objective, plan.join)
    return Sweep(objective if plan.examples is None else in_pieces(objective, plan.examples), plan.build, plan.keep, plan.together)


def apart_of(plan: Plan, matmat: Matmat, objective: Objective) -> Apart | None:
    """The same matrix as a sum over the batches as they are: the more parts, the more their forms tell of the trace."""
    if plan.join is not None and plan.build is not None:
        return Sweep(objective, plan.build, plan.keep, plan.together).apart
    return matmat.apart if isinstance(matmat, Sweep) else None


def choose_plan(objective: Objective, kind: Kind, engine: Engine, budget: int) -> Plan:
    """The plan for an engine asked for by name, or the fastest that fits. OutOfBudget says the least that is needed."""
    try:
        if engine == "blockwise":
            build = _chained(objective)
            return _fitting(objective, "blockwise", build, _cost(objective, build, budget), budget)
        if engine == "difference":
            return _difference(objective, kind, budget, "")
        cost = _cost(objective, kind.build, budget)
    except NotDifferentiable as error:
        if engine != "auto":
            raise
        return _difference(objective, kind, budget, f"by finite differences: {str(error).split(' Use engine=')[0]}")
    proof = cost.examples_within(budget // 3)
    if engine == "fresh":
        return _must_fit(objective, Plan("fresh", kind.build, bytes=int(cost.fresh), proof=proof), budget)
    if engine == "retained":
        return _must_fit(objective, Plan("retained", kind.build, ALL, bytes=int(cost.retained(ALL)), proof=proof), budget)
    plan = _fastest(objective, kind, cost, budget)
    return replace(plan, proof=proof) if plan.engine in ("fresh", "retained") else plan


def _fastest(objective: Objective, kind: Kind, cost: _Cost, budget: int) -> Plan:
    vector = objective.size * objective.theta.element_size()
    room = budget - min(max(budget // 2, RESERVE[0] * vector), RESERVE[1] * vector)
    if cost.retained(ALL) <= room:
        plan = Plan("retained", kind.build, ALL, bytes=int(cost.retained(ALL)))
        more = cost.retained(ALL) + 8 * sum(cost.elements) + JOINED + COLUMNS * cost.fresh  # graphs and data once more, joined; columns together
        if cost.largest_graph <= SMALL and plan.bytes + more <= room:
            join = int(JOINED / max(cost.held[1] * cost.least, 1.0))
            return replace(plan, join=join, together=kind.blocks, bytes=int(plan.bytes + more))
        return plan
    keep = max((k for k in range(len(cost.elements)) if cost.retained(k) <= room), default=0) if objective.terms().batches.repeats else 0
    if keep:
        return Plan("retained", kind.build, keep, bytes=int(cost.retained(keep)))
    for left in (room, budget - RESERVE[0] * vector):
        try:
            return _fitting(objective, "fresh", kind.build, cost, left)
        except OutOfBudget:
            continue
    if kind.blocks and (chain := find_chain(objective)) is not None:
        build = blockwise_of(chain)
        return _fitting(objective, "blockwise", build, _cost(objective, build, budget), room)
    return _difference(objective, kind, room, f"by finite differences: {'one example' if objective.divisible else 'the whole batch'}'s second-order graph does not fit the memory budget")


@dataclass(frozen=True)
class _Cost:
    """Bytes of a product, linear in the numbers that a micro-batch holds: (fixed, per number)."""

    held: tuple[float, float]  # by a map once built
    peak: tuple[float, float]  # while it is applied, itself included
    elements: tuple[int, ...]  # numbers in every batch
    least: float  # numbers in the largest example

    def retained(self, keep: int) -> float:
        """With the maps of the first `keep` batches kept."""
        kept = sum(self._of(self.held, e) for e in self.elements[:keep])
        working = max(self._of(self.peak, e) - self._of(self.held, e) for e in self.elements)
        building = 0.0 if keep >= len(self.elements) else max(self._of(self.held, e) for e in self.elements[keep:])
        return kept + working + building

    @property
    def largest_graph(self) -> float:
        """Bytes of the largest map."""
        return max(self._of(self.held, e) for e in self.elements)

    @property
    def fresh(self) -> float:
        """One micro-batch at a time."""
        return max(self._of(self.peak, e) for e in self.elements)

    def examples_within(self, budget: float) -> int:
        """The largest micro-batch that fits."""
        fixed, slope = self.peak
        return int((budget / MARGIN - fixed) / max(slope * self.least, 1.0))

    def smallest(self) -> float:
        """With a single example at a time."""
        return self._of(self.peak, self.least)

    @staticmethod
    def _of(line: tuple[float, float], elements: float) -> float:
        return MARGIN * (line[0] + line[1] * elements)


def _cost(objective: Objective, build: Build, budget: int) -> _Cost:
    """Measured on micro-batches of one and two examples, or on a whole batch where batches must not be cut."""
    reading = objective.terms().batches.reading
    vectors = 4.0 * objective.size * objective.theta.element_size()  # the column, its sum in float64, the result
    tried = [_measured(on_few(objective, 1, double=False), build)]
    if objective.divisible and 2 * tried[0][2] <= budget:  # the trial keeps to the budget too
        tried.append(_measured(on_few(objective, 2, double=False), build))
    (e1, held1, peak1), (e2, held2, peak2) = tried[0], tried[-1]
    if e2 > e1:
        held, peak = (held2 - held1) / (e2 - e1), (peak2 - peak1) / (e2 - e1)
    else:
        held, peak = held1 / e1, peak1 / e1
    lines = [(max(h - slope * e1, 0.0), max(slope, 0.0)) for h, slope in ((held1, held), (peak1, peak))]
    largest = max(e / max(size, 1) for e, size in zip(reading.elements, reading.sizes, strict=True))
    return _Cost(lines[0], (lines[1][0] + vectors, lines[1][1]), reading.elements, largest if objective.divisible else max(reading.elements))


def _measured(small: Objective, build: Build) -> tuple[int, int, int]:
    """(numbers in the micro-batch, bytes that its map holds, bytes at the worst)."""
    direction = small.space.sample(0, 0, "normal")
    with small.applied():
        term = next(iter(small.terms()))
        with Meter() as meter:
            apply = build(small, term)
            held = meter.live
            if apply is not None:
                apply(direction, True)
    return small.terms().batches.reading.elements[0], held, meter.peak


def _fitting(objective: Objective, engine: str, build: Build, cost: _Cost, room: int) -> Plan:
    """On whole batches, or on the largest micro-batches that fit."""
    if cost.fresh <= room:
        return Plan(engine, build, bytes=int(cost.fresh))
    examples = cost.examples_within(room) if objective.divisible else 0
    if examples < 1:
        what, size = ("one example", cost.smallest()) if objective.divisible else ("the whole batch", cost.fresh)
        advice = f"Give the operator a larger memory=, or choose fewer params=.{_why_whole(objective)}"
        raise OutOfBudget(f"a product of {what} takes about {size_text(size)}, and {size_text(room)} are left for it. {advice}")
    return Plan(engine, build, examples=examples, bytes=int(room))


def _why_whole(objective: Objective) -> str:
    return "" if objective.divisible else f" The batch cannot be cut into micro-batches: {objective.indivisible}."


def _must_fit(objective: Objective, plan: Plan, budget: int) -> Plan:
    if plan.bytes > budget:
        raise OutOfBudget(
            f'a product with engine="{plan.engine}" takes about {size_text(plan.bytes)}, and {size_text(budget)} are left for it. '
            f'Use engine="auto", which chooses what fits, or give the operator a larger memory=.{_why_whole(objective)}'
        )
    return plan


def _chained(objective: Objective) -> Build:
    chain = find_chain(objective)
    if chain is None:
        raise ValueError('engine="blockwise" needs a model with a Sequential or ModuleList whose members each take exactly what the one before returned. Use engine="auto".')
    return blockwise_of(chain)


def _difference(objective: Objective, kind: Kind, budget: int, note: str) -> Plan:
    """Finite differences: a gradient's memory in float64 and five copies of theta."""
    size = 10 * objective.size * objective.theta.element_size() + (0 if objective.divisible else _bytes_of_gradient(objective))
    return _must_fit(objective, Plan("difference", None, bytes=size, note=note), budget)


def _bytes_of_gradient(objective: Objective) -> int:
    """What the gradient of the largest batch holds at its worst, in float64; measured on the first one, where batches must stay whole."""
    small, elements = on_few(objective, 1, double=False), objective.terms().batches.reading.elements
    with Meter() as meter:
        small.gradient()
    return int(meter.peak * max(elements) / elements[0] * (8 / objective.theta.element_size()))
