"""Prove, in float64 and on a few examples, that products are what finite differences of the loss say they are.

A symmetric and deterministic operator can still be wrong: a custom autograd Function whose backward returns detached tensors
gives a symmetric one. So the gradient is compared with differences of losses, the Hessian product with differences of gradients,
and Gauss-Newton and Fisher products with differences of outputs; every parameter's part on its own scale. The product in the real
precision is taken where it agrees as it is; else the one in float64 is proven, and their difference is the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .comparison import AGREE, STEPS, Difference, Kink, Parts, compare, disagreement, reach_of, rounding_of_loss
from .criterion_proof import prove_criterion
from .cutting import cut_batch
from .errors import NotDeterministic, NotDifferentiable, OrographError, PreflightFailed, ProductWrong
from .linalg.operator import Matmat
from .objective import Objective
from .products.gauss_newton import OutputCurvature, sandwich_of
from .products.sweeps import Sweep
from .reached import Reached, Watch
from .suspects import reached_by, suspects
from .variants import in_double, in_pieces, on_spread
from .weighting import HINT

WRONG = {torch.float64: 1e-3, torch.float32: 0.05}  # gap between real precision and float64 that no rounding explains
EXAMPLES, MOST = 16, 256  # examples of a proof, and how many it may take where products are zero on fewer
CLOSE = 1e-5  # gap up to which a product in the real precision is proven as it is
SAME = 1e-9  # relative difference of losses that are the same but for rounding
BESIDE = 1e-3  # relative step to a neighbouring point, where the loss has a kink at the point itself


@dataclass(frozen=True)
class Verdict:
    """What was proven, in words; the error of a product relative to its norm, in the precision that the operator uses; and what the proof has reached."""

    words: str
    noise: float = 0.0
    reached: Reached = field(default_factory=Reached)
    zero: bool = False  # every product was zero, on some of the data

    @property
    def proven(self) -> bool:
        return self.words.startswith("proven")


def preflight(objective: Objective, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None, most: int = MOST) -> Verdict:
    """Prove the products that `matmat_of(objective)` makes: Hessian products, or J'CJ products with `curvature` C in output space.

    "proven", or "unverified: why". Raises PreflightFailed where differences at several steps agree with each other and not with
    the gradient, ProductWrong where they do not with the product. One product and two gradients of a few examples, `most` of them,
    where all is well; of more examples where a product is zero on fewer, since zero agreeing with zero proves nothing.
    """
    for count in _counts(objective, most):
        try:
            few = on_spread(objective, count)
        except ValueError:  # none of them counts
            continue
        verdict = prove_on(few, matmat_of, curvature)
        if verdict is not None:
            return verdict
        if few.examples >= objective.examples:
            return Verdict("proven")  # zero on all of the data
    return Verdict(f"unverified: all products are zero on the {min(count, objective.examples)} examples that were tried, which proves nothing of the others", zero=True)


def few_enough(objective: Objective) -> int:
    """Examples that a proof takes: 16, and for large models so few that all of it costs about one gradient of the whole set."""
    small_model = objective.size * EXAMPLES <= 2**20
    return EXAMPLES if small_model else min(max(objective.examples // 10, 2), EXAMPLES)


def _counts(objective: Objective, most: int) -> Iterator[int]:
    """How many examples to try, until products are not zero."""
    count = max(min(few_enough(objective), most), 1)
    yield count
    while count < min(objective.examples, most):
        count = min(4 * count, objective.examples, most)
        yield count


def prove_on(few: Objective, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None, block: list[str] | None = None) -> Verdict | None:
    """The verdict on all examples of `few`, or None where every product is zero on them; with `block`, on the diagonal block of those parameters."""
    try:
        return _Proof(few, matmat_of, curvature, block).verdict()
    except (NotDeterministic, NotDifferentiable, PreflightFailed, Coupled):
        raise
    except (RuntimeError, TypeError, ValueError, OrographError) as error:  # a model or loss that cannot run in float64 or on fewer examples
        return Verdict(f"unverified: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


class Coupled(ValueError):
    """Examples of different batches, in one batch, give other losses than apart."""


class _Proof:
    """One proof: the examples in the real precision and in float64, the direction, and what has been reached."""

    def __init__(self, real: Objective, matmat_of: Callable[[Objective], Matmat], curvature: OutputCurvature | None, block: list[str] | None) -> None:
        self.real, self.matmat_of, self.curvature, self.block = real, matmat_of, curvature, block
        self.precise = all(leaf.dtype == torch.float64 for leaf in real.leaves)
        self.small = real if self.precise else in_double(real)
        self.coarse = max((leaf.dtype for leaf in real.leaves), key=lambda dtype: torch.finfo(dtype).eps)
        self.reached = Reached()
        self.direction = _direction(self.small, block)
        self.parts = Parts(real.layout, block)

    def verdict(self) -> Verdict | None:
        difference = Difference(self.small, self.direction, self.curvature, self.parts)
        first = difference(STEPS[0])
        try:
            check_gradient(difference)
        except Kink:
            return self._proven_beside()
        self._refuse_coupling(difference)
        if self.curvature is not None:
            prove_criterion(self.small, self.curvature)
        exact: Tensor | None = None
        if self.coarse in (torch.float32, torch.float64):
            product = self._product(self.real)
            gap = self.parts.norm(product - first[: self.real.size]) / max(self.parts.norm(first), 1e-300)
            rounding = 0.0 if self.precise else 32 * torch.finfo(self.coarse).eps * self.parts.norm(product)
            ratios = disagreement(difference.of_product(product), first, self.parts, difference.floor(STEPS[0]) + rounding)
            if ratios.max() <= 1 and (self.precise or gap <= CLOSE or difference.is_zero(STEPS[0])):
                return self._nontrivial(0.0 if self.precise else gap, product, difference, STEPS[0])
            exact = product if self.precise else None
        return self._proven_exactly(difference, exact)

    def _refuse_coupling(self, difference: Difference) -> None:
        """Examples of several batches in one must give what they give apart: else the batches add up to no loss."""
        batches = self.small.terms().batches
        if not self.small.divisible or len(batches.reading.sizes) > 1 or self.small.examples < 2:
            return
        whole, parts = difference.value, in_pieces(self.small, (self.small.examples + 1) // 2).value()
        if abs(whole - parts) > SAME * max(abs(whole), abs(parts)):  # or rounding: that is told apart there
            with torch.no_grad():
                cut = cut_batch(self.real.snapshot, self.real.recipe, next(iter(batches))[1])
            if cut.coupled:
                raise Coupled(cut.reason + HINT)

    def _proven_exactly(self, difference: Difference, exact: Tensor | None) -> Verdict | None:
        """By the product in float64 and by smaller and larger steps; beside the point where the loss has a kink there."""
        exact = self._product(self.small) if exact is None else exact
        try:
            step = compare(difference, exact)
        except Kink:
            return self._proven_beside()
        noise = 0.0 if self.precise else self._noise(exact)
        return self._nontrivial(noise, exact, difference, step)

    def _proven_beside(self) -> Verdict:
        beside = self.small.at(self.small.theta + BESIDE * self.small.theta.norm() * _direction(self.small, None, 1))
        difference = Difference(beside, self.direction, self.curvature, self.parts)
        try:
            difference(STEPS[0])
            check_gradient(difference)
            exact = self._product(beside)
            compare(difference, exact)
        except Kink:
            return Verdict("unverified: the loss has kinks at these weights and beside them", 0.0, self._all(None))
        return Verdict("proven beside a kink of the loss", 0.0, self._all(exact))

    def _nontrivial(self, noise: float, product: Tensor, difference: Difference, step: float) -> Verdict | None:
        return None if difference.is_zero(step) else Verdict("proven", noise, self._all(product))

    def _all(self, product: Tensor | None) -> Reached:
        self.reached.forget_nodes()
        if product is not None:
            self.reached.parameters = self.parts.nonzero(product)
        return self.reached

    def _product(self, objective: Objective) -> Tensor:
        matmat = self.matmat_of(objective)
        if isinstance(matmat, Sweep):
            matmat.watch = Watch(Reached(parameters=set(range(len(objective.names)))), into=self.reached)
        else:
            self.reached.add(reached_by(objective))
        return matmat(self.direction.to(objective.dtype)[:, None])[:, 0].double()

    def _noise(self, exact: Tensor) -> float:
        """Error of the product in the operator's own precision on the same examples, relative to its norm."""
        product = self._product(self.real)
        gap = float((product - exact).norm() / exact.norm().clamp(min=1e-300))
        allowed = WRONG.get(self.coarse, math.inf)
        if gap > allowed and gap * float(exact.norm()) > allowed * float(exact.norm()) + _rounding(self.real, self.direction, self.coarse):
            raise ProductWrong(
                f"the product in {str(self.coarse).removeprefix('torch.')} is {gap:.1%} off the proven one in float64 on the same examples, which no rounding explains. {suspects(self.real)}"
            )
        return gap


def _direction(objective: Objective, block: list[str] | None, index: int = 0) -> Tensor:
    """A random unit vector, of one block where one is named; without the rows of embeddings at `padding_idx`, which torch holds constant whatever the loss says."""
    direction = objective.space.sample(0, index, "normal")
    for name, places in objective.snapshot.slots.parameters.items():
        for module, attribute in places:
            row = getattr(module, "padding_idx", None)
            if row is not None and attribute == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name in objective.names:
                direction[objective.layout[name]].view(module.num_embeddings, -1)[row] = 0.0
    for name in objective.names if block is not None else ():
        if block is not None and name not in block:
            direction[objective.layout[name]] = 0.0
    return direction / (float(direction.norm()) or 1.0)


def check_gradient(difference: Difference) -> None:
    """PreflightFailed where losses say something else than the gradient; Kink where they do not settle."""
    objective, direction = difference.objective, difference.direction
    slope, seen = difference.slopes
    if not math.isfinite(slope) or abs(seen - slope) <= AGREE * abs(slope):
        return
    theta, steps = objective.theta, [reach_of(objective, step, difference.parts) for step in (1e-4, 1e-5, 1e-6)]
    slope = float(objective.gradient() @ direction)
    values: list[tuple[float, float]] = []  # (ahead, behind)
    for reach in steps:
        ahead, behind = (objective.at(theta + sign * reach * direction).value() for sign in (1, -1))
        values.append((ahead, behind))
        if abs((ahead - behind) / (2 * reach) - slope) <= AGREE * abs(slope):
            return
    central = [(ahead - behind) / (2 * reach) for (ahead, behind), reach in zip(values, steps, strict=True)]
    gap = min(abs(found - slope) for found in central)
    if gap <= AGREE * abs(slope) + rounding_of_loss(objective, difference.parts)[0] / steps[0]:  # the floor is what float64 losses can tell
        return
    here = objective.value()
    uneven = abs((values[2][0] - here) - (here - values[2][1])) / steps[2]
    if uneven > 0.5 * gap or abs(central[1] - central[2]) > 0.1 * gap:
        raise Kink  # the two sides differ at the smallest step: autograd has chosen one of them
    raise PreflightFailed(
        f"the gradient disagrees with finite differences of the loss: {slope:.6g} along a random direction, where the loss says {central[1]:.6g}. {suspects(objective)}"
    )


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
