"""Hutchinson, Hutch++ and XTrace as states that grow by a few products at a time.

A state is a dict of tensors, never changed in place: it can be saved after every step and continued bit for bit.
What the numbers in it say about the error: `intervals`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checkpoints import State
from .intervals import Moments, SketchAlgebra, leave_one_out, spread
from .operator import NOISE, LinearOperator

VECTORS = ("Q", "AQ", "D", "rows", "following", "pilot_vectors", "pilot_images")  # parts of a state that live on the operator's device; the numbers stay on the CPU
BATCH = 8  # columns per call of the operator: what a killed job can lose, twice over
DROP = 8.0  # new basis vectors below this many roundings of the old are noise
ROUNDINGS = 4.0  # roundings (relative to the norm of A v) that a product is taken to be off by


def start_state(op: LinearOperator, method: str, sketch: int) -> State:
    """Nothing spent yet. `sketch`: largest number of basis vectors that Hutch++ may hold."""
    none, empty = torch.zeros(0, dtype=torch.float64), torch.zeros(op.size, 0, dtype=op.dtype, device=op.device)
    shared = {"products": torch.tensor(0), "drawn": torch.tensor(0)}
    if method == "exact":
        return {**shared, "total": torch.zeros((), dtype=torch.float64)}
    if method == "xtrace":
        return {**shared, "Q": empty, "AQ": empty, "R": none.reshape(0, 0)}
    forms = {"quadratic": none, "square": none, "radius": none}
    if method == "hutchinson":
        return {**shared, **forms}
    basis = {"sketch": torch.tensor(sketch), "sketched": torch.tensor(0), "captured": torch.zeros(2, dtype=torch.float64)}
    return {**shared, **forms, **basis, "Q": empty, "D": empty}


def grow(op: LinearOperator, method: str, state: State, budget: int, seed: int) -> State | None:
    """The state after a few more products, at most `budget` in all; None if these buy nothing more."""
    before = op.products
    step = {"exact": _grow_exact, "hutchinson": _grow_forms, "hutch++": _grow_hutchpp, "xtrace": _grow_xtrace}[method]
    grown = step(op, state, budget, seed)
    if grown is None:
        return None
    grown["products"] = state["products"] + (op.products - before)
    return {name: tensor.contiguous() for name, tensor in grown.items()}  # the layout decides the last bit of a product


def moments(op: LinearOperator, method: str, state: State, seed: int) -> Moments:
    """The estimate that a state amounts to. No products; XTrace: O(n k^2) and the k random vectors once more."""
    if method == "exact":
        blur = excess_noise(op) * abs(float(state["total"]))
        return Moments(float(state["total"]), blur, math.inf, 0.0, blur)
    epsilon = max(ROUNDINGS * torch.finfo(op.dtype).eps, excess_noise(op))
    if method == "xtrace":
        values, tangents, dependence, scale = xtrace_forms(op, state, seed)
        return spread(values, tangents, dependence, epsilon * scale)
    rank = state["Q"].shape[1] if "Q" in state else 0
    dimension = op.size - rank
    scaling = dimension / state["radius"]
    forms = scaling * state["quadratic"]
    squares = scaling * state["square"]
    captured, magnitude = state.get("captured", torch.zeros(2, dtype=torch.float64))
    noise = epsilon * float(magnitude + squares.mean().sqrt())
    return spread(captured + forms, squares - forms**2 / dimension, 1.0, noise)


def excess_noise(op: LinearOperator) -> float:
    """Relative error of a product where it is more than the rounding of the operator's dtype, as for half-precision models."""
    return op.noise if op.noise > NOISE.get(op.dtype, 0.0) else 0.0


def _grow_exact(op: LinearOperator, state: State, budget: int, seed: int) -> State | None:
    """Diagonal entries one after another, from columns of the identity."""
    done = int(state["drawn"])
    rows = torch.arange(done, min(done + BATCH, op.size), device=op.device)
    if not len(rows):
        return None
    columns = torch.zeros(op.size, len(rows), dtype=op.dtype, device=op.device)
    columns[rows, torch.arange(len(rows), device=op.device)] = 1.0
    total = state["total"] + (columns * (op @ columns)).sum(dtype=torch.float64).cpu()
    return {**state, "total": total, "drawn": state["drawn"] + len(rows)}


def _grow_forms(op: LinearOperator, state: State, budget: int, seed: int) -> State | None:
    """More quadratic forms of the operator deflated by `Q` (Hutchinson: of the operator itself)."""
    count = min(BATCH, budget - int(state["products"]))
    if count < 1:
        return None
    Q = state.get("Q")
    V = op.space.samples(seed, _next(state, count), "sphere")
    V = V if Q is None else _deflate(op, Q, V)
    D = op @ V  # (n, count)
    D = D if Q is None else _deflate(op, Q, D)
    grown = {**state, "drawn": state["drawn"] + count}
    for name, (left, right) in {"quadratic": (V, D), "square": (D, D), "radius": (V, V)}.items():
        grown[name] = torch.cat([state[name], dots(op, left, right)])
    if Q is not None and int(state["sketched"]) < int(state["sketch"]):
        grown["D"] = torch.cat([state["D"], D], dim=1)  # only a sketch that can still grow needs the vectors
    return grown


def _grow_hutchpp(op: LinearOperator, state: State, budget: int, seed: int) -> State | None:
    r"""Hutch++: a third of the products each for sketching the range, for its exact trace, for the rest.

    A longer basis $[Q\; q]$ turns the old residuals $D = B G$ into $D - q q^\top D - (I - q q^\top) B q\, (q^\top G)$ at no product.
    """
    drawn = int(state["sketched"])
    count = min(BATCH, min(budget // 3, int(state["sketch"])) - drawn)
    if count < 1:
        return _grow_forms(op, state, budget, seed)
    S = op.space.samples(seed, range(-drawn - count, -drawn), "sphere")  # negative: a stream that no quadratic form uses
    fresh, _ = _extend(op, state["Q"], op @ S)
    grown = {**state, "sketched": state["sketched"] + count}
    if fresh.shape[1]:
        image = op @ fresh
        gained = torch.stack([dots(op, fresh, image).sum(), op.space.norm(image).sum().cpu()])
        grown["captured"] = state["captured"] + gained  # and what its rounding is relative to
        grown["Q"] = torch.cat([state["Q"], fresh], dim=1)
        grown |= _deflate_forms(op, grown, fresh, _deflate(op, grown["Q"], image), seed)
    if int(grown["sketched"]) == int(state["sketch"]):
        grown["D"] = state["D"][:, :0]
    return grown


def _deflate_forms(op: LinearOperator, state: State, fresh: Tensor, image: Tensor, seed: int) -> State:
    """The quadratic forms kept so far, of the operator now deflated by `fresh` too; `image`: its product outside the basis."""
    parts: dict[str, list[Tensor]] = {"D": [], "quadratic": [], "square": [], "radius": []}
    for start in range(0, state["D"].shape[1], BATCH):
        D = state["D"][:, start : start + BATCH]
        V = op.space.samples(seed, range(start, start + D.shape[1]), "sphere")
        along = op.space.inner(fresh, V)
        D = _deflate(op, fresh, D) - image @ along.to(op.dtype)
        parts["D"].append(D)
        parts["quadratic"].append(dots(op, V, D))
        parts["square"].append(dots(op, D, D))
        parts["radius"].append(state["radius"][start : start + D.shape[1]] - (along**2).sum(dim=0).cpu())
    return {name: torch.cat(part, dim=-1) for name, part in parts.items() if part}


def _grow_xtrace(op: LinearOperator, state: State, budget: int, seed: int) -> State | None:
    """XTrace: extend the basis Q of the images of the samples, the factor R and the products A Q."""
    count = min(BATCH, budget // 2 - int(state["drawn"]))
    if count < 1:
        return None
    return extend_sketch(op, state, op @ op.space.samples(seed, _next(state, count), "sphere"))


def extend_sketch(op: LinearOperator, state: State, images: Tensor) -> State:
    """XTrace's sketch with the images A g (n, k) of the next k samples: one product per new basis vector."""
    fresh, factor = _extend(op, state["Q"], images)
    rank, old = state["R"].shape
    R = torch.zeros(rank + fresh.shape[1], old + images.shape[1], dtype=torch.float64)
    R[:rank, :old], R[:, old:] = state["R"], factor
    grown = {**state, "drawn": state["drawn"] + images.shape[1], "R": R}
    if fresh.shape[1]:
        grown["Q"] = torch.cat([state["Q"], fresh], dim=1)
        grown["AQ"] = torch.cat([state["AQ"], op @ fresh], dim=1)
    return grown


def _next(state: State, count: int) -> range:
    return range(int(state["drawn"]), int(state["drawn"]) + count)


def dots(op: LinearOperator, U: Tensor, V: Tensor) -> Tensor:
    """Inner products of matching columns, (k,) in float64."""
    return torch.diagonal(op.space.inner(U, V)).cpu()


def _deflate(op: LinearOperator, Q: Tensor, V: Tensor) -> Tensor:
    """The part of `V` outside the span of the orthonormal `Q`; twice, since once leaves 1e-16 of V where that is all there is."""
    for _ in range(2 if Q.shape[1] else 0):
        V = V - Q @ op.space.inner(Q, V).to(op.dtype)
    return V


def _extend(op: LinearOperator, Q: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """New orthonormal columns (n, r) and coefficients (rank + r, k) in float64: Y = [Q, new] coefficients.

    Gram-Schmidt, twice, column by column: a Gram matrix would lose directions 1e-8 of the largest. Dependent columns add none.
    """
    tolerance = DROP * torch.finfo(op.dtype).eps
    basis, factor = Q, torch.zeros(Q.shape[1] + Y.shape[1], Y.shape[1], dtype=torch.float64)
    for j, y in enumerate(Y.unbind(dim=1)):
        length = float(op.space.norm(y))
        for _ in range(2 if basis.shape[1] else 0):
            part = op.space.inner(basis, y)
            y = y - basis @ part.to(op.dtype)
            factor[: len(part), j] += part.cpu()
        rest = float(op.space.norm(y))
        if rest > tolerance * length:
            factor[basis.shape[1], j] = rest
            basis = torch.cat([basis, (y / rest).unsqueeze(1)], dim=1)
    return basis[:, Q.shape[1] :], factor[: basis.shape[1]]


def xtrace_forms(
    op: LinearOperator, state: State, seed: int, first: int = 0
) -> tuple[Tensor, Tensor, float, float]:
    """Leave-one-out estimates, tangential parts, dependence, and the size that rounding is relative to.

    `first`: index of the first sample in the stream `seed`.
    """
    Q, R, count = state["Q"], state["R"], int(state["drawn"])
    if not Q.shape[1]:
        return torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64), 1.0, 0.0
    H = op.space.inner(Q, state["AQ"])
    E = _deflate(op, Q, state["AQ"])
    within, outside = [], []
    for start in range(0, count, BATCH):
        indices = range(first + start, first + min(start + BATCH, count))
        V = op.space.samples(seed, indices, "sphere")
        within.append(op.space.inner(Q, V).cpu())
        outside.append(op.space.inner(E, V).cpu())
    H, W = ((H + H.T) / 2).cpu(), torch.cat(within, dim=1)
    radius = (op.size - (W**2).sum(dim=0)).clamp_min(0.0)
    sketch = SketchAlgebra(op.size, H, R, W, torch.cat(outside, dim=1), radius, op.space.inner(E, E).cpu())
    values, tangents, dependence = leave_one_out(sketch)
    scale = float(torch.linalg.eigvalsh(H).abs().sum()) + float(torch.linalg.matrix_norm(R)) / math.sqrt(count)
    return values, tangents, dependence, scale

