"""Polynomial interpolation on a rectangle, in barycentric form (Berrut and Trefethen 2004, doi:10.1137/S0036144502417715), and points for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Transform = Literal["values", "roots", "logarithms"]


@dataclass(frozen=True)
class Interpolant:
    """Values (len(s), len(t)) at the places (s_i, t_j); `of`: whether the polynomial is one of the function, of its root or of its logarithm."""

    values: Tensor
    s: Tensor
    t: Tensor
    of: Transform = "values"

    def __call__(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at all (s_i, t_j) (len(s), len(t))."""
        rows, columns = interpolation_matrix(s, self.s), interpolation_matrix(t, self.t)
        return self._back(rows @ self._heights() @ columns.T)

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at the places (s_i, t_i) (len(s),)."""
        rows, columns = interpolation_matrix(s, self.s), interpolation_matrix(t, self.t)
        return self._back(torch.einsum("ki,ij,kj->k", rows, self._heights(), columns))

    def coarser(self, step: int) -> Interpolant:
        """The interpolant of every `step`-th value a side."""
        return Interpolant(self.values[::step, ::step], self.s[::step], self.t[::step], self.of)

    def _heights(self) -> Tensor:
        return self.values if self.of == "values" else self.values.sqrt() if self.of == "roots" else self.values.log()

    def _back(self, found: Tensor) -> Tensor:
        return found if self.of == "values" else found.clamp(min=0).square() if self.of == "roots" else found.exp()


def nodes(m: int) -> Tensor:
    """The m + 1 Chebyshev points of [-1, 1], in ascending order; those of m are among those of 2 m."""
    return -torch.cos(math.pi * torch.arange(m + 1, dtype=torch.float64) / m)


def grid_nodes(n: int, m: int) -> list[int]:
    """M + 1 of the even points 0 ... n, near to the Chebyshev points of [0, n]; m is a power of two, and every second one is near to those of m / 2.

    Even points as such are hopeless for polynomials of high degree (Runge), but Chebyshev points moved to even ones are nearly as good as they were: the Lebesgue constant is at most
    2.5 for m = 4, 2.9 for m = 8 and n >= 10, and 5.7 for m = 16 and n >= 24.
    """
    found, level = [0, n], 1
    while level < m:
        level *= 2
        room, finer = m // level, [0]  # so that points of all levels to come find a place between two
        for k, (low, high) in enumerate(pairwise(found)):
            ideal = round(n * (1 - math.cos(math.pi * (2 * k + 1) / level)) / 2)
            finer += [min(max(ideal, low + room), high - room), high]
        found = finer
    return found


def interpolation_matrix(x: Tensor, points: Tensor) -> Tensor:
    """(len(x), len(points)): what the values at some points contribute at each x."""
    scale = float(points[-1] - points[0]) / 4  # the capacity of an interval, for which the products below stay near one
    apart = (points[:, None] - points) / scale
    weights = 1 / (apart + torch.eye(len(points), dtype=apart.dtype)).prod(1)
    distance = x.double()[:, None] - points
    exact = distance.abs() < 1e-12  # places are rounded to 14 digits
    terms = weights / torch.where(exact, torch.ones_like(distance), distance)
    matrix = terms / terms.sum(1, keepdim=True)
    hit = exact.any(1)
    matrix[hit] = exact[hit].double()
    return matrix


def between_neighbours(z: Tensor) -> Tensor:
    """Each value (rows, columns) as those beside it foretell it: the mean of the lines between opposite neighbours; nan where no such pair is known."""
    wide = torch.nn.functional.pad(z[None, None], (1, 1, 1, 1), value=math.nan)[0, 0]
    pairs = torch.stack([wide[:-2, 1:-1] + wide[2:, 1:-1], wide[1:-1, :-2] + wide[1:-1, 2:]]) / 2
    return torch.nanmean(torch.where(pairs.isfinite(), pairs, math.nan), dim=0)
