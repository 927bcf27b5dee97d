"""Minima of a surface and the passes between them: the merge tree of sublevel sets, by union-find."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor

SMOOTH, KINKED = 1 / 8, 1 / 2  # of second differences: what a function can fall within half a cell
EIGHT = torch.ones(3, 3).numpy()  # neighbours of a point


@dataclass(frozen=True)
class Basin:
    """A local minimum at grid point `minimum`, the `pass_` over which it meets a deeper one, `into`, and how deep it is: loss of the pass minus its own (inf for the deepest)."""

    minimum: tuple[int, int]
    value: float
    pass_: tuple[int, int] | None
    persistence: float
    into: tuple[int, int] | None = None  # its parent in the merge tree, by minimum


def basins_of(z: Tensor) -> list[Basin]:
    """All basins of a surface (rows, columns), deepest first: 0-dimensional persistence of its sublevel sets, with eight neighbours. NaN is a wall.

    Edelsbrunner, Letscher, Zomorodian 2002, doi:10.1007/s00454-002-2885-2: when two components meet, the one whose minimum is higher ends there.
    """
    rows, columns = z.shape
    flat = z.double().flatten()
    order = torch.argsort(flat, stable=True).tolist()
    parent: dict[int, int] = {}
    found: dict[int, Basin] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in order:
        value = float(flat[i])
        if math.isnan(value):
            continue
        r, c = divmod(i, columns)
        near = [(r + dr) * columns + c + dc for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr or dc) and 0 <= r + dr < rows and 0 <= c + dc < columns]
        meeting = sorted({root(j) for j in near if j in parent}, key=lambda a: (float(flat[a]), a))
        parent[i] = meeting[0] if meeting else i
        for high in meeting[1:]:  # all end in the deepest of them
            if float(flat[high]) < value:  # a basin of its own, and no plateau
                found[high] = Basin(divmod(high, columns), float(flat[high]), (r, c), value - float(flat[high]), divmod(meeting[0], columns))
            parent[high] = meeting[0]
    for i in {root(i) for i in parent}:
        found[i] = Basin(divmod(i, columns), float(flat[i]), None, math.inf)
    return sorted(found.values(), key=lambda basin: (-basin.persistence, basin.value, basin.minimum))


def between_points(z: Tensor, kinked: Tensor) -> Tensor:
    r"""How far below a point of the grid the function can be within half a cell, from the second differences near it.

    The bottom of a valley runs between points, and the points of the grid nearest to it rise and fall along it. For a quadratic
    function $\tfrac18 (|D_{ss}| + |D_{tt}| + 2 |D_{st}|)$ is never passed; a kink (`kinked`: where the surface may have some) falls by
    up to four times as much. The largest value of a point and its neighbours; zero where a hole leaves none.
    """
    rows = torch.zeros_like(z)
    rows[1:-1] += (z[2:] - 2 * z[1:-1] + z[:-2]).abs()
    rows[:, 1:-1] += (z[:, 2:] - 2 * z[:, 1:-1] + z[:, :-2]).abs()
    mixed = (z[2:, 2:] - z[2:, :-2] - z[:-2, 2:] + z[:-2, :-2]).abs() / 4
    rows[1:-1, 1:-1] += 2 * mixed
    largest = torch.from_numpy(ndimage.maximum_filter(rows.nan_to_num(0.0, 0.0, 0.0).numpy(), size=3))
    return largest * torch.where(kinked, KINKED, SMOOTH)


def is_separated(z: Tensor, doubt: Tensor, minimum: tuple[int, int], level: float) -> bool:
    """Whether no path from a minimum to a deeper one stays below `level` where every point is lower by its `doubt`."""
    order = torch.empty(z.numel(), dtype=torch.int64)
    order[torch.argsort(z.flatten(), stable=True)] = torch.arange(z.numel())  # ties as in `basins_of`
    below = ~(z - doubt > level) & ~z.isnan()
    parts = torch.from_numpy(ndimage.label(below.numpy(), structure=EIGHT)[0])
    reached = order.view(z.shape)[parts == parts[minimum]]
    return int(reached.min()) == int(order.view(z.shape)[minimum])
