"""Find the order of one network's units in which what they compute is most like what those of another network compute.

Units meet those whose activations correlate most with their own (Li et al. 2016, arXiv:1511.07543). Units that activations do not tell
apart, for instance those that are zero for all examples, are told apart by their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .axes import Axis, factors_of
from .axis_rules import Axes
from .example_groups import DoubleNetwork
from .nesting import Batch
from .symmetries import named_tensors
from .tracing import Place, Tracer
from .watching import Turned, Watched, run
from .weight_matching import SWEEPS, Orders, WeightPairs, assign, start_outward

SAMPLES = 1024  # examples at most, and samples of an activation that one correlation uses
MOST_UNITS = 4096  # along one tensor, whose correlations are a matrix of that size
TIE = 0.01  # share of the weights in what a match is worth: it decides where correlations are as good as equal


@dataclass
class Correlations:
    """Sum over tensors with units along `names` of the correlation of every unit of a with every unit of b (sizes..., sizes...)."""

    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Activations:
    """One tensor that a network computes: (units, at most `SAMPLES` samples), units along one or two kinds."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    samples: Tensor


def _activations(tensor: Tensor, axes: Axes, names: Mapping[Axis, str]) -> Activations | None:
    """None for a tensor without units to compare, or without samples of them."""
    factors = [factor for axis in axes for factor in factors_of(axis)]
    places = [place for place, factor in enumerate(factors) if factor.root in names]
    own = tuple(names[factors[place].root] for place in places)
    sizes = tuple(factors[place].size for place in places)
    if not 1 <= len(own) <= 2 or len(set(own)) < len(own) or prod(sizes) > MOST_UNITS:
        return None
    if any(factor.kind != "leaf" for factor in factors) or sum(f.size > 1 for f in factors) == len(own):
        return None
    moved = tensor.reshape([factor.size for factor in factors]).movedim(places, list(range(len(places))))
    rows = moved.reshape(prod(sizes), -1)
    step = max(1, rows.shape[1] // SAMPLES)
    return Activations(own, sizes, rows[:, ::step].double().cpu())


def correlations(first: Collecting, second: Collecting, batch: Batch) -> list[Correlations]:
    """Of all units with all units. Only samples of the first network's activations are kept while the second one runs."""
    kept: dict[Place, Activations] = {}
    found: dict[tuple[str, ...], Correlations] = {}

    def keep(place: Place, activations: Activations) -> None:
        kept[place] = activations

    def compare(place: Place, y: Activations) -> None:
        x = kept.pop(place, None)
        if x is None or (x.names, x.sizes, x.samples.shape) != (y.names, y.sizes, y.samples.shape):
            return
        values = _correlation(x.samples, y.samples).reshape(*x.sizes, *x.sizes)
        total = found.setdefault(x.names, Correlations(x.names, torch.zeros_like(values)))
        total.values += values

    first.run(batch, keep)
    second.run(batch, compare)
    return list(found.values())


@dataclass(frozen=True)
class Collecting:
    """A network whose activations are collected: the axes of its tensors and the names of its units are known."""

    network: DoubleNetwork
    axes: Mapping[str, Axes]
    units: Mapping[str, Axis]

    def run(self, batch: Batch, collect: Callable[[Place, Activations], None]) -> None:
        """One forward pass; `collect` gets the activations of every tensor as it is made."""

        def take(place: Place, tensor: Tensor, axes: Axes) -> None:
            names = {axis.root: name for name, axis in self.units.items()}  # a run may give an axis another root
            activations = _activations(tensor, axes, names)
            if activations is not None:
                collect(place, activations)

        with self.network.applied():
            tracer = Tracer(named_tensors(self.network), self.axes)
            tracer.collect = take
            run(Watched(tracer), self.network, Turned((), batch))


def match_activations(found: list[Correlations], pairs: WeightPairs) -> Orders:
    """Every unit of a meets that of b whose activations correlate most with its own; heads and their entries in turns."""
    orders = start_outward(pairs, partly=True) if pairs.pieces else {}
    known = {name for c in found for name in c.names}
    for name in known:  # first guess, whatever the order of other leaves of the same axis
        gains = [_any_order(c, c.names.index(name)) for c in found if name in c.names]
        orders[name] = assign(_with_weights(sum(gains[1:], gains[0]), pairs, name, orders))
    for _ in range(SWEEPS):
        moved = False
        for name in pairs.sizes:
            gains = [_gain_of(c, place, orders) for c in found for place, own in enumerate(c.names) if own == name]
            total = sum(gains[1:], gains[0]) if gains else torch.zeros((pairs.sizes[name],) * 2, dtype=torch.float64)
            new = assign(_with_weights(total, pairs, name, orders))
            moved = moved or not torch.equal(new, orders[name])
            orders[name] = new
        if not moved:
            break
    return orders


def _with_weights(gain: Tensor, pairs: WeightPairs, name: str, orders: Orders) -> Tensor:
    """The gain in correlation, with ties broken by the gain in weights."""
    more = pairs.gain(name, orders)
    return gain + TIE * more / more.abs().max().clamp(min=1e-300)


def _any_order(c: Correlations, place: int) -> Tensor:
    """[i, j]: the best that unit i of a and unit j of b can have in common, over all orders of the other leaf."""
    if len(c.names) == 1:
        return c.values
    values = c.values.movedim((place, 2 + place), (0, 1))  # (i, j, other, other)
    worth = torch.zeros(values.shape[:2], dtype=torch.float64)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            worth[i, j] = values[i, j].gather(1, assign(values[i, j])[:, None]).sum()
    return worth


def _gain_of(c: Correlations, place: int, orders: Orders) -> Tensor:
    """[i, j] with the other leaves in their present orders."""
    count, values = len(c.names), c.values
    for other in (o for o in range(count) if o != place):
        values = values.index_select(count + other, orders[c.names[other]])
    for other in sorted((o for o in range(count) if o != place), reverse=True):
        values = values.diagonal(dim1=other, dim2=values.ndim // 2 + other).sum(-1)
    return values


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, of every unit of one with every unit of the other; 0 for one that never changes."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scale = x.norm(dim=1)[:, None] * y.norm(dim=1)
    return torch.where(scale > 1e-12 * scale.max().clamp(min=1e-300), x @ y.T / scale.clamp(min=1e-300), torch.zeros_like(scale))
