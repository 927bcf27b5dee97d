"""Runs a network on groups of examples until what they reach is known, and keeps in place what they do not reach.

The first group is learned from. The second is the proof: if it reaches what the first did not, it is learned from as well and the third
takes its place. Decisions that all examples answer alike are turned over once, so that their other way is watched too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .axes import Axis, freeze
from .axis_rules import INPUT, OUTPUT
from .decisions import Decisions, Site
from .example_groups import DoubleNetwork
from .nesting import Batch, tensors_in
from .tracing import Tracer

MOST_TURNS = 64  # decisions that are turned over


@dataclass(frozen=True)
class Turned:
    """Decisions that no example answers otherwise, and the examples whose answers are turned over."""

    sites: tuple[Site, ...]
    batch: Batch


@dataclass
class Watched:
    """What several runs have shown."""

    tracer: Tracer
    answers: dict[Site, set[bool]] = field(default_factory=dict)
    modules: dict[Site, str] = field(default_factory=dict)  # whose code decides
    first: dict[Site, Turned] = field(default_factory=dict)  # the run that came to a decision first
    read: set[str] = field(default_factory=set)  # modules whose code reads numbers of the data
    turned: list[Turned] = field(default_factory=list)
    tried: set[Site] = field(default_factory=set)
    uncovered: dict[str, str] = field(default_factory=dict)  # module -> why another way through its code is unknown
    proof: list[Batch] = field(default_factory=list)

    def news(self, other: Watched) -> set[str]:
        """Modules whose code did in the other runs what it did not do in these."""
        own, new = self.tracer.trace, other.tracer.trace
        found = {owner(name, new.called) for name in new.reached - own.reached}
        found |= {module for module, names in new.operations.items() if not names <= own.operations.get(module, set())}
        return found | {other.modules[site] for site in other.answers.keys() - self.answers.keys()} | (other.read - self.read)


def watch(network: DoubleNetwork, named: dict[str, Tensor], groups: list[list[Batch]]) -> Watched:
    """Axes of the named tensors, inside `network.applied()`."""
    seen = Watched(Tracer(named))
    _learn(seen, network, groups[0])
    spare = [group for group in groups[1:] if group]
    while spare:
        proof, spare = spare[0], spare[1:]
        other = Watched(Tracer(named))
        for batch in proof:
            run(other, network, Turned((), batch))
        seen.proof, news = proof, seen.news(other)
        if news and spare:
            _learn(seen, network, proof)
            continue
        for module in news:
            seen.uncovered.setdefault(module, "other examples took a way that the watched ones did not take")
        break
    _keep_what_is_not_covered(seen, named)
    return seen


def run(seen: Watched, network: DoubleNetwork, turned: Turned, decisions: Decisions | None = None) -> Any:
    """One pass over a few examples, which is watched; the output."""
    tracer, term = seen.tracer, network.term(turned.batch)
    for tensor in tensors_in(term.batch):
        tracer.label(tensor, [Axis(size, frozen=True, reason=INPUT) for size in tensor.shape], fed=True)
    decisions = decisions or Decisions(tracer, turned.sites)
    try:
        with tracer.watching(network.snapshot.model), decisions:
            output = term.output()
    finally:
        for site, answers in decisions.answers.items():
            seen.answers.setdefault(site, set()).update(answers)
            seen.first.setdefault(site, turned)
        seen.modules |= decisions.modules
        seen.read |= decisions.read
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            for axis in tracer.axes(tensor):
                freeze(axis, OUTPUT)
    return output


def _learn(seen: Watched, network: DoubleNetwork, batches: list[Batch]) -> None:
    """Watch these examples, and the other way of every decision that they all answer alike."""
    for batch in batches:
        run(seen, network, Turned((), batch))
    while waiting := [site for site, answers in seen.answers.items() if len(answers) == 1 and site not in seen.tried]:
        for site in waiting:
            seen.tried.add(site)
            if len(seen.tried) > MOST_TURNS:
                seen.uncovered[seen.modules[site]] = f"more than {MOST_TURNS} decisions depend on the data"
                continue
            before = seen.first[site]
            _turn(seen, network, Turned((*before.sites, site), before.batch))


def _turn(seen: Watched, network: DoubleNetwork, turned: Turned) -> None:
    """Watch what happens when a decision is turned over.

    A way that ends in an error at once is a check of the user's own. One that fails later is not covered.
    """
    decisions = Decisions(seen.tracer, turned.sites)
    try:
        run(seen, network, turned, decisions)
        seen.turned.append(turned)
    except Exception as error:  # of the user's code, on a way that its data do not take; what it means is said below
        if decisions.turned_at is None or seen.tracer.count > decisions.turned_at:
            seen.uncovered.setdefault(seen.modules[turned.sites[-1]], f"the other way of a decision ended in {type(error).__name__}")


def _keep_what_is_not_covered(seen: Watched, named: dict[str, Tensor]) -> None:
    """Freeze what was never reached and what it may read, and what ways through the code that nobody took may do."""
    trace = seen.tracer.trace
    for name in named.keys() - trace.reached:
        for axis in seen.tracer.axes(named[name]):
            freeze(axis, "the data never reach this tensor")
        largest = max(named[name].shape, default=0)
        for axes in trace.visible.get(owner(name, trace.called), ()):
            for axis in axes:
                if axis.root.size <= largest:
                    freeze(axis, f"{name}, which the data never reach, may read these units")
    for module in seen.read:
        seen.uncovered.setdefault(module, "its code computes with numbers read from the data, so its way may depend on them")
    for module, reason in seen.uncovered.items():
        for axes in trace.visible.get(module, ()):
            for axis in axes:
                freeze(axis, f"{module or 'the network'}: {reason}")


def owner(name: str, called: set[str]) -> str:
    """The module that runs and has this tensor, itself or in a part of it that does not run."""
    module = name.rpartition(".")[0]
    while module and module not in called:
        module = module.rpartition(".")[0]
    return module
