"""Products against finite differences, the part of every parameter on its own scale."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .errors import ProductWrong
from .layout import Layout
from .objective import Objective
from .products.gauss_newton import OutputCurvature, output_of
from .suspects import suspects
from .terms import Term

STEPS = (1e-6, 1e-7, 1e-8)  # relative to |theta|
COARSE = (1e-4, 1e-3)  # further steps, for models that round to float32 inside
AGREE = 1e-4  # relative difference up to which a finite difference and a product agree
EPSILON = float(torch.finfo(torch.float64).eps)
ROUNDINGS = 64  # of a gradient, that its difference may carry
CANCELLED = 1e-8  # of the whole product, that rounding may leave of a parameter's part
Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


class Kink(Exception):
    """The point lies on a kink of the loss: differences do not settle."""


class Parts:
    """A vector (n,) cut into the parts of the parameters of one block, or of all; an entry behind it is a part of its own."""

    def __init__(self, layout: Layout, block: list[str] | None) -> None:
        self.size = layout.size
        self.slices = {i: layout[name] for i, name in enumerate(layout.names) if block is None or name in block}

    def norms(self, vector: Tensor) -> Numbers:
        """Of every part."""
        values = vector.detach().cpu().double().numpy()
        pieces = [values[part] for part in self.slices.values()]
        pieces += [values[self.size :]] if len(values) > self.size else []
        return np.array([float(np.linalg.norm(piece)) for piece in pieces])

    def norm(self, vector: Tensor) -> float:
        """Of all parameters' parts together."""
        return float(np.linalg.norm(self.norms(vector[: self.size])))

    def nonzero(self, vector: Tensor) -> set[int]:
        """Indices of the parameters whose part is not zero."""
        return {i for i, norm in zip(self.slices, self.norms(vector[: self.size]), strict=True) if norm > 0}


class Difference:
    """step -> what a finite difference of that relative step says a product of `direction` is, in float64.

    For the Hessian a central difference of gradients (n,). With a `curvature` C: J'(C Jv) (n,), with Jv a central difference of outputs,
    and (Jv)'C(Jv) behind it, in which no derivative of the network is taken.
    """

    def __init__(self, objective: Objective, direction: Tensor, curvature: OutputCurvature | None, parts: Parts) -> None:
        self.objective, self.direction, self.curvature, self.parts = objective, direction, curvature, parts
        self.slopes = (float("nan"), 0.0)  # along the direction: by the gradient, by the loss
        self.value = float("nan")  # of the loss, at the mean of the two sides
        self.gradient_norm = 0.0
        self.found: dict[float, Tensor] = {}
        self._centre: list[tuple[Term, Tensor, Callable[[Tensor], Tensor]]] | None = None

    def __call__(self, step: float) -> Tensor:
        if step not in self.found:
            theta, reach = self.objective.theta, reach_of(self.objective, step, self.parts)
            sides = [self.objective.at(theta + sign * reach * self.direction) for sign in (1, -1)]
            run = self._of_gradients if self.curvature is None else self._of_outputs
            self.found[step] = run(sides, 2 * reach)
        return self.found[step]

    def _of_gradients(self, sides: list[Objective], width: float) -> Tensor:
        (ahead, up), (behind, down) = (side.value_and_gradient() for side in sides)
        mean = (up + down) / 2
        self._note(mean, ahead, behind, width)
        return (up - down) / width

    def _of_outputs(self, sides: list[Objective], width: float) -> Tensor:
        (ahead, up), (behind, down) = map(_outputs_at, sides)
        total, gradient = torch.zeros_like(self.direction), torch.zeros_like(self.direction)
        form, leaves, layout = 0.0, self.objective.leaves, self.objective.layout
        with self.objective.applied():
            for (term, output, bend), high, low in zip(self._terms(), up, down, strict=True):
                pushed = (high - low) / width
                bent = bend(pushed)
                form += term.weight * float((pushed * bent).sum())
                if not output.requires_grad:
                    continue
                variable = output.detach().requires_grad_()
                loss = term.loss_of(variable)
                slope = torch.autograd.grad(loss, variable, allow_unused=True)[0] if loss.requires_grad else None
                for cotangent, into in ((bent, total), (slope, gradient)):
                    if cotangent is not None:
                        pulled = torch.autograd.grad(output, leaves, cotangent, retain_graph=True, allow_unused=True)
                        into.add_(layout.flatten(pulled, into), alpha=term.weight)
        self._note(gradient, ahead, behind, width)
        return torch.cat([total, total.new_tensor([form])])

    def _terms(self) -> list[tuple[Term, Tensor, Callable[[Tensor], Tensor]]]:
        """(term, its outputs with their graph, C) at the point itself; inside `applied()`."""
        assert self.curvature is not None
        if self._centre is None:
            self._centre = []
            for term in self.objective.terms():
                output = output_of(term)
                self._centre.append((term, output, self.curvature(term, output.detach())))
        return self._centre

    def _note(self, gradient: Tensor, ahead: float, behind: float, width: float) -> None:
        self.slopes = float(gradient @ self.direction), (ahead - behind) / width
        self.value = (ahead + behind) / 2
        self.gradient_norm = max(self.gradient_norm, self.parts.norm(gradient))

    def of_product(self, product: Tensor) -> Tensor:
        """A product (n,) in the form of a difference."""
        return product if self.curvature is None else torch.cat([product, (self.direction @ product).reshape(1)])

    def floor(self, step: float) -> float:
        """What rounding leaves of the difference of a single parameter's part."""
        cancelled = CANCELLED * self.parts.norm(self.found[step])
        return self._rounding(step) + cancelled

    def _rounding(self, step: float) -> float:
        return ROUNDINGS * EPSILON * self.gradient_norm / reach_of(self.objective, step, self.parts)

    def is_zero(self, step: float) -> bool:
        """Whether the difference is no more than rounding."""
        return self.parts.norm(self.found[step]) <= self._rounding(step)


def _outputs_at(objective: Objective) -> tuple[float, list[Tensor]]:
    """(loss, outputs of every term)."""
    outputs, value = [], 0.0
    with objective.applied(), torch.no_grad():
        for term in objective.terms():
            outputs.append(output_of(term))
            value += term.weight * float(term.loss_of(outputs[-1]))
    return value, outputs


def reach_of(objective: Objective, step: float, parts: Parts) -> float:
    """Length of a relative step."""
    return step * max(parts.norm(objective.theta), 1e-3)


def disagreement(product: Tensor, difference: Tensor, parts: Parts, floor: float) -> Numbers:
    """Of every part, as a multiple of what is allowed."""
    scale = np.maximum(parts.norms(product), parts.norms(difference))
    gaps: Numbers = parts.norms(product - difference)
    return gaps / np.maximum(AGREE * scale + floor, 1e-300)


def compare(difference: Difference, product: Tensor) -> float:
    """The step at which product and differences agree. Agreement at any step proves; a part for which two steps agree with each other and not with the product refutes; else there is a kink or noise."""
    parts, exact = difference.parts, difference.of_product(product)
    best: Numbers = np.full(len(parts.norms(exact)), np.inf)
    for step in (*STEPS, *COARSE):  # from the largest of the fine ones, where all is mostly well
        ratios = disagreement(exact, difference(step), parts, difference.floor(step))
        if ratios.max() <= 1:
            return step
        best = np.minimum(best, ratios)
    grain = rounding_of_loss(difference.objective, parts)[1]
    for step in STEPS:
        floor = difference.floor(step) + grain / reach_of(difference.objective, step, parts)
        best = np.minimum(best, disagreement(exact, difference(step), parts, floor))
    if best.max() <= 1:
        return STEPS[0]
    first, second = difference(STEPS[0]), difference(STEPS[1])
    gaps = np.min([parts.norms(difference(step) - exact) for step in STEPS], axis=0)
    settled = parts.norms(first - second) <= 0.1 * gaps
    if not bool((settled & (best > 1)).any()):
        raise Kink
    scale = np.maximum(np.maximum(parts.norms(first), parts.norms(exact)), 1e-300)
    share = float((gaps / scale)[settled & (best > 1)].max())
    what = "finite differences of the gradient" if difference.curvature is None else "finite differences of the outputs"
    raise ProductWrong(
        f"the product disagrees with {what} by {share:.1%}, at steps that agree with each other. "
        f"{suspects(difference.objective)} Pass check=False only to study the operator as it is."
    )


def rounding_of_loss(objective: Objective, within: Parts) -> tuple[float, float]:
    """Rounding of the loss and of its gradient in float64: where a network is saturated, they are far above the values themselves."""
    loss, gradient = abs(objective.value()), within.norm(objective.gradient())
    with objective.applied():
        term = next(iter(objective.terms()))
        output = term.output()
        if isinstance(output, Tensor) and output.requires_grad:
            loss = max(loss, float(output.detach().abs().max()))
            mean = output.abs().sum() / (term.units if term.recipe.weighs else 1.0)
            parts = torch.autograd.grad(mean, objective.leaves, allow_unused=True)
            gradient = max(gradient, within.norm(objective.layout.flatten(parts, objective.theta)))
    return 4 * EPSILON * loss, 4 * EPSILON * gradient
