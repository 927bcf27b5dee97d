"""Whether units * loss adds up, so that L is what the criterion would return for the whole set at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .nesting import as_double, join_batches, map_tensors, take_rows, tensors_in
from .terms import Recipe, Term

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}  # relative, on sums that differ only in the order of additions
LOW_PRECISION = 5e-2
Sum = tuple[float, float, torch.dtype, float]  # units, loss, its precision, and by how much rounding alone may move it
Seen = tuple[Any, Any, float]  # output, target, units
HINT = (
    ". If the loss or the model couples the examples of a batch (contrastive losses, batch statistics), no weighting is right: "
    "give the whole set as one batch (data=[(inputs, targets)] or batch_size=len(inputs)), or use Objective.from_batch_loss."
)


def evaluate(term: Term) -> Sum:
    """(units, loss, precision, rounding) of a batch; an empty one counts for nothing."""
    output = term.output()
    units = term.count_units()
    if not units:
        return 0.0, 0.0, torch.float64, 0.0
    loss = term.loss_of(output).detach()
    if output is None:  # a batch_loss shows no output
        return units, float(loss), loss.dtype, 0.0
    away = map_tensors(lambda t: t.detach() / 2 if t.is_floating_point() else t, output)
    rounding = 4 * torch.finfo(loss.dtype).eps * abs(float(term.loss_of(away)))  # outputs are right up to their last digits: so is a perfect fit
    return units, float(loss), loss.dtype, rounding if math.isfinite(rounding) else 0.0


def mismatch(recipe: Recipe, whole: Sum, parts: list[Sum], what: str, tolerance: float | None = None) -> str | None:
    """Why the sum of units * loss over `parts` is not units * loss of the whole (for a sum: of the losses themselves), or None."""
    assert recipe.criterion is not None
    units, loss, dtype, rounding = whole
    tolerance = TOLERANCE.get(dtype, LOW_PRECISION) if tolerance is None else tolerance
    averaged, summed = sum(u * value for u, value, *_ in parts), sum(value for _, value, *_ in parts)
    mean = abs(averaged - units * loss) <= tolerance * sum(abs(u * value) for u, value, *_ in parts) + units * rounding
    counts = abs(sum(u for u, *_ in parts) - units) <= 1e-9 * abs(units)
    added = abs(summed - loss) <= tolerance * sum(abs(value) for _, value, *_ in parts) + rounding
    if recipe.criterion.reduction == "sum":
        return None if added else f'criterion {recipe.criterion.name} says reduction="sum", but its value on {what} does not add up'
    if mean and counts:
        return None
    if added and recipe.count is None:
        return (
            f"criterion {recipe.criterion.name} adds up like a sum over examples, not a mean. Say so: functools.partial(F.some_loss, reduction='sum'), "
            f"or set criterion.reduction = 'sum' on your function; or pass count= for a mean over other units."
        )
    given = "count(batch)" if recipe.count is not None else "len(target)"
    return (
        f"the weighting of batches is wrong: {given} * loss of {what} does not add up "
        f"({averaged:.9g} for {units * loss:.9g}). Pass count=lambda batch: ... with the number of units that the "
        f"loss takes its mean over (valid tokens, the sum of class weights)"
    )


def check_outputs(term: Term, previous: Seen | None) -> Seen:
    """Cut this batch's output and targets in two, and join them with the previous batch's: count * loss must add up."""
    output = term.output()
    target, units = term.target, term.count_units()
    here = (output, target, units)
    rows = tensors_in(target)[0].size(0) if tensors_in(target) else term.examples
    if term.recipe.count is None and rows >= 2:
        cut = max(1, rows // 3)
        parts = lambda: [(take_rows(output, index), take_rows(target, index), float(len(index))) for index in (torch.arange(cut, device="cpu"), torch.arange(cut, rows, device="cpu"))]  # noqa: E731
        _must_add_up(term.recipe, here, parts, "a batch's output and its two parts")
    if previous is not None:
        outputs, targets = join_batches(previous[0], output), join_batches(previous[1], target)
        if outputs is not None and targets is not None:
            _must_add_up(term.recipe, (outputs, targets, previous[2] + units), lambda: [previous, here], "two batches and both in one")
        elif term.recipe.count is None:
            raise ValueError(
                f"criterion {term.recipe.criterion.name if term.recipe.criterion else ''} is not one of torch's own losses, and the batches have outputs of different "
                "shapes, so whether it counts examples or positions cannot be proven. Pass count=lambda batch: ... with the batch's number of units."
            )
    return here


def _must_add_up(recipe: Recipe, whole: Seen, parts: Callable[[], list[Seen]], what: str) -> None:
    try:
        problem = mismatch(recipe, _loss(recipe, *whole), [_loss(recipe, *part) for part in parts()], what)
    except Exception as error:  # the criterion is the user's: whatever it raises on a part says that it takes batches whole
        raise ValueError(
            f"criterion {recipe.criterion.name if recipe.criterion else ''} raises {type(error).__name__} on a part of a batch ({first_line(error)}), so that whether batches "
            f"add up cannot be proven{HINT}"
        ) from error
    if problem is not None:
        raise ValueError(problem + HINT)


def _loss(recipe: Recipe, output: Any, target: Any, units: float) -> Sum:
    assert recipe.criterion is not None
    try:
        loss = recipe.criterion.call(as_double(output), as_double(target))
    except RuntimeError:  # the criterion holds tensors in another precision
        loss = recipe.criterion.call(output, target)
    return units, float(loss), loss.dtype, 0.0


def first_line(error: Exception) -> str:
    """What an exception says, in short."""
    return (str(error).splitlines() or ["no message"])[0][:150]
