r"""Products from finite differences, for models that autograd cannot differentiate twice: $H v \approx (g(\theta + \epsilon v) - g(\theta - \epsilon v)) / 2 \epsilon$.

In float64 wherever the model runs there, else in float32. The step is calibrated on one direction: it falls by factors of 3 until two
neighbours agree, or to the pair that agrees best; how far they disagree is the noise. On piecewise-linear networks a difference crosses
kinks, and measures the *smoothed* Hessian. Two gradients per product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotDifferentiable
from ..objective import Objective
from ..variants import in_double
from .gauss_newton import OutputCurvature, output_of
from .sweeps import add_parts

STEPS = {torch.float64: (1e-6, 9), torch.float32: (1e-2, 7)}  # the first step relative to |theta|, and how many there are
SETTLED = {torch.float64: 1e-6, torch.float32: 1e-4}  # disagreement of neighbours at which the search ends


@dataclass
class Difference:
    """V (n, k) -> A V (n, k) by central differences of `slope` along each column."""

    objective: Objective  # in the precision of the differences
    along: Callable[[Objective, Tensor], Tensor]  # (objective, unit direction times the step) -> A direction * step
    dtype: torch.dtype  # of the vectors
    step: float = 0.0
    noise: float = 0.0

    def __call__(self, V: Tensor) -> Tensor:
        columns = []
        for v in V.to(self.objective.dtype).unbind(dim=1):
            length = float(torch.linalg.vector_norm(v, dtype=torch.float64))
            columns.append(self.along(self.objective, v * (self.step / length)) * (length / self.step) if length else torch.zeros_like(v))
        return torch.stack(columns).to(self.dtype).T


def hessian_difference(objective: Objective) -> Difference:
    """Hessian products from two gradients each."""
    return _calibrated(objective, _slope)


def sandwich_difference(objective: Objective, curvature: OutputCurvature) -> Difference:
    """J'CJ products: J v from differences of the outputs, then one backward."""

    def along(precise: Objective, step: Tensor) -> Tensor:
        theta = precise.theta
        ahead, behind = precise.at(theta + step), precise.at(theta - step)
        total = torch.zeros(precise.size, dtype=torch.float64, device=precise.device)
        for term in precise.terms():
            outputs = []
            for side in (ahead, behind):
                with side.applied(), torch.no_grad():
                    outputs.append(output_of(term))
            with precise.applied():
                output = output_of(term)
                cotangent = curvature(term, output.detach())((outputs[0] - outputs[1]) / 2)
                add_parts(precise, total, torch.autograd.grad(output, precise.leaves, cotangent, allow_unused=True), term.weight)
        return total

    return _calibrated(objective, along)


def _slope(objective: Objective, step: Tensor) -> Tensor:
    theta = objective.theta
    return (objective.at(theta + step).gradient().double() - objective.at(theta - step).gradient().double()) / 2


def _calibrated(objective: Objective, along: Callable[[Objective, Tensor], Tensor]) -> Difference:
    """With the step whose neighbours agree best, tried along one direction."""
    precise = _precise(objective)
    found = Difference(precise, along, objective.dtype)
    direction = precise.space.sample(0, 0, "normal")
    direction /= float(direction.norm())
    reach = max(float(precise.theta.norm()), 1e-3)
    first, count = STEPS[precise.dtype]
    slopes: list[Tensor] = []
    best = float("inf")
    for step in (reach * first / 3**index for index in range(count)):
        slopes.append(along(precise, direction * step) / step)
        gap = float((slopes[-1] - slopes[-2]).norm()) / (float(slopes[-1].norm()) or 1.0) if len(slopes) > 1 else best
        if gap < best:
            best, found.step, found.noise = gap, step, gap
        if best < SETTLED[precise.dtype]:
            break
    return found


def _precise(objective: Objective) -> Objective:
    """In float64, where the model and its loss run there."""
    if objective.dtype == torch.float64:
        return objective
    try:
        double = in_double(objective)
        double.gradient()
    except (RuntimeError, TypeError, ValueError) as error:
        if any(torch.finfo(leaf.dtype).bits < 32 for leaf in objective.leaves):
            raise NotDifferentiable(f"finite differences need float32 or better, and this model does not run in float64: {str(error).splitlines()[0]}") from error
        return objective
    return double
