"""The curvature of an objective as operators: Hessian, generalised Gauss-Newton, Fisher, preconditioned, and one block of any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import OrographWarning
from .layout import select_names
from .linalg.operator import NOISE, LinearOperator, Matmat, Space
from .objective import Objective
from .preflight import Verdict, preflight
from .products.gauss_newton import OutputCurvature, jacobian_sandwich, loss_hessian
from .products.likelihood import empirical_fisher, sampled_fisher
from .products.reverse import hessian_matmat

Engine = Literal["auto", "fresh", "retained"]


def hessian(objective: Objective, *, engine: Engine = "auto", check: bool = True, memory: int | str | None = None) -> LinearOperator:
    r"""The Hessian of the loss at the objective's point: $H = \nabla^2 L(\theta)$, (n, n), symmetric, possibly indefinite.

    `engine`: "fresh" rebuilds each micro-batch's first-backward graph at every product (about 1 + 2k gradients for k columns),
    "retained" keeps all graphs (about 2k); "auto" is "fresh" · `check`: prove product and gradient against finite differences, in
    float64 on 16 examples; a proven error raises PreflightFailed, and what cannot be proven is said in `op.about["preflight"]` ·
    `memory`: bytes, or a text such as "4GiB", for bases of vectors. Raises NotDifferentiable where an operation has no second
    derivative. Pearlmutter 1994.
    """
    _check(objective, engine, ("auto", "fresh", "retained"))
    engine = "fresh" if engine == "auto" else engine
    return _operator(objective, lambda o: hessian_matmat(o, retain=engine == "retained"), None, check, memory, {"curvature": "hessian", "engine": engine})


def ggn(objective: Objective, *, engine: Engine = "auto", check: bool = True, memory: int | str | None = None) -> LinearOperator:
    r"""The generalised Gauss-Newton matrix $G = \sum_b w_b J_b^\top (\nabla^2_{out} L_b) J_b$: the Hessian without the network's own curvature.

    Positive semi-definite for convex losses. What the loss adds that does not go through the outputs (a penalty on the weights) is
    not in it. Arguments as for `hessian`; `check` proves the Jacobian against
    differences of the outputs. Schraudolph 2002; Martens 2020, arXiv:1412.1193.
    """
    _check(objective, engine, ("auto", "fresh"))
    _needs_output(objective, "ggn")
    criterion = objective.recipe.criterion
    if criterion is not None and criterion.family == "nll":
        warnings.warn(
            "the negative log-likelihood is linear in the outputs (log-probabilities), so its Gauss-Newton matrix is zero. "
            "Use cross-entropy on logits, or fisher, which is the same matrix in expectation.",
            OrographWarning,
            stacklevel=2,
        )
    return _operator(objective, lambda o: jacobian_sandwich(o, loss_hessian), loss_hessian, check, memory, {"curvature": "ggn", "engine": "fresh"})


def fisher(
    objective: Objective,
    *,
    kind: Literal["mc", "empirical"] = "mc",
    seed: int = 0,
    engine: Engine = "auto",
    check: bool = True,
    memory: int | str | None = None,
) -> LinearOperator:
    r"""The Fisher information $F = \frac1U \sum_i \nabla \ell_i \nabla \ell_i^\top$ of the loss as a negative log-likelihood.

    kind="mc": one label per unit drawn from the model, so that F is an unbiased estimate of the GGN; labels depend on (seed,
    index of the example), not on the batching. kind="empirical": the data's own labels (another matrix: Kunstner et al. 2019,
    arXiv:1905.12558); a unit is a position for class targets, an example for elementwise losses. Arguments as for `hessian`.
    """
    _check(objective, engine, ("auto", "fresh"))
    _needs_output(objective, "fisher")
    if kind not in ("mc", "empirical"):
        raise ValueError(f'fisher(kind={kind!r}): choose "mc" (labels drawn from the model) or "empirical" (the data\'s own labels).')
    if kind == "mc" and not objective.terms().batches.ordered:
        raise ValueError('fisher(kind="mc") keys labels by the index of the example, and this data comes in another order in each pass. Use shuffle=False.')
    curvature = sampled_fisher(seed) if kind == "mc" else empirical_fisher
    return _operator(objective, lambda o: jacobian_sandwich(o, curvature), curvature, check, memory, {"curvature": f"fisher-{kind}", "engine": "fresh", "seed": seed})


def preconditioned(op: LinearOperator, scale: Tensor) -> LinearOperator:
    r"""$P^{-1/2} A P^{-1/2}$ for P = diag(`scale`) (n,) > 0: the spectrum of $P^{-1} A$, kept symmetric. Each product costs one of `op`."""
    if not isinstance(scale, Tensor) or scale.shape != (op.size,):
        raise ValueError(f"preconditioned(op, scale) needs a tensor of shape ({op.size},), got {tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__}.")
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise ValueError("preconditioned(op, scale) needs every entry of scale positive and finite: it is the diagonal of P.")
    root = scale.to(device=op.device, dtype=op.dtype).rsqrt()[:, None]
    return _derived(op, lambda V: root * (op @ (root * V)), op.space, "preconditioned")


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

    return _derived(op, matmat, space, f"block {', '.join(chosen)}")


def _derived(op: LinearOperator, matmat: Callable[[Tensor], Tensor], space: Space, what: str) -> LinearOperator:
    about = op.about | {"curvature": f"{what} of {op.about.get('curvature', 'operator')}"}
    return LinearOperator(matmat, space.size, op.dtype, op.device, space, memory=op.memory, noise=op.noise, about=about)


def _operator(
    objective: Objective,
    matmat_of: Callable[[Objective], Matmat],
    curvature: OutputCurvature | None,
    check: bool,
    memory: int | str | None,
    about: dict[str, Any],
) -> LinearOperator:
    verdict = preflight(objective, matmat_of, curvature) if check else Verdict("skipped")
    about = about | {"mode": objective.mode, "fingerprints": objective.fingerprints(), "preflight": verdict.words, "noise": verdict.noise}
    space = objective.space
    noise = 10 * verdict.noise if verdict.noise > NOISE.get(space.dtype, 0.0) else 0.0  # one direction's gap; others may be worse
    return LinearOperator(matmat_of(objective), space.size, space.dtype, space.device, space, memory=memory, noise=noise, about=about)


def _check(objective: Objective, engine: str, engines: tuple[str, ...]) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"an operator needs an Objective, got {type(objective).__name__}: Objective(model, criterion, data).")
    if engine not in engines:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(engines)}.")


def _needs_output(objective: Objective, name: str) -> None:
    if objective.recipe.batch_loss is not None:
        raise TypeError(f"{name} needs the network's output, which a batch_loss hides. Use Objective(model, criterion, data, forward=lambda model, batch: (output, target)).")
