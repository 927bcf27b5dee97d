"""The autograd graph of a loss: what it reaches, and what in it is known to make derivatives wrong without an error."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .layout import in_full
from .nesting import Batch
from .objective import Objective
from .reached import Reached


def reached_by(objective: Objective) -> Reached:
    """What value and gradient reach."""
    found = Reached()
    for _, reached in batches_reached(objective):
        found.add(reached)
    return found


def batches_reached(objective: Objective) -> Iterator[tuple[Batch, Reached]]:
    """Every micro-batch with what its value and gradient reach. One gradient."""
    found = []
    with objective.applied():
        for term in objective.terms():
            seen = Reached()
            term.watch = seen.walk
            loss = term.loss_of(term.output())
            parts = torch.autograd.grad(loss, objective.leaves, allow_unused=True) if loss.requires_grad else []
            seen.forget_nodes()
            seen.parameters = {i for i, part in enumerate(parts) if part is not None and bool(in_full(part).any())}
            found.append((term.batch, seen))
    yield from found


def suspects(objective: Objective) -> str:
    """The likely cause of a wrong derivative, in a sentence."""
    with objective.applied():
        term = next(iter(objective.terms()))
        node = term.loss_of(term.output()).grad_fn
    names: list[str] = []
    queue, seen = [node], set()
    while queue:
        here = queue.pop()
        if here is None or here in seen:
            continue
        seen.add(here)
        custom = isinstance(here, torch.autograd.function.BackwardCFunction)
        names.append(type(here).__name__.removesuffix("Backward") if custom else "")
        if "WeightNorm" in type(here).__name__:
            return "torch's own second derivative of weight_norm is the likely cause: fold it into the weights first (remove_parametrizations)."
        queue.extend(next_node for next_node, _ in here.next_functions)
    found = [name for name in names if name]
    if found:
        return f"The custom autograd.Function {found[0]!r} is the likely cause: its backward must be made of differentiable torch operations."
    return "A kernel with a hand-written backward, or a gradient that is detached inside the model, is the likely cause."
