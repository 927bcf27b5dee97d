"""The data's share of an error: what a number measured on a sample says about the data that the sample was drawn from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from .arguments import AtLeastThree, Seed
from .checks import checked
from .errors import OrographWarning
from .objective import Objective
from .results import Eigenpairs, Estimate

Statistic = Callable[[Objective], Estimate | Eigenpairs | float]


@checked
def data_error(objective: Objective, statistic: Statistic, *, parts: AtLeastThree = 8, seed: Seed = 0) -> Estimate:
    r"""`statistic(objective)` with an error that includes the data: as an estimate for the distribution that the examples come from.

    $\mathrm{sem}^2 = \mathrm{sem}_0^2 + \operatorname{Var}_g(t_g) / G$ over G disjoint random subsets, on each of which the statistic $t_g$
    is taken with the same seed as on the whole (paired: what a random vector does to the value, it does to all of them alike).
    `statistic`: such as `lambda o: trace(hessian(o), seed=0)`, or one that returns Eigenpairs, whose first value counts · `parts`: G.

    Not every statistic means the same on a subset: $\mathbb{E}\,\lambda_{max}(H_{sub}) \ge \lambda_{max}(H)$, since the largest eigenvalue is a
    convex function of the matrix and its eigenvector is fitted to the subset. A mean of the subsets that is off the whole by more than
    its error is an OrographWarning, with the bias that a 1/n law puts on the whole, $(\bar t - t) / (G - 1)$.
    Costs the statistic on the whole and on its parts: twice as much. Raises ValueError where batches must not be cut.
    """
    whole = _number(statistic(objective))
    values = torch.tensor([float(_number(statistic(part)).value) for part in objective.split(parts, seed)], dtype=torch.float64)
    spread = float(values.std()) / math.sqrt(parts)
    own, value = float(whole.sem), float(whole.value)
    lift = float(values.mean()) - value
    if abs(lift) > 3 * max(spread, 1e-9 * abs(value)):
        direction = "larger" if lift > 0 else "smaller"
        warnings.warn(
            f"on subsets {1 / parts:.0%} as large the value is {abs(lift / value) if value else math.inf:.1%} {direction}: it depends on the amount of data "
            f"(lambda_max is biased upward on samples). On this sample it is off by about {lift / (parts - 1):+.3g} in the same direction.",
            OrographWarning,
            stacklevel=3,
        )
    sem = math.hypot(own, spread)
    dof = parts - 1 if own == 0 else min((sem / spread) ** 4 * (parts - 1) if spread else math.inf, 1e9)
    return replace(whole, value=value, sem=sem, dof=dof)


def _number(result: Estimate | Eigenpairs | float) -> Estimate:
    """A statistic's result as one number."""
    if isinstance(result, Eigenpairs):
        return Estimate(value=float(result.values[0]), products=result.products, status=result.status, label=result.label)
    return result if isinstance(result, Estimate) else Estimate(value=float(result))
