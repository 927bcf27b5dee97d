"""Running statistics of BatchNorm anew, for weights that were not trained with those at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .evaluation import no_gradient
from .objective import Objective
from .restoring import under
from .results import Point
from .snapshots import Snapshot
from .surroundings import normal_tensors


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def renormalised(objective: Objective, source: object = None) -> Point:
    """The same weights with running statistics re-estimated: those of the objective's batches, averaged. One forward pass.

    What noise, averaging or a path does to weights, it does to the statistics of what they compute, and those at hand no longer fit
    (Izmailov et al. 2018, arXiv:1803.05407; Jordan et al. 2023, arXiv:2211.08403). Every layer sees what batches normalised by their own
    statistics give. A network without running statistics comes back as it is.
    """
    return renormalised_all(objective, [objective.point(source)])[0]


@under(normal_tensors)
def renormalised_all(objective: Objective, points: Sequence[Point]) -> list[Point]:
    """`renormalised` for many networks: every batch goes to all of them before the next one is loaded."""
    norms = running_norms(objective.snapshot.model)
    if not norms:
        return list(points)
    if objective.examples > 1 and max(objective.terms().batches.reading.sizes) < 2:
        raise ValueError("running statistics cannot be re-estimated from batches of one example, which have no variance. Use a larger batch_size, or statistics as they are.")
    networks = [replace(objective.at(point).snapshot, mode="batch") for point in points]
    seen = _Seen([{} for _ in points])
    with objective.applied():  # which takes the hooks off again
        for norm in norms:
            norm.register_forward_pre_hook(lambda module, inputs: _add(seen.sums[seen.network].setdefault(id(module), []), inputs[0]))
        for term in objective.terms():
            for i, network in enumerate(networks):
                seen.network = i
                with network.applied(), no_gradient(objective.recipe):
                    if term.examples > 1 or objective.examples == 1:  # one example has no variance
                        term.loss_of(term.output())
    return [_with_statistics(point, network, norms, found) for point, network, found in zip(points, networks, seen.sums, strict=True)]


@dataclass
class _Seen:
    """What the hooks have added up for every network. An object: lists and dicts that a hook closes over are put back when a network leaves the model."""

    sums: list[dict[int, list[Tensor]]]
    network: int = 0  # the one that runs


def _with_statistics(point: Point, network: Snapshot, norms: Sequence[_BatchNorm], sums: Mapping[int, Sequence[Tensor]]) -> Point:
    places = {(id(module), attribute): name for name, slots in network.slots.buffers.items() for module, attribute in slots}
    fresh = {}
    for norm in norms:
        if id(norm) in sums:  # a layer that the forward does not use keeps its own
            mean, variance, count = sums[id(norm)]
            fresh[places[id(norm), "running_mean"]] = mean / count
            fresh[places[id(norm), "running_var"]] = variance / count
    return replace(point, buffers=dict(point.buffers) | {name: value.to(point.buffers[name]) for name, value in fresh.items()})


def _add(sums: list[Tensor], x: Tensor) -> None:
    """Mean, unbiased variance and number of the values of each channel (axis 1), weighted by that number."""
    values = x.detach().double().movedim(1, 0).flatten(1)
    count = values.new_tensor(values.shape[1])
    new = [count * values.mean(1), count * values.var(1), count]
    sums[:] = [old + one for old, one in zip(sums, new, strict=True)] if sums else new


@dataclass
class Repair:
    r"""REPAIR between two networks: every layer of a mixture gets the means and scales of activations that lie between those of its ends.

    $\mathbb{E} X = (1-t)\,\mathbb{E} X_a + t\,\mathbb{E} X_b$, and the same for standard deviations, of each unit before its nonlinearity: averaged units
    that agree only in part have too small a variance, and the loss compounds with depth. Weights and biases of linear and convolutional layers are rescaled, one layer after the other, all but
    the last. Jordan et al. 2023, arXiv:2211.08403. Networks with running statistics are `renormalised` in its place. Costs one forward pass per layer and
    mixture, and one for each end; `passes` counts them.
    """

    objective: Objective
    a: Point
    b: Point
    passes: int = 0
    _layers: dict[nn.Module, tuple[str, str | None]] = field(default_factory=dict)
    _ends: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=list)

    @under(normal_tensors)
    def at(self, merged: Point, t: float) -> Point:
        """The mixture of share `t` of b, repaired."""
        if running_norms(self.objective.snapshot.model):
            self.passes += 1
            return renormalised(self.objective, merged)
        if not self._ends:
            self._layers = _rescalable(self.objective)
            self._ends = [self._statistics(point) for point in (self.a, self.b)]
        (mean_a, std_a), (mean_b, std_b) = self._ends
        theta, layout = merged.theta.clone(), self.objective.layout
        for weight, bias in list(self._layers.values())[:-1]:
            means, stds = self._statistics(replace(merged, theta=theta))
            goal_mean, goal_std = ((1 - t) * x[weight] + t * y[weight] for x, y in ((mean_a, mean_b), (std_a, std_b)))
            ratio = torch.where(stds[weight] > 1e-8 * stds[weight].max(), goal_std / stds[weight].clamp(min=1e-300), torch.ones_like(goal_std))
            W = theta[layout[weight]].view(len(ratio), -1)
            W *= ratio.to(W)[:, None]
            if bias is not None:
                theta[layout[bias]] = ((theta[layout[bias]].double() - means[weight]) * ratio + goal_mean).to(theta)
        return replace(merged, theta=theta)

    def _statistics(self, point: Point) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.passes += 1
        return _unit_statistics(self.objective.at(point), self._layers)


def _rescalable(objective: Objective) -> dict[nn.Module, tuple[str, str | None]]:
    """Linear and convolutional layers in the order in which they run, with the names of weight and bias; tied ones and those outside the study left out."""
    slots = objective.snapshot.slots
    places = {(id(module), attribute): name for name, where in slots.parameters.items() for module, attribute in where if len(where) == 1 and name in objective.names}
    order: dict[nn.Module, tuple[str, str | None]] = {}

    def note(module: nn.Module, inputs: object, output: object) -> None:
        weight, bias = places.get((id(module), "weight")), places.get((id(module), "bias"))
        if weight is not None and (bias is not None or getattr(module, "bias", None) is None):
            order.setdefault(module, (weight, bias))

    _run_hooked(objective, [m for m in objective.snapshot.model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)], note, first_only=True)
    return order


def _unit_statistics(objective: Objective, layers: dict[nn.Module, tuple[str, str | None]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of every unit's activation over the data, by the name of its layer's weight."""
    sums: dict[str, list[Tensor]] = {}

    def note(module: nn.Module, inputs: object, output: object) -> None:
        assert isinstance(output, Tensor)
        values = output.detach().double().movedim(-1 - len(getattr(module, "kernel_size", ())), 0)  # counted from the end: an input may have no batch axis
        units = values.reshape(len(values), -1)
        new = [units.sum(1), units.square().sum(1), units.new_tensor(units.shape[1])]
        name = layers[module][0]
        sums[name] = [old + one for old, one in zip(sums[name], new, strict=True)] if name in sums else new

    _run_hooked(objective, list(layers), note)
    means = {name: total / count for name, (total, _, count) in sums.items()}
    return means, {name: (square / count - means[name] ** 2).clamp(min=0).sqrt() for name, (_, square, count) in sums.items()}


def _run_hooked(objective: Objective, modules: list[nn.Module], note: Callable[[nn.Module, object, object], None], *, first_only: bool = False) -> None:
    """Forward passes over the data with a hook on some modules."""
    with objective.applied(), no_gradient(objective.recipe):  # which takes the hooks off again
        for module in modules:
            module.register_forward_hook(note)
        for term in objective.terms():
            term.loss_of(term.output())
            if first_only:
                break
