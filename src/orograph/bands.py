"""The nudged elastic band: a chain between two networks that settles in the valley, over the lowest pass that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .arguments import AtLeastOne, File, NotNegative, Positive, Seed, ShareOrZero
from .checks import checked
from .curves import curve_job, micro_batches
from .linalg.checkpoints import checkpointing
from .objective import Objective
from .paths import Line, PolyChain, between, theta_of
from .progress import Progress, progress_bar
from .renormalise import renormalised
from .results import Point

PIVOTS = 3  # of the first cycle
MOST_NEW = 2  # pivots that a cycle inserts
EXCESS = 0.1  # of the chain's range of losses, above its pieces' chords, that calls for a new pivot
BETWEEN = 4  # losses looked at on each piece


@checked
def elastic_band(
    objective: Objective, a: Any, b: Any, *, cycles: Sequence[tuple[AtLeastOne, Positive]] = ((20, 0.1), (20, 0.1), (20, 0.03), (20, 0.01)), batch_size: AtLeastOne = 128, momentum: ShareOrZero = 0.9,
    weight_decay: NotNegative = 1e-4, seed: Seed = 0, checkpoint: File | None = None, progress: Progress = None,
) -> PolyChain:  # fmt: skip
    r"""A chain of straight pieces along a low way from a to b, by the nudged elastic band with inserted pivots (AutoNEB). Draxler et al. 2018, arXiv:1803.00885.

    Every pivot follows its gradient orthogonal to the chain (improved tangent: Henkelman and Jonsson 2000, doi:10.1063/1.1323224), and after each step the pivots are spread
    evenly over it, which is a spring without limit. `cycles`: (epochs, learning rate) each; before every cycle but the first up to two pivots are inserted where
    the loss rises most above the chords of the pieces, by more than a tenth of its range. The highest loss on the chain bounds the saddle between the two networks from
    above. Costs epochs times pivots gradients. `checkpoint`: a file from which a killed run goes on, bit for bit.
    """
    first, last = objective.network(a), objective.network(b)
    parts = micro_batches(objective, batch_size, seed)
    job = curve_job(objective, first, last, checkpoint, what="band", cycles=[list(cycle) for cycle in cycles], batch_size=batch_size, momentum=momentum, weight_decay=weight_decay, seed=seed)
    plan = [(cycle, epoch, rate) for cycle, (epochs, rate) in enumerate(cycles) for epoch in range(epochs)]
    with progress_bar(progress, "elastic band", unit="epoch") as report, checkpointing(checkpoint, job) as (found, keep):
        line = Line(first.theta, last.theta)
        start = torch.stack([theta_of(line((j + 1) / (PIVOTS + 1))) for j in range(PIVOTS)])
        state = {"inner": start, "velocity": torch.zeros_like(start), "done": torch.tensor(0)} if found is None else {k: v.to(start.device) if v.ndim else v for k, v in found.items()}
        for done in range(int(state["done"]), len(plan)):
            cycle, epoch, rate = plan[done]
            inner, velocity = state["inner"].clone(), state["velocity"].clone()
            if epoch == 0 and cycle > 0:
                inner = _with_new_pivots(objective, first, inner, last)
                velocity = torch.zeros_like(inner)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
            loss = 0.0
            for index in torch.randperm(len(parts), generator=generator).tolist():
                inner, velocity, loss = _step(parts[index][1], first, inner, last, velocity, rate, momentum, weight_decay)
            state = {"inner": inner, "velocity": velocity, "done": torch.tensor(done + 1)}
            keep(state)
            report(done + 1, len(plan), f"{len(inner)} pivots, highest loss {loss:.4g}")
    return PolyChain([first, *between(first, state["inner"], last, "pivot"), last])


def _step(part: Objective, first: Point, inner: Tensor, last: Point, velocity: Tensor, rate: float, momentum: float, decay: float) -> tuple[Tensor, Tensor, float]:
    """One step of all pivots on one micro-batch: (pivots, velocity, highest loss)."""
    found = [part.at(point).value_and_gradient() for point in between(first, inner, last, "pivot")]
    losses = [part.at(first).value(), *(value for value, _ in found), part.at(last).value()]
    chain = torch.cat([first.theta[None], inner, last.theta[None]])
    slopes = torch.stack([slope for _, slope in found]) + decay * inner
    for j in range(len(inner)):
        tangent = _tangent(chain, losses, j + 1)
        slopes[j] -= (slopes[j] @ tangent) * tangent
    velocity = momentum * velocity + slopes
    chain[1:-1] = inner - rate * velocity
    return _spread(chain), velocity, max(losses)


def _tangent(chain: Tensor, losses: list[float], j: int) -> Tensor:
    """Unit tangent at pivot j: towards the higher neighbour, a mixture at a maximum or minimum."""
    ahead, behind = chain[j + 1] - chain[j], chain[j] - chain[j - 1]
    rise, fall = losses[j + 1] - losses[j], losses[j - 1] - losses[j]
    if rise > 0 > fall:
        tangent = ahead
    elif fall > 0 > rise:
        tangent = behind
    else:
        large, small = max(abs(rise), abs(fall)), min(abs(rise), abs(fall))
        tangent = ahead * large + behind * small if losses[j + 1] > losses[j - 1] else ahead * small + behind * large
    length = float(tangent.norm())
    return tangent / length if length > 0 else (chain[j + 1] - chain[j - 1]) / max(float((chain[j + 1] - chain[j - 1]).norm()), 1e-300)


def _spread(chain: Tensor) -> Tensor:
    """Inner pivots at equal distances along the chain."""
    pieces = (chain[1:] - chain[:-1]).double().norm(dim=1)
    places = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    found = []
    for j in range(1, len(chain) - 1):
        at = places[-1] * j / (len(chain) - 1)
        piece = min(int((places[1:] < at).sum()), len(pieces) - 1)
        share = float((at - places[piece]) / pieces[piece]) if float(pieces[piece]) > 0 else 0.0
        found.append(chain[piece].lerp(chain[piece + 1], share))
    return torch.stack(found)


def _with_new_pivots(objective: Objective, first: Point, inner: Tensor, last: Point) -> Tensor:
    """The chain with up to two more pivots, where the loss is highest above the chord of its piece."""
    nets = [first, *between(first, inner, last, "pivot"), last]
    ends = [objective.at(renormalised(objective, net)).value() for net in nets]
    highest: list[tuple[float, int, float]] = []
    seen = list(ends)
    for piece, (a, b) in enumerate(pairwise(nets)):
        line = Line(a, b)
        shares = [(k + 1) / (BETWEEN + 1) for k in range(BETWEEN)]
        losses = [objective.at(renormalised(objective, line(s))).value() for s in shares]
        seen += losses
        excess, share = max((loss - (1 - s) * ends[piece] - s * ends[piece + 1], s) for loss, s in zip(losses, shares, strict=True))
        highest.append((excess, piece, share))
    span = max(seen) - min(seen)
    chosen = sorted((piece, share) for excess, piece, share in sorted(highest, reverse=True)[:MOST_NEW] if excess > EXCESS * span)
    thetas = [net.theta for net in nets]
    for piece, share in reversed(chosen):
        thetas.insert(piece + 1, thetas[piece].lerp(thetas[piece + 1], share))
    return torch.stack(thetas[1:-1])
