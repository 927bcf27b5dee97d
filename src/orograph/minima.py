"""Minima of a picture, and which of them are more than its errors and the gaps between its points explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import Sampled, even
from .topology import Basin, basins_of, between_points, is_separated

FINE = 100  # intervals a side on which minima are looked for, at least, where polynomials tell the surface
MAX_MINIMA = 400  # minima that are looked at, the deepest ones
Index = tuple[int, int]


@dataclass(frozen=True)
class Minimum:
    """A minimum and the pass to a deeper one, as points of the picture.

    `depth`: of the minimum below the pass, inf for the deepest · `border`: whether it lies on the picture's border, beyond
    which the surface may go down · `significant`: whether every path to a deeper one rises above all doubt.
    """

    place: Index
    pass_: Index | None
    depth: float
    border: bool
    significant: bool


@dataclass(frozen=True)
class Doubts:
    """A surface (rows, columns) and its doubts, on the picture's points or on finer ones."""

    z: Tensor
    picture: Tensor  # errors of the picture
    kinked: Tensor  # where it may have kinks
    data: Tensor  # standard errors of the data
    step: int  # points of this grid from one of the picture to the next


def minima_of(sampled: Sampled, z: Tensor, error: Tensor | None) -> list[Minimum]:
    """All minima of a picture, significant ones first and deepest first among these; at most `MAX_MINIMA`.

    `error`: standard errors of the data. Where the surface is a polynomial everywhere, it is looked at on a finer grid than the
    picture's, which costs no evaluation.
    """
    doubts = _on_finer_grid(sampled, _doubts(sampled, z, error))
    low = doubts.picture + between_points(doubts.z, doubts.kinked)
    last = len(doubts.z) - 1
    found = []
    for basin in basins_of(doubts.z)[:MAX_MINIMA]:
        border = not {0, last}.isdisjoint(basin.minimum)
        significant = not border and _is_significant(basin, doubts, low)
        place, way = (
            None if at is None else _nearest(at, doubts.step) for at in (basin.minimum, basin.pass_)
        )
        assert place is not None
        found.append(Minimum(place, way, basin.persistence, border, significant))
    return sorted(found, key=lambda minimum: not minimum.significant)


def _nearest(at: Index, step: int) -> Index:
    return round(at[0] / step), round(at[1] / step)


def _is_significant(basin: Basin, doubts: Doubts, low: Tensor) -> bool:
    at = basin.minimum
    own = float(doubts.picture[at])
    if basin.pass_ is None:
        rise = float(doubts.z[doubts.z.isfinite()].max()) - basin.value
        return rise > 2 * own + 1.96 * math.sqrt(2) * float(doubts.data[at])
    doubt = own + 1.96 * math.hypot(float(doubts.data[at]), float(doubts.data[basin.pass_]))
    return basin.persistence > doubt and is_separated(doubts.z, low, at, basin.value + doubt)


def _doubts(sampled: Sampled, z: Tensor, error: Tensor | None) -> Doubts:
    """On the picture's own points; where all of them were evaluated, the picture has no error."""
    scale, picture = sampled.scale(), torch.full_like(z, math.inf)
    kinked = torch.zeros_like(z, dtype=torch.bool)
    for square in sampled.squares:
        a, b, c, d = square.sides
        where = slice(a, b + 1), slice(c, d + 1)
        kinked[where] |= square.direct
        if square.direct and not sampled.unseen(sampled.points_in(square)):
            picture[where] = 0.0
            continue
        own = torch.full_like(z[where], square.errors[0] * scale.spread)
        if scale.logarithmic is not None and square.errors[1] < math.inf:
            factor = math.expm1(min(square.errors[1] * scale.logarithmic, 100.0))
            own = torch.minimum(own, z[where].abs().clamp(min=scale.floor) * factor)
        picture[where] = torch.minimum(picture[where], own.nan_to_num(math.inf))
    data = torch.zeros_like(z) if error is None else error.nan_to_num(0.0)
    return Doubts(z, picture, kinked, data, 1)


def _on_finer_grid(sampled: Sampled, doubts: Doubts) -> Doubts:
    """The polynomials between the picture's points; the doubts of the nearest of these."""
    step = math.ceil(FINE / (sampled.resolution - 1))
    if step == 1 or any(square.direct or square.interpolant is None for square in sampled.squares):
        return doubts
    axis = even(step * (sampled.resolution - 1) + 1)
    s, t = torch.meshgrid(axis, axis, indexing="ij")
    z = sampled.at(s.flatten(), t.flatten()).view_as(s)
    near = ((torch.arange(len(axis)) + step // 2) // step).clamp(max=sampled.resolution - 1)

    def taken(values: Tensor) -> Tensor:
        return values[near][:, near]

    worst = torch.nn.functional.max_pool2d(doubts.picture[None, None], 3, stride=1, padding=1)[0, 0]
    return Doubts(z, taken(worst), taken(doubts.kinked), taken(doubts.data), step)
