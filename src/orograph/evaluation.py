"""Numbers of one pass over the terms of a loss: value, gradient, metrics, losses of single examples. All inside `applied()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .criteria import Criterion, correct_predictions, knows_accuracy
from .errors import NotDifferentiable
from .layout import Layout
from .terms import Recipe, Term, Terms

Metric = Callable[[Any, Any], Any]  # (output, target) -> mean over the batch, or (total, count)
TAKEN = ("loss", "error", "norm", "layers")  # names of quantities that stand beside metrics


def no_gradient(recipe: Recipe) -> AbstractContextManager[Any]:
    """No autograd graph, except for losses that differentiate inside themselves (physics-informed ones)."""
    return torch.no_grad() if recipe.batch_loss is None else torch.enable_grad()


def total_loss(terms: Terms) -> float:
    """L, summed in float64."""
    with no_gradient(terms.recipe):
        return sum(float(term.loss_of(term.output()).detach()) * term.weight for term in terms)


def value_and_gradient(terms: Terms, leaves: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> tuple[float, Tensor]:
    """L and dL/dtheta (n,), both accumulated in float64; the gradient is then of `dtype`."""
    value = 0.0
    total = torch.zeros(layout.size, dtype=torch.float64, device=leaves[0].device)
    reached = False
    for term in terms:
        loss = term.loss_of(term.output())
        value += float(loss.detach()) * term.weight
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, leaves, allow_unused=True)
            reached = reached or any(part is not None for part in parts)
            total.add_(layout.flatten(parts, total), alpha=term.weight)
    if not reached:
        raise NotDifferentiable(no_dependence(layout.names))
    return value, total.to(dtype)


def no_dependence(names: Sequence[str]) -> str:
    """Message for a loss that does not depend on the parameters."""
    return (
        f"the loss does not depend on any of the {len(names)} selected parameters ({', '.join(names[:3])} ...). Is there a .detach(), a torch.no_grad() "
        "or an argmax in the forward pass, or does params= name the wrong ones?"
    )


def check_metrics(metrics: Mapping[str, Metric], criterion: Criterion | None) -> None:
    """ValueError for a metric with the name of a quantity that is measured anyway."""
    taken = (*TAKEN, "accuracy") if criterion is not None and knows_accuracy(criterion) else TAKEN
    colliding = [name for name in metrics if name in taken]
    if colliding:
        raise ValueError(
            f"metrics={{{colliding[0]!r}: ...}} would replace a quantity of that name which is measured "
            f"anyway. Call it otherwise, such as 'my {colliding[0]}'; taken are {', '.join(taken)}."
        )


def all_metrics(terms: Terms, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The loss, the accuracy of a classifier, and the user's metrics over the whole data set."""
    recipe, value = terms.recipe, 0.0
    sums: dict[str, tuple[float, float]] = {}
    with no_gradient(recipe):
        for term in terms:
            output = term.output()
            value += float(term.loss_of(output).detach()) * term.weight
            found: dict[str, Any] = {}
            if recipe.criterion is not None and (right := correct_predictions(recipe.criterion, output, term.target)) is not None:
                found = {"accuracy": (float(right[0].sum()), float(right[1].sum()))}
            for name, metric in metrics.items():
                result = metric(output, term.target) if recipe.batch_loss is None else metric(recipe.model, term.given())
                found[name] = result if isinstance(result, tuple) else (float(result) * term.examples, term.examples)
            for name, pair in found.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + float(pair[0]), count + float(pair[1]))
    return {"loss": value} | {name: total / count for name, (total, count) in sums.items() if count}


@dataclass(frozen=True)
class PerExample:
    """A quantity of every example: its mean over the data is sum(total) / sum(count). An example is one row of the output."""

    total: Tensor  # (N,)
    count: Tensor  # (N,)

    @property
    def mean(self) -> float:
        return float(self.total.sum() / self.count.sum())


def per_example(terms: Terms) -> dict[str, PerExample]:
    """The "loss" of every example, where the loss is one of torch's own, and the "error" (0 or 1), where it is a classification."""
    if not has_examples(terms.recipe):
        return {}
    with torch.no_grad():
        return gathered(terms.recipe, [examples_of(term) for term in terms])


def has_examples(recipe: Recipe) -> bool:
    """Whether the criterion tells the losses of single examples."""
    return recipe.criterion is not None and recipe.criterion.function is not None and recipe.count is None


def examples_of(term: Term, *, errors: bool = True) -> dict[str, PerExample]:
    """`per_example` of one micro-batch; without `errors` the loss alone."""
    criterion = term.recipe.criterion
    assert criterion is not None  # `has_examples`
    output = term.output()
    loss = _rows(criterion.each(output, term.target))
    found = {"loss": PerExample(loss, _rows(criterion.unit_weights(term.target)) if criterion.weighs_positions(term.target) else torch.full_like(loss, term.units / len(loss)))}
    if errors and (right := correct_predictions(criterion, output, term.target)) is not None:
        found["error"] = PerExample(_rows(right[1] - right[0]), _rows(right[1]))
    return found


def gathered(recipe: Recipe, parts: Sequence[Mapping[str, PerExample]]) -> dict[str, PerExample]:
    """What all micro-batches tell."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: PerExample(*(torch.cat([getattr(part[name], column) for part in parts if name in part]) for column in ("total", "count"))) for name in names}
    if not recipe.weighs:
        found["loss"] = PerExample(found["loss"].total, torch.full_like(found["loss"].total, 1 / len(found["loss"].total)))
    return found


def _rows(tensor: Tensor) -> Tensor:
    """Sum over all but the first axis, in float64; a number is one row."""
    return tensor.reshape(len(tensor) if tensor.ndim else 1, -1).double().sum(dim=1)
