"""The same loss over a few examples, in smaller micro-batches, or in float64: what proofs, memory budgets and differences need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from .batches import Batches, is_pair, listed
from .nesting import Batch, as_double, count_examples, count_numbers, join_batches, take_rows
from .objective import Objective
from .restoring import under
from .snapshots import Snapshot
from .surroundings import normal_tensors
from .terms import Recipe, weigh

LOADED = 8  # batches that a proof reads from a loader whose data do not fit into memory


def on_few(objective: Objective, examples: int, *, double: bool) -> Objective:
    """A copy over the first batch's first examples (all of it, where batches must not be cut), in float64 if `double`."""
    with objective.applied():
        term = next(iter(objective.terms()))
        few = replace(term, batch=take_rows(term.batch, torch.arange(min(examples, term.examples), device="cpu"))) if objective.divisible else term
        batch = few.batch if few.count_units() > 0 else term.batch
    small = _weighed(objective, objective.snapshot, objective.recipe, listed([batch]))
    return in_double(small) if double else small


def on_spread(objective: Objective, examples: int) -> Objective:
    """A copy over about `examples` examples drawn from all batches, see `spread_batches`."""
    return _weighed(objective, objective.snapshot, objective.recipe, listed(spread_batches(objective, examples)))


def spread_batches(objective: Objective, examples: int) -> list[Batch]:
    """About `examples` examples drawn from all batches, a random one out of every stretch of the data.

    Examples of different batches are joined where their shapes fit; of other shapes, the first and the largest stay. Batches that must not
    be cut are taken whole: the first of them, and further ones where more examples are wanted.
    """
    batches = objective.terms().batches
    sizes = batches.reading.sizes if batches.kept is not None else batches.reading.sizes[:LOADED]
    total = sum(sizes)
    count = min(examples, total)
    random = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    rows = ((torch.arange(count) + random) * (total / count)).long().clamp(max=total - 1)
    with objective.applied():
        if not objective.divisible:
            wanted = max(1, examples // max(batches.reading.sizes))
            return list(islice((term.batch for term in objective.terms()), wanted))
        parts = []
        for first, batch in islice(batches, len(sizes)):
            own = rows[(rows >= first) & (rows < first + count_examples(batch))] - first
            if len(own):
                parts.append(take_rows(batch, own))
        return _grouped(parts)


def _grouped(parts: list[Batch]) -> list[Batch]:
    """Joined where shapes fit; of several groups the first and the one with the most numbers."""
    groups: list[Batch] = []
    for part in parts:
        for index, group in enumerate(groups):
            if (both := join_batches(group, part)) is not None:
                groups[index] = both
                break
        else:
            groups.append(part)
    largest = max(groups, key=count_numbers)
    return [groups[0]] if largest is groups[0] else [groups[0], largest]


def on_batch(objective: Objective, batch: Batch, rows: torch.Tensor | None = None) -> Objective:
    """A copy over one prepared batch, or over some of its examples."""
    return _weighed(objective, objective.snapshot, objective.recipe, listed([batch if rows is None else take_rows(batch, rows)]))


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
        yield weight, _weighed(objective, objective.snapshot, objective.recipe, listed([batch]))


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
