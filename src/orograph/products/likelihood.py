r"""The Fisher's curvature in output space: $C_b = \frac{1}{u_b} \sum_i c_i\, s_i s_i^\top$ with s_i the gradient of one unit's
negative log-likelihood in the outputs, at labels drawn from the model ("mc") or at the data's own ("empirical").

Drawn labels depend on (seed, index of the example, position in it) alone, through a counter-based hash, so they are the same in
whatever batches the data come.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..criteria import Criterion
from ..terms import Term

SAMPLED = (F.cross_entropy, F.nll_loss, F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


def outer_products(term: Term, scores: Tensor, weights: Tensor, *, axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Map u to the sum of weight * s (s . u) per unit; a unit's score s runs over `axes` of the output (none: every entry is a unit)."""
    scale = weights / (term.units if term.recipe.weighs else 1.0)
    if not axes:
        return lambda u: scale * scores * scores * u
    return lambda u: scale * scores * (scores * u).sum(dim=axes, keepdim=True)


def empirical_fisher(term: Term, output: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores at the data's own labels: of a position for class targets, of an example for elementwise losses.

    The negative log-likelihood of an example is the sum of its entries' losses, and all are divided by the units of the loss, as
    the GGN is: if the labels were drawn from the model, the two would agree in expectation.
    """
    criterion, target = _known(term), term.target
    variable = output.requires_grad_()
    each = criterion.each(variable, target)
    (scores,) = torch.autograd.grad(each.sum(), variable)
    if criterion.family == "elementwise":
        one = torch.ones((), dtype=output.dtype, device=output.device)
        return outer_products(term, scores, one, axes=tuple(range(1, output.ndim)))
    axis = 1 if output.ndim > 1 else 0
    if not criterion.weighs_positions(target):
        return outer_products(term, scores, torch.ones((), dtype=output.dtype, device=output.device), axes=(axis,))
    weights = criterion.unit_weights(target).to(output.dtype).unsqueeze(axis)
    safe = torch.where(weights > 0, weights, torch.ones_like(weights))
    return outer_products(term, scores / safe, weights, axes=(axis,))  # the class weight counts the unit, and is not in its score


def sampled_fisher(seed: int) -> Callable[[Term, Tensor], Callable[[Tensor], Tensor]]:
    """Scores at labels drawn from the model's own predictive distribution: unbiased for the GGN of the same loss."""

    def curvature(term: Term, output: Tensor) -> Callable[[Tensor], Tensor]:
        criterion, target = _known(term), term.target
        if criterion.function not in SAMPLED or (criterion.family == "elementwise" and any(criterion.settings.get(k) is not None for k in ("weight", "pos_weight"))):
            raise TypeError(f'fisher(kind="mc") needs the likelihood behind {criterion.name}: unweighted MSE or binary cross-entropy, cross-entropy or NLL. Use kind="empirical" or ggn.')
        if criterion.family == "elementwise":
            uniform = _uniforms(seed, term, output.shape, output)
            return outer_products(term, _element_scores(criterion, output, uniform), torch.ones_like(output), axes=())
        axis = 1 if output.ndim > 1 else 0
        logits = output.movedim(axis, -1)
        uniform = _uniforms(seed, term, logits.shape[:-1], output)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        labels = (cumulative < uniform.double().unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
        variable = output.requires_grad_()
        plain = F.cross_entropy if criterion.family == "cross_entropy" else F.nll_loss
        (scores,) = torch.autograd.grad(plain(variable, labels, reduction="sum"), variable)
        weights = criterion.curvature_weights(target, axis).to(output.dtype)
        return outer_products(term, scores, weights.unsqueeze(axis), axes=(axis,))

    return curvature


def _element_scores(criterion: Criterion, output: Tensor, uniform: Tensor) -> Tensor:
    """Gradient of one entry's loss at a drawn label."""
    if criterion.function is F.mse_loss:  # (y - f)^2 is the negative log-likelihood of N(f, 1/2)
        normal: Tensor = torch.special.ndtri(uniform)
        return -(2**0.5) * normal
    if criterion.function is F.binary_cross_entropy_with_logits:
        return output.sigmoid() - (uniform < output.sigmoid()).to(output.dtype)
    return (output - (uniform < output).to(output.dtype)) / (output * (1 - output))


def _known(term: Term) -> Criterion:
    criterion = term.recipe.criterion
    if criterion is None or not criterion.known or term.recipe.count is not None:
        name = criterion.name if criterion is not None else "batch_loss"
        raise TypeError(f"fisher needs one of torch's own losses, whose value for single examples is known; got {name}. Use hessian or ggn.")
    return criterion


def _uniforms(seed: int, term: Term, shape: torch.Size, like: Tensor) -> Tensor:
    """Numbers in (0, 1), one per position, keyed by (seed, example, position within the example)."""
    rows = shape[0] if len(shape) else 1
    per_example = max(rows // term.examples, 1)
    row = torch.arange(rows, dtype=torch.int64, device=like.device)
    inner = torch.arange(max(shape[1:].numel(), 1), dtype=torch.int64, device=like.device)
    example = term.first + row // per_example
    position = (row % per_example)[:, None] * len(inner) + inner
    key = _mix(_mix(example + _mix(torch.tensor(seed, dtype=torch.int64, device=like.device)))[:, None] + position)
    unit: Tensor = ((key >> 11) & ((1 << 53) - 1)).double().add_(0.5) * 2.0**-53
    return unit.reshape(shape).to(like.dtype).clamp(1e-7, 1 - 1e-7)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) in wrapping int64 arithmetic."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
