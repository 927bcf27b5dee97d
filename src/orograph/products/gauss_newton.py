r"""Products with $G = \sum_b w_b J_b^\top C_b J_b$: the Jacobian J of the outputs around a curvature C in output space.

With C the Hessian of the loss in the outputs this is the generalised Gauss-Newton matrix; with outer products of output
gradients it is the Fisher. $J v$ is the derivative of the linear map $u \mapsto J^\top u$, so that reverse mode alone suffices;
the forward and that map's graph are built once per micro-batch and used for every column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..objective import Objective
from ..terms import Term
from .reverse import differentiable_twice

OutputCurvature = Callable[[Term, Tensor], Callable[[Tensor], Tensor]]  # (term, output) -> (u -> C u)


def jacobian_sandwich(objective: Objective, curvature: OutputCurvature) -> Callable[[Tensor], Tensor]:
    """V (n, k) -> G V (n, k) at the objective's point."""
    leaves, layout = objective.leaves, objective.layout

    def matmat(V: Tensor) -> Tensor:
        total = torch.zeros(V.shape, dtype=torch.float64, device=V.device)
        with objective.applied():
            for term in objective.terms():
                output = term.output()
                if not isinstance(output, Tensor):
                    raise TypeError(f"the model's output is a {type(output).__name__}. GGN and Fisher need one tensor: pass forward=lambda model, batch: (tensor, target).")
                if not output.requires_grad:
                    continue
                apply = curvature(term, output.detach())
                cotangent = torch.zeros_like(output, requires_grad=True)
                with differentiable_twice():
                    pulled = torch.autograd.grad(output, leaves, cotangent, create_graph=True, allow_unused=True)
                curved = [index for index, part in enumerate(pulled) if part is not None]
                for column in range(V.shape[1]):
                    split = layout.split(V[:, column])
                    with differentiable_twice():
                        (pushed,) = torch.autograd.grad(
                            [pulled[i] for i in curved], cotangent, [split[i].to(pulled[i].dtype) for i in curved], retain_graph=True
                        )
                        parts = torch.autograd.grad(output, leaves, apply(pushed), retain_graph=True, allow_unused=True)
                    total[:, column].add_(layout.flatten(parts, total), alpha=term.weight)
        return total.to(V.dtype)

    return matmat


def loss_hessian(term: Term, output: Tensor) -> Callable[[Tensor], Tensor]:
    """C = second derivative of the batch's loss in its outputs."""
    variable = output.requires_grad_()
    (first,) = torch.autograd.grad(term.loss_of(variable), variable, create_graph=True)
    if not first.requires_grad:  # a loss that is linear in the outputs has no curvature there
        return torch.zeros_like
    return lambda u: torch.autograd.grad(first, variable, u, retain_graph=True)[0]
