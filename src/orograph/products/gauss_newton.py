r"""Products with $G = \sum_b w_b J_b^\top C_b J_b$: the Jacobian J of the outputs around a curvature C in output space.

With C the Hessian of the loss in the outputs this is the generalised Gauss-Newton matrix; with outer products of output
gradients it is the Fisher. $J v$ is the derivative of the linear map $u \mapsto J^\top u$, so that reverse mode alone suffices;
the forward and that map's graph are built once per micro-batch (1 gradient) and serve every vector (4/3 of one each).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NotDifferentiable
from ..layout import in_full
from ..nesting import as_double
from ..objective import Objective
from ..terms import Term
from .sweeps import Build, Parts, TermMap, differentiable_twice, first_derivatives

OutputCurvature = Callable[[Term, Tensor], Callable[[Tensor], Tensor]]  # (term, output) -> (u -> C u)


def sandwich_of(curvature: OutputCurvature) -> Build:
    """J'CJ of one term, for the given C."""

    def build(objective: Objective, term: Term) -> TermMap | None:
        leaves, output = objective.leaves, output_of(term)
        if not output.requires_grad:
            return None
        bend = curvature(term, output.detach())
        cotangent = torch.zeros_like(output, requires_grad=True)
        with differentiable_twice():
            pulled = first_derivatives(output, leaves, cotangent)
        curved = [index for index, part in enumerate(pulled) if part is not None and part.requires_grad]
        _must_be_linear(output, [leaf for leaf, part in zip(leaves, pulled, strict=True) if part is not None and not part.requires_grad])
        if not curved:
            return None
        parts = [pulled[index] for index in curved]

        def apply(column: Tensor, again: bool) -> Parts:
            split = objective.layout.split(column)
            directions = [split[index].to(part.dtype) for index, part in zip(curved, parts, strict=True)]
            with differentiable_twice():
                (pushed,) = torch.autograd.grad(parts, cotangent, directions, retain_graph=True)
                return torch.autograd.grad(output, leaves, bend(pushed), retain_graph=again, allow_unused=True)

        return apply

    return build


def _must_be_linear(output: Tensor, leaves: list[Tensor]) -> None:
    """A backward that autograd cannot follow gives numbers without a graph; zeros are none of these."""
    if leaves:
        parts = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True, allow_unused=True)
        if any(part is not None and bool(in_full(part).any()) for part in parts):
            raise NotDifferentiable("autograd cannot follow the backward of this model: a custom autograd.Function computes it outside torch.")


def output_of(term: Term) -> Tensor:
    """The model's output for a term, which has to be one tensor."""
    output = term.output()
    if not isinstance(output, Tensor):
        raise TypeError(f"the model's output is a {type(output).__name__}. GGN and Fisher need one tensor: pass forward=lambda model, batch: (tensor, target).")
    return output


def loss_hessian(term: Term, output: Tensor) -> Callable[[Tensor], Tensor]:
    """C = second derivative of the batch's loss in its outputs."""
    variable = output.requires_grad_()
    (first,) = torch.autograd.grad(term.loss_of(variable), variable, create_graph=True)
    if not first.requires_grad:  # a loss that is linear in the outputs has no curvature there
        return torch.zeros_like
    return lambda u: torch.autograd.grad(first, variable, u, retain_graph=True)[0]


def loss_hessian_by_differences(term: Term, output: Tensor) -> Callable[[Tensor], Tensor]:
    """C from fourth-order differences of the criterion's gradient in the outputs, in float64 where it runs there: for losses whose gradient autograd cannot differentiate."""
    slope, there = criterion_slope(term, output)
    scale = max(float(there.square().mean().sqrt()), 1e-3) * 1e-4 if there.numel() else 1.0

    def bend(u: Tensor) -> Tensor:
        size = float(u.double().square().mean().sqrt())
        if not size:
            return torch.zeros_like(u)
        step = u.to(there.dtype) * (scale / size)
        near, far = (slope(there + k * step)[1] - slope(there - k * step)[1] for k in (1, 2))
        return ((8 * near - far) * (size / (12 * scale))).to(u.dtype)

    return bend


def criterion_slope(term: Term, output: Tensor) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """(outputs -> the criterion's value and its gradient in them, the outputs), in float64 where the criterion runs there."""
    criterion = term.recipe.criterion
    assert criterion is not None  # a batch_loss has no outputs
    precise, target = criterion.in_double(term.recipe.model), as_double(term.target)

    def slope(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            variable = at.detach().requires_grad_()
            own = precise.call(variable, target) if at.dtype == torch.float64 else criterion.call(variable, term.target)
            value: Tensor = own.reshape(())
            if not value.requires_grad:
                return value, torch.zeros_like(at)
            (gradient,) = torch.autograd.grad(value, variable, allow_unused=True, materialize_grads=True)
            return value.detach(), gradient

    there = output.detach().double()
    try:
        slope(there)
    except (RuntimeError, TypeError, ValueError):
        there = output.detach()
    return slope, there
