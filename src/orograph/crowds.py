"""Losses of many networks in one reading of the data: every batch goes to all of them before the next one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .evaluation import PerExample, examples_of, gathered, has_examples, no_gradient
from .objective import Objective
from .results import Point


def losses_of(objective: Objective, points: Sequence[Point], report: Callable[[float], None] = lambda share: None) -> list[tuple[float, PerExample | None]]:
    """The loss of each network, and that of its single examples where the criterion tells them. `report`: share of the work done.

    Up to rounding what `objective.at(point).value()` gives, to the bit whoever is in the crowd.
    """
    networks, terms = [objective.at(point) for point in points], objective.terms()
    single = has_examples(objective.recipe)
    parts: list[list[dict[str, PerExample]]] = [[] for _ in points]
    sums, done = [0.0 for _ in points], 0.0
    with objective.applied():
        for term in terms:
            for i, network in enumerate(networks):
                with network.applied(), no_gradient(objective.recipe):
                    if single:
                        parts[i].append(examples_of(term, errors=False))
                    else:
                        sums[i] += float(term.loss_of(term.output()).detach()) * term.weight
            done += term.examples
            report(done / max(objective.examples, 1))
    found = [gathered(objective.recipe, part)["loss"] if single else None for part in parts]
    return [(value if examples is None else examples.mean, examples) for value, examples in zip(sums, found, strict=True)]
