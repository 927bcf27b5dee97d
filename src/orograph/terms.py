r"""The loss as a weighted sum over micro-batches: $L(\theta) = \sum_b w_b L_b(\theta)$ with $w_b = u_b / \sum_b u_b$ for u_b units.

Engines see four things: `with objective.applied():`, and of every term its `weight`, `output()` and `loss_of(output)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batches, hash_examples
from .criteria import Criterion
from .nesting import Batch, count_examples, map_tensors, tensors_in

Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]  # (model, batch) -> (output, target)
BatchLoss = Callable[[nn.Module, Batch], Any]  # (model, batch) -> (total, count)
Count = Callable[[Batch], float]


@dataclass(frozen=True)
class Recipe:
    """How one batch becomes a loss: either `criterion` (with `forward` and `count`) or `batch_loss`."""

    model: nn.Module
    criterion: Criterion | None
    batch_loss: BatchLoss | None
    forward: Forward | None
    count: Count | None
    writes: bool = False  # the model or loss writes to what it is given, and gets copies
    alone: bool = False  # the whole set is one batch, so that its units need not be known
    indivisible: str = ""  # why a batch must not be cut, where it must not

    @property
    def calls(self) -> tuple[Callable[..., Any], ...]:
        """Everything beside the model that a loss calls."""
        criterion = None if self.criterion is None else self.criterion.call
        return tuple(call for call in (criterion, self.batch_loss, self.forward, self.count) if call is not None)

    @property
    def weighs(self) -> bool:
        """Whether batches are averaged by units (a mean) rather than added up (a sum)."""
        return self.criterion is None or self.criterion.reduction != "sum"


@dataclass
class Term:
    """One micro-batch of the loss. `output()` first, then `loss_of(output)`."""

    recipe: Recipe
    batch: Batch
    first: int  # index of its first example in the data set
    units: float = 0.0
    weight: float = 1.0
    watch: Callable[[Any], None] | None = field(default=None, repr=False)  # is given outputs and losses with their graphs
    _target: Any = field(default=None, repr=False)
    _counted: float | None = field(default=None, repr=False)  # units found by the last evaluation

    @property
    def examples(self) -> int:
        return count_examples(self.batch)

    def output(self) -> Any:
        """What the model returns for this batch, with its autograd graph (None for a `batch_loss`)."""
        output = self._output()
        if self.watch is not None and output is not None:
            self.watch(output)
        return output

    def _output(self) -> Any:
        recipe = self.recipe
        if recipe.batch_loss is not None:
            return None
        with _noted(self):
            if recipe.forward is not None:
                result = recipe.forward(recipe.model, self.given())
                if not isinstance(result, tuple) or len(result) != 2:
                    raise TypeError(f"forward(model, batch) must return (output, target), got {type(result).__name__}.")
                output, self._target = result
                return output
            return recipe.model(_pair(self.given())[0])

    def given(self) -> Batch:
        """The batch for a call of the user's code: a copy where that writes to it."""
        return map_tensors(fresh, self.batch) if self.recipe.writes else self.batch

    @property
    def target(self) -> Any:
        """The targets; with `forward=` they are known after `output()`."""
        return self._target if self.recipe.forward is not None else _pair(self.given())[1]

    def loss_of(self, output: Any) -> Tensor:
        """The batch's own loss, a scalar: the mean over its units, or their sum for reduction="sum"."""
        loss = self._loss_of(output)
        if self.watch is not None:
            self.watch(loss)
        return loss

    def _loss_of(self, output: Any) -> Tensor:
        with _noted(self):
            if self.recipe.batch_loss is not None:
                total, count = self.total_and_count()
                return _scalar(total, "batch_loss") / (1.0 if count is None else count)
            criterion, target = self.recipe.criterion, self.target
            assert criterion is not None  # one of the two is there by construction
            criterion.check_shapes(output, target)
            return _scalar(criterion.call(output, target), f"criterion {criterion.name}")

    def total_and_count(self) -> tuple[Any, Any]:
        """What `batch_loss` returns; no count for a bare scalar."""
        assert self.recipe.batch_loss is not None
        result = self.recipe.batch_loss(self.recipe.model, self.given())
        if isinstance(result, tuple) and len(result) != 2:
            raise TypeError(f"batch_loss must return (total, count), got {len(result)} values.")
        total, count = result if isinstance(result, tuple) else (result, None)
        self._counted = 1.0 if count is None else float(count.detach() if isinstance(count, Tensor) else count)
        return total, count

    def count_again(self) -> float:
        """Units found by the evaluation that was just made, where they may depend on the weights."""
        if self.recipe.batch_loss is not None:
            return self.units if self._counted is None else self._counted
        return self.count_units() if self.recipe.forward is not None and self._target is not None else self.units

    def count_units(self) -> float:
        """The batch's units, read from its targets; runs the model only where the targets come out of `forward=` or `batch_loss`."""
        recipe = self.recipe
        if recipe.batch_loss is not None:
            with _noted(self):
                _, count = self.total_and_count()
            return 1.0 if count is None else float(count)
        if recipe.count is not None:
            return float(recipe.count(self.batch))
        if recipe.forward is not None and self._target is None:
            with torch.no_grad():
                self.output()
        assert recipe.criterion is not None
        single = isinstance(self.target, Tensor) and (recipe.criterion.known or self.target.ndim > 0)  # torch's losses count one number as one unit
        if not single and not (hasattr(self.target, "__len__") and not isinstance(self.target, Tensor)):
            if recipe.alone:
                return 1.0
            raise TypeError(f"the targets are {type(self.target).__name__}, whose length is unknown. Pass count=lambda batch: ... with the batch's number of units.")
        return recipe.criterion.units(self.target)


@dataclass(frozen=True)
class Terms:
    """All micro-batches with their weights; iterate inside `objective.applied()`."""

    recipe: Recipe
    batches: Batches
    units: tuple[float, ...]  # per batch, in the order of the first pass
    total: float

    def __iter__(self) -> Iterator[Term]:
        seen = 0.0
        for index, (first, batch) in enumerate(self.batches):
            term = Term(self.recipe, batch, first)
            term.units = self.units[index] if self.batches.repeats else term.count_units()
            seen += term.units
            if term.units != 0:  # else nothing in it counts: its mean would be 0/0
                term.weight = term.units / self.total if self.recipe.weighs else 1.0
                yield term
                _must_be_as_many(term.count_again(), term.units)
        _must_be_as_many(seen, self.total)


def weigh(recipe: Recipe, batches: Batches) -> Terms:
    """Count the units of every batch (inside `applied()`)."""
    units = []
    for first, batch in batches:
        term = Term(recipe, batch, first)
        units.append(term.count_units())
    if not all(unit >= 0 for unit in units):
        raise ValueError(f"count(batch) gave {min(units)}. A batch's number of units cannot be negative.")
    if not sum(units) > 0:
        raise ValueError("the data holds no unit: every target is ignored, or every count is zero.")
    if recipe.batch_loss is not None and len(batches.reading.sizes) > 1 and _returns_bare_scalar(recipe, batches):
        raise ValueError(
            "batch_loss returned a bare scalar, and there are several batches: whether they weigh equally is unknown. Return (total, count):\n"
            "    losses = ...            # the loss of every example\n"
            "    return losses.sum(), len(losses)"
        )
    return Terms(recipe, batches, tuple(units), sum(units))


def _returns_bare_scalar(recipe: Recipe, batches: Batches) -> bool:
    first, batch = next(iter(batches))
    return Term(recipe, batch, first).total_and_count()[1] is None


def writes_inputs(recipe: Recipe, first: int, batch: Batch) -> bool:
    """Whether the model or the loss changes the batch that it is given; tried on a copy."""
    term = Term(recipe, map_tensors(fresh, batch), first)
    term.loss_of(term.output())
    return was_written(term.batch, batch)


def was_written(given: Batch, batch: Batch) -> bool:
    """Whether somebody has written to `given`, which was a `fresh` copy of `batch`."""
    return any(tensor._version for tensor in tensors_in(given)) or bool((hash_examples(given) != hash_examples(batch)).any())


def fresh(tensor: Tensor) -> Tensor:
    """A copy to which nobody has written yet."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _must_be_as_many(found: float, expected: float) -> None:
    if not math.isclose(found, expected, rel_tol=1e-6):
        raise ValueError(
            f"the number of units depends on the weights or changes by itself: {found:g}, where the construction found {expected:g}. A mean over "
            "examples that the model selects (hard examples, confident ones) is not one fixed loss. Divide by a number that only the data decide."
        )


def _pair(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise TypeError(
        f"a batch is a {type(batch).__name__}{size}, not an (inputs, targets) pair. Pass forward=lambda model, batch: (output, target), "
        "such as forward=lambda model, batch: (model(batch['x']), batch['y'])."
    )


def _scalar(loss: Any, source: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{source} returned {type(loss).__name__}, not a tensor.")
    if loss.numel() != 1:
        raise ValueError(f'{source} returned shape {tuple(loss.shape)}, not a scalar. Use reduction="mean" or "sum", or add .mean() to it.')
    return loss.reshape(())


@contextmanager
def _noted(term: Term) -> Iterator[None]:
    """Whatever the user's model or loss raises passes unchanged, with a note on where it happened."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", None):
            error.add_note(f"Orograph was evaluating the model and loss on the batch that starts at example {term.first}.")
        raise
