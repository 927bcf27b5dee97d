r"""Hessian products by reverse-over-reverse: $H v = \nabla_\theta (g(\theta)^\top v)$, on the model's own modules.

The graph of the first backward, g as a function of theta, costs about 1 gradient and serves every vector; each vector then costs
about 2 (Pearlmutter 1994).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Objective
from ..terms import Term
from .sweeps import Parts, TermMap, differentiable_twice, first_derivatives


def hessian_of(objective: Objective, term: Term) -> TermMap | None:
    """The Hessian of one term's loss."""
    leaves = objective.leaves
    loss = term.loss_of(term.output())
    if not loss.requires_grad:
        return None
    with differentiable_twice():
        gradient = first_derivatives(loss, leaves)
    if all(part is None for part in gradient):
        return None
    curved = [index for index, part in enumerate(gradient) if part is not None and part.requires_grad]
    parts = [gradient[index] for index in curved]

    def apply(column: Tensor, again: bool) -> Parts:
        if not parts:  # linear in every parameter: no curvature
            return [None] * len(leaves)
        split = objective.layout.split(column)
        directions = [split[index].to(part.dtype) for index, part in zip(curved, parts, strict=True)]
        with differentiable_twice():
            return torch.autograd.grad(parts, leaves, directions, retain_graph=again, allow_unused=True, is_grads_batched=column.ndim == 2)

    return apply
