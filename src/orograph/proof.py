"""Two proofs at construction: the model stands still, and the batches add up to the loss of the whole set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotDeterministic
from .evaluation import no_gradient
from .nesting import as_double, map_tensors, take_rows, tensors_in
from .terms import Recipe, Term, Terms

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}  # relative, on sums that differ only in the order of additions
PADDING = {torch.float64: 1e-9, torch.float32: 5e-6}  # relative, on losses that differ only in padding and the order of examples
LOW_PRECISION = 5e-2
Sum = tuple[float, float, torch.dtype, float]  # units, loss, its precision, and by how much rounding alone may move it


def prove_still(term: Term, buffers: Mapping[str, Tensor]) -> list[str]:
    """The same batch twice gives the same loss, or NotDeterministic names what moves.

    `buffers`: those put into the model. Returns the names of those that the forward writes to without an effect on the loss.
    """
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    with no_gradient(term.recipe):
        first, second = (float(term.loss_of(term.output()).detach()) for _ in range(2))
    moved = [name for name, tensor in buffers.items() if not torch.equal(tensor, before[name])]
    if not math.isfinite(first):
        raise ValueError(f"the loss is {first} at these weights, so nothing can be proven about it. Start from weights where it is finite.")
    if abs(first - second) <= 1e-7 * abs(first):
        return moved
    if moved:
        raise NotDeterministic(
            f"the loss changes from one evaluation to the next ({first:.7g}, then {second:.7g}): the forward pass writes to the buffer {moved[0]!r}. "
            "Make it depend on self.training, so that evaluation leaves it alone."
        )
    name = _random_module(term)
    where = f"module {name!r} draws random numbers or keeps a state" if name else "the forward pass or the loss draws random numbers or keeps a state"
    raise NotDeterministic(
        f"the loss changes from one evaluation to the next ({first:.7g}, then {second:.7g}) although dropout is off: {where}. "
        "Functional dropout needs training=self.training; other noise needs a fixed generator, or has to go."
    )


def prove_passes_agree(terms: Terms) -> None:
    """Examples whose bytes differ between passes may differ in their padding only; then the loss does not."""
    sums = []
    allowed = 0.0
    with no_gradient(terms.recipe):
        for batches in terms.batches.twice():
            total = 0.0
            for term in (Term(terms.recipe, batch, start) for start, batch in batches):
                units, loss, dtype, rounding = _evaluate(term)
                total += units * loss
                allowed += units * (PADDING.get(dtype, LOW_PRECISION) * abs(loss) + rounding) / 2
            sums.append(total)
    first, second = (total / terms.total for total in sums)
    if abs(sums[0] - sums[1]) > allowed:
        raise NotDeterministic(
            f"data changes between passes: the loss is {first:.7g} over the first and {second:.7g} over the second. Random augmentation or "
            "masking is at work (in the Dataset or in collate_fn). Turn it off, or pass a list of already augmented batches."
        )


def prove_weighting(terms: Terms, *, couples: bool) -> None:
    """Count * loss adds up over parts of batches, so that L is what the criterion would return for the whole set at once.

    torch's own losses: one batch is cut in two unequal parts that go through the model on their own. Any other callable: every
    batch's output is cut, and joined with its neighbour's. `couples`: the model itself couples the examples of a batch
    (mode="batch"), so only outputs are cut.
    """
    recipe = terms.recipe
    if recipe.batch_loss is not None or len(terms.batches.reading.sizes) == 1:
        return  # the user weighs; or there is nothing to weigh: one batch is the whole set
    assert recipe.criterion is not None
    previous: tuple[Any, Any, float] | None = None
    proven = False
    with torch.no_grad():
        for term in terms:
            if recipe.criterion.known and recipe.count is None:
                proven = proven or (not couples and _cut_batch(term))
                if proven or couples:
                    return
                continue
            if not couples and not proven:
                proven = _cut_batch(term)
            previous = _check_outputs(term, previous)


def _cut_batch(term: Term) -> bool:
    """Send two unequal parts of a batch through the model; False if it is too small to be cut."""
    count = term.examples
    if count < 2:
        return False
    first = torch.arange(max(1, count // 3))
    rest = torch.arange(len(first), count)
    whole = _evaluate(term)
    parts = [_evaluate(Term(term.recipe, take_rows(term.batch, rows), term.first)) for rows in (first, rest)]
    _must_add_up(term.recipe, whole, parts, "a batch and its two parts")
    return True


def _evaluate(term: Term) -> Sum:
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


def _check_outputs(term: Term, previous: tuple[Any, Any, float] | None) -> tuple[Any, Any, float]:
    """Cut this batch's output and targets in two, and join them with the previous batch's: count * loss must add up."""
    output = term.output()
    target, units = term.target, term.count_units()
    here = (output, target, units)
    rows = len(tensors_in(target)[0]) if tensors_in(target) else term.examples
    if term.recipe.count is None and rows >= 2:
        cut = max(1, rows // 3)
        parts = [(take_rows(output, index), take_rows(target, index), float(len(index))) for index in (torch.arange(cut), torch.arange(cut, rows))]
        _must_add_up(term.recipe, _loss(term.recipe, *here), [_loss(term.recipe, *part) for part in parts], "a batch's output and its two parts")
    if previous is not None:
        joined = _join(previous, here)
        if joined is not None:
            _must_add_up(term.recipe, _loss(term.recipe, *joined), [_loss(term.recipe, *previous), _loss(term.recipe, *here)], "two batches and both in one")
        elif term.recipe.count is None:
            raise ValueError(
                f"criterion {term.recipe.criterion.name if term.recipe.criterion else ''} is not one of torch's own losses, and the batches have outputs of different "
                "shapes, so whether it counts examples or positions cannot be proven. Pass count=lambda batch: ... with the batch's number of units."
            )
    return here


def _loss(recipe: Recipe, output: Any, target: Any, units: float) -> Sum:
    assert recipe.criterion is not None
    try:
        loss = recipe.criterion.call(as_double(output), as_double(target))
    except RuntimeError:  # the criterion holds tensors in another precision
        loss = recipe.criterion.call(output, target)
    return units, float(loss), loss.dtype, 0.0


def _join(a: tuple[Any, Any, float], b: tuple[Any, Any, float]) -> tuple[Any, Any, float] | None:
    """Two batches' outputs and targets in one, or None where their shapes do not fit."""
    joined = []
    for left, right in zip(a[:2], b[:2], strict=True):
        ours, theirs = tensors_in(left), tensors_in(right)
        if len(ours) != len(theirs) or any(x.ndim == 0 or x.shape[1:] != y.shape[1:] for x, y in zip(ours, theirs, strict=True)):
            return None
        queue = [torch.cat([x, y]) for x, y in zip(ours, theirs, strict=True)]
        joined.append(map_tensors(lambda _, queue=queue: queue.pop(0), left))  # type: ignore[misc]
    return joined[0], joined[1], a[2] + b[2]


def _must_add_up(recipe: Recipe, whole: Sum, parts: list[Sum], what: str) -> None:
    """Sum of units * loss over the parts = units * loss of the whole (for a sum: of the losses themselves)."""
    assert recipe.criterion is not None
    units, loss, dtype, rounding = whole
    tolerance = TOLERANCE.get(dtype, LOW_PRECISION)
    averaged, summed = sum(u * value for u, value, *_ in parts), sum(value for _, value, *_ in parts)
    mean = abs(averaged - units * loss) <= tolerance * sum(abs(u * value) for u, value, *_ in parts) + units * rounding
    counts = abs(sum(u for u, *_ in parts) - units) <= 1e-9 * abs(units)
    added = abs(summed - loss) <= tolerance * sum(abs(value) for _, value, *_ in parts) + rounding
    if recipe.criterion.reduction == "sum":
        if added:
            return
        raise ValueError(f'criterion {recipe.criterion.name} says reduction="sum", but its value on {what} does not add up{_coupling_hint}')
    if mean and counts:
        return
    if added and recipe.count is None:
        raise ValueError(
            f"criterion {recipe.criterion.name} adds up like a sum over examples, not a mean. Say so: functools.partial(F.some_loss, reduction='sum'), "
            f"or set criterion.reduction = 'sum' on your function; or pass count= for a mean over other units."
        )
    given = "count(batch)" if recipe.count is not None else "len(target)"
    raise ValueError(
        f"the weighting of batches is wrong: {given} * loss of {what} does not add up "
        f"({averaged:.9g} for {units * loss:.9g}). Pass count=lambda batch: ... with the number of units that the "
        f"loss takes its mean over (valid tokens, the sum of class weights){_coupling_hint}"
    )


_coupling_hint = (
    ". If the loss or the model couples the examples of a batch (contrastive losses, batch statistics), no weighting is right: "
    "give the whole set as one batch (data=[(inputs, targets)] or batch_size=len(inputs)), or use Objective.from_batch_loss."
)


def _random_module(term: Term) -> str | None:
    """Name of the first innermost module whose output differs between two runs although its inputs are the same."""
    names = {module: name or type(module).__name__ for name, module in term.recipe.model.named_modules()}
    runs: list[list[tuple[nn.Module, list[Tensor], list[Tensor]]]] = []
    for _ in range(2):
        calls: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []
        note = lambda module, args, output, calls=calls: calls.append(  # noqa: E731
            (module, [t.detach().clone() for t in tensors_in(args)], [t.detach().clone() for t in tensors_in(output)])
        )
        hooks = [module.register_forward_hook(note) for module in names]
        try:
            term.loss_of(term.output())
        finally:
            for hook in hooks:
                hook.remove()
        runs.append(calls)
    for (module, ins, outs), (_, ins2, outs2) in zip(*runs, strict=False):
        if _same(ins, ins2) and not _same(outs, outs2):
            return names[module]
    return None


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
