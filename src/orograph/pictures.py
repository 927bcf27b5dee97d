"""From a plane to a surface that can be drawn, with its error, and what has to be said beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .chebyshev import nodes
from .grids import Sampled, sample_square
from .linalg.operator import LinearOperator
from .objective import Objective
from .planes import Plane
from .results import Curve, Point, Surface
from .samples import Place, Samples
from .topology import basins_of

FAILS = 0.1  # of the picture's range, by which the quadratic model is off where it counts as failed
PILOT = 256  # examples from which the number needed is told
STATISTICS = {"frozen": "running statistics of the middle", "reestimated": "running statistics re-estimated at every point"}
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


def draw(samples: Samples, *, span: float, resolution: int, tol: float, most: int, seed: int, whole: Objective | None = None) -> Picture:
    """The loss over (s, t) in [-span, span]^2 of a plane, at any resolution. `whole`: the objective of all examples, where the samples are of some."""

    def spanned(places: Sequence[Place]) -> list[Place]:
        return [(span * s, span * t) for s, t in places]

    sampled = sample_square(lambda places: samples.losses(spanned(places)), resolution=resolution, tol=tol, most=most, seed=seed)
    z = sampled.grid(lambda place: samples.at(spanned([place]))[0][0])
    error = sampled.grid(lambda place: samples.at(spanned([place]))[0][1], as_sampled=False).clamp(min=0)
    along = [_along(sampled, axis, lambda places: samples.losses(spanned(places))) for axis in (0, 1)]
    x = span * sampled.axis
    names = [f"{name}, in units of {_relative(samples, direction)}" for name, direction in (("s", samples.plane.u), ("t", samples.plane.v))]
    slices = [Curve(x=x, y=y, label=f"loss along the {order} axis", xlabel=name, ylabel="loss") for y, order, name in zip(along, ("first", "second"), names, strict=True)]
    some = whole is not None and whole.examples > samples.objective.examples
    notes = [f"{samples.objective.examples:,} of {whole.examples:,} examples" if some and whole is not None else "", STATISTICS[samples.statistics] if samples.normed else ""]
    surface = Surface(
        x=x, y=x, z=z, error=None if bool(error.isnan().all()) else error, evaluations=samples.evaluations, label="loss", note=", ".join(filter(None, notes)), xlabel=names[0], ylabel=names[1],
    )  # fmt: skip
    return Picture(surface, (slices[0], slices[1]), sampled, samples)


def _along(sampled: Sampled, axis: int, losses: Callable[[Sequence[Place]], Sequence[float]]) -> Tensor:
    """The loss along one of the axes, through the origin of the plane."""
    x, zero = sampled.axis, torch.zeros(sampled.resolution, dtype=torch.float64)
    y = sampled.at(*((x, zero) if axis == 0 else (zero, x)))
    lost = torch.nonzero(y.isnan())[:, 0]
    y[lost] = torch.tensor(losses([(float(x[i]), 0.0) if axis == 0 else (0.0, float(x[i])) for i in lost]), dtype=torch.float64)
    return y


def _relative(samples: Samples, direction: Tensor) -> str:
    origin = samples.plane.origin
    theta = origin.theta if isinstance(origin, Point) else origin
    return f"{float(direction.norm()) / max(float(theta.norm()), 1e-300):.3g} |w|"


def check_examples(probe: str, examples: object) -> None:
    """ValueError for what is no number of examples."""
    if examples not in (None, "enough") and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 2):
        raise ValueError(f'{probe}(examples={examples!r}): give a number of examples from 2, "enough", or None for all.')


def sampled_data(objective: Objective, plane: Plane, examples: Examples, *, span: float, tol: float, seed: int) -> Objective:
    r"""The objective over so many random examples; "enough": so many that the standard error of the loss is below `tol` of the picture's range.

    A pilot of 256 examples at 25 places tells the deviation sigma of an example's loss: $\sigma^2 (1/m - 1/N) \le (tol \cdot range)^2$ for m of N examples. All where half would be needed.
    """
    if examples is None or (examples == "enough" and objective.examples <= 2 * PILOT):
        return objective
    if examples != "enough":
        return objective.sample(examples, seed)
    pilot = Samples(objective.sample(PILOT, seed), plane, "frozen")
    x = (span * nodes(4)).tolist()
    found = torch.tensor(pilot.at([(s, t) for s in x for t in x]), dtype=torch.float64)
    loss, error = found[found.isfinite().all(1)].T
    if not len(loss):
        return objective
    aim = (tol * float(loss.max() - loss.min())) ** 2
    m = math.ceil(1 / (aim / max(PILOT * float(error.max()) ** 2, 1e-300) + 1 / objective.examples))
    return objective if m > objective.examples / 2 else objective.sample(max(m, PILOT), seed)


def quadratic_model(op: LinearOperator, objective: Objective, plane: Plane, picture: Surface) -> tuple[Surface, float, tuple[float, float]]:
    """The quadratic model on the same grid from two products; the radius (of s, t) at which it is off by a tenth of the range; d'Hd/d'd of both axes."""
    g = objective.gradient().double()
    directions = torch.stack([plane.u, plane.v], dim=1)
    image = (op @ directions.to(op.dtype)).double()
    slopes, bends = directions.double().T @ g, directions.double().T @ image
    s, t = picture.x[:, None], picture.y[None]
    z = objective.value() + slopes[0] * s + slopes[1] * t + 0.5 * (bends[0, 0] * s**2 + 2 * bends[0, 1] * s * t + bends[1, 1] * t**2)
    finite = picture.z[torch.isfinite(picture.z)]
    off = (picture.z - z).abs() > FAILS * float(finite.max() - finite.min()) if len(finite) else torch.ones_like(z, dtype=torch.bool)
    radius = (s**2 + t**2).sqrt()
    curvatures = float(bends[0, 0]) / float(plane.u.double().norm() ** 2), float(bends[1, 1]) / float(plane.v.double().norm() ** 2)
    model = Surface(x=picture.x, y=picture.y, z=z, evaluations=0, label="quadratic model", xlabel=picture.xlabel, ylabel=picture.ylabel)
    return model, float(radius[off].min()) if bool(off.any()) else math.inf, curvatures


def basin_rows(picture: Picture) -> list[dict[str, Any]]:
    """Minima of the picture, deepest first, and whether each is deeper than the errors of the data and of the picture explain."""
    surface, rows = picture.surface, []
    for basin in basins_of(surface.z)[:12]:
        i, j = basin.minimum
        doubt, way = 0.0, {}
        if basin.pass_ is not None:
            way = {"pass_s": float(surface.x[basin.pass_[0]]), "pass_t": float(surface.y[basin.pass_[1]])}
            doubt = 2 * picture.error + (0.0 if surface.error is None else 1.96 * math.hypot(float(surface.error[i, j]), float(surface.error[basin.pass_])))
        rows.append({"s": float(surface.x[i]), "t": float(surface.y[j]), "loss": basin.value, "depth": basin.persistence, "significant": bool(basin.persistence > doubt)} | way)
    return rows


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
