"""The curvature of an objective as operators: Hessian, generalised Gauss-Newton, Fisher, preconditioned, and one block of any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import Seed
from .certified import Certified
from .checks import checked, refusal
from .durable import fingerprint
from .errors import OrographWarning
from .identity import identity_of
from .layout import select_names
from .linalg.operator import LinearOperator, Space
from .memory import memory_budget
from .objective import Objective
from .products.choice import Engine, Kind, choose_plan
from .products.difference import hessian_difference, sandwich_difference
from .products.gauss_newton import OutputCurvature, loss_hessian, loss_hessian_by_differences, sandwich_of
from .products.likelihood import empirical_fisher, sampled_fisher
from .products.reverse import hessian_of

JACOBIAN_ENGINES = ("auto", "retained", "fresh", "difference")
HESSIAN = Kind(hessian_of, hessian_difference, blocks=True)


def _sandwich(curvature: OutputCurvature) -> Kind:
    """J'CJ with the given C."""
    return Kind(sandwich_of(curvature), lambda objective: sandwich_difference(objective, curvature), blocks=False)


@checked
def hessian(objective: Objective, *, engine: Engine = "auto", check: bool = True, memory: int | str | None = None) -> LinearOperator:
    r"""The Hessian of the loss at the objective's point: $H = \nabla^2 L(\theta)$, (n, n), symmetric, possibly indefinite.

    `engine`: "retained" keeps the first-backward graphs of all micro-batches (2 gradients per product, 1 to build them), "fresh" builds
    them anew at every product (1 + 2k for k columns), "blockwise" holds one block of a chain at a time (about 5), "difference" takes
    finite differences of gradients (2, in float64 where possible; on piecewise-linear networks that is the smoothed Hessian). "auto"
    measures two examples and takes the first that fits; it goes to "difference", with a warning, where autograd has no second
    derivative or a wrong one · `check`: prove product and gradient against finite differences, in float64 on a few examples of all batches,
    and on a batch that reaches further when a product first meets it; a proven error raises PreflightFailed, and what cannot be proven is said in `op.about["preflight"]` · `memory`:
    bytes, or a text such as "4GiB", for graphs and bases of vectors together; default half of what is free; recorded in `op.about`,
    never passed. Raises NotDifferentiable, OutOfBudget. Pearlmutter 1994.
    """
    return _operator(objective, HESSIAN, None, engine, check, memory, {"curvature": "hessian"})


@checked
def ggn(objective: Objective, *, engine: Engine = "auto", check: bool = True, memory: int | str | None = None) -> LinearOperator:
    r"""The generalised Gauss-Newton matrix $G = \sum_b w_b J_b^\top (\nabla^2_{out} L_b) J_b$: the Hessian without the network's own curvature.

    Positive semi-definite for convex losses. What the loss adds that does not go through the outputs (a penalty on the weights) is
    not in it. Arguments as for `hessian` (no "blockwise"; retained, a
    product costs 4/3 gradients); `check` proves the Jacobian against differences of the outputs, and the loss's second derivative in the outputs (taken by differences where it is wrong). Schraudolph 2002; Martens 2020, arXiv:1412.1193.
    """
    _needs_output(objective, "ggn", engine)
    criterion = objective.recipe.criterion
    if criterion is not None and criterion.family == "nll":
        warnings.warn(
            "the negative log-likelihood is linear in the outputs (log-probabilities), so its Gauss-Newton matrix is zero. "
            "Use cross-entropy on logits, or fisher, which is the same matrix in expectation.",
            OrographWarning,
            stacklevel=3,
        )
    return _operator(objective, _sandwich(loss_hessian), loss_hessian, engine, check, memory, {"curvature": "ggn"})


@checked
def fisher(
    objective: Objective,
    *,
    kind: Literal["mc", "empirical"] = "mc",
    seed: Seed = 0,
    engine: Engine = "auto",
    check: bool = True,
    memory: int | str | None = None,
) -> LinearOperator:
    r"""The Fisher information $F = \frac1U \sum_i \nabla \ell_i \nabla \ell_i^\top$ of the loss as a negative log-likelihood.

    kind="mc": one label per unit drawn from the model, so that F is an unbiased estimate of the GGN; labels depend on (seed,
    index of the example), not on the batching. kind="empirical": the data's own labels (another matrix: Kunstner et al. 2019,
    arXiv:1905.12558), where $\ell_i$ is the loss of a position for class targets, and for elementwise losses the sum over all entries
    of an example; U counts what the loss is a mean over (entries, for MSE; 1 for reduction="sum"), so that both kinds have the scale
    of the GGN: they agree with it in expectation where labels follow the model. Arguments as for `hessian`.
    """
    _needs_output(objective, "fisher", engine)
    if kind == "mc" and not objective.terms().batches.ordered:
        raise ValueError('fisher(kind="mc") keys labels by the index of the example, and this data comes in another order in each pass. Use shuffle=False.')
    curvature = sampled_fisher(seed) if kind == "mc" else empirical_fisher
    return _operator(objective, _sandwich(curvature), curvature, engine, check, memory, {"curvature": f"fisher-{kind}", **({"seed": seed} if kind == "mc" else {})})


@checked
def preconditioned(op: LinearOperator, scale: Tensor) -> LinearOperator:
    r"""$P^{-1/2} A P^{-1/2}$ for P = diag(`scale`) (n,) > 0: the spectrum of $P^{-1} A$, kept symmetric. Each product costs one of `op`."""
    if scale.shape != (op.size,) or not scale.is_floating_point():
        raise refusal("preconditioned", "scale", scale, f"a tensor of floating-point numbers of shape ({op.size},): it is the diagonal of P.")
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise ValueError("preconditioned(op, scale) needs every entry of scale positive and finite: it is the diagonal of P.")
    root = scale.to(device=op.device, dtype=op.dtype).rsqrt()[:, None]
    return _derived(op, lambda V: root * (op @ (root * V)), op.space, "preconditioned", {"scale": fingerprint([scale])})


@checked
def block(op: LinearOperator, objective: Objective, names: str | Sequence[str]) -> LinearOperator:
    """The diagonal block of `op` that belongs to the parameters `names` (names or globs). Each product costs one of `op`."""
    if op.size != objective.size:
        raise ValueError(f"block(op, objective, names): op has size {op.size}, the objective {objective.size}. They must belong together.")
    chosen = select_names(names, {name: name for name in objective.names})
    index = torch.cat([torch.arange(objective.size)[objective.layout[name]] for name in chosen]).to(op.device)
    space = Space(tuple((name, size) for name, size in objective.layout.blocks if name in chosen), op.dtype, op.device)

    def matmat(V: Tensor) -> Tensor:
        whole = V.new_zeros(op.size, V.shape[1])
        whole[index] = V
        return (op @ whole)[index]

    return _derived(op, matmat, space, f"block {', '.join(chosen)}", {}, certificate_of_block(op, chosen))


def certificate_of_block(op: LinearOperator, names: list[str]) -> str | None:
    """What is proven of the diagonal block of these parameters, on its own scale; None for an operator that comes from no objective."""
    return op.matmat.prove_block(names) if isinstance(op.matmat, Certified) else op.about.get("preflight")


def _derived(op: LinearOperator, matmat: Callable[[Tensor], Tensor], space: Space, what: str, fingerprints: dict[str, str], words: str | None = None) -> LinearOperator:
    about = op.about | {"curvature": f"{what} of {op.about.get('curvature', 'operator')}", "fingerprints": op.about.get("fingerprints", {}) | fingerprints}
    about |= {} if words is None else {"preflight": words}
    first = op.about.get("preflight")

    def certified(V: Tensor) -> Tensor:
        product = matmat(V)
        if op.about.get("preflight") != first:  # what a product has reached beyond the proof
            about["preflight"] = op.about["preflight"]
        return product

    return LinearOperator(certified, space.size, op.dtype, op.device, space, memory=op.memory, noise=op.noise, about=about, check=not op.is_proven)


def _operator(objective: Objective, kind: Kind, curvature: OutputCurvature | None, engine: Engine, check: bool, memory: int | str | None, about: dict[str, Any]) -> LinearOperator:
    """Choose the engine, prove it, and hand out its products."""
    space, budget = objective.space, memory_budget(memory, objective.device)
    plan = choose_plan(objective, kind, engine, budget)
    precise = (_sandwich(loss_hessian_by_differences), loss_hessian_by_differences) if curvature is loss_hessian else None
    about = about | {"mode": objective.mode, "fingerprints": identity_of(objective, ordered="seed" in about), "memory": budget}
    products = Certified(objective, kind, curvature, precise, engine, budget, plan, check, about)
    products.begin()
    apart = products.apart if products.has_parts else None
    op = LinearOperator(products, space.size, space.dtype, space.device, space, memory=max(budget - products.plan.bytes, 1), noise=products.excess, about=about, apart=apart, check=False)

    def changed(products: Certified) -> None:
        op.noise = max(op.noise, products.excess)

    products.settled = changed
    return op


def _needs_output(objective: Objective, name: str, engine: Engine) -> None:
    if engine not in JACOBIAN_ENGINES:
        raise refusal(name, "engine", engine, f"one of {', '.join(JACOBIAN_ENGINES)}: a Jacobian has no other.")
    if objective.recipe.batch_loss is not None:
        raise TypeError(f"{name} needs the network's output, which a batch_loss hides. Use Objective(model, criterion, data, forward=lambda model, batch: (output, target)).")
