"""Trace and diagonal of an operator from a few products, each with an interval that holds."""

from __future__ import annotations

import math
from typing import Literal

import torch

from ..arguments import AtLeastThree, AtLeastTwo, File, Positive, Seed
from ..errors import OutOfBudget
from ..memory import size_text
from ..progress import Progress, progress_bar
from ..results import Estimate, Status
from .checkpoints import State, checkpointing, job_description
from .intervals import Moments
from .operator import LinearOperator, in_full_precision
from .remainder import KrylovTrace, no_forms
from .trace_methods import BATCH, VECTORS, grow, moments, start_state

Method = Literal["auto", "hutchinson", "hutch++", "xtrace"]
KINDS = ("hutchinson", "hutch++", "xtrace", "exact", "krylov")  # what a state can be; its index is stored
FIRST = 20  # products at which the stopping rule is first looked at
GROWTH = (1.15, 2.0)  # least and largest growth of products from look to look


@in_full_precision
def trace(
    op: LinearOperator,
    *,
    method: Method = "auto",
    rel_error: Positive | None = 0.05,
    max_products: AtLeastThree = 1000,
    seed: Seed = 0,
    checkpoint: File | None = None,
    progress: Progress = None,
) -> Estimate:
    r"""Trace of a symmetric operator, unbiased, with an interval that holds.

    `auto`: the trace on a Krylov subspace Q exactly, as $\operatorname{tr} Q^\top A Q$, and quadratic forms $x^\top A x$ for the rest, in
    which every part (micro-batch) of the operator gets a vector x of its own; Q grows while another vector in it takes more off the
    variance than another form would, and while `op.memory` holds it. One Krylov subspace sees a single vector of equal eigenvalues:
    where much is left outside of Q, a block of starts goes on there (XTrace in the complement of Q). By name: `hutchinson` averages $v^\top A v$ and keeps one vector
    at a time; `hutch++` first takes out the range of a sketch (2/3 of the products; Meyer et al. 2021, arXiv:2010.09649), as large as
    memory allows; `xtrace` uses every sample for both (Epperly, Tropp, Webber 2024, arXiv:2301.07825) and keeps 3/2 vectors per
    product. Samples are spheres: the error then does not depend on the basis.

    `rel_error`: stop when the half-width of the 95 % interval is at most `rel_error` times |value|; None: spend `max_products`.
    Looked at only where it is expected to be met, so that stopping when the interval happens to be short costs no coverage to speak
    of. A trace near zero ends "budget-limited" with its interval; "noise-limited": rounding in the products is all that is left.
    Where an estimator would take n products or more and `max_products` has room for n, the trace is computed exactly.
    `checkpoint`: a file; a killed job that is called again the same way gives the same bits, and one that has ended goes on where a smaller `rel_error` or more `max_products` are asked for. How the interval comes about: `intervals`.
    """
    kind = _choose(op, method, rel_error, max_products)
    job = job_description(op, checkpoint, what="trace", method=method, seed=seed)
    with progress_bar(progress, "trace") as report, checkpointing(checkpoint, job) as (found, keep):
        state = _start(op, kind, max_products) if found is None else _placed(found, op)
        krylov = KrylovTrace(op, seed, rel_error, max_products, found) if KINDS[int(state["kind"])] == "krylov" else None
        state |= no_forms() if krylov is not None and krylov.forms_lost else {}
        expected = max_products if rel_error is None else FIRST
        while True:
            kind = KINDS[int(state["kind"])]
            budget = int(state["look"]) if rel_error is not None else max_products  # in the state: a resumed job looks where it would have looked
            limit = max_products if kind == "exact" else min(budget, max_products)
            while (grown := krylov.grow(state, limit) if krylov is not None and kind == "krylov" else grow(op, kind, state, limit, seed)) is not None:
                state = grown
                keep(state)
                report(int(state["products"]), max(expected, int(state["products"])), kind)
            now, forms = krylov.moments(state) if krylov is not None and kind == "krylov" else (moments(op, kind, state, seed), 0.0)
            spent = int(state["products"])
            status, need = judge(now, kind, rel_error, spent, forms)
            if status != "budget-limited" or budget >= max_products:
                break
            expected = math.ceil(min(need, max_products))
            report(spent, max(expected, spent), f"{now.value:.4g} ± {half_width(now):.2g}")
            budget = min(math.ceil(min(max(1.02 * need, GROWTH[0] * spent), GROWTH[1] * spent)), max_products)
            state = state | {"look": torch.tensor(budget)}
            if max(need, budget) >= op.size and spent + op.size <= max_products:
                state = {**_start(op, "exact", max_products), "products": state["products"]}
                expected = spent + op.size
            keep(state)
    return Estimate(value=now.value, sem=now.sem, dof=now.dof, skew=now.skew, products=spent, status=status, label="trace")


@in_full_precision
def diagonal(op: LinearOperator, *, num_samples: AtLeastTwo = 100, seed: Seed = 0, progress: Progress = None) -> Estimate:
    r"""Diagonal of an operator (n,), with the standard error of each entry (n,).

    Mean of $v \odot A v$ over random signs $v$: unbiased, variance $\sum_{j \ne i} A_{ij}^2$ per sample, so a diagonal operator is
    exact at once. Bekas, Kokiopoulou, Saad 2007, doi:10.1016/j.apnum.2007.01.003. One product per sample; from `num_samples` >= n
    on, n products for the exact diagonal. Keeps two vectors of float64.
    """
    with progress_bar(progress, "diagonal") as report:
        if num_samples >= op.size:
            return _exact_diagonal(op)
        mean = torch.zeros(op.size, dtype=torch.float64, device=op.device)
        scatter = torch.zeros_like(mean)
        before = op.products
        for start in range(0, num_samples, BATCH):
            V = op.space.samples(seed, range(start, min(start + BATCH, num_samples)), "rademacher")
            for done, x in enumerate((V * (op @ V)).double().unbind(dim=1), start + 1):
                step = x - mean  # Welford: equal entries leave exactly no scatter
                mean = mean + step / done
                scatter = scatter + step * (x - mean)
            report(op.products - before, num_samples, "")
    sem = (scatter / (num_samples - 1) / num_samples).sqrt()
    return Estimate(value=mean, sem=sem, dof=num_samples - 1, products=op.products - before, label="diagonal")


def _exact_diagonal(op: LinearOperator) -> Estimate:
    value, before = torch.zeros(op.size, dtype=torch.float64, device=op.device), op.products
    for start in range(0, op.size, BATCH):
        rows = torch.arange(start, min(start + BATCH, op.size), device=op.device)
        columns = torch.zeros(op.size, len(rows), dtype=op.dtype, device=op.device)
        columns[rows, torch.arange(len(rows), device=op.device)] = 1.0
        value[rows] = (columns * (op @ columns)).sum(dim=0).double()
    return Estimate(value=value, sem=torch.zeros_like(value), products=op.products - before, label="diagonal")


def _start(op: LinearOperator, kind: str, max_products: int) -> State:
    shared = {"kind": torch.tensor(KINDS.index(kind)), "look": torch.tensor(FIRST)}
    if kind == "krylov":
        return {**no_forms(), "products": torch.tensor(0), "closed": torch.tensor(False), **shared}
    sketch = min(max_products // 3, _vectors(op) // 4)  # basis, residuals of as many forms, and room to join them
    return {**start_state(op, kind, sketch), **shared}


def _placed(state: State, op: LinearOperator) -> State:
    placed = {name: tensor.to(op.device) if name in VECTORS else tensor for name, tensor in state.items()}
    if "sketch" in placed:  # memory may be less than it was
        placed["sketch"] = torch.maximum(placed["sketched"], placed["sketch"].clamp(max=max(_vectors(op) // 4, 0)))
    return placed


def _vectors(op: LinearOperator) -> int:
    """How many vectors the operator's memory holds, beside those of the product that is being computed."""
    return op.memory // (op.size * torch.finfo(op.dtype).bits // 8) - 2 * BATCH


def _choose(op: LinearOperator, method: Method, rel_error: float | None, max_products: int) -> str:
    """The kind of state to begin with."""
    at_once = rel_error is None or op.size <= FIRST or max_products < op.size + FIRST  # an estimate first would leave no room
    if op.size <= max_products and at_once:
        return "exact"
    if method == "auto":
        return "krylov"
    room, needed = _vectors(op), 3 * (max_products // 2)  # Q, A Q and one of them again
    least = needed if method == "xtrace" else 4 if method == "hutch++" else 0
    if least > room:
        need = (least + 2 * BATCH) * op.size * torch.finfo(op.dtype).bits / 8
        raise OutOfBudget(
            f"trace(method={method!r}, max_products={max_products}) keeps {least} vectors of {op.size} entries beside those of a product, "
            f"{size_text(need)} in all; the operator's memory is {size_text(op.memory)}. "
            f'Use method="auto" or fewer max_products, or give the operator a larger memory=.'
        )
    return method


def half_width(now: Moments) -> float:
    """Of the 95 % interval."""
    lower, upper = Estimate(value=now.value, sem=now.sem, dof=now.dof, skew=now.skew).interval(0.95)
    return float(upper - lower) / 2


def judge(now: Moments, kind: str, rel_error: float | None, spent: int, forms: float) -> tuple[Status, float]:
    """How the estimate stands, and how many products the error asked for may take in all.

    `forms`: how many quadratic forms of what the runs leave would say as much as the estimate does.
    """
    if kind == "exact" or rel_error is None:
        return "converged", spent
    half, target = half_width(now), rel_error * abs(now.value)
    if half <= target:
        return "converged", spent
    if now.sem < math.sqrt(2) * now.noise:  # most of the error is rounding
        return "noise-limited", spent
    if target <= 0:
        return "budget-limited", math.inf
    if kind == "krylov":
        return "budget-limited", spent - forms + forms * (half / target) ** 2
    return "budget-limited", spent * (half / target) ** (2 if kind == "hutchinson" else 1)  # Hutch++ and XTrace need O(1 / error)
