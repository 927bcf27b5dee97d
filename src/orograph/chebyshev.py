r"""Polynomial interpolation at the Chebyshev points of a square, in barycentric form (Berrut and Trefethen 2004, doi:10.1137/S0036144502417715)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Transform = Literal["values", "roots", "logarithms"]


@dataclass(frozen=True)
class Interpolant:
    """Values (m + 1, m + 1) at the Chebyshev points of a square; `of`: whether the polynomial is one of the function, of its root or of its logarithm."""

    values: Tensor
    centre: tuple[float, float]
    half: float  # of the square's side
    of: Transform = "values"

    def __call__(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at all (s_i, t_j) (len(s), len(t))."""
        rows, columns = self._matrices(s, t)
        return self._back(rows @ self._heights() @ columns.T)

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at the places (s_i, t_i) (len(s),)."""
        rows, columns = self._matrices(s, t)
        return self._back(torch.einsum("ki,ij,kj->k", rows, self._heights(), columns))

    def coarser(self, step: int) -> Interpolant:
        """The interpolant of every `step`-th value a side, which are Chebyshev points too."""
        return Interpolant(self.values[::step, ::step], self.centre, self.half, self.of)

    def _matrices(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        m = len(self.values) - 1
        return interpolation_matrix((s - self.centre[0]) / self.half, m), interpolation_matrix((t - self.centre[1]) / self.half, m)

    def _heights(self) -> Tensor:
        return self.values if self.of == "values" else self.values.sqrt() if self.of == "roots" else self.values.log()

    def _back(self, found: Tensor) -> Tensor:
        return found if self.of == "values" else found.clamp(min=0).square() if self.of == "roots" else found.exp()


def nodes(m: int) -> Tensor:
    """The m + 1 Chebyshev points of [-1, 1], in ascending order; those of m are among those of 2 m."""
    return -torch.cos(math.pi * torch.arange(m + 1, dtype=torch.float64) / m)


def interpolation_matrix(x: Tensor, m: int) -> Tensor:
    """(len(x), m + 1): what the values at the Chebyshev points contribute at each x."""
    points, weights = nodes(m), (-1.0) ** torch.arange(m + 1, dtype=torch.float64)
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    distance = x.double()[:, None] - points
    exact = distance.abs() < 1e-12  # places are rounded to 14 digits
    terms = weights / torch.where(exact, torch.ones_like(distance), distance)
    matrix = terms / terms.sum(1, keepdim=True)
    hit = exact.any(1)
    matrix[hit] = exact[hit].double()
    return matrix
