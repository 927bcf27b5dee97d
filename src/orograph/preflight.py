"""Prove, in float64 and on a few examples, that products are what finite differences of the loss say they are.

A symmetric and deterministic operator can still be wrong: a custom autograd Function whose backward returns detached tensors
gives a symmetric one. So the product is compared with differences of gradients, and the gradient with differences of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import NotDeterministic, NotDifferentiable, OrographError, PreflightFailed
from .objective import Objective

STEPS = (1e-6, 1e-7, 1e-8)  # relative to |theta|
AGREE = 1e-4  # relative difference up to which a finite difference and a product agree
EXAMPLES = 16


def preflight(objective: Objective, matmat_of: Callable[[Objective], Callable[[Tensor], Tensor]] | None) -> str:
    """Return "proven", or "unverified: why". Raises PreflightFailed where the steps agree with each other and not with the product.

    `matmat_of` makes the Hessian product of an objective; without it only the gradient is proven. Costs a product and seven
    gradients of at most 16 examples.
    """
    try:
        small = objective.in_double(EXAMPLES)
        direction = _direction(small)
        _check_gradient(small, direction)
        if matmat_of is None:
            return "gradient proven"
        exact = matmat_of(small)(direction[:, None])[:, 0]
        slopes = [_directional(lambda o: o.gradient(), small, direction, step) for step in STEPS]
    except (NotDeterministic, NotDifferentiable, PreflightFailed):
        raise
    except (RuntimeError, TypeError, ValueError, OrographError) as error:  # a model or loss that cannot run in float64 or on fewer examples
        return f"unverified: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    scale = max(float(exact.norm()), *(float(slope.norm()) for slope in slopes))
    if not scale > 0:
        return "proven"
    gaps = [float((slope - exact).norm()) / scale for slope in slopes]
    if min(gaps) <= AGREE:
        return "proven"
    steady = float((slopes[0] - slopes[1]).norm()) / scale <= 0.1 * min(gaps)
    if steady:
        raise PreflightFailed(
            f"the product disagrees with finite differences of the gradient by {min(gaps):.1%}, at steps that agree with each other. "
            f"{_suspects(small)} Pass check=False only to study the operator as it is."
        )
    return f"unverified: finite differences at three steps differ from each other (gaps {', '.join(f'{gap:.1e}' for gap in gaps)}); the loss has kinks or noise here"


def _direction(objective: Objective) -> Tensor:
    direction = objective.space.sample(0, 0, "normal")
    return direction / float(direction.norm())


def _directional(function: Callable[[Objective], Tensor], objective: Objective, direction: Tensor, step: float) -> Tensor:
    """Central difference of a vector function along a unit direction."""
    theta = objective.theta
    reach = step * max(float(theta.norm()), 1e-3)
    return (function(objective.at(theta + reach * direction)) - function(objective.at(theta - reach * direction))) / (2 * reach)


def _check_gradient(objective: Objective, direction: Tensor) -> None:
    """The gradient's own derivative of the loss: wrong first gradients would pass a comparison of second ones with themselves."""
    slope = float(objective.gradient() @ direction)
    differences = [float(_directional(lambda o: torch.tensor(o.value(), dtype=torch.float64), objective, direction, step)) for step in (1e-4, 1e-5, 1e-6)]
    floor = 1e-9 * abs(objective.value())  # what float64 losses can tell
    gaps = [abs(difference - slope) for difference in differences]
    if min(gaps) <= AGREE * abs(slope) + floor or not math.isfinite(slope):
        return
    if abs(differences[1] - differences[2]) <= 0.1 * min(gaps):
        raise PreflightFailed(
            f"the gradient disagrees with finite differences of the loss: {slope:.6g} along a random direction, where the loss says {differences[1]:.6g}. {_suspects(objective)}"
        )


def _suspects(objective: Objective) -> str:
    """What is known to make second derivatives wrong without an error."""
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
        if isinstance(here, torch.autograd.function.BackwardCFunction):
            names.append(type(here).__name__.removesuffix("Backward"))
        queue.extend(next_node for next_node, _ in here.next_functions)
    if names:
        return f"The custom autograd.Function {names[0]!r} is the likely cause: its backward must be made of differentiable torch operations."
    return "A kernel with a hand-written backward, or a gradient that is detached inside the model, is the likely cause."
