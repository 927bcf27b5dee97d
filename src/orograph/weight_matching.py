"""Find the order of one network's units in which its weights are most like those of another network.

Every unit belongs to an axis of several tensors, and what it is worth to match two units depends on the orders of the other axes. Two
steps solve this. `start_outward` finds first orders: units are compared by what is known whatever the unknown orders are, namely by
the sorted entries along axes whose order is open. `descend` then solves one assignment problem after another until none helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .axes import Axis, factors_of, segments_of
from .axis_rules import Axes
from .progress import Report

Orders = dict[str, Tensor]
SWEEPS = 100  # of coordinate descent at most
TOLERANCE = 1e-9  # relative gain below which a sweep has found nothing


@dataclass(frozen=True)
class Piece:
    """The same part of a tensor in both networks; `units` names what may be permuted along each dimension, None where nothing may."""

    a: Tensor
    b: Tensor
    units: tuple[str | None, ...]

    def reordered(self, orders: Mapping[str, Tensor], but: int | None = None) -> Tensor:
        """B with its dimensions in their new orders, all but one."""
        tensor = self.b
        for dim, name in enumerate(self.units):
            if name is not None and name in orders and dim != but:
                tensor = tensor.index_select(dim, orders[name])
        return tensor


@dataclass(frozen=True)
class WeightPairs:
    """All pieces of two networks that have units, and where each kind of unit occurs."""

    pieces: list[Piece]
    sizes: Mapping[str, int]
    places: dict[str, list[tuple[Piece, int]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sizes:
            self.places[name] = [
                (piece, dim)
                for piece in self.pieces
                for dim, unit in enumerate(piece.units)
                if unit == name
            ]

    def neighbours(self, name: str) -> set[str]:
        """Other units in the same tensors."""
        return {unit for piece, _ in self.places[name] for unit in piece.units if unit} - {name}

    def score(self, orders: Orders, pieces: Sequence[Piece] | None = None) -> float:
        """Sum of the inner products of a's pieces with b's in their new orders."""
        chosen = self.pieces if pieces is None else pieces
        return sum(float((piece.a * piece.reordered(orders)).sum()) for piece in chosen)

    def scale(self) -> float:
        """Half the squared norms of both: the score of two equal networks."""
        return sum(float(p.a.square().sum() + p.b.square().sum()) for p in self.pieces) / 2

    def gain(self, name: str, orders: Orders) -> Tensor:
        """[i, j]: what it is worth that unit i of a meets unit j of b, the other units in the given orders."""
        total = torch.zeros(self.sizes[name], self.sizes[name], dtype=torch.float64)
        for piece, dim in self.places[name]:
            total += _rows(piece.a, dim) @ _rows(piece.reordered(orders, but=dim), dim).T
        return total

    def distances(self, name: str, orders: Orders, *, partly: bool) -> Tensor | None:
        """[i, j]: squared distance of what is known of unit i of a and unit j of b.

        orders: those known so far. Along the other axes entries are compared by their size: sorted, if `partly`; else the tensor is
        left out. None where nothing is known.
        """
        total: Tensor | None = None
        for piece, dim in self.places[name]:
            unknown = [
                other for other, unit in enumerate(piece.units) if other != dim and unit and unit not in orders
            ]
            if unknown and not partly:
                continue
            x, y = (_signatures(t, dim, unknown) for t in (piece.a, piece.reordered(orders, but=dim)))
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            total = squares if total is None else total + squares
        return total


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def _signatures(tensor: Tensor, dim: int, unknown: list[int]) -> Tensor:
    """One row for each entry of `dim` that the order of the entries along the `unknown` dimensions does not change."""
    if not unknown:
        return _rows(tensor, dim)
    known = [other for other in range(tensor.ndim) if other != dim and other not in unknown]
    moved = tensor.permute(dim, *known, *unknown)
    sizes = [tensor.shape[other] for other in known]
    flat = moved.reshape(tensor.shape[dim], prod(sizes), -1)
    return flat.sort(dim=-1).values.flatten(1)


def pair_weights(
    axes: Mapping[str, Axes],
    units: Mapping[str, Axis],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
) -> WeightPairs:
    """All tensors that have units, in float64, cut into pieces along whose dimensions one kind of unit lies."""
    names = {axis.root: name for name, axis in units.items()}
    found: list[Piece] = []
    for name, own in axes.items():
        if name in first:
            found += _cut(first[name].double().cpu(), second[name].double().cpu(), own, names)
    pieces = [piece for piece in found if any(piece.units)]
    return WeightPairs(pieces, {name: axis.size for name, axis in units.items()})


def _cut(a: Tensor, b: Tensor, axes: Axes, names: Mapping[Axis, str]) -> list[Piece]:
    """One piece for each combination of segments."""
    parts: list[tuple[Tensor, Tensor, tuple[str | None, ...]]] = [(a, b, ())]
    for axis in axes:
        grown = []
        for x, y, units in parts:
            place, dim = 0, len(units)
            for segment in segments_of(axis):
                factors = factors_of(segment)
                shape = [factor.size for factor in factors]
                cut = [t.narrow(dim, place, segment.size).unflatten(dim, shape) for t in (x, y)]
                grown.append((cut[0], cut[1], (*units, *(names.get(f.root) for f in factors))))
                place += segment.size
        parts = grown
    return [Piece(x, y, units) for x, y, units in parts]


def assign(gain: Tensor) -> Tensor:
    """For every unit of a the unit of b that it meets, in the best assignment."""
    _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64)


def match_weights(pairs: WeightPairs, seed: int, report: Report) -> Orders:
    """The best that coordinate descent finds from three starts."""
    starts = [start_outward(pairs, partly=True), start_outward(pairs, partly=False), {}]
    found = [descend(pairs, start, seed, report) for start in starts]
    return max(found, key=pairs.score)


def start_outward(pairs: WeightPairs, *, partly: bool) -> Orders:
    """Orders found one after another, the clearest first: exact for a permuted copy.

    partly: whether axes of unknown order tell something, by their sorted entries.
    """
    orders: Orders = {}
    seen: dict[str, Tensor | None] = {}
    open_names = list(pairs.sizes)
    while open_names:
        for name in open_names:
            if name not in seen:
                seen[name] = pairs.distances(name, orders, partly=partly)
        chosen = max(open_names, key=lambda name: _clearness(seen[name]))
        distances = seen.pop(chosen)
        size = pairs.sizes[chosen]
        orders[chosen] = torch.arange(size) if distances is None else assign(-distances)
        open_names.remove(chosen)
        for name in pairs.neighbours(chosen):
            seen.pop(name, None)
    return orders


def _clearness(distances: Tensor | None) -> float:
    """How far the matches stand out: mean of 1 - (distance of a match) / (distance of the next best), -1 where nothing is known."""
    if distances is None:
        return -1.0
    units, order = torch.arange(len(distances)), assign(-distances)
    matched = distances[units, order].clamp(min=0)
    others = distances.clone()
    others[units, order] = torch.inf
    nearest = others.min(dim=1).values.clamp(min=0)
    floor = 1e-12 * float(distances.abs().max()) + 1e-300  # round-off of squared distances
    return float((1 - (matched + floor) / (nearest + floor)).mean())


def descend(pairs: WeightPairs, start: Orders, seed: int, report: Report) -> Orders:
    """Coordinate descent: one assignment problem after another until a sweep gains nothing."""
    orders = {name: start.get(name, torch.arange(size)) for name, size in pairs.sizes.items()}
    generator = torch.Generator().manual_seed(seed)
    names, stale = list(pairs.sizes), set(pairs.sizes)
    least = TOLERANCE * pairs.scale()
    for sweep in range(1, SWEEPS + 1):
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            if name not in stale:
                continue
            stale.discard(name)
            pieces = list({id(piece): piece for piece, _ in pairs.places[name]}.values())
            trial = orders | {name: assign(pairs.gain(name, orders))}
            if pairs.score(trial, pieces) > pairs.score(orders, pieces) + least:
                orders = trial
                stale |= pairs.neighbours(name) | {name}
        report(sweep, sweep + 1, f"{len(stale)} kinds of units left")
        if not stale:
            break
    return orders
