"""A criterion that is not torch's own, in the space of the outputs: its gradient against its values, its second derivative against its gradient.

No pass through the network is needed. A loss that saves its gradient (fused kernels), or holds a factor back, has a right gradient and
a wrong second derivative, which both sides of a comparison of Gauss-Newton products would share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .comparison import AGREE, EPSILON, ROUNDINGS
from .errors import CriterionWrong, PreflightFailed
from .objective import Objective
from .products.gauss_newton import OutputCurvature, criterion_slope, loss_hessian, loss_hessian_by_differences, output_of
from .terms import Term

STEPS = (1e-5, 1e-6, 1e-7)  # relative to the outputs


def prove_criterion(objective: Objective, curvature: OutputCurvature) -> None:
    """PreflightFailed where the criterion's gradient is not that of its values, CriterionWrong where `curvature` is not that of its gradient."""
    criterion = objective.recipe.criterion
    if criterion is None or criterion.known or curvature not in (loss_hessian, loss_hessian_by_differences):
        return
    with objective.applied():
        for term in objective.terms():
            with torch.no_grad():
                output = output_of(term)
            _prove(term, output.detach(), curvature)


def _prove(term: Term, output: Tensor, curvature: OutputCurvature) -> None:
    slope, there = criterion_slope(term, output)
    if there.dtype != torch.float64 or not there.numel():
        return  # differences in less say little
    scale = max(float(there.square().mean().sqrt()), 1e-3)
    u = torch.randn(there.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(there.device)
    bent = curvature(term, there.clone())(u).detach()
    rows: list[Tensor] = []
    rises: list[float] = []
    wrong_slope, wrong_bend = True, torch.ones(len(_rows(u)), dtype=torch.bool, device=u.device)
    for step in STEPS:
        width = 2 * step * scale
        (ahead, up), (behind, down) = (slope(there + sign * width / 2 * u) for sign in (1, -1))
        mean, rise = (up + down) / 2, float(ahead - behind) / width
        rounding = ROUNDINGS * EPSILON * abs(float(ahead)) / width
        wrong_slope = wrong_slope and abs(rise - float((mean * u).sum())) > AGREE * float((mean * u).norm()) + rounding
        rises.append(rise - float((mean * u).sum()))
        rows.append((up - down) / width)
        floor = ROUNDINGS * EPSILON * float(mean.norm()) / width + 1e-8 * float(rows[-1].norm())
        allowed = AGREE * torch.maximum(_rows(bent), _rows(rows[-1])) + floor
        wrong_bend &= _rows(bent - rows[-1]) > allowed
        if not wrong_slope and not bool(wrong_bend.any()):
            return
    name = term.recipe.criterion.name if term.recipe.criterion is not None else ""
    if wrong_slope and abs(rises[0] - rises[1]) <= 0.1 * abs(rises[0]):
        raise PreflightFailed(
            f"the gradient disagrees with finite differences of the loss already in the space of the outputs: criterion {name} holds back a factor (detach) or "
            "has a hand-written backward that is wrong. Its curvature is that of another function. Pass the loss whose gradient it is."
        )
    settled = _rows(rows[0] - rows[1]) <= 0.1 * _rows(bent - rows[0])
    if bool((wrong_bend & settled).any()):
        share = float((_rows(bent - rows[0]) / torch.maximum(_rows(bent), _rows(rows[0])).clamp(min=1e-300))[wrong_bend & settled].max())
        raise CriterionWrong(
            f"the second derivative of criterion {name} in the outputs disagrees with finite differences of its gradient by {share:.1%}, at steps that agree with each "
            "other: it saves its gradient, or holds back a part of it (detach). Pass check=False only to study the operator as it is."
        )


def _rows(values: Tensor) -> Tensor:
    """Norm of every row."""
    flat = values.reshape(values.shape[0] if values.ndim > 0 else 1, -1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms
