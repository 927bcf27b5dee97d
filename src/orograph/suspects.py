"""What is known to make derivatives wrong without an error, found in the autograd graph of a loss."""

from __future__ import annotations

import torch

from .objective import Objective


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
