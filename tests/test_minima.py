"""Minima told of functions of two parameters whose minima are known, on planes turned and grids of any fineness."""

import math

import pytest
import torch
from torch import nn

import orograph as og

from .families import rotating


class Function(nn.Module):
    """A function of two parameters as a network."""

    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.f(*self.w).expand(len(x))


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def himmelblau(x, y):
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def six_hump_camel(x, y):
    return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + (4 * y**2 - 4) * y**2 + 1.1


def rastrigin(x, y):
    return sum(10 + v**2 - 10 * torch.cos(2 * math.pi * v) for v in (x, y))


def quadratic(kappa):
    return lambda x, y: x**2 + kappa * y**2


def winding_valley(kappa):
    return lambda x, y: kappa * (y - torch.sin(2 * x)) ** 2 + 0.1 * x**2


def ring(x, y):
    return (x**2 + y**2 - 1) ** 2 + 0.05 * (x - 1) ** 2


def kinked_valley(x, y):
    return 5 * (y - 0.6 * x).abs() + 0.1 * (x - 0.3).abs()


def plateau(x, y):
    return torch.relu(x**2 + y**2 - 0.3)


FUNCTIONS = {  # name -> (function, span, distance between neighbouring minima or nothing)
    "Rosenbrock": (rosenbrock, 2.0),
    "Rosenbrock, wide": (rosenbrock, 3.1),
    "Himmelblau": (himmelblau, 6.0),
    "six-hump camel": (six_hump_camel, 2.0),
    "Rastrigin": (rastrigin, 1.4),
    "quadratic, kappa 1e2": (quadratic(1e2), 1.0),
    "quadratic, kappa 1e4": (quadratic(1e4), 1.0),
    "quadratic, kappa 1e6": (quadratic(1e6), 1.0),
    "winding valley": (winding_valley(10), 2.0),
    "winding narrow valley": (winding_valley(1000), 2.0),
    "ring": (ring, 1.5),
    "kinked valley": (kinked_valley, 1.0),
    "plateau": (plateau, 1.0),
}
KNOWN = {  # minima of the function, wherever they are; one at the origin of a plateau is any point of it
    "Rosenbrock": [(1.0, 1.0)],
    "Rosenbrock, wide": [(1.0, 1.0)],
    "Himmelblau": [(3.0, 2.0), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)],
    "six-hump camel": [(s * x, s * y) for s in (1, -1) for x, y in ((0.0898, -0.7126), (1.7036, -0.7961), (1.6071, 0.5687))],
    "Rastrigin": [(0.99496 * i, 0.99496 * j) for i in range(-2, 3) for j in range(-2, 3)],
    "ring": [(1.0, 0.0)],
    "kinked valley": [(0.3, 0.18)],
}
TURNS = (0.0, 0.3, 0.8, 1.3)
GRIDS = (25, 51, 101, 201)
CASES = [(name, turn, grid) for name in FUNCTIONS for turn in TURNS for grid in GRIDS]


def told(name, turn, grid):
    f, span = FUNCTIONS[name]
    c, s = math.cos(turn), math.sin(turn)
    data = torch.zeros(2, 1, dtype=torch.float64)
    objective = og.Objective(Function(f), lambda output, target: output.mean(), (data, data))
    u, v = (torch.tensor(w, dtype=torch.float64) for w in ((c, s), (-s, c)))
    record = og.measure(objective, "surface", plane=og.Plane(objective.point(), u, v), span=span, resolution=grid)
    facts = {row["quantity"]: row["value"] for row in record["faithful"].rows}
    return facts["significant minima inside the picture"], record


def expected(name, turn, grid):
    """Minima inside the picture, and those nearer to its border than a cell, which may be told or not."""
    span = FUNCTIONS[name][1]
    c, s, cell = math.cos(turn), math.sin(turn), 2 * span / (grid - 1)
    reach = [max(abs(c * x + s * y), abs(c * y - s * x)) for x, y in KNOWN.get(name, [(0.0, 0.0)])]
    return sum(r < span - cell for r in reach), sum(abs(r - span) <= cell for r in reach)


def false_and_missed(name, turn, grid):
    """(minima told that there are not, minima not told, record)."""
    inside, doubtful = expected(name, turn, grid)
    found, record = told(name, turn, grid)
    return max(found - inside - doubtful, 0), max(inside - found, 0), record


@pytest.mark.parametrize("case", rotating(CASES, 6), ids=str)
def test_significant_minima_are_those_of_the_function(case):
    false, missed, record = false_and_missed(*case)
    assert (false, missed) == (0, 0), record["basins"]


def test_what_the_table_has_no_room_for_is_said():
    found, record = told("Rastrigin", 0.0, 51)
    assert found == 9 and len(record["basins"].rows) == 8
    assert "the 8 deepest of 9 that are significant" in record["basins"].label
    assert "has 9 minima" in record.says and "of which the table has 8" in record.says


def test_a_minimum_on_the_border_is_none_of_the_function():
    data = torch.zeros(2, 1, dtype=torch.float64)
    objective = og.Objective(Function(lambda x, y: x + 0 * y), lambda output, target: output.mean(), (data, data))
    basis = torch.eye(2, dtype=torch.float64)
    record = og.measure(objective, "surface", plane=og.Plane(objective.point(), basis[0], basis[1]), resolution=21)
    assert all(row["on border"] and not row["significant"] for row in record["basins"].rows)
