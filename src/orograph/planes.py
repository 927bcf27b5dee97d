"""Planes through the space of parameters: two directions from a place, and how to choose them so that a picture means something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .checks import checked
from .crowds import losses_of
from .objective import Objective
from .paths import Place, refuse_places, theta_of
from .results import Point

MARGIN = 1.4  # half-width of a picture over that of its networks: minima around them are in it
LENGTH_EVALUATIONS = 2  # that `curvature_length` takes
Normalisation = Literal["filter", "layer", "whole"]


@checked
@dataclass(frozen=True)
class Plane:
    r"""$(s, t) \mapsto$ `origin` + s `u` + t `v`, for a Point or a flat tensor and two directions (n,). A Point's running statistics stay those of the origin."""

    origin: Place
    u: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        refuse_places("Plane", origin=theta_of(self.origin), u=self.u, v=self.v)

    def __call__(self, s: float, t: float) -> Place:
        """The place at (s, t)."""
        step = s * self.u + t * self.v
        if isinstance(self.origin, Point):
            return replace(self.origin, theta=self.origin.theta + step.to(self.origin.theta), label=f"({s:.3g}, {t:.3g})")
        return self.origin + step.to(self.origin)

    def coordinates(self, place: Place) -> tuple[float, float, float]:
        """(s, t, distance from the plane) of a place: the nearest point of the plane, also where u and v are not orthogonal.

        The same to the last bit in every call, since samples are found again by their place; LAPACK's least squares depend on where in memory their arguments lie.
        """
        refuse_places("coordinates", origin=theta_of(self.origin), place=theta_of(place))
        step, u, v = (theta_of(place) - theta_of(self.origin)).double(), self.u.double(), self.v.double()
        uu = max(float((u * u).sum()), 1e-300)
        skew = float((u * v).sum()) / uu
        across = v - skew * u
        width = float((across * across).sum())
        t = float((step * across).sum()) / width if width > 1e-24 * float((v * v).sum()) else 0.0  # parallel axes make a line
        s = float((step * u).sum()) / uu - skew * t
        return s + 0.0, t + 0.0, float((step - s * u - t * v).norm())

    @property
    def cosine(self) -> float:
        """Of the angle between the two directions."""
        return float(self.u.double() @ self.v.double() / (self.u.double().norm() * self.v.double().norm()).clamp(min=1e-300))


def random_direction(objective: Objective, seed: int, normalisation: Normalisation = "filter") -> Tensor:
    r"""A Gaussian direction (n,), scaled to the weights: per filter, per parameter, or as a whole.

    "filter": every row of a weight (a filter, the weights into a unit) gets the norm of the network's own row, and biases and norm parameters stay
    (Li et al. 2018, arXiv:1712.09913); "layer": every parameter its own norm; "whole": $\|d\| = \|\theta\|$.
    """
    d, theta, layout = objective.space.sample(seed, 0, "normal"), objective.theta, objective.layout
    if normalisation == "whole":
        scaled: Tensor = d * (theta.norm() / d.norm())
        return scaled
    found = []
    for part, own in zip(layout.split(d), layout.split(theta), strict=True):
        if normalisation == "layer":
            found.append(part * (own.norm() / part.norm().clamp(min=1e-30)))
        elif own.ndim < 2:
            found.append(torch.zeros_like(part))
        else:
            rows, size = part.flatten(1), own.flatten(1).norm(dim=1, keepdim=True)
            found.append((rows * (size / rows.norm(dim=1, keepdim=True).clamp(min=1e-30))).view_as(part))
    return layout.flatten(found, theta)


def curvature_length(objective: Objective, largest: float) -> float:
    r"""The length of axes along eigenvectors, where the loss rises by as much as has been learnt: $\ell = \sqrt{2 \Delta / \lambda_1}$.

    $\Delta$ is the difference between the own loss and the one of all weights zero (about log C for C classes), or the own loss where that is larger. A unit vector says nothing of the loss: with
    $\lambda_1$ = 40 the quadratic model rises by 20 over it, far beyond the basin, where a loss has kinks. The axes are no longer than the weights. `largest`: the eigenvalue. Two evaluations.
    """
    own = objective.point()
    (here, _), (nothing, _) = losses_of(objective, [own, replace(own, theta=torch.zeros_like(own.theta))])
    rise = max((abs(value) for value in (here, nothing - here) if math.isfinite(value)), default=0.0)
    weights = float(own.theta.double().norm())
    length = math.sqrt(2 * rise / largest) if largest > 0 else math.inf
    return min(length, weights or math.inf) if 0 < min(length, weights or math.inf) < math.inf else 1.0


def plane_through(points: Sequence[Point], margin: float = MARGIN) -> Plane:
    """The plane of three networks, placed and scaled so that all lie within 1 / `margin` of [-1, 1]^2; its axes are orthogonal."""
    if len(points) != 3:
        raise ValueError(f"a plane goes through three networks, got {len(points)}.")
    if any(torch.equal(points[i].theta, points[j].theta) for i, j in ((0, 1), (0, 2), (1, 2))):
        raise ValueError("two of the three networks have the same weights, and make no plane. Use a barrier between two, or three different ones.")
    a, b, c = (theta_of(point).double() for point in points)
    e1 = b - a
    e2 = (c - a) - ((c - a) @ e1) / (e1 @ e1).clamp(min=1e-300) * e1
    if float(e2.norm()) <= max(1e-9 * float((c - a).norm()), _rounding(points)):
        raise ValueError("the three networks lie on one line, and make no plane. Use a barrier between two of them.")
    return _framed(points[0], torch.stack([e1 / e1.norm(), e2 / e2.norm()]), points, margin)


def principal_plane(points: Sequence[Point], margin: float = MARGIN) -> tuple[Plane, tuple[float, float]]:
    """The plane along the first two principal components of some networks, through the last of them, and the share of variance of each."""
    if len(points) < 3:
        raise ValueError(f"principal components need three networks at least, got {len(points)}.")
    rows = torch.stack([theta_of(point).double() for point in points])
    centred = rows - rows.mean(0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)  # not the Gram matrix, which keeps half of the digits
    values = lengths**2
    total = float(values.sum())
    if not float(values[1]) > max(1e-12 * total, len(points) * _rounding(points) ** 2, 1e-300):
        raise ValueError("the networks lie on one line (or are all the same), and have no plane.")
    return _framed(points[-1], axes[:2], points, margin), (float(values[0]) / total, float(values[1]) / total)


def _rounding(points: Sequence[Point]) -> float:
    """How far rounding alone takes a network off a line."""
    return max(4 * torch.finfo(theta_of(point).dtype).eps * float(theta_of(point).double().norm()) for point in points)


def _framed(origin: Point, axes: Tensor, points: Sequence[Point], margin: float) -> Plane:
    """Centre and half-widths from the networks' own coordinates along orthonormal axes (2, n)."""
    base = origin.theta.double()
    places = torch.stack([axes @ (theta_of(point).double() - base) for point in points])  # (networks, 2)
    low, high = places.min(0).values, places.max(0).values
    centre, half = (low + high) / 2, margin * ((high - low) / 2).clamp(min=1e-3 * float((high - low).max()))
    middle = replace(origin, theta=(base + centre @ axes).to(origin.theta))  # with the statistics, and the name, of `origin`
    return Plane(middle, (half[0] * axes[0]).to(origin.theta), (half[1] * axes[1]).to(origin.theta))
