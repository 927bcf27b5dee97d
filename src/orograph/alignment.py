"""Bring one network's units into the order of another's, so that a straight line between the two compares like with like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .arguments import Seed
from .axes import Axis, factors_of, segments_of
from .axis_rules import Axes
from .checks import checked
from .objective import Objective
from .progress import Progress, Report, progress_bar
from .results import Point
from .symmetries import Symmetry, find_symmetry, prove

Method = Literal["weights", "activations"]
Orders = dict[str, Tensor]
SWEEPS = 100  # of coordinate descent at most
TOLERANCE = 1e-9  # relative gain below which a sweep has found nothing
CAP = 1024  # examples, and samples of an activation, that one correlation uses
MOST_UNITS = 4096  # along one tensor, whose correlations are a matrix of that size


@checked
@dataclass(frozen=True)
class Alignment:
    """`point`: b with its units in a's order, the same function as b · `permutations`: name of units -> order, entry i of the new order was order[i] ·
    `verified`: largest relative change of b's outputs in float64 is round-off · `similarity` of the weights before and after, 1 for equal ones.
    """

    point: Point
    permutations: Mapping[str, Tensor]
    verified: bool
    similarity: tuple[float, float]
    method: str


@checked
def align(objective: Objective, a: Any, b: Any, *, method: Method = "weights", seed: Seed = 0, progress: Progress = None) -> Alignment:
    r"""Permute the units of network b so that they match those of network a; b's function stays what it is.

    What may be permuted is read off the model as it runs and proven (`symmetries`); a model for which it cannot be proven is refused, naming the module.
    method="weights": $\max_P \sum_k \langle W^a_k, P W^b_k P^\top \rangle$ over all tensors, by coordinate descent over assignment problems (Ainsworth et al.
    2023, arXiv:2209.04836), from an order found outward from the inputs and outputs, and from the given one; the better is kept ·
    method="activations": Pearson correlation of the units' activations on the objective's first batch (Li et al. 2016, arXiv:1511.07543; Jordan et al.
    2023, arXiv:2211.08403). Costs a few forward passes on four examples, and for activations one of each network on one batch.
    """
    first, second = objective.network(a), objective.network(b)
    here = objective.at(second)
    symmetry = find_symmetry(here)
    prove(here, symmetry, seed)
    pieces = _pieces(objective, symmetry, first, second)
    names = list(symmetry.units)
    with progress_bar(progress, f"aligning by {method}", unit="sweep") as report:
        if method == "weights":
            found = max((_descend(pieces, symmetry, start, seed, report) for start in (_outward(pieces, symmetry), {})), key=lambda orders: _score(pieces, symmetry, orders))
        else:
            found = _by_activations(objective, symmetry, first, second)
    orders = {name: found.get(name, torch.arange(symmetry.units[name].size)) for name in names}
    point = symmetry.permuted(second, orders, objective)
    scale = sum(float(piece.a.square().sum() + piece.b.square().sum()) for piece in pieces) / 2
    similarity = tuple(_score(pieces, symmetry, given) / scale if scale else 1.0 for given in ({}, orders))
    return Alignment(point, orders, True, (similarity[0], similarity[1]), method)


@dataclass(frozen=True)
class Piece:
    """The same part of a tensor in both networks, cut so that every axis is one leaf."""

    a: Tensor
    b: Tensor
    leaves: list[Axis]


def _pieces(objective: Objective, symmetry: Symmetry, first: Point, second: Point) -> list[Piece]:
    """All tensors that have units, float64, cut into pieces."""
    layout = objective.layout
    tensors = [dict(zip(layout.names, layout.split(point.theta), strict=True)) | dict(point.frozen) for point in (first, second)]
    found = []
    for name, axes in symmetry.axes.items():
        if name in tensors[0]:
            found += _cut(tensors[0][name].double().cpu(), tensors[1][name].double().cpu(), axes)
    return [piece for piece in found if any(_free(leaf, symmetry) for leaf in piece.leaves)]


def _cut(a: Tensor, b: Tensor, axes: Axes) -> list[Piece]:
    """One piece for each combination of segments."""
    parts: list[tuple[Tensor, Tensor, list[Axis]]] = [(a, b, [])]
    for axis in axes:
        grown = []
        for x, y, leaves in parts:
            place, dim = 0, len(leaves)
            for segment in segments_of(axis):
                factors = [leaf for factor in factors_of(segment) for leaf in ([factor] if factor.kind == "leaf" else [Axis(factor.size, frozen=True)])]
                shape = [leaf.size for leaf in factors]
                cut = [t.narrow(dim, place, segment.size).unflatten(dim, shape) for t in (x, y)]
                grown.append((cut[0], cut[1], leaves + factors))
                place += segment.size
        parts = grown
    return [Piece(x, y, leaves) for x, y, leaves in parts]


def _free(leaf: Axis, symmetry: Symmetry) -> bool:
    return any(axis.root is leaf.root for axis in symmetry.units.values())


def _by_root(symmetry: Symmetry, orders: Orders) -> dict[Axis, Tensor]:
    return {symmetry.units[name].root: order for name, order in orders.items()}


def _reordered(piece: Piece, orders: Mapping[Axis, Tensor], but: int | None = None) -> Tensor:
    """The piece of b with its axes in their new orders, all but one."""
    tensor = piece.b
    for dim, leaf in enumerate(piece.leaves):
        order = orders.get(leaf.root)
        if order is not None and dim != but:
            tensor = tensor.index_select(dim, order)
    return tensor


def _score(pieces: list[Piece], symmetry: Symmetry, orders: Orders) -> float:
    """Sum of the inner products of a's pieces with b's in their new orders."""
    by_root = _by_root(symmetry, orders)
    return sum(float((piece.a * _reordered(piece, by_root)).sum()) for piece in pieces)


def _gain(pieces: list[Piece], leaf: Axis, orders: Mapping[Axis, Tensor], ready: set[Axis] | None = None) -> Tensor | None:
    """[i, j]: what it is worth that unit i of a meets unit j of b; only from pieces whose other free axes are `ready`, where that is given."""
    total: Tensor | None = None
    for piece in pieces:
        for dim, own in enumerate(piece.leaves):
            if own.root is not leaf:
                continue
            others = {other.root for place, other in enumerate(piece.leaves) if place != dim}
            if ready is not None and any(not other.frozen and other.size > 1 and other not in ready for other in others):
                continue
            x, y = (t.movedim(dim, 0).reshape(leaf.size, -1) for t in (piece.a, _reordered(piece, orders, but=dim)))
            total = x @ y.T if total is None else total + x @ y.T
    return total


def _outward(pieces: list[Piece], symmetry: Symmetry) -> Orders:
    """Orders found one after another, each from tensors whose other axes are known already: exact for a permuted copy."""
    orders: Orders = {}
    ready: set[Axis] = set()
    open_names = list(symmetry.units)
    while open_names:
        gains = {name: _gain(pieces, symmetry.units[name].root, _by_root(symmetry, orders), ready) for name in open_names}
        seen = {name: gain for name, gain in gains.items() if gain is not None}
        name = max(seen, key=lambda name: _clearness(seen[name])) if seen else open_names[0]
        gain = seen.get(name)
        orders[name] = _assign(gain) if gain is not None else torch.arange(symmetry.units[name].size)
        ready.add(symmetry.units[name].root)
        open_names.remove(name)
    return orders


def _clearness(gain: Tensor) -> float:
    """How far the best match of a unit stands out from its second best, on average."""
    best = gain.topk(min(2, gain.shape[1]), dim=1).values
    return float((best[:, 0] - best[:, -1]).mean() / gain.abs().mean().clamp(min=1e-300))


def _assign(gain: Tensor) -> Tensor:
    """For every unit of a the unit of b that it meets, in the best assignment."""
    _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64)


def _descend(pieces: list[Piece], symmetry: Symmetry, start: Orders, seed: int, report: Report) -> Orders:
    """Coordinate descent: one assignment problem after another until a sweep gains nothing."""
    orders = {name: start.get(name, torch.arange(axis.size)) for name, axis in symmetry.units.items()}
    generator = torch.Generator().manual_seed(seed)
    score, names = _score(pieces, symmetry, orders), list(symmetry.units)
    for sweep in range(1, SWEEPS + 1):
        before = score
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            gain = _gain(pieces, symmetry.units[name].root, _by_root(symmetry, orders))
            if gain is None:
                continue
            trial = orders | {name: _assign(gain)}
            better = _score(pieces, symmetry, trial)
            if better > score + TOLERANCE * abs(score):
                orders, score = trial, better
        report(sweep, sweep + 1, f"similarity {score:.6g}")
        if score <= before + TOLERANCE * abs(before):
            break
    return orders


@dataclass(frozen=True)
class Activations:
    """One tensor as the data make it: units along one or more leaves, (units, samples)."""

    leaves: list[Axis]
    values: Tensor


@dataclass(frozen=True)
class Correlations:
    """Of every unit of a with every unit of b (sizes..., sizes...), for the units along `names`."""

    names: list[str]
    values: Tensor


def _by_activations(objective: Objective, symmetry: Symmetry, first: Point, second: Point) -> Orders:
    """Every unit of a meets that of b whose activations correlate most with its own; heads and their entries in turns."""
    names, seen = _activations(objective.at(first), symmetry)
    _, others = _activations(objective.at(second), symmetry)
    found = []
    for count in sorted(seen.keys() & others.keys()):
        x, y = seen[count], others[count]
        sizes = [leaf.size for leaf in x.leaves]
        if x.values.shape == y.values.shape:
            found.append(Correlations([names[leaf.root] for leaf in x.leaves], _correlation(x.values, y.values).reshape(*sizes, *sizes)))
    orders: Orders = {}
    for name in symmetry.units:  # first guess, whatever the order of other leaves of the same axis
        gains = [_any_order(c, c.names.index(name)) for c in found if name in c.names and len(set(c.names)) == len(c.names) <= 2]
        if gains:
            orders[name] = _assign(sum(gains[1:], gains[0]))
    for _ in range(SWEEPS):
        moved = False
        for name in symmetry.units:
            gains = [_gain_of(c, place, orders) for c in found for place, own in enumerate(c.names) if own == name and len(set(c.names)) == len(c.names)]
            if gains:
                new = _assign(sum(gains[1:], gains[0]))
                moved = moved or name not in orders or not torch.equal(new, orders[name])
                orders[name] = new
        if not moved:
            break
    return orders


def _any_order(c: Correlations, place: int) -> Tensor:
    """[i, j]: the best that unit i of a and unit j of b can have in common, over all orders of the other leaf."""
    if len(c.names) == 1:
        return c.values
    values = c.values.movedim((place, 2 + place), (0, 1))  # (i, j, other, other)
    worth = torch.zeros(values.shape[:2], dtype=torch.float64)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            worth[i, j] = values[i, j].gather(1, _assign(values[i, j])[:, None]).sum()
    return worth


def _gain_of(c: Correlations, place: int, orders: Orders) -> Tensor:
    """[i, j] with the other leaves in their present orders."""
    count, values = len(c.names), c.values
    for other in (o for o in range(count) if o != place):
        order = orders.get(c.names[other])
        values = values if order is None else values.index_select(count + other, order)
    for other in sorted((o for o in range(count) if o != place), reverse=True):
        values = values.diagonal(dim1=other, dim2=values.ndim // 2 + other).sum(-1)
    return values


def _activations(objective: Objective, symmetry: Symmetry) -> tuple[dict[Axis, str], dict[int, Activations]]:
    """Names of this run's units, and by number of the operation the tensors that have units along an axis."""
    seen: dict[int, tuple[Tensor, Axes]] = {}

    def watch(count: int, tensor: Tensor, axes: Axes) -> None:
        if tensor.is_floating_point() and tensor.ndim > 1:
            seen[count] = tensor.detach(), axes

    there = find_symmetry(objective, watch, examples=CAP)
    names = dict(zip([axis.root for axis in there.units.values()], symmetry.units, strict=True))
    found = {}
    for count, (tensor, axes) in seen.items():
        factors = [factor for axis in axes for factor in factors_of(axis)]
        units = [place for place, factor in enumerate(factors) if factor.root in names]
        if not units or any(factor.kind != "leaf" for factor in factors) or sum(factor.size > 1 for factor in factors) == len(units):
            continue
        values = tensor.reshape([factor.size for factor in factors]).movedim(units, list(range(len(units)))).flatten(0, len(units) - 1).flatten(1)
        if len(values) <= MOST_UNITS:
            found[count] = Activations([factors[place] for place in units], values[:, :: max(1, values.shape[1] // CAP)].double().cpu())
    return names, found


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, of every unit of one with every unit of the other; 0 for one that never changes."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scale = x.norm(dim=1)[:, None] * y.norm(dim=1)
    return torch.where(scale > 1e-12 * scale.max().clamp(min=1e-300), x @ y.T / scale.clamp(min=1e-300), torch.zeros_like(scale))
