"""Permutations of units that leave a network's function as it is, read off its operations as it runs and then proven.

Every operation that PyTorch dispatches while the model sees some examples says which axes of its tensors move together (`axes`). What
the rules do not know keeps its axes where they are, and so does what the examples do not reach: that can only lose symmetries. The proof
does not rely on the rules: random permutations of everything that is free must leave the outputs of other examples as they are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from .axes import Axis, factors_of, freeze, leaves_of, moved
from .axis_rules import INHERENT, Axes
from .errors import OrographError
from .example_groups import DoubleNetwork, double_network, example_groups, tensors_of
from .nesting import Batch
from .objective import Objective
from .results import Point
from .tracing import Tracer
from .watching import Turned, Watched, run, watch

SAME = 1e-8  # relative change of the outputs in float64 that rounding can make
IN_PART = "in part: "  # where other units along the same axis can move
BROKEN = "moving these units changed the outputs: something tells them apart that no operation shows"


@dataclass
class Symmetry:
    """Axes of every tensor of a network, by name, and the leaves that may be permuted: `units`, each with a name of its own."""

    axes: dict[str, Axes]
    units: dict[str, Axis]
    unknown: dict[str, int] = field(default_factory=dict)  # operations without a rule -> how often they ran
    rounding: float = 0.0  # unit round-off of the narrowest numbers that the model casts to inside
    proof: list[Batch] = field(default_factory=list)  # examples that had no part in finding the symmetry
    is_proof_of_watched: bool = False  # there are no such examples, so that the proof takes those that were watched
    turned: list[Turned] = field(default_factory=list)  # decisions whose other answer is proven too

    def permuted(self, point: Point, orders: dict[str, Tensor], objective: Objective) -> Point:
        """The same function with its units in another order: entry i of the new order is entry order[i] of the old one."""
        by_axis = {self.units[name].root: order for name, order in orders.items()}
        layout = objective.layout
        parts = dict(zip(layout.names, layout.split(point.theta), strict=True))

        def move(name: str, tensor: Tensor) -> Tensor:
            for dim, axis in enumerate(self.axes.get(name, ())):
                if any(leaf in by_axis for leaf in leaves_of(axis)):
                    tensor = tensor.index_select(dim, moved(axis, by_axis).to(tensor.device))
            return tensor

        theta = layout.flatten([move(name, part) for name, part in parts.items()], point.theta)
        buffers = {name: move(name, tensor) for name, tensor in point.buffers.items()}
        frozen = {name: move(name, tensor) for name, tensor in point.frozen.items()}
        return replace(point, theta=theta, buffers=buffers, frozen=frozen)

    def left(self, *, inherent: bool = True) -> dict[str, str]:
        """What stays in place, as `tensor[dimension]`, and why.

        inherent: whether axes are listed that no network can permute: those of inputs and outputs, positions, rows of an embedding.
        """
        free = {axis.root for axis in self.units.values()}
        found: dict[str, str] = {}
        for name, own in self.axes.items():
            for dim, axis in enumerate(own):
                leaves = [leaf for leaf in leaves_of(axis) if leaf.size > 1]
                kept = [leaf.reason for leaf in leaves if leaf not in free]
                if kept and (inherent or not set(kept) <= INHERENT):
                    reasons = "; ".join(dict.fromkeys(reason or "no reason was noted" for reason in kept))
                    found[f"{name}[{dim}]"] = (IN_PART if len(kept) < len(leaves) else "") + reasons
        return found

    def keep(self, names: list[str], reason: str) -> Symmetry:
        """The same symmetry without some of its units."""
        for name in names:
            freeze(self.units[name], reason)
        return replace(self, units={name: axis for name, axis in self.units.items() if name not in names})


def moving_buffers(model: nn.Module) -> set[int]:
    """Ids of the buffers that belong to units: running statistics, and the vectors of spectral norms."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, _NormBase):
            found |= {id(module.running_mean), id(module.running_var)}
        if isinstance(module, parametrizations._SpectralNorm):
            found |= {id(getattr(module, name, None)) for name in ("_u", "_v")}
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                found |= {id(getattr(module, f"{hook.name}_{end}")) for end in "uv"}
    return found - {id(None)}


def named_tensors(network: DoubleNetwork) -> dict[str, Tensor]:
    """What may have units: parameters and `moving_buffers`, inside `network.applied()`."""
    snapshot = network.snapshot
    own = {name: getattr(*slots[0]) for name, slots in snapshot.slots.buffers.items()}
    movable = moving_buffers(snapshot.model)
    return {**snapshot.leaves, **snapshot.frozen} | {name: tensor for name, tensor in own.items() if id(tensor) in movable}


def find_symmetry(objective: Objective, seed: int = 0) -> Symmetry:
    """Watch forward passes of some examples in float64; no proof yet. Raises TypeError for a `batch_loss`, which hides the output."""
    if objective.recipe.batch_loss is not None:
        raise TypeError("alignment needs the network's output, which a batch_loss hides. Use Objective(model, criterion, data, forward=lambda model, batch: (output, target)).")
    network = double_network(objective)
    with network.applied():
        named = named_tensors(network)
        groups = example_groups(objective, seed)
        seen = watch(network, named, groups)
    trace = seen.tracer.trace
    axes = {name: seen.tracer.axes(tensor) for name, tensor in named.items()}
    return Symmetry(axes, _units(axes), trace.unknown, trace.rounding, seen.proof or groups[0], not seen.proof, seen.turned)


def _units(axes: dict[str, Axes]) -> dict[str, Axis]:
    """Free leaves, named after the first tensor that has them."""
    found: dict[Axis, str] = {}
    for name, own in axes.items():
        for dim, axis in enumerate(own):
            for factor in factors_of(axis):
                if factor.kind == "join" and len(factors_of(axis)) > 1:
                    freeze(factor, "its parts lie end to end inside of another axis")  # rare
            for leaf in leaves_of(axis):
                if leaf.size > 1 and not leaf.frozen and leaf not in found:
                    found[leaf] = f"{name}[{dim}]" + (f".{len(found)}" if f"{name}[{dim}]" in found.values() else "")
    return {name: leaf for leaf, name in found.items() if not leaf.frozen}


def prove(objective: Objective, symmetry: Symmetry, seed: int = 0) -> Symmetry:
    """Random orders of all units must leave the outputs of the proof's examples as they are in float64.

    Units that do not are kept in place. OrographError names the module where none are left.
    """
    if not symmetry.units:
        return symmetry
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(axis.size, generator=generator) for name, axis in symmetry.units.items()}
    before = _outputs(objective, symmetry, objective.point())
    rounding = max(SAME, 100 * symmetry.rounding)

    def changes(chosen: dict[str, Tensor]) -> bool:
        after = _outputs(objective, symmetry, symmetry.permuted(objective.point(), chosen, objective))
        return not _same(after, before, rounding)

    if not changes(orders):
        return symmetry
    broken = [name for name, order in orders.items() if changes({name: order})] or list(orders)
    rest = {name: order for name, order in orders.items() if name not in broken}
    if rest and not changes(rest):
        return symmetry.keep(broken, BROKEN)
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in broken))
    unknown = f" Operations without a rule: {', '.join(symmetry.unknown)}." if symmetry.unknown else ""
    raise OrographError(
        f"the permutations found for {', '.join(modules[:5])} change the function, so this network cannot be aligned: something there tells its units "
        f"apart that no operation shows.{unknown} Align a part of the network that is known to be symmetric, or compare without alignment."
    )


def _same(after: list[Tensor], before: list[Tensor], rounding: float) -> bool:
    """Whether outputs agree, each relative to its own size; entries that are no numbers must be so in both."""
    for x, y in zip(after, before, strict=True):
        if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
            return False
        x, y = (torch.where(t.isfinite(), t, torch.zeros_like(t)) for t in (x, y))
        if y.numel() and float((x - y).abs().max()) > rounding * max(float(y.abs().max()), 1e-300):
            return False
    return len(after) == len(before)


def _outputs(objective: Objective, symmetry: Symmetry, point: Point) -> list[Tensor]:
    """Of the proof's examples, and of those whose decisions are turned over."""
    network = double_network(objective).at(point)
    with network.applied():
        found = [t for batch in symmetry.proof for t in tensors_of(network.term(batch).output())]
        for turned in symmetry.turned:
            found += tensors_of(run(Watched(Tracer()), network, turned))
    return found
