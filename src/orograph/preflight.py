"""Prove, in float64 and on a few examples, that products are what finite differences of the loss say they are.

A symmetric and deterministic operator can still be wrong: a custom autograd Function whose backward returns detached tensors
gives a symmetric one. So the gradient is compared with differences of losses, the Hessian product with differences of gradients,
and the Jacobian behind Gauss-Newton and Fisher products with differences of outputs. Then the product in the real precision is
compared with the proven one, which gives its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import NotDeterministic, NotDifferentiable, OrographError, PreflightFailed
from .linalg.operator import Matmat
from .objective import Objective
from .products.gauss_newton import OutputCurvature, sandwich_of
from .products.sweeps import Sweep
from .variants import on_few

STEPS = (1e-6, 1e-7, 1e-8)  # relative to |theta|
COARSE = (1e-4, 1e-3)  # further steps, for models that round to float32 inside
AGREE = 1e-4  # relative difference up to which a finite difference and a product agree
WRONG = {torch.float64: 1e-3, torch.float32: 0.05}  # gap between real precision and float64 that no rounding explains
EXAMPLES = 16
BESIDE = 1e-3  # relative step to a neighbouring point, where the loss has a kink at the point itself


@dataclass(frozen=True)
class Verdict:
    """What was proven, in words; and the error of a product relative to its norm, in the precision that the operator uses."""

    words: str
    noise: float = 0.0


class _Kink(Exception):
    """The point lies on a kink of the loss: differences do not settle."""


class ProductWrong(PreflightFailed):
    """The gradient is right, and the product is not what its differences say."""


def preflight(objective: Objective, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None, most: int = EXAMPLES) -> Verdict:
    """Prove the products that `matmat_of(objective)` makes: Hessian products, or J'CJ products with `curvature` C in output space.

    "proven", or "unverified: why". Raises PreflightFailed where differences at several steps agree with each other and not with
    the gradient, ProductWrong where they do not with the product. Two products and four gradients of a few examples, `most` of them,
    where all is well.
    """
    count = max(min(few_enough(objective), most), 1)
    try:
        small = on_few(objective, count, double=True)
        direction = _direction(small)
        words = "proven"
        try:
            exact = _prove(small, direction, matmat_of, curvature)
        except _Kink:
            small = small.at(small.theta + BESIDE * small.theta.norm() * _direction(small, 1))
            exact, words = None, _prove_beside(small, direction, matmat_of, curvature)
        noise = _noise(on_few(objective, count, double=False), direction, matmat_of, exact) if exact is not None else 0.0
    except (NotDeterministic, NotDifferentiable, PreflightFailed):
        raise
    except (RuntimeError, TypeError, ValueError, OrographError) as error:  # a model or loss that cannot run in float64 or on fewer examples
        return Verdict(f"unverified: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return Verdict(words, noise)


def few_enough(objective: Objective) -> int:
    """Examples that a proof takes: at most 16, and for large models so few that all of it costs about one gradient of the whole set."""
    small_model = objective.size * EXAMPLES <= 2**20
    return EXAMPLES if small_model else min(max(objective.examples // 20, 1), EXAMPLES)


def _prove_beside(small: Objective, direction: Tensor, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None) -> str:
    try:
        _prove(small, direction, matmat_of, curvature)
    except _Kink:
        return "unverified: the loss has kinks at these weights and beside them"
    return "proven beside a kink of the loss"


def _prove(small: Objective, direction: Tensor, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None) -> Tensor:
    """The product of `direction`, proven against differences."""
    _check_gradient(small, direction)
    exact = matmat_of(small)(direction[:, None])[:, 0]
    if curvature is None:
        slopes = lambda step: _directional(lambda o: o.gradient(), small, direction, step)  # noqa: E731
        _compare(exact, slopes, lambda: _grains(small)[1], small, "finite differences of the gradient")
    else:
        forms = lambda step: _quadratic_form(small, direction, step, curvature)  # noqa: E731
        _compare((direction @ exact).reshape(1), forms, lambda: 0.0, small, "finite differences of the outputs")
    return exact


def _grains(objective: Objective) -> tuple[float, float]:
    """Rounding of the loss and of its gradient in float64: where a network is saturated, they are far above the values themselves."""
    loss, gradient = abs(objective.value()), float(objective.gradient().norm())
    with objective.applied():
        term = next(iter(objective.terms()))
        output = term.output()
        if isinstance(output, Tensor) and output.requires_grad:
            loss = max(loss, float(output.detach().abs().max()))
            mean = output.abs().sum() / (term.units if term.recipe.weighs else 1.0)
            parts = torch.autograd.grad(mean, objective.leaves, allow_unused=True)
            gradient = max(gradient, float(objective.layout.flatten(parts, objective.theta).norm()))
    epsilon = 4 * torch.finfo(torch.float64).eps
    return epsilon * loss, epsilon * gradient


def _compare(exact: Tensor, difference: Callable[[float], Tensor], grain: Callable[[], float], small: Objective, what: str) -> None:
    """Agreement at any step proves; steps that agree with each other and not with the product refute; else there is a kink or noise.

    `grain`: what rounding leaves of a difference before it is divided by the step.
    """
    found: list[Tensor] = []
    for step in STEPS:  # from the largest, where all is mostly well
        found.append(difference(step))
        scale = max(float(exact.norm()), float(found[-1].norm()))
        if float((found[-1] - exact).norm()) <= AGREE * scale:
            return
    for step in COARSE:
        slope = difference(step)
        if float((slope - exact).norm()) <= AGREE * max(float(exact.norm()), float(slope.norm())):
            return
    scale = max(float(exact.norm()), *(float(slope.norm()) for slope in found))
    gaps = [float((slope - exact).norm()) / scale for slope in found]
    rounding = grain() / scale
    if any(gap <= AGREE + rounding / _reach(small.theta, step) for gap, step in zip(gaps, STEPS, strict=True)):
        return
    if float((found[0] - found[1]).norm()) / scale > 0.1 * min(gaps):
        raise _Kink
    raise ProductWrong(
        f"the product disagrees with {what} by {min(gaps):.1%}, at steps that agree with each other. "
        f"{_suspects(small)} Pass check=False only to study the operator as it is."
    )


def _direction(objective: Objective, index: int = 0) -> Tensor:
    """A random unit vector; without the rows of embeddings at `padding_idx`, which torch holds constant whatever the loss says."""
    direction = objective.space.sample(0, index, "normal")
    for name, places in objective.snapshot.slots.parameters.items():
        for module, attribute in places:
            row = getattr(module, "padding_idx", None)
            if row is not None and attribute == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name in objective.names:
                direction[objective.layout[name]].view(module.num_embeddings, -1)[row] = 0.0
    return direction / float(direction.norm())


def _directional(function: Callable[[Objective], Tensor], objective: Objective, direction: Tensor, step: float) -> Tensor:
    """Central difference of a function along a unit direction."""
    theta = objective.theta
    reach = _reach(theta, step)
    return (function(objective.at(theta + reach * direction)) - function(objective.at(theta - reach * direction))) / (2 * reach)


def _reach(theta: Tensor, step: float) -> float:
    """Length of a relative step."""
    return step * max(float(theta.norm()), 1e-3)


def _check_gradient(objective: Objective, direction: Tensor) -> None:
    """The gradient against differences of the loss: wrong first gradients would pass a comparison of second ones with themselves."""
    slope, theta = float(objective.gradient() @ direction), objective.theta
    if not math.isfinite(slope):
        return
    steps = [_reach(theta, step) for step in (1e-4, 1e-5, 1e-6)]
    values: list[tuple[float, float]] = []  # (ahead, behind)
    for reach in steps:
        ahead, behind = (objective.at(theta + sign * reach * direction).value() for sign in (1, -1))
        values.append((ahead, behind))
        if abs((ahead - behind) / (2 * reach) - slope) <= AGREE * abs(slope):
            return
    central = [(ahead - behind) / (2 * reach) for (ahead, behind), reach in zip(values, steps, strict=True)]
    gap = min(abs(difference - slope) for difference in central)
    if gap <= AGREE * abs(slope) + _grains(objective)[0] / steps[0]:  # the floor is what float64 losses can tell
        return
    here = objective.value()
    uneven = abs((values[2][0] - here) - (here - values[2][1])) / steps[2]
    if uneven > 0.5 * gap or abs(central[1] - central[2]) > 0.1 * gap:
        raise _Kink  # the two sides differ at the smallest step: autograd has chosen one of them
    raise PreflightFailed(
        f"the gradient disagrees with finite differences of the loss: {slope:.6g} along a random direction, where the loss says {central[1]:.6g}. {_suspects(objective)}"
    )


def _quadratic_form(objective: Objective, direction: Tensor, step: float, curvature: OutputCurvature) -> Tensor:
    """(Jv)' C (Jv), (1,), with Jv a central difference of the outputs."""

    def output(at: Objective) -> Tensor:
        with at.applied(), torch.no_grad():
            outputs: Tensor = next(iter(at.terms())).output()
            return outputs

    pushed = _directional(output, objective, direction, step)
    with objective.applied():
        term = next(iter(objective.terms()))
        there = term.output().detach()
        return (pushed * curvature(term, there)(pushed)).sum().reshape(1) * term.weight


def _noise(real: Objective, direction: Tensor, matmat_of: Callable[[Objective], Matmat], exact: Tensor) -> float:
    """Error of the product in the operator's own precision on the same examples, relative to its norm."""
    product = matmat_of(real)(direction.to(real.dtype)[:, None])[:, 0].double()
    gap = float((product - exact).norm() / exact.norm().clamp(min=1e-300))
    coarse = min((leaf.dtype for leaf in real.leaves), key=lambda dtype: -torch.finfo(dtype).eps)
    allowed = WRONG.get(coarse, math.inf)
    if gap > allowed and gap * float(exact.norm()) > allowed * float(exact.norm()) + _rounding(real, direction, coarse):
        raise ProductWrong(
            f"the product in {str(coarse).removeprefix('torch.')} is {gap:.1%} off the proven one in float64 on the same examples, which no rounding explains. {_suspects(real)}"
        )
    return gap


def _rounding(objective: Objective, direction: Tensor, dtype: torch.dtype) -> float:
    """What rounding of `dtype` may do to a product: a saturated loss has a curvature far below eps J'J v, and only that is certain."""
    if objective.recipe.batch_loss is not None:
        return math.inf  # no outputs to tell it from; the gap is in the noise
    identity = Sweep(objective, sandwich_of(lambda term, output: lambda u: u / (term.units if term.recipe.weighs else 1.0)))
    try:
        reach = float(identity(direction.to(objective.dtype)[:, None]).double().norm())
    except NotDifferentiable:
        return 0.0  # differences in float64 are not rounded to `dtype`
    return 100 * torch.finfo(dtype).eps * reach


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
        names.append(type(here).__name__.removesuffix("Backward") if isinstance(here, torch.autograd.function.BackwardCFunction) else "")
        if "WeightNorm" in type(here).__name__:
            return "torch's own second derivative of weight_norm is the likely cause: fold it into the weights first (remove_parametrizations)."
        queue.extend(next_node for next_node, _ in here.next_functions)
    custom = [name for name in names if name]
    if custom:
        return f"The custom autograd.Function {custom[0]!r} is the likely cause: its backward must be made of differentiable torch operations."
    return "A kernel with a hand-written backward, or a gradient that is detached inside the model, is the likely cause."
