r"""A curvature matrix as a sweep over micro-batches: $A V = \sum_b w_b A_b V$, each $A_b$ a linear map that autograd builds once.

Building a map costs a forward and a first backward; applying it to a vector costs the rest. Maps that are kept across products save
the first part, at the price of the memory that their graphs hold.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import NotDifferentiable
from ..evaluation import no_dependence
from ..layout import in_full
from ..objective import Objective
from ..reached import Reached, Watch, parameters_in
from ..terms import Term

Parts = Sequence[Tensor | None]  # one per leaf, None for zero
TermMap = Callable[[Tensor, bool], Parts]  # (column (n,), or rows (k, n) at once; whether it is used again) -> A_b column, or a row of parts for each
Build = Callable[[Objective, Term], TermMap | None]  # None: the term does not depend on theta

UNSUPPORTED = re.compile(
    r"derivative for .* is not implemented|does not currently support double backward|not implemented for .*double.?backward"
    r"|once_differentiable|torch\.compile with aot_autograd does not|must implement .*(backward|vjp)|incompatible with \.grad\(\)"
)


@dataclass
class Sweep:
    """The matrix as a function V (n, k) -> A V (n, k), and as a sum of parts; the first `keep` maps stay in memory."""

    objective: Objective
    build: Build
    keep: int = 0
    together: bool = False  # several columns in one backward, where a graph is so small that operations cost more than numbers
    kept: list[tuple[float, TermMap | None]] = field(default_factory=list)
    watch: Watch | None = None  # is told what every term reaches, in the first sweep
    _checked: bool = False

    def __call__(self, V: Tensor) -> Tensor:
        total = torch.zeros(V.shape[::-1], dtype=torch.float64, device=V.device)  # a row per column of V
        with self.objective.applied():  # over the backwards too: checkpointing runs the forward again there
            for weight, apply, held, seen in self._maps():
                self._add(total, V, weight, apply, held, seen)
        self.watch = None
        return total.to(V.dtype).T

    def apart(self, vectors: Callable[[int], Tensor], take: Callable[[Tensor], None]) -> None:
        """take(w_b A_b V_b) (n, k) for every part b, with V_b = vectors(b) of its own: together they cost one product per column."""
        with self.objective.applied():
            for index, (weight, apply, held, seen) in enumerate(self._maps()):
                V = vectors(index)
                total = torch.zeros(V.shape[::-1], dtype=torch.float64, device=V.device)
                self._add(total, V, weight, apply, held, seen)
                take(total.to(V.dtype).T)
        self.watch = None

    def _add(self, total: Tensor, V: Tensor, weight: float, apply: TermMap | None, held: bool, seen: Reached | None) -> None:
        if apply is None:
            return
        if seen is None and self.together and held and V.shape[1] > 1 and self._added_together(total, V, weight, apply):
            return
        for column in range(V.shape[1]):
            parts = apply(V[:, column].contiguous(), held or column + 1 < V.shape[1])
            add_parts(self.objective, total[column], parts, weight)
            if seen is not None and self.watch is not None:
                seen.parameters |= parameters_in(parts, self.watch.proven.parameters)

    def _added_together(self, total: Tensor, V: Tensor, weight: float, apply: TermMap) -> bool:
        """All columns in one backward by torch's vmap; checked on one of them, since not every operation has a right batched form."""
        own = torch.zeros_like(total)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about operations that vmap runs one by one
                add_parts(self.objective, own, apply(V.T.contiguous(), True), weight)
            alone = torch.zeros_like(total[0])
            if not self._checked:
                add_parts(self.objective, alone, apply(V[:, -1].contiguous(), True), weight)  # the last: the first one for all would pass on the first
                gap = float((own[-1] - alone).norm())
                self.together = gap <= 100 * torch.finfo(V.dtype).eps * float(alone.norm())
                self._checked = True
        except (RuntimeError, NotImplementedError, NotDifferentiable):
            self.together = False
        if self.together:
            total += own
        return self.together

    def _maps(self) -> Iterator[tuple[float, TermMap | None, bool, Reached | None]]:
        """(weight, map, whether it is kept, what its graph reaches where that is watched) of every term."""
        if self.kept and len(self.kept) < self.keep:  # all terms there are
            yield from ((weight, apply, True, None) for weight, apply in self.kept)
            return
        found = list(self.kept)
        reached = False
        for index, term in enumerate(self.objective.terms()):
            if index < len(self.kept):
                weight, apply = self.kept[index]
                yield weight, apply, True, None
                continue
            seen = Reached() if self.watch is not None else None
            term.watch = None if seen is None else seen.walk
            apply = self.build(self.objective, term)
            reached = reached or apply is not None
            if index < self.keep:
                found.append((term.weight, apply))
            yield term.weight, apply, index < self.keep, seen
            if seen is not None and self.watch is not None:
                self.watch.tell(term.batch, seen)
        if not reached and not self.kept:
            raise NotDifferentiable(no_dependence(self.objective.names))
        self.kept = found


def add_parts(objective: Objective, total: Tensor, parts: Parts, weight: float) -> None:
    """Total (n,) += weight * parts, in float64."""
    start = 0
    for (_, entries), part in zip(objective.layout.blocks, parts, strict=True):
        if part is not None:
            total[start : start + entries].add_(in_full(part.detach()).reshape(-1), alpha=weight)
        start += entries


def first_derivatives(output: Tensor, variables: Sequence[Tensor], given: Tensor | None = None) -> list[Any]:
    """Derivatives that can be differentiated again (None for zero); those that are sparse, of embeddings, as dense tensors."""
    parts = torch.autograd.grad(output, variables, given, create_graph=True, allow_unused=True)
    return [None if part is None else in_full(part) for part in parts]


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Turn torch's errors about a missing second derivative into NotDifferentiable, which says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not UNSUPPORTED.search(str(error)):
            raise
        raise NotDifferentiable(
            f'autograd cannot differentiate this model twice: {str(error).splitlines()[0]} Use engine="difference" (which "auto" does), replace the '
            "operation by one in plain torch (EmbeddingBag by Embedding and a sum, a fused module by its eager one), or leave its parameters out of params=."
        ) from error
