"""From a plane to a surface that can be drawn, with its error, and what has to be said beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from .chebyshev import nodes
from .crowds import losses_of
from .grids import FLAT, Place, Sampled, sample_square
from .linalg.operator import LinearOperator
from .objective import Objective
from .planes import Plane
from .results import Curve, Point, Surface
from .samples import Samples, SurfaceStatistics
from .topology import basins_of
from .variants import joined

FAILS = 0.1  # of the picture's range, by which the quadratic model is off where it counts as failed
PILOT = 256  # examples from which the number needed is told
MOST = 8  # minima that are told, and evaluated
DOUBTFUL = 0.25  # of the picture's size outside the plane, or of its range between true and in-plane loss
Examples = int | Literal["enough"] | None


@dataclass(frozen=True)
class Picture:
    """A surface on an even grid, the loss along its two axes, and how both came about."""

    surface: Surface
    slices: tuple[Curve, Curve]
    sampled: Sampled
    samples: Samples

    @property
    def error(self) -> float:
        """Of the picture, in units of the loss; what the data leave open not among it."""
        return self.sampled.errors[0] * self.sampled.scale().spread

    @property
    def unknown(self) -> int:
        """Points of the picture that were left out, for want of evaluations."""
        return sum(len(self.sampled.points_in(square)) for square in self.sampled.squares if square.interpolant is None and not square.direct)


def draw(samples: Samples, *, span: float, resolution: int, tol: float, most: int, seed: int, networks: Sequence[Point] = (), whole: Objective | None = None, title: str = "") -> Picture:
    """The loss over (s, t) in [-span, span]^2 of a plane, at any resolution. `networks`: to be marked; `whole`: the objective of all examples, where the samples are of some; `title`: what plane it is."""

    def spanned(places: Sequence[Place]) -> list[Place]:
        return [(span * s, span * t) for s, t in places]

    marked = [(s / span, t / span) for s, t, _ in map(samples.plane.coordinates, networks) if abs(s) <= span and abs(t) <= span]
    most -= MOST + len(networks) - len(marked)  # for the minima, and for the shadows of networks outside the picture
    sampled = sample_square(lambda places: samples.losses(spanned(places)), resolution=resolution, tol=tol, most=most, seed=seed, also=marked)
    z = sampled.grid(lambda place: samples.at(spanned([place]))[0][0])
    variance = sampled.grid(lambda place: samples.at(spanned([place]))[0][1] ** 2, as_sampled=False)  # smooth at the origin, where the error itself has a cone's tip
    error = variance.clamp(min=0).sqrt()
    along = [_along(sampled, axis, lambda places: samples.losses(spanned(places)), most) for axis in (0, 1)]
    x = span * sampled.axis
    samples.losses([(float(x[i]), float(x[j])) for i, j in (basin.minimum for basin in basins_of(z)[:MOST])])  # a polynomial may have minima that the loss has not
    names = [f"{name}, in units of {_relative(samples, direction)}" for name, direction in (("s", samples.plane.u), ("t", samples.plane.v))]
    slices = [Curve(x=x, y=y, label=f"loss along the {order} axis", xlabel=name, ylabel="loss") for y, order, name in zip(along, ("first", "second"), names, strict=True)]
    some = whole is not None and whole.examples > samples.objective.examples
    own = sampled.errors[0]
    notes = [title, f"error {own:.1%} of the range" if math.isfinite(own) else "", f"{samples.objective.examples:,} of {whole.examples:,} examples" if some and whole is not None else "", samples.policy]
    surface = Surface(
        x=x, y=x, z=z, error=None if bool(error.isnan().all()) else error, evaluations=samples.evaluations, label="loss", note=", ".join(filter(None, notes)), xlabel=names[0], ylabel=names[1],
        logarithmic=sampled.scale().logarithmic is not None and not bool((z <= 0).any()), status="converged" if sampled.converged else "budget-limited",
    )  # fmt: skip
    return Picture(surface, (slices[0], slices[1]), sampled, samples)


def _along(sampled: Sampled, axis: int, losses: Callable[[Sequence[Place]], Sequence[float]], most: int) -> Tensor:
    """The loss along one of the axes, through the origin of the plane; nan where neither a polynomial nor the budget reaches."""
    x, zero = sampled.axis, torch.zeros(sampled.resolution, dtype=torch.float64)
    y = sampled.at(*((x, zero) if axis == 0 else (zero, x)))
    lost = [int(i) for i in torch.nonzero(y.isnan())[:, 0]]
    places = [(float(x[i]), 0.0) if axis == 0 else (0.0, float(x[i])) for i in lost]
    new = len(sampled.unseen(places))
    for i, place in zip(lost, places, strict=True):
        if place in sampled.seen or len(sampled.seen) + 2 * new <= most:  # there are two axes
            y[i] = losses([place])[0]
    return y


def _relative(samples: Samples, direction: Tensor) -> str:
    origin = samples.plane.origin
    theta = origin.theta if isinstance(origin, Point) else origin
    return f"{float(direction.norm()) / max(float(theta.norm()), 1e-300):.3g} |w|"


def check_examples(probe: str, examples: object) -> None:
    """ValueError for what is no number of examples."""
    if examples is not None and examples != "enough" and (isinstance(examples, bool) or not isinstance(examples, Integral) or examples < 2):
        raise ValueError(f'{probe}(examples={examples!r}): give a number of examples from 2, "enough", or None for all.')


def check_resolution(probe: str, resolution: object) -> None:
    """ValueError for what is no number of points a side."""
    if isinstance(resolution, bool) or not isinstance(resolution, Integral) or resolution < 3:
        raise ValueError(f"{probe}(resolution={resolution!r}) needs a whole number of points a side, 3 at least.")


def sampled_data(objective: Objective, plane: Plane, examples: Examples, *, span: float, tol: float, seed: int) -> Objective:
    r"""The objective over so many random examples; "enough": so many that the standard error of the loss is below `tol` of the picture's range.

    A pilot of 256 examples at 25 places tells the deviation sigma of an example's loss: $\sigma^2 (1/m - 1/N) \le (tol \cdot range)^2$ for m of N examples. All where half would be needed.
    """
    if examples is None or (examples == "enough" and objective.examples <= 2 * PILOT):
        return objective
    if examples != "enough":
        return _regrouped(objective, int(examples), seed)
    pilot = Samples(objective.sample(PILOT, seed), plane, "frozen")
    x = (span * nodes(4)).tolist()
    found = torch.tensor(pilot.at([(s, t) for s in x for t in x]), dtype=torch.float64)
    loss, error = found[found.isfinite().all(1)].T
    if not len(loss):
        return objective
    aim = (tol * float(loss.max() - loss.min())) ** 2
    m = math.ceil(1 / (aim / max(PILOT * float(error.max()) ** 2, 1e-300) + 1 / objective.examples))
    return objective if m > objective.examples / 2 else _regrouped(objective, max(m, PILOT), seed)


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
    """Minima of the picture, deepest first, with the loss evaluated there, and whether each is deeper than the errors of the data and of the picture explain."""
    surface, rows = picture.surface, []
    finite = surface.z[surface.z.isfinite()]
    for basin in basins_of(surface.z)[:MOST]:
        i, j = basin.minimum
        doubt, way = 0.0, {}
        if basin.pass_ is not None:
            way = {"pass_s": float(surface.x[basin.pass_[0]]), "pass_t": float(surface.y[basin.pass_[1]])}
            doubt = (0.0 if surface.error is None else 1.96 * math.hypot(float(surface.error[i, j]), float(surface.error[basin.pass_])))
        depth = basin.persistence if basin.pass_ is not None else float(finite.max()) - basin.value
        row = {"s": float(surface.x[i]), "t": float(surface.y[j]), "loss": picture.samples.losses([(float(surface.x[i]), float(surface.y[j]))])[0], "depth": basin.persistence}
        rows.append(row | {"significant": bool(depth > doubt + 2 * picture.error)} | way)
    return rows


def mark_rows(picture: Picture, objective: Objective, networks: Sequence[Point]) -> list[dict[str, Any]]:
    """Where networks lie: coordinates, their own loss and the one at their shadow in the plane, both evaluated; what the plane leaves out; and whether it misleads there.

    `doubtful`: a residual of more than a quarter of the picture's half-diagonal, or losses that differ by more than a quarter of the picture's range (of its logarithms, where it is read by
    these), or by anything unknown.
    """
    plane, z = picture.samples.plane, picture.surface.z[picture.surface.z.isfinite()]
    spread = float(z.max() - z.min()) if len(z) else 0.0
    size = float(picture.surface.x[-1]) * math.hypot(float(plane.u.double().norm()), float(plane.v.double().norm()))  # a middle of the picture is near nothing, and no reason for doubt
    rows, places = [], [plane.coordinates(network) for network in networks]
    shadows = picture.samples.losses([(s, t) for s, t, _ in places])  # together: one reading of the data
    for network, (s, t, off), shadow in zip(networks, places, shadows, strict=True):
        loss = losses_of(objective, [network])[0][0]
        apart = abs(loss - shadow) / max(spread, 4 * FLAT * abs(loss), 1e-300)
        if picture.surface.wide:  # where a picture is read by its logarithms
            apart = max(apart, abs(math.log(loss / shadow)) / math.log(float(z.max() / z.min()))) if loss > 0 and shadow > 0 else math.inf
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
