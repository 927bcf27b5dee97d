"""Examples of all batches in groups that have nothing in common: some to learn from, others to prove with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .nesting import Batch, as_double, count_examples, take_rows, tensors_in
from .objective import Objective
from .restoring import under
from .results import Point
from .snapshots import Snapshot
from .surroundings import normal_tensors
from .terms import Recipe, Term

MOST_BATCHES = 16  # that examples are taken from
EXAMPLES = 64  # in one group
LEAST_EXAMPLES = 4
COST = 5e8  # parameters times examples of one group
GROUPS = 3


@dataclass(frozen=True)
class DoubleNetwork:
    """The objective's network in float64, as a function of a batch."""

    snapshot: Snapshot
    recipe: Recipe

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds these weights; nothing is recorded for derivatives."""
        with self.snapshot.applied(), torch.no_grad():
            yield

    def term(self, batch: Batch) -> Term:
        """One micro-batch, in float64."""
        return Term(self.recipe, as_double(batch), 0)

    def at(self, point: Point) -> DoubleNetwork:
        """The same network with other weights."""
        return DoubleNetwork(replace(self.snapshot, point=point).in_double(()), self.recipe)


def double_network(objective: Objective) -> DoubleNetwork:
    """Where the objective stands, in float64."""
    return DoubleNetwork(objective.snapshot.in_double(objective.recipe.calls), objective.recipe)


@under(normal_tensors)
def example_groups(objective: Objective, seed: int = 0) -> list[list[Batch]]:
    """Three groups of micro-batches without a common example, each from all batches, or from 16 of them and one of every shape.

    Batches that must not be cut go to the groups whole, in turns. Later groups are empty where there are too few examples.
    """
    shapes = [_shape(batch) for _, batch in objective.terms().batches]
    chosen = _chosen(shapes)
    affordable = max(LEAST_EXAMPLES, min(EXAMPLES, int(COST / max(objective.size, 1))))
    each = -(-affordable // len(chosen))
    generator = torch.Generator().manual_seed(seed)
    groups: list[list[Batch]] = [[] for _ in range(GROUPS)]
    turn = 0
    for index, (_, batch) in enumerate(objective.terms().batches):
        if index not in chosen:
            continue
        count = count_examples(batch)
        if objective.divisible and count > 1:
            size = max(1, min(each, count // GROUPS if count >= GROUPS else 1))
            order = torch.randperm(count, generator=generator, device="cpu")
            for number, group in enumerate(groups):
                rows = order[number * size : (number + 1) * size]
                if len(rows):
                    group.append(take_rows(batch, rows.sort().values))
        else:
            groups[turn % GROUPS].append(batch)
            turn += 1
    return sorted(groups, key=len, reverse=True)


def _chosen(shapes: list[Any]) -> set[int]:
    """Batches that are spread evenly, and the first of every shape."""
    count = len(shapes)
    places = [round(i * (count - 1) / (MOST_BATCHES - 1)) for i in range(MOST_BATCHES)]
    spread = set(places if count > MOST_BATCHES else range(count))
    return spread | {shapes.index(shape) for shape in dict.fromkeys(shapes)}


def _shape(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors of one example."""
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors_in(batch))


def tensors_of(output: Any) -> list[Tensor]:
    """Floating-point tensors of an output."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
