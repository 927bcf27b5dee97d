r"""Hessian products by reverse-over-reverse: $H V = \nabla_\theta (g(\theta)^\top V)$, on the model's own modules.

The graph of the first backward, g as a function of theta, is built once per micro-batch and used for every column of V: about
1 gradient to build it and 2 per column (Pearlmutter 1994). "retained" keeps the graphs across products, so that only the 2 per
column remain; "fresh" drops each one, so that memory holds one micro-batch's graph at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import NotDifferentiable
from ..evaluation import no_dependence
from ..objective import Objective
from ..terms import Term

UNSUPPORTED = re.compile(
    r"derivative for .* is not implemented|does not currently support double backward|not implemented for .*double.?backward"
    r"|once_differentiable|torch\.compile with aot_autograd does not"
)
FirstBackward = tuple[list[Tensor], list[int]]  # the gradient parts that depend on theta, and which leaves they belong to


def hessian_matmat(objective: Objective, *, retain: bool) -> Callable[[Tensor], Tensor]:
    """V (n, k) -> H V (n, k) at the objective's point."""
    graphs: list[tuple[float, FirstBackward]] = []

    def matmat(V: Tensor) -> Tensor:
        total = torch.zeros(V.shape, dtype=torch.float64, device=V.device)
        with objective.applied():  # over the backwards too: checkpointing runs the forward again there
            for weight, graph in _graphs(objective, graphs, retain):
                for column in range(V.shape[1]):
                    last = not retain and column == V.shape[1] - 1
                    parts = _second_backward(graph, objective, V[:, column], keep=not last)
                    total[:, column].add_(objective.layout.flatten(parts, total), alpha=weight)
        return total.to(V.dtype)

    return matmat


def _graphs(objective: Objective, kept: list[tuple[float, FirstBackward]], retain: bool) -> Iterator[tuple[float, FirstBackward]]:
    """(weight, first-backward graph) of every term, from `kept` where they are there already."""
    if kept:
        yield from kept
        return
    reached = False
    found = []
    for term in objective.terms():
        graph, depends = _first_backward(term, objective.leaves)
        reached = reached or depends
        if retain:
            found.append((term.weight, graph))
        yield term.weight, graph
    if not reached:
        raise NotDifferentiable(no_dependence(objective.names))
    kept.extend(found)


def _first_backward(term: Term, leaves: list[Tensor]) -> tuple[FirstBackward, bool]:
    """The gradient of one term with its graph; and whether the term depends on theta at all."""
    loss = term.loss_of(term.output())
    if not loss.requires_grad:
        return ([], []), False
    with differentiable_twice():
        parts = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    curved = [index for index, part in enumerate(parts) if part is not None and part.requires_grad]
    return ([parts[index] for index in curved], curved), any(part is not None for part in parts)


def _second_backward(graph: FirstBackward, objective: Objective, vector: Tensor, *, keep: bool) -> Sequence[Tensor | None]:
    parts, curved = graph
    if not parts:  # linear in every parameter: no curvature
        return [None] * len(objective.leaves)
    split = objective.layout.split(vector)
    directions = [split[index].to(part.dtype) for index, part in zip(curved, parts, strict=True)]
    with differentiable_twice():
        return torch.autograd.grad(parts, objective.leaves, directions, retain_graph=keep, allow_unused=True)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Turn torch's errors about a missing second derivative into NotDifferentiable, which says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not UNSUPPORTED.search(str(error)):
            raise
        raise NotDifferentiable(
            f"autograd cannot differentiate this model twice: {str(error).splitlines()[0]} Replace the operation by one in plain torch "
            "(EmbeddingBag by Embedding and a sum, a fused or compiled module by its eager one), or leave its parameters out of params=."
        ) from error
