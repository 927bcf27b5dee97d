"""Paths between networks: a function of t in [0, 1] that gives Points (or flat tensors), a mixture of control points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from scipy.integrate import quad
from torch import Tensor

from .checks import checked, refusal
from .results import Point

Place = Point | Tensor
PathKind = Literal["bezier", "polychain"]


@checked
@dataclass(frozen=True)
class Line:
    r"""The straight line $\theta(t) = (1 - t)\,a + t\,b$ between two Points, running statistics included, or two flat tensors."""

    a: Place
    b: Place

    def __post_init__(self) -> None:
        refuse_places("Line", a=self.a, b=self.b)

    @property
    def points(self) -> tuple[Place, ...]:
        """Its control points."""
        return self.a, self.b

    def weights(self, t: float) -> Tensor:
        """What each control point contributes at t."""
        return torch.tensor([1 - t, t], dtype=torch.float64)

    def __call__(self, t: float) -> Place:
        """The place at `t`; 0 is a, 1 is b."""
        return mixture(self.points, self.weights(t), f"t = {t:.3g}")

    def length(self) -> float:
        """Arc length in the space of parameters."""
        return math.sqrt(_steps(self.points)[0, 0])


@checked
@dataclass(frozen=True)
class Bezier:
    r"""Bezier curve $\theta(t) = \sum_j \binom nj t^j (1-t)^{n-j} P_j$ through the first and the last of n + 1 Points or flat tensors."""

    points: Sequence[Place]

    def __post_init__(self) -> None:
        refuse_points("Bezier", self.points)

    def weights(self, t: float) -> Tensor:
        """What each control point contributes at t."""
        n = len(self.points) - 1
        return torch.tensor([math.comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(n + 1)], dtype=torch.float64)

    def __call__(self, t: float) -> Place:
        """The place at `t`."""
        return mixture(self.points, self.weights(t), f"t = {t:.3g}")

    def length(self) -> float:
        """Arc length, by quadrature of the speed."""
        gram, n = _steps(self.points), len(self.points) - 1

        def speed(t: float) -> float:
            w = torch.tensor([n * math.comb(n - 1, j) * t**j * (1 - t) ** (n - 1 - j) for j in range(n)], dtype=torch.float64)
            return math.sqrt(max(float(w @ gram @ w), 0.0))

        return float(quad(speed, 0, 1, epsrel=1e-8)[0])


@checked
@dataclass(frozen=True)
class PolyChain:
    """Straight pieces through Points or flat tensors, each taking the same share of [0, 1]."""

    points: Sequence[Place]

    def __post_init__(self) -> None:
        refuse_points("PolyChain", self.points)

    def weights(self, t: float) -> Tensor:
        """What each control point contributes at t."""
        pieces = len(self.points) - 1
        piece = min(max(math.floor(t * pieces), 0), pieces - 1)  # the outer ones go on beyond the ends
        found = torch.zeros(pieces + 1, dtype=torch.float64)
        found[piece], found[piece + 1] = 1 - (t * pieces - piece), t * pieces - piece
        return found

    def __call__(self, t: float) -> Place:
        """The place at `t`."""
        return mixture(self.points, self.weights(t), f"t = {t:.3g}")

    def length(self) -> float:
        """Sum of the lengths of its pieces."""
        return float(_steps(self.points).diagonal().sqrt().sum())


Path = Line | Bezier | PolyChain


def refuse_places(call: str, **places: Place) -> None:
    """TypeError or ValueError for places that are not of one kind and one size, each a flat tensor of finite numbers."""
    kinds = {type(place) if isinstance(place, Point) else Tensor for place in places.values()}
    if len(kinds) > 1:
        raise TypeError(f"{call}({', '.join(places)}) needs Points or flat tensors, all of one kind, got both.")
    leader = next(iter(places))
    first = theta_of(places[leader])
    for name, place in places.items():
        theta = theta_of(place)
        if theta.ndim != 1 or not len(theta) or not theta.is_floating_point() or theta.shape != first.shape:
            raise refusal(call, name, theta, f"a flat tensor of floating-point numbers, all of one size: shape ({first.numel()},), as {leader} has.")
        if not bool(torch.isfinite(theta).all()):
            raise refusal(call, name, theta, "finite numbers, and it holds NaN or inf.")


def refuse_points(call: str, points: Sequence[Place]) -> None:
    """As `refuse_places`, for control points, of which a path has two or more."""
    if len(points) < 2:
        raise refusal(call, "points", points, "at least 2 control points: a path has two ends.")
    refuse_places(call, **{f"points[{index}]": point for index, point in enumerate(points)})


def mixture(points: Sequence[Place], weights: Tensor, label: str) -> Place:
    """Weighted sum of Points, floating-point buffers included (others from the heaviest), or of flat tensors."""
    shares = [(point, float(w)) for point, w in zip(points, weights, strict=True) if float(w) != 0]
    if len(shares) == 1:  # an end: exactly that network
        return shares[0][0]
    if not isinstance(points[0], Point):
        return _sum([(point, w) for point, w in shares if isinstance(point, Tensor)])
    nets = [(point, w) for point, w in shares if isinstance(point, Point)]
    heaviest = max(nets, key=lambda pair: pair[1])[0]
    buffers = {name: _sum([(p.buffers[name], w) for p, w in nets]) if tensor.is_floating_point() else heaviest.buffers[name] for name, tensor in heaviest.buffers.items()}
    first, last = points[0], points[-1]
    assert isinstance(first, Point) and isinstance(last, Point)
    return replace(heaviest, theta=_sum([(p.theta, w) for p, w in nets]), buffers=buffers, label=f"{first.label} to {last.label}, {label}")


def theta_of(place: Place) -> Tensor:
    """The flat parameters of a place (n,)."""
    return place.theta if isinstance(place, Point) else place


def between(first: Point, inner: Tensor, last: Point, name: str) -> list[Point]:
    """Inner control points (k, n) as networks: running statistics from the straight line at equal shares."""
    line, found = Line(first, last), []
    for j, theta in enumerate(inner, start=1):
        there = line(j / (len(inner) + 1))
        assert isinstance(there, Point)
        found.append(Point(theta=theta, buffers=there.buffers, frozen=first.frozen, label=f"{name} {j}"))
    return found


def _sum(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    total = terms[0][0] * terms[0][1]
    for tensor, weight in terms[1:]:
        total = total + weight * tensor
    return total


def _steps(points: Sequence[Place]) -> Tensor:
    """Inner products of the steps from one control point to the next (n, n), in float64."""
    thetas = [theta_of(point) for point in points]
    steps = [(b - a).double() for a, b in pairwise(thetas)]
    return torch.tensor([[float(x @ y) for y in steps] for x in steps], dtype=torch.float64)
