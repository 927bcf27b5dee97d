"""Train a curve of low loss between two networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .arguments import AtLeastOne, File, NotNegative, Positive, Seed, ShareOrZero
from .checks import checked
from .identity import identity_of, measured_losses, point_identity
from .linalg.checkpoints import checkpointing
from .objective import Objective
from .paths import Bezier, Line, PathKind, PolyChain, between, theta_of
from .progress import Progress, progress_bar
from .renormalise import running_norms
from .results import Point
from .variants import pieces, with_batch_statistics

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the loss tells a user's own functions apart
CURVES: dict[PathKind, type[Bezier] | type[PolyChain]] = {"bezier": Bezier, "polychain": PolyChain}


@checked
def fit_path(
    objective: Objective,
    a: Any,
    b: Any,
    *,
    kind: PathKind = "bezier",
    bends: AtLeastOne = 1,
    epochs: AtLeastOne = 100,
    batch_size: AtLeastOne = 64,
    learning_rate: Positive = 0.2,
    momentum: ShareOrZero = 0.9,
    weight_decay: NotNegative = 5e-4,
    seed: Seed = 0,
    checkpoint: File | None = None,
    progress: Progress = None,
) -> Bezier | PolyChain:
    r"""A curve from a to b along which the loss is low: its `bends` inner control points are trained, the ends stay.

    Minimises $\mathbb{E}_{t \sim U[0,1]} [L(\phi(t)) + \tfrac\lambda2 \|\phi(t)\|^2]$ (Garipov et al. 2018, arXiv:1802.10026), by SGD with momentum; weight decay
    acts on the point of the curve, not on the control points. The inner points start on the straight line. Every micro-batch of an epoch has a t of its own, one from
    each of as many equal parts of [0, 1] (stratified). Learning rate: constant for half of the epochs, then linearly down to a hundredth at nine tenths, then
    constant. BatchNorm normalises with the batch while the curve is trained; evaluate with running statistics re-estimated at each t. Any module: a gradient at
    $\phi(t)$, times what a control point contributes there, is that point's gradient. Costs `epochs` gradients. `checkpoint`: a file from which a killed
    training goes on to the same curve, bit for bit.
    """
    first, last = objective.network(a), objective.network(b)
    line = Line(first, last)
    start = torch.stack([theta_of(line(j / (bends + 1))) for j in range(1, bends + 1)])
    settings = {"kind": kind, "bends": bends, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay, "seed": seed}
    job = curve_job(objective, first, last, checkpoint, what="curve", **settings)
    parts = micro_batches(objective, batch_size, seed)
    with progress_bar(progress, f"curve with {bends} bend{'s' if bends > 1 else ''}", unit="epoch") as report, checkpointing(checkpoint, job) as (found, keep):
        state = {"inner": start, "velocity": torch.zeros_like(start), "epoch": torch.tensor(0)} if found is None else {k: v.to(start.device) if v.ndim else v for k, v in found.items()}
        for epoch in range(int(state["epoch"]), epochs):
            rate = learning_rate * _factor(epoch / epochs)
            inner, velocity = state["inner"].clone(), state["velocity"].clone()
            mean = 0.0
            for weight, t, part in _epoch(parts, seed, epoch):
                path = _curve(kind, first, inner, last)
                point = path(t)
                loss, slope = part.at(point).value_and_gradient()
                pull = slope + weight_decay * theta_of(point)
                for j, share in enumerate(path.weights(t)[1:-1].tolist()):
                    velocity[j] = momentum * velocity[j] + share * pull
                inner = inner - rate * velocity
                mean += weight * loss
            state = {"inner": inner, "velocity": velocity, "epoch": torch.tensor(epoch + 1)}
            keep(state)
            report(epoch + 1, epochs, f"loss {mean:.4g}")
    return _curve(kind, first, state["inner"], last)


def curve_job(objective: Objective, first: Point, last: Point, path: File | None, **settings: Any) -> dict[str, Any]:
    """What must agree for a training between two networks to be continued: objective, ends, settings, and the loss at a few places between the ends. Without a path there is no job."""
    if path is None:
        return {}
    line = Line(first, last)
    losses = measured_losses(objective, [objective.at(line(t)).value() for t in PLACES])
    own = {name: value for name, value in identity_of(objective, ordered=True).items() if name != "weights"}  # those of the ends count
    return {**settings, **own, "ends": [point_identity(point) for point in (first, last)], "loss on the line": losses}


def _curve(kind: PathKind, first: Point, inner: Tensor, last: Point) -> Bezier | PolyChain:
    return CURVES[kind]([first, *between(first, inner, last, "control point"), last])


def micro_batches(objective: Objective, batch_size: int, seed: int) -> list[tuple[float, Objective]]:
    """Random micro-batches, the same for the same seed; with batch statistics where the network has running ones."""
    if running_norms(objective.snapshot.model) and objective.mode == "eval":
        mixed = _shuffled(objective, seed)
        found = [(weight, with_batch_statistics(part)) for weight, part in pieces(mixed, batch_size) if part.examples > 1]
        if not found:
            raise ValueError(f"batch_size={batch_size} leaves BatchNorm one example at a time, which has no variance. Use larger batches.")
        return found
    return list(pieces(_shuffled(objective, seed), batch_size))


def _shuffled(objective: Objective, seed: int) -> Objective:
    if not objective.divisible or not objective.terms().batches.ordered:
        return objective
    return objective.picked(torch.randperm(objective.examples, generator=torch.Generator().manual_seed(seed)))


def _epoch(parts: list[tuple[float, Objective]], seed: int, epoch: int) -> Iterator[tuple[float, float, Objective]]:
    """(weight, t, micro-batch) in random order, one t from each of as many equal parts of [0, 1]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, strata = (torch.randperm(len(parts), generator=generator).tolist() for _ in range(2))
    offsets = torch.rand(len(parts), generator=generator, dtype=torch.float64).tolist()
    for index, stratum, offset in zip(order, strata, offsets, strict=True):
        weight, part = parts[index]
        yield weight, (stratum + offset) / len(parts), part


def _factor(progress: float) -> float:
    """Of the learning rate: 1 up to a half, then linearly to 0.01 at nine tenths."""
    return 1.0 if progress <= 0.5 else max(0.01, 1 - 0.99 * (progress - 0.5) / 0.4)
