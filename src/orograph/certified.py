"""Products that stay proven where they are used: what the proof has not reached is proven when a product first meets it.

The proof at construction sees a few examples. The first sweep over the data walks the graph of every micro-batch; a batch with an
operation, or a parameter, that the proof has not reached is proven before the product is handed out. What is refuted then goes to
finite differences where the engine may be chosen, and is an error where it was asked for by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cutting import Cut, cut_batch
from .errors import CriterionWrong, OrographWarning, ProductWrong
from .linalg.operator import NOISE, Matmat
from .nesting import Batch, count_examples, take_rows
from .objective import Objective
from .preflight import MOST, Verdict, few_enough, preflight, prove_on
from .products.choice import Engine, Kind, Plan, apart_of, choose_plan, matmat_of
from .products.difference import Difference
from .products.gauss_newton import OutputCurvature
from .products.sweeps import Sweep
from .reached import Reached, Watch
from .suspects import batches_reached, reached_by
from .variants import on_batch, on_spread

REACHING = 64  # examples to which a batch with something new is cut down for its proof
BLOCK = 8  # examples of the proof of one block


@dataclass
class Certified:
    """V (n, k) -> A V (n, k), with what is proven of it in `about`."""

    objective: Objective
    kind: Kind
    curvature: OutputCurvature | None
    fallback: tuple[Kind, OutputCurvature] | None  # the same matrix with the criterion's second derivative by differences
    engine: Engine
    budget: int
    plan: Plan
    check: bool
    about: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    settled: Callable[[Certified], None] | None = None  # is told when the engine has changed
    _matmat: Matmat | None = None
    _watch: Watch | None = None
    _has_looked: bool = False
    _is_zero: bool = False  # every product of the proof was zero

    def begin(self) -> None:
        """Prove the products, changing the engine where "auto" allows it."""
        verdict = Verdict("skipped")
        if self.check:
            verdict = self._prove(lambda: preflight(self.objective, self._small(), self.curvature, self._most()))
        self._install(verdict)

    def _small(self) -> Callable[[Objective], Matmat]:
        return partial(matmat_of, replace(self.plan, keep=0, examples=None, join=None), self.kind)

    def _most(self) -> int:
        return MOST if self.plan.build is None else min(self.plan.proof, MOST)

    def _prove(self, prove: Callable[[], Verdict]) -> Verdict:
        """The verdict; once more after a change to differences, which is only made for engine="auto"."""
        try:
            return prove()
        except ProductWrong as error:
            if self.engine != "auto" or (self.plan.build is None and not isinstance(error, CriterionWrong)):
                raise
            self._change(error)
        return self._prove(prove)

    def _change(self, error: ProductWrong) -> None:
        cause = str(error).split(" Pass check=False")[0]
        if isinstance(error, CriterionWrong) and self.fallback is not None and self.curvature is not self.fallback[1]:
            self.kind, self.curvature = self.fallback
            self.plan = replace(choose_plan(self.objective, self.kind, self.engine, self.budget), note=f"with the criterion's second derivative by finite differences: {cause}")
        else:
            note = f"by finite differences, since autograd's second derivative is wrong: {cause}"
            self.plan = replace(choose_plan(self.objective, self.kind, "difference", self.budget), note=note)

    def _install(self, verdict: Verdict) -> None:
        """Make the products of the plan, watched where they are proven."""
        self._matmat = matmat_of(self.plan, self.kind, self.objective)
        self._watch, self._has_looked = Watch(verdict.reached) if verdict.proven or verdict.zero else None, False
        self._is_zero = verdict.zero
        if isinstance(self._matmat, Sweep):
            self._matmat.watch = self._watch
        if self.plan.note:
            warnings.warn(f"products are computed {self.plan.note}", OrographWarning, stacklevel=5)
        for key in ("engine", "graphs_kept", "joined", "micro_batch", "note"):
            self.about.pop(key, None)
        self.noise = max(verdict.noise, self._matmat.noise if isinstance(self._matmat, Difference) else 0.0, self.noise)
        self.about |= self.plan.about | {"preflight": verdict.words, "noise": self.noise}
        if self.settled is not None:
            self.settled(self)

    @property
    def excess(self) -> float:
        """Noise beyond the rounding of the operator's own precision; one direction's gap, and others may be worse."""
        return 10 * self.noise if self.noise > NOISE.get(self.objective.dtype, 0.0) else 0.0

    def __call__(self, V: Tensor) -> Tensor:
        assert self._matmat is not None  # `begin` has run
        if not isinstance(self._matmat, Sweep):
            self._look()
        product = self._matmat(V)
        while self._watch is not None and self._watch.beyond:
            before = self._matmat
            self._prove_beyond(self._watch)
            if self._matmat is before:
                break
            product = self._matmat(V)
        return product

    def apart(self, vectors: Callable[[int], Tensor], take: Callable[[Tensor], None]) -> None:
        """As `LinearOperator.apart`; where there was no product before, or one of joined batches, all batches are looked at first."""
        if self.plan.join is not None or (isinstance(self._matmat, Sweep) and self._matmat.watch is not None):
            self._look()
        assert self._matmat is not None  # `begin` has run
        parts = apart_of(self.plan, self._matmat, self.objective)
        if parts is None:
            take(self(vectors(0)))
        else:
            parts(vectors, take)

    @property
    def has_parts(self) -> bool:
        """Whether the matrix is a sum over batches."""
        return self._matmat is not None and apart_of(self.plan, self._matmat, self.objective) is not None

    # -- what the proof has not reached ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Let a gradient of all batches tell what they reach, once, where the products are not watched themselves."""
        if self._watch is None or self._has_looked:
            return
        watch, self._has_looked = self._watch, True
        for batch, reached in batches_reached(self.objective):
            watch.tell(batch, reached)
        self._prove_beyond(watch)

    def _prove_beyond(self, watch: Watch) -> None:
        """Prove the batches with something new, one after another; a change of engine begins anew."""
        if self._is_zero:  # where products are not zero
            watch.beyond.sort(key=lambda found: len(found[1].parameters), reverse=True)
        while watch.beyond:
            batch, reached = watch.beyond.pop(0)
            new = watch.proven.lacks(reached)
            if not new:
                continue
            if self.plan.join is not None and self.objective.divisible and self._cut(batch).coupled:
                self.plan = replace(self.plan, join=None)  # what runs on joined batches only is no part of this loss
                self._install(Verdict(str(self.about["preflight"]), self.noise, watch.proven))
                return
            before, prove = self.plan, partial(self._verdict_on, batch, watch.proven, reached)
            verdict = self._prove(prove)
            if self.plan is not before:
                self._install(verdict)
                return
            if verdict.proven:
                watch.proven.add(reached)
                self.noise = max(self.noise, verdict.noise)
                if self._is_zero:
                    self._is_zero, self.about["preflight"] = False, "proven"
            else:
                self.about["preflight"] = f"unverified: a batch reaches {new}, which the proof has not reached ({verdict.words.removeprefix('unverified: ')})"
                watch.proven.add(reached)

    def _verdict_on(self, batch: Batch, known: Reached, wanted: Reached) -> Verdict:
        few = self._reduced(on_batch(self.objective, batch), batch, known, wanted)
        if self.objective.divisible and few.examples > self._most():
            return Verdict(f"unverified: {few.examples} examples are needed for it, and {self._most()} fit into the memory budget")
        return prove_on(few, self._small(), self.curvature) or Verdict("unverified: all products are zero there")

    def _reduced(self, few: Objective, batch: Batch, known: Reached, wanted: Reached) -> Objective:
        """As few examples of the batch as reach what is new, by halving."""
        while self.objective.divisible and (count := count_examples(batch)) > REACHING:
            for rows in torch.arange(count).chunk(2):
                half = on_batch(self.objective, batch, rows)
                seen = reached_by(half)
                if not Reached(known.kinds | seen.kinds, known.parameters | seen.parameters).lacks(wanted):
                    break
            else:
                return few
            few, batch = half, take_rows(batch, rows)
        return few

    def _cut(self, batch: Batch) -> Cut:
        with torch.no_grad():
            return cut_batch(self.objective.snapshot, self.objective.recipe, batch)

    # -- blocks ---------------------------------------------------------------------------------------------------------------

    def prove_block(self, names: list[str]) -> str:
        """What is proven of the diagonal block of some parameters, on its own scale: behind a tiny gate the whole product says nothing of it."""
        if not self.check or not str(self.about["preflight"]).startswith("proven"):
            return str(self.about["preflight"])
        before = self.plan
        words = self._prove(lambda: self._block_verdict(names)).words
        if self.plan is not before:
            self._install(Verdict("proven"))
        return words

    def _block_verdict(self, names: list[str]) -> Verdict:
        count = min(few_enough(self.objective), self._most(), BLOCK)
        while True:
            few = on_spread(self.objective, count)
            verdict = prove_on(few, self._small(), self.curvature, names)
            if verdict is not None:
                return verdict
            if few.examples >= self.objective.examples:
                return Verdict("proven")  # zero on all of the data
            if count >= min(self._most(), MOST):
                return Verdict(f"unverified: the block is zero on the {few.examples} examples that were tried")
            count = min(4 * count, self._most(), MOST)
