"""The same loss over a few examples, in smaller micro-batches, or in float64: what proofs, memory budgets and differences need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from .batches import Batches, is_pair, one_batch
from .nesting import Batch, as_double, count_examples, take_rows
from .objective import Objective
from .restoring import under
from .snapshots import Snapshot
from .surroundings import normal_tensors
from .terms import Recipe, weigh


def on_few(objective: Objective, examples: int, *, double: bool) -> Objective:
    """A copy over the first batch's first examples (all of it, where batches must not be cut), in float64 if `double`."""
    with objective.applied():
        term = next(iter(objective.terms()))
        few = replace(term, batch=take_rows(term.batch, torch.arange(min(examples, term.examples), device="cpu"))) if objective.divisible else term
        batch = few.batch if few.count_units() > 0 else term.batch
    small = _weighed(objective, objective.snapshot, objective.recipe, one_batch(batch))
    return in_double(small) if double else small


def in_pieces(objective: Objective, examples: int) -> Objective:
    """Every batch cut into micro-batches of at most `examples`."""

    def cut(batch: Batch) -> list[tuple[int, Batch]]:
        rows = torch.arange(count_examples(batch), device="cpu").split(examples)
        return [(int(part[0]), take_rows(batch, part)) for part in rows]

    return _weighed(objective, objective.snapshot, objective.recipe, replace(objective.terms().batches, view=cut))


@under(normal_tensors)
def joined(objective: Objective, examples: int) -> Objective:
    """Batches of tensor pairs put together to micro-batches of at most about `examples`; the objective itself where they are anything else."""
    batches = objective.terms().batches
    pairs = (batches.kept or []) if objective.divisible else []
    alike = {(type(batch), *((t.shape[1:], t.dtype) for t in batch)) if is_pair(batch) else None for batch in pairs}
    if len(alike) != 1 or None in alike or len(pairs) < 2:
        return objective
    groups: list[list[Batch]] = [[]]
    for batch in pairs:
        if groups[-1] and sum(map(count_examples, groups[-1])) + count_examples(batch) > examples:
            groups.append([])
        groups[-1].append(batch)
    kept: list[Batch] = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
    sizes, elements = tuple(map(count_examples, kept)), tuple(sum(t.numel() for t in batch) for batch in kept)
    reading = replace(batches.reading, sizes=sizes, elements=elements)
    return _weighed(objective, objective.snapshot, objective.recipe, replace(batches, source=kept, kept=kept, reading=reading))


def pieces(objective: Objective, examples: int) -> Iterator[tuple[float, Objective]]:
    """(weight, the loss of that micro-batch alone) for micro-batches of `examples`, or fewer; the user's own batches where they must not be cut."""
    cut = in_pieces(joined(objective, examples), examples) if objective.divisible else objective
    with objective.applied():
        parts = [(term.weight, term.batch) for term in cut.terms()]
    for weight, batch in parts:
        yield weight, _weighed(objective, objective.snapshot, objective.recipe, one_batch(batch))


def random_pieces(objective: Objective, examples: int, most: int, seed: int) -> list[tuple[float, Objective]]:
    """At most `most` micro-batches of `examples` random examples each; the first of the user's own batches where they must not be cut."""
    if not objective.divisible or not objective.terms().batches.ordered:
        return list(islice(pieces(objective, examples), most))
    count = max(min(most, objective.examples // examples), 1) * examples
    chosen = objective if count >= objective.examples else objective.sample(count, seed)
    return list(islice(pieces(chosen, examples), most))


@under(normal_tensors)
def with_batch_statistics(objective: Objective) -> Objective:
    """The same loss with BatchNorm on each batch's own statistics, as in training."""
    return objective.like(replace(objective.snapshot, mode="batch"), objective.terms())


@under(normal_tensors)
def in_double(objective: Objective) -> Objective:
    """Weights, buffers, data and criterion in float64."""
    batches, recipe = objective.terms().batches, objective.recipe
    single = batches.prepare
    kept = None if batches.kept is None else [as_double(batch) for batch in batches.kept]
    recipe = replace(recipe, criterion=recipe.criterion and recipe.criterion.in_double(recipe.model))
    return _weighed(objective, objective.snapshot.in_double(recipe.calls), recipe, replace(batches, kept=kept, prepare=lambda tensor: as_double(single(tensor))))


@under(normal_tensors)
def _weighed(objective: Objective, snapshot: Snapshot, recipe: Recipe, batches: Batches) -> Objective:
    """With the units of every batch counted anew."""
    with snapshot.applied():
        return objective.like(snapshot, weigh(recipe, batches))
