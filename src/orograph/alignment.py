"""Bring one network's units into the order of another's, so that a straight line between the two compares like with like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .activation_matching import SAMPLES, Collecting, correlations, match_activations
from .arguments import Seed
from .checks import checked
from .example_groups import double_network
from .nesting import Batch, count_examples, take_rows
from .objective import Objective
from .progress import Progress, progress_bar
from .results import Point
from .symmetries import Symmetry, find_symmetry, prove
from .weight_matching import WeightPairs, match_weights, pair_weights

Method = Literal["weights", "activations"]


@checked
@dataclass(frozen=True)
class Alignment:
    """A network with its units in the order of another one's.

    point: b with its units in a's order, the same function as b.
    permutations: name of units -> order; entry i of the new order was entry order[i].
    verified: b's outputs stay as they are, but for round-off in float64, on examples that had no part in finding what may be
        permuted. False where there are no such examples, so that the check used the same ones.
    similarity: of the weights of units before and after, 1 for equal ones; None where nothing can be permuted.
    left: what stays in place -> why, as "tensor[dimension]".
    """

    point: Point
    permutations: Mapping[str, Tensor]
    verified: bool
    similarity: tuple[float, float] | None
    method: str
    left: Mapping[str, str]


@checked
def align(objective: Objective, a: Any, b: Any, *, method: Method = "weights", seed: Seed = 0, progress: Progress = None) -> Alignment:
    r"""Permute the units of network b so that they match those of network a; b's function stays what it is.

    What may be permuted is read off the model as it runs and proven on other examples (`symmetries`); what stays in place is `left`.
    A model of which nothing can be proven is refused, naming the module.

    method="weights": $\max_P \sum_k \langle W^a_k, P W^b_k P^\top \rangle$ over all tensors, by coordinate descent over assignment
    problems (Ainsworth et al. 2023, arXiv:2209.04836) from several starts; the best is kept.
    method="activations": Pearson correlation of the units' activations on the objective's first batch (Li et al. 2016,
    arXiv:1511.07543; Jordan et al. 2023, arXiv:2211.08403); units that activations do not tell apart are matched by weights.

    Costs forward passes on about 200 examples, fewer for large models, and for activations one of each network on at most 1,024.
    """
    first, second = objective.network(a), objective.network(b)
    there = objective.at(second)
    symmetry = prove(there, find_symmetry(there, seed), seed)
    verified = not symmetry.is_proof_of_watched
    if not symmetry.units:
        return Alignment(second, {}, verified, None, method, symmetry.left())
    pairs = pair_weights(symmetry.axes, symmetry.units, *(_tensors(objective, point) for point in (first, second)))
    with progress_bar(progress, f"aligning by {method}", unit="sweep") as report:
        if method == "weights":
            orders = match_weights(pairs, seed, report)
        else:
            orders = _match_activations(objective, symmetry, pairs, first, second)
    orders = {name: orders[name] for name in symmetry.units}
    point = symmetry.permuted(second, orders, objective)
    scale = pairs.scale()
    similarity = (pairs.score({}) / scale, pairs.score(orders) / scale) if scale else None
    return Alignment(point, orders, verified, similarity, method, symmetry.left())


def _tensors(objective: Objective, point: Point) -> dict[str, Tensor]:
    """Parameters by name, frozen ones too."""
    layout = objective.layout
    return dict(zip(layout.names, layout.split(point.theta), strict=True)) | dict(point.frozen)


def _match_activations(objective: Objective, symmetry: Symmetry, pairs: WeightPairs, first: Point, second: Point) -> dict[str, Tensor]:
    network = double_network(objective)
    batch: Batch = next(iter(objective.terms().batches))[1]
    if objective.divisible:
        batch = take_rows(batch, torch.arange(min(SAMPLES, count_examples(batch)), device="cpu"))
    here, there = (Collecting(network.at(point), symmetry.axes, symmetry.units) for point in (first, second))
    return match_activations(correlations(here, there, batch), pairs)
