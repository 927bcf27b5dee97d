"""From a plane to a surface that can be drawn, with its error, and what has to be said beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import AtLeastTwo
from .chebyshev import interpolation_matrix, nodes
from .grids import FLAT, Place, Sampled, even
from .linalg.operator import LinearOperator
from .minima import Minimum, minima_of
from .objective import Objective
from .planes import Plane
from .refinement import sample_square
from .results import Curve, Point, Surface
from .samples import Samples, SurfaceStatistics
from .variants import joined

FAILS = 0.1  # of the picture's range, by which the quadratic model is off where it counts as failed
PILOT = 256  # examples from which the number needed is told
MOST = 8  # minima that are told, and evaluated
DOUBTFUL = 0.25  # of the picture's size outside the plane, or of its range between true and in-plane loss
Examples = AtLeastTwo | Literal["enough"] | None


@dataclass(frozen=True)
class Picture:
    """A surface on an even grid, the loss along its two axes, and how both came about."""

    surface: Surface
    slices: tuple[Curve, Curve]
    sampled: Sampled
    samples: Samples
    minima: list[Minimum]

    @property
    def error(self) -> float:
        """Of the picture, in units of the loss; what the data leave open not among it."""
        return self.sampled.errors[0] * self.sampled.scale().spread

    def loss_at(self, i: int, j: int) -> float:
        """The loss at a point of the picture: evaluated where it was, else the picture's own."""
        place = float(self.surface.x[i]), float(self.surface.y[j])
        return self.samples.found[place][0] if place in self.samples.found else float(self.surface.z[i, j])


def draw(samples: Samples, *, span: float, resolution: int, tol: float, most: int, seed: int, networks: Sequence[Point] = (), whole: Objective | None = None, title: str = "") -> Picture:
    """The loss over (s, t) in [-span, span]^2 of a plane, at any resolution, by at most `most` evaluations, and never more than the picture has points.

    `networks`: to be marked; where they alone would take two thirds of these evaluations, they come on top · `whole`: the objective of all examples, where the samples are of some · `title`:
    what plane it is.
    """
    marked = {(s / span, t / span): (s, t) for s, t in [*(samples.plane.coordinates(network)[:2] for network in networks), samples.reference]}
    inside = [place for place in marked if max(map(abs, place)) <= 1]

    def losses(places: Sequence[Place]) -> list[float]:
        return samples.losses([marked.get((s, t), (span * s, span * t)) for s, t in places])

    most, lines = min(most, resolution**2), {span * float(s) for s in even(resolution)}
    beside = samples.before + sum(not {s, t} <= lines for s, t in samples.refused) + samples.price(len(marked) - len(inside)) + sum(not in_plane(samples, network) for network in networks)
    sampled = sample_square(losses, resolution=resolution, tol=tol, most=most - beside if 3 * beside <= 2 * most else most, seed=seed, also=inside, price=samples.price)
    error = _errors(samples, sampled, marked, span)
    z = sampled.grid(lambda place: sampled.seen[place])
    along = _along(sampled, z)
    minima = minima_of(sampled, z, error)
    losses(_affordable(sampled, [(float(sampled.axis[i]), float(sampled.axis[j])) for i, j in (minimum.place for minimum in minima[:MOST])]))  # a polynomial may have minima that the loss has not
    names = [f"{name}, in units of {_relative(samples, direction)}" for name, direction in (("s", samples.plane.u), ("t", samples.plane.v))]
    x = span * sampled.axis
    slices = [Curve(x=x, y=y, label=f"loss along the {order} axis", xlabel=name, ylabel="loss") for y, order, name in zip(along, ("first", "second"), names, strict=True)]
    some = whole is not None and whole.examples > samples.objective.examples
    own = sampled.errors[0]
    notes = [title, f"error {own:.1%} of the range" if math.isfinite(own) else "", f"{samples.objective.examples:,} of {whole.examples:,} examples" if some and whole is not None else "", samples.policy]
    surface = Surface(
        x=x, y=x, z=z, error=error, evaluations=samples.evaluations, label="loss", note=", ".join(filter(None, notes)), xlabel=names[0], ylabel=names[1],
        logarithmic=sampled.scale().logarithmic is not None, status="converged" if sampled.converged else "budget-limited",
    )  # fmt: skip
    return Picture(surface, (slices[0], slices[1]), sampled, samples, minima)


def in_plane(samples: Samples, network: Point) -> bool:
    """Whether a network is the one that its place in the plane has, up to rounding: the loss there is then its own."""
    s, t, _ = samples.plane.coordinates(network)
    here = samples.objective.point(samples.plane(s, t))
    same = all(torch.equal(value, others[name]) for own, others in ((network.buffers, here.buffers), (network.frozen, here.frozen)) for name, value in own.items())
    rounding = 4 * torch.finfo(here.theta.dtype).eps * float(here.theta.double().norm())
    return same and (samples.statistics == "frozen" or not samples.policy) and float((network.theta - here.theta).double().norm()) <= rounding


def _errors(samples: Samples, sampled: Sampled, marked: dict[Place, Place], span: float) -> Tensor | None:
    """Standard errors of the data: the variance is smooth at the reference, where the error itself has a cone's tip."""
    found = samples.at([marked.get((s, t), (span * s, span * t)) for s, t in sampled.seen])
    variances = {place: error**2 for place, (_, error) in zip(sampled.seen, found, strict=True)}
    error = sampled.grid(lambda place: variances[place], as_sampled=False).clamp(min=0).sqrt()
    return None if bool(error.isnan().all()) else error


def _affordable(sampled: Sampled, places: Sequence[Place]) -> list[Place]:
    """As many of some places as the evaluations left allow, which are then spent."""
    new = sampled.unseen(places)
    while new and sampled.price(len(new)) > sampled.left:
        new.pop()
    sampled.left -= sampled.price(len(new))
    return [place for place in places if place in sampled.seen or place in new]


def _along(sampled: Sampled, z: Tensor) -> tuple[Tensor, Tensor]:
    """The loss along both axes, through the origin of the plane: where the picture has no points on them by its polynomials, or by a cubic through the four nearest lines of points."""
    x, zero, middle = sampled.axis, torch.zeros(sampled.resolution, dtype=torch.float64), sampled.resolution // 2
    if sampled.resolution % 2:
        return z[:, middle].clone(), z[middle].clone()
    near = slice(middle - 2, middle + 2)
    cubic = interpolation_matrix(zero[:1], x[near])[0]
    first, second = sampled.at(x, zero), sampled.at(zero, x)
    return torch.where(first.isnan(), z[:, near] @ cubic, first), torch.where(second.isnan(), cubic @ z[near], second)


def _relative(samples: Samples, direction: Tensor) -> str:
    origin = samples.plane.origin
    theta = origin.theta if isinstance(origin, Point) else origin
    return f"{float(direction.norm()) / max(float(theta.norm()), 1e-300):.3g} |w|"


def sampled_data(objective: Objective, plane: Plane, examples: Examples, *, span: float, tol: float, seed: int) -> tuple[Objective, int]:
    r"""The objective over so many random examples, and how many evaluations of it the choice has cost; "enough": so many that the standard error of the loss is below `tol` of the picture's range.

    A pilot of 256 examples at 25 places tells the deviation sigma of an example's loss: $\sigma^2 (1/m - 1/N) \le (tol \cdot range)^2$ for m of N examples. All where half would be needed.
    """
    if examples is None or (examples == "enough" and objective.examples <= 2 * PILOT):
        return objective, 0
    if examples != "enough":
        return _regrouped(objective, int(examples), seed), 0
    pilot = Samples(objective.sample(PILOT, seed), plane, "frozen")
    x = (span * nodes(4)).tolist()
    found = torch.tensor(pilot.at([(s, t) for s in x for t in x]), dtype=torch.float64)
    loss, error = found[found.isfinite().all(1)].T
    if not len(loss):
        return objective, _share(pilot, objective)
    aim = (tol * float(loss.max() - loss.min())) ** 2
    m = math.ceil(1 / (aim / max(PILOT * float(error.max()) ** 2, 1e-300) + 1 / objective.examples))
    chosen = objective if m > objective.examples / 2 else _regrouped(objective, max(m, PILOT), seed)
    return chosen, _share(pilot, chosen)


def _share(pilot: Samples, objective: Objective) -> int:
    """What a pilot has cost in evaluations of another objective."""
    return math.ceil(pilot.evaluations * pilot.objective.examples / objective.examples)


def _regrouped(objective: Objective, examples: int, seed: int) -> Objective:
    """A sample in batches as large as those it was drawn from, whose rests would be poor estimates of running statistics."""
    return joined(objective.sample(examples, seed), max(objective.terms().batches.reading.sizes))


def quadratic_model(op: LinearOperator, objective: Objective, plane: Plane, picture: Surface) -> tuple[Surface, float, tuple[float, float]]:
    """The quadratic model on the same grid from two products; the radius (of s, t) at which it is off by a tenth of the range; d'Hd/d'd of both axes."""
    value, slope = objective.value_and_gradient()
    g = slope.double()
    directions = torch.stack([plane.u, plane.v], dim=1)
    image = (op @ directions.to(op.dtype)).double()
    slopes, bends = directions.double().T @ g, directions.double().T @ image
    s, t = picture.x[:, None], picture.y[None]
    z = value + slopes[0] * s + slopes[1] * t + 0.5 * (bends[0, 0] * s**2 + 2 * bends[0, 1] * s * t + bends[1, 1] * t**2)
    finite = picture.z[torch.isfinite(picture.z)]
    spread = max(float(finite.max() - finite.min()), FLAT * float(finite.abs().max())) if len(finite) else 0.0
    off = ~((picture.z - z).abs() <= FAILS * spread)  # a loss that is not finite is off too
    radius = (s**2 + t**2).sqrt()
    curvatures = float(bends[0, 0]) / float(plane.u.double().norm() ** 2), float(bends[1, 1]) / float(plane.v.double().norm() ** 2)
    model = Surface(x=picture.x, y=picture.y, z=z, evaluations=0, label="quadratic model", xlabel=picture.xlabel, ylabel=picture.ylabel)
    return model, float(radius[off].min()) if bool(off.any()) else math.inf, curvatures


def basin_rows(picture: Picture) -> list[dict[str, Any]]:
    """The first minima of the picture, with the loss evaluated there, and whether each is more than all doubt explains."""
    surface, rows = picture.surface, []
    for minimum in picture.minima[:MOST]:
        i, j = minimum.place
        place = {"s": float(surface.x[i]), "t": float(surface.y[j]), "loss": picture.loss_at(i, j)}
        row = place | {"depth": minimum.depth, "significant": minimum.significant, "on border": minimum.border}
        if minimum.pass_ is not None:
            row |= {"pass_s": float(surface.x[minimum.pass_[0]]), "pass_t": float(surface.y[minimum.pass_[1]])}
        rows.append(row)
    return rows


def mark_rows(picture: Picture, networks: Sequence[Point]) -> list[dict[str, Any]]:
    """Where networks lie: coordinates, their own loss and the one at their shadow in the plane, both evaluated; what the plane leaves out; and whether it misleads there.

    `doubtful`: a residual of more than a quarter of the picture's half-diagonal, or losses that differ by more than a quarter of the picture's range (of its logarithms, where it is read by
    these), or by anything unknown. A network that lies in the plane with all that belongs to it is its own shadow, and is evaluated once.
    """
    samples, z = picture.samples, picture.surface.z[picture.surface.z.isfinite()]
    plane, spread = samples.plane, float(z.max() - z.min()) if len(z) else 0.0
    size = float(picture.surface.x[-1]) * math.hypot(float(plane.u.double().norm()), float(plane.v.double().norm()))  # a middle of the picture is near nothing, and no reason for doubt
    floor = picture.surface.floor
    rows, places = [], [plane.coordinates(network) for network in networks]
    shadows = samples.losses([(s, t) for s, t, _ in places])  # together: one reading of the data
    others = [not in_plane(samples, network) for network in networks]
    own = iter(samples.own_losses([network for network, other in zip(networks, others, strict=True) if other]))
    for network, (s, t, off), shadow, other in zip(networks, places, shadows, others, strict=True):
        loss = next(own) if other else shadow
        apart = abs(loss - shadow) / max(spread, 4 * FLAT * abs(loss), 1e-300)
        if floor is not None:  # where a picture is read by its logarithms
            logs = abs(math.log((loss if loss > 0 else floor) / (shadow if shadow > 0 else floor))) if math.isfinite(loss) and math.isfinite(shadow) else math.inf
            apart = max(apart, logs / math.log(float(z.max()) / floor))
        doubtful = not (off <= DOUBTFUL * size and apart <= DOUBTFUL)
        rows.append({"name": network.label, "s": s, "t": t, "loss": loss, "in_plane_loss": shadow, "residual": off, "doubtful": doubtful})
    return rows


def own_statistics(statistics: SurfaceStatistics) -> str:
    """What to say beside losses of networks: theirs are by the statistics that they came with."""
    return " (their own losses with the running statistics that they came with, in the plane with re-estimated ones)" if statistics == "reestimated" else ""


def over_directions(pictures: Sequence[Picture]) -> tuple[Curve, Surface]:
    """The mean loss along the axes of several planes with its standard error, and the standard deviation between the planes at every (s, t)."""
    lines = torch.stack([picture.slices[axis].y for picture in pictures for axis in (0, 1)])
    first = pictures[0].surface
    mean = Curve(
        x=first.x, y=lines.mean(0), error=lines.std(0) / math.sqrt(len(lines)), label=f"mean loss along {len(lines)} random directions", xlabel=first.xlabel.replace("s, in", "distance, in"), ylabel="loss",
    )  # fmt: skip
    deviation = torch.stack([picture.surface.z for picture in pictures]).std(0)
    label = f"standard deviation between {len(pictures)} planes"
    return mean, Surface(x=first.x, y=first.y, z=deviation, evaluations=sum(picture.surface.evaluations for picture in pictures), label=label, xlabel=first.xlabel, ylabel=first.ylabel, note=first.note)
