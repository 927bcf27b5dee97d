"""What an evaluation reaches: the kinds of autograd nodes in its graph, and the parameters that its products depend on.

A proof on a few examples says nothing of an operation that it never ran. A custom Function counts only where a gradient other than
zero has come to it: behind a closed gate its backward is not tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .layout import in_full
from .nesting import Batch, tensors_in

Kind = type | str  # the class of a custom Function's node, the name of any other node


@dataclass
class Reached:
    """Kinds of nodes and indices of parameters."""

    kinds: set[Kind] = field(default_factory=set)
    parameters: set[int] = field(default_factory=set)
    _nodes: set[Any] = field(default_factory=set, repr=False)

    def walk(self, result: Any) -> None:
        """Note every node of the graph of `result`."""
        queue: list[Any] = [t.grad_fn for t in tensors_in(result)]
        while queue:
            node = queue.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes.add(node)
            if isinstance(node, BackwardCFunction):
                self._wait_for_gradient(node)
            else:
                self.kinds.add(type(node).__name__)
            queue.extend(following for following, _ in node.next_functions)

    def _wait_for_gradient(self, node: Any) -> None:
        kind = type(node)

        def note(gradients: tuple[Tensor | None, ...]) -> None:
            if kind not in self.kinds and any(g is not None and bool(g.any()) for g in gradients):
                self.kinds.add(kind)

        node.register_prehook(note)

    def forget_nodes(self) -> None:
        """Nodes keep graphs alive."""
        self._nodes.clear()

    def add(self, other: Reached) -> None:
        """Take in what another has reached."""
        self.kinds |= other.kinds
        self.parameters |= other.parameters

    def lacks(self, other: Reached) -> str:
        """Something that `other` has reached and this has not, in words; empty where there is nothing."""
        kinds = sorted(other.kinds - self.kinds, key=lambda kind: (isinstance(kind, str), str(kind)))
        if kinds:
            name = kinds[0] if isinstance(kinds[0], str) else kinds[0].__name__
            return f"the operation {name.removesuffix('Backward')!r}"
        return "a parameter" if other.parameters - self.parameters else ""


@dataclass
class Watch:
    """Compares what the terms of a sweep reach with what a proof has reached, once for every term."""

    proven: Reached
    into: Reached | None = None  # takes what every term reaches
    beyond: list[tuple[Batch, Reached]] = field(default_factory=list)  # batches with something that the proof has not reached

    def tell(self, batch: Batch, reached: Reached) -> None:
        """To be called when the first product with the batch has been made."""
        reached.forget_nodes()
        if self.into is not None:
            self.into.add(reached)
        elif self.proven.lacks(reached):
            self.beyond.append((batch, reached))


@torch.no_grad()
def parameters_in(parts: Any, known: set[int]) -> set[int]:
    """Indices of the parts, one per parameter, that are not zero; without those that are known."""
    return {
        index
        for index, part in enumerate(parts)
        if part is not None and index not in known and bool(in_full(part).any())
    }
