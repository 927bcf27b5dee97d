"""Numbers of one pass over the terms of a loss: value, gradient, metrics, losses of single examples. All inside `applied()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .criteria import accuracy_count
from .errors import NotDifferentiable
from .layout import Layout
from .terms import Recipe, Terms

Metric = Callable[[Any, Any], Any]  # (output, target) -> mean over the batch, or (total, count)


def no_gradient(recipe: Recipe) -> AbstractContextManager[Any]:
    """No autograd graph, except for losses that differentiate inside themselves (physics-informed ones)."""
    return torch.no_grad() if recipe.batch_loss is None else torch.enable_grad()


def total_loss(terms: Terms) -> float:
    """L, summed in float64."""
    with no_gradient(terms.recipe):
        return sum(float(term.loss_of(term.output()).detach()) * term.weight for term in terms)


def total_gradient(terms: Terms, leaves: Sequence[Tensor], layout: Layout) -> Tensor:
    """dL/dtheta (n,), accumulated in float64."""
    total = torch.zeros(layout.size, dtype=torch.float64, device=leaves[0].device)
    reached = False
    for term in terms:
        loss = term.loss_of(term.output())
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, leaves, allow_unused=True)
            reached = reached or any(part is not None for part in parts)
            total.add_(layout.flatten(parts, total), alpha=term.weight)
    if not reached:
        raise NotDifferentiable(no_dependence(layout.names))
    return total


def no_dependence(names: Sequence[str]) -> str:
    """Message for a loss that does not depend on the parameters."""
    return (
        f"the loss does not depend on any of the {len(names)} selected parameters ({', '.join(names[:3])} ...). Is there a .detach(), a torch.no_grad() "
        "or an argmax in the forward pass, or does params= name the wrong ones?"
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
            if recipe.criterion is not None:
                found = {"accuracy": accuracy_count(recipe.criterion, output, term.target)}
            for name, metric in metrics.items():
                result = metric(output, term.target) if recipe.batch_loss is None else metric(recipe.model, term.batch)
                found[name] = result if isinstance(result, tuple) else (float(result) * term.examples, term.examples)
            for name, pair in found.items():
                if pair is not None:
                    total, count = sums.get(name, (0.0, 0.0))
                    sums[name] = (total + float(pair[0]), count + float(pair[1]))
    return {"loss": value} | {name: total / count for name, (total, count) in sums.items() if count}


def example_losses(terms: Terms) -> tuple[Tensor, Tensor] | None:
    """(total, count) of the loss of every example (N,), so that L = sum(total) / sum(count); None where the loss is not torch's own.

    An example is one row of the output. For reduction="sum" every count is 1/N.
    """
    recipe = terms.recipe
    if recipe.criterion is None or recipe.criterion.function is None or recipe.count is not None:
        return None
    totals, counts = [], []
    with torch.no_grad():
        for term in terms:
            each = recipe.criterion.each(term.output(), term.target)
            rows = each.reshape(len(each), -1).double()
            totals.append(rows.sum(dim=1))
            if recipe.criterion.weighs_positions(term.target):
                counts.append(recipe.criterion.unit_weights(term.target).reshape(len(each), -1).sum(dim=1))
            else:
                counts.append(torch.full_like(totals[-1], term.units / len(each)))
    total, count = torch.cat(totals), torch.cat(counts)
    return total, count if recipe.weighs else torch.full_like(total, 1 / len(total))
