r"""A function on the points of a picture from few of them: more where it is smooth, smaller squares where it is not.

Every sample is a point of the picture, an even grid on [-1, 1]^2, so that no picture takes more samples than it has points, and what was sampled is drawn as it is. A square is sampled at nested
grids near to Chebyshev points (5, 9, 17 a side) until points that were never used are met: some at random, some where the grid and a coarser one within it disagree most.
Where more points do not help (a kink, a wall, a value that is not finite) it is cut in four, and where that would cost about as much as the points of the picture that lie in
it, these are evaluated themselves. The polynomial is one of the values, of their roots (a loss grows like a square near a minimum, and more slowly far off), or of their logarithms (a blow-up):
whichever predicts fresh points best.

Errors are shares of the picture's range; where values span a factor of `results.WIDE`, so that the picture needs a logarithmic scale, those of the logarithms count too.
They are estimates from points never used, and no bounds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from .chebyshev import Interpolant, Transform, between_neighbours, grid_nodes
from .results import lowest_shown

FIRST = 4  # intervals a side
LEVELS = ((16, 24), (8, 10), (FIRST, 6))  # as many intervals a side where the square has so many of the picture
RANDOM, SUSPECTED = 4, 5  # checks per level and square: at random, and where each kind of polynomial is doubted most or a wide picture is lowest
THIN = 2.0  # by how much points left out may be worse than those known
LENIENT = 5.0  # logarithms may be off by so many times the tolerance: a picture has some fifteen levels
FLAT = 1e-9  # a range of this share of the values is none
Place = tuple[float, float]
Sides = tuple[int, int, int, int]  # first and last row, first and last column


@dataclass(frozen=True)
class Scale:
    """The range of a picture, and of its logarithms where it is wide; `floor`: where some values are zero, the least that its logarithms show."""

    spread: float
    logarithmic: float | None
    floor: float = 0.0

    def errors(self, found: Tensor, truth: Tensor) -> Tensor:
        """(2, ...) differences as shares of the range of the values, and of their logarithms; inf where a positive picture is met by values that are not."""
        plain = (found - truth).abs() / self.spread
        logs = torch.zeros_like(plain) if self.logarithmic is None else (found.clamp(min=self.floor).log() - truth.clamp(min=self.floor).log()).abs() / self.logarithmic
        return torch.stack([plain, logs]).nan_to_num(nan=math.inf, posinf=math.inf)

    def worst(self, found: Tensor, truth: Tensor) -> Tensor:
        """(2,) the largest of them."""
        errors = self.errors(found, truth).flatten(1)
        return errors.max(1).values if errors.shape[1] else torch.zeros(2, dtype=torch.float64)


def score(errors: Tensor) -> Tensor:
    """What is compared with the tolerance: errors (2, ...) of values and, more leniently, of logarithms."""
    return torch.maximum(errors[0], errors[1] / LENIENT)


@dataclass(frozen=True)
class Square:
    """Some rows and columns of the picture: m + 1 of them a side are sampled, or `direct`, every point; with no interpolant nothing is known of it yet."""

    sides: Sides
    m: int = FIRST
    direct: bool = False
    interpolant: Interpolant | None = None
    errors: tuple[float, float] = (math.inf, math.inf)  # of values and logarithms

    @property
    def score(self) -> float:
        return float(score(torch.tensor(self.errors)))

    @property
    def intervals(self) -> int:
        """Of the picture, on the shorter side."""
        return min(self.sides[1] - self.sides[0], self.sides[3] - self.sides[2])

    @property
    def most(self) -> int:
        """How many intervals a side it can have at most."""
        return next((m for m, least in LEVELS if self.intervals >= least), 0)

    def sampled(self) -> tuple[list[int], list[int]]:
        """Rows and columns that are sampled."""
        (a, b), (c, d) = self.sides[:2], self.sides[2:]
        if self.direct:
            return list(range(a, b + 1)), list(range(c, d + 1))
        top = max(self.most, self.m)
        rows, columns = ([low + i for i in grid_nodes(high - low, top)[:: top // self.m]] for low, high in ((a, b), (c, d)))
        return rows, columns

    def quarters(self) -> list[Square]:
        """Four squares that have their borders in common."""
        a, b, c, d = self.sides
        r, s = (a + b) // 2, (c + d) // 2
        return [Square((low, high, left, right)) for low, high in ((a, r), (r, b)) for left, right in ((c, s), (s, d))]


@dataclass
class Sampled:
    """A function on the points of a picture of `resolution` points a side: what was seen, and squares with their interpolants."""

    resolution: int
    tol: float
    seed: int
    left: int  # evaluations that may still be spent
    price: Callable[[int], int] = int  # of some new places, in evaluations
    seen: dict[Place, float] = field(default_factory=dict)
    squares: list[Square] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.axis = even(self.resolution)  # (resolution,), the same on both axes
        self._x: list[float] = self.axis.tolist()

    @property
    def errors(self) -> tuple[float, float]:
        """Estimates of the largest errors, as shares of the range of values and of logarithms; nan where nothing is known of a part."""
        worst = [max((square.errors[kind] for square in self.squares), default=math.inf) for kind in (0, 1)]
        return worst[0] if math.isfinite(worst[0]) else math.nan, worst[1] if math.isfinite(worst[1]) else math.nan

    @property
    def converged(self) -> bool:
        """Whether the error asked for is met."""
        return all(square.score <= self.tol for square in self.squares)

    def scale(self) -> Scale:
        """Of all values seen."""
        finite = [value for value in self.seen.values() if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
        floor = lowest_shown(torch.tensor(finite, dtype=torch.float64))
        return Scale(max(high - low, FLAT * abs(high), 1e-300), None if floor is None else math.log(high / floor), floor if floor is not None and low < floor else 0.0)

    def grid(self, value: Callable[[Place], float], *, as_sampled: bool = True) -> Tensor:
        """The picture (resolution, resolution) of `value`, known wherever the function was evaluated; `as_sampled`: on the scale that suits the function."""
        z = torch.full((self.resolution, self.resolution), math.nan, dtype=torch.float64)
        for square in self.squares:
            if square.interpolant is not None and not square.direct:
                a, b, c, d = square.sides
                values = torch.tensor([value(place) for place in self.places(square)], dtype=torch.float64).view_as(square.interpolant.values)
                part = replace(square.interpolant, values=values, of=square.interpolant.of if as_sampled else "values")
                z[a : b + 1, c : d + 1] = part(self.axis[a : b + 1], self.axis[c : d + 1])
        index = {x: i for i, x in enumerate(self._x)}
        for s, t in self.seen:  # what was evaluated has the last word
            if s in index and t in index:
                z[index[s], index[t]] = value((s, t))
        for square in self.squares:
            if square.direct:
                a, b, c, d = square.sides
                z[a : b + 1, c : d + 1] = self._filled(square, z[a : b + 1, c : d + 1])
        return z

    def _filled(self, square: Square, z: Tensor) -> Tensor:
        """Values (rows, columns) of a square with those that could not be paid for."""
        lacking = ~torch.tensor([place in self.seen for place in self.points_in(square)]).view_as(z)
        z = torch.where(lacking, math.nan, z)
        while bool(lacking.any()):
            z = torch.where(lacking, between_neighbours(z), z)
            if not bool((lacking & ~z.isnan()).any()):
                break
            lacking = lacking & z.isnan()
        return z

    def thin_errors(self, square: Square, scale: Scale) -> tuple[float, float]:
        """Errors of a square of which some points could not be paid for: what the others would be off by in their place."""
        rows, columns = square.sampled()
        z = torch.tensor([self.seen.get(place, math.nan) for place in self.points_in(square)], dtype=torch.float64).view(len(rows), len(columns))
        guessed = between_neighbours(z)
        both = z.isfinite() & guessed.isfinite()
        complete = bool(self._filled(square, z).isfinite().all())
        found = THIN * scale.worst(guessed[both], z[both]) if complete and bool(both.any()) else torch.tensor([math.inf, math.inf])
        return float(found[0]), float(found[1])

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at places (k,) by its polynomials; nan in squares that have none."""
        found = torch.full((len(s),), math.nan, dtype=torch.float64)
        for square in self.squares:
            a, b, c, d = (self._x[i] for i in square.sides)
            inside = (s >= a - 1e-12) & (s <= b + 1e-12) & (t >= c - 1e-12) & (t <= d + 1e-12)
            if square.interpolant is not None and not square.direct and bool(inside.any()):
                found[inside] = square.interpolant.at(s[inside], t[inside])
        return found

    def places(self, square: Square) -> list[Place]:
        """Where a square is sampled, row by row."""
        rows, columns = square.sampled()
        return [(self._x[i], self._x[j]) for i in rows for j in columns]

    def points_in(self, square: Square) -> list[Place]:
        """The points of the picture that lie in a square."""
        return self.places(replace(square, direct=True))

    def cost(self, squares: Sequence[Square]) -> int:
        """Evaluations that some squares take, checks among them."""
        places = (place for square in squares for place in self.places(square))
        return len(self.unseen(places)) + (RANDOM + SUSPECTED) * sum(not square.direct for square in squares)

    def affords(self, squares: Sequence[Square]) -> bool:
        """Whether some squares can be paid for; their checks are asked for later, in groups of their own."""
        return self.price(self.cost(squares)) + self.price(1) - 1 <= self.left

    @property
    def unknown(self) -> int:
        """Points of the picture that were left out, for want of evaluations."""
        return int(self.grid(lambda place: 0.0, as_sampled=False).isnan().sum())

    def unseen(self, places: Iterable[Place]) -> list[Place]:
        """Those that were not evaluated yet, each once."""
        return [place for place in dict.fromkeys(places) if place not in self.seen]

    def candidates(self, square: Square) -> list[Interpolant]:
        """Polynomials through a square's values, and through their roots and logarithms where they have some; none where a value is not finite."""
        rows, columns = square.sampled()
        values = torch.tensor([self.seen[place] for place in self.places(square)], dtype=torch.float64).view(len(rows), len(columns))
        if not bool(values.isfinite().all()):
            return []
        low = float(values.min())
        transforms: tuple[Transform, ...] = get_args(Transform) if low > 0 else ("values", "roots") if low == 0 else ("values",)
        return [Interpolant(values, self.axis[rows], self.axis[columns], of) for of in transforms]

    def checks(self, square: Square, scale: Scale) -> list[Place]:
        """Points of the picture at which to test a square whose values are known: some at random, the same for the same square and level, and where a coarser grid is off most."""
        rows, columns = square.sampled()
        lines = [sorted({round(x) for x in torch.linspace(low, high, 4 * square.m + 1).tolist()} - set(used)) for (low, high), used in ((square.sides[:2], rows), (square.sides[2:], columns))]
        if not all(lines):
            return []
        dice = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {square.sides} {square.m}".encode()))
        free = [sorted(set(range(low, high + 1)) - set(used)) for (low, high), used in ((square.sides[:2], rows), (square.sides[2:], columns))]
        pairs = torch.stack([torch.randint(len(side), (RANDOM,), generator=dice) for side in free], dim=1).tolist()
        found = [(free[0][i], free[1][j]) for i, j in pairs]
        s, t = (self.axis[line] for line in lines)
        for f in self.candidates(square):
            errors = scale.errors(f(s, t), f.coarser(2)(s, t))
            for doubt in errors if f.of == "roots" else [score(errors)]:  # roots, mostly chosen, for values and logarithms apart
                i, j = divmod(int(doubt.argmax()), len(t))
                found.append((lines[0][i], lines[1][j]))
            if f.of == "roots" and scale.logarithmic is not None:  # logarithms are told worst where the loss is low
                i, j = divmod(int(f(s, t).argmin()), len(t))
                found.append((lines[0][i], lines[1][j]))
        return [(self._x[i], self._x[j]) for i, j in found]


def even(resolution: int) -> Tensor:
    """Even points of [-1, 1]: the same number for the same place, on whichever grid it is met."""
    return torch.tensor([round(x, 14) + 0.0 for x in torch.linspace(-1, 1, resolution, dtype=torch.float64).tolist()], dtype=torch.float64)
