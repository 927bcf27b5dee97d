r"""A function on [-1, 1]^2 from few evaluations: Chebyshev points, more of them where it is smooth, smaller squares where it is not.

A square is sampled at nested grids (5, 9, 17 points a side) until points that were never used are met: some at random, some where the grid and a coarser one within it disagree most.
Where more points do not help (a kink, a wall, a value that is not finite) it is cut in four, and where a polynomial would cost more than the points of the picture that lie in
it, these are evaluated themselves. The polynomial is one of the values, of their roots (a loss grows like a square near a minimum, and more slowly far off), or of their logarithms (a blow-up):
whichever predicts fresh points best.

Errors are shares of the picture's range; where values span a factor of `WIDE`, so that the picture needs a logarithmic scale, those of the logarithms count too.
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

from .chebyshev import Interpolant, Transform, nodes
from .results import WIDE

FIRST, LAST = 4, 16  # intervals a side
RANDOM, SUSPECTED = 4, 4  # checks per level and square: at random, and where each kind of polynomial is doubted most
SAFETY = 2.2, 3.0  # of values and of logarithms, see `_estimate`
BLIND = 8.0  # a coarser grid counts as at most so much worse than the checks
SURE = 2  # points of the picture that are evaluated rather than one more node, which only may help
LENIENT = 5.0  # logarithms may be off by so many times the tolerance: a picture has some fifteen levels
EPSILON = torch.finfo(torch.float64).eps
FLAT = 1e-9  # a range of this share of the values is none
Place = tuple[float, float]
Evaluate = Callable[[Sequence[Place]], Sequence[float]]


@dataclass(frozen=True)
class Scale:
    """The range of a picture, and of its logarithms where it is wide."""

    spread: float
    logarithmic: float | None

    def errors(self, found: Tensor, truth: Tensor) -> Tensor:
        """(2, ...) differences as shares of the range of the values, and of their logarithms; inf where a positive picture is met by values that are not."""
        plain = (found - truth).abs() / self.spread
        logs = torch.zeros_like(plain) if self.logarithmic is None else (found.clamp(min=0).log() - truth.clamp(min=0).log()).abs() / self.logarithmic
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
    """A part of the picture: m + 1 points a side, or `direct`, where every point of the picture in it is evaluated; with no interpolant nothing is known of it yet."""

    centre: Place
    half: float
    m: int = FIRST
    direct: bool = False
    interpolant: Interpolant | None = None
    errors: tuple[float, float] = (math.inf, math.inf)  # of values and logarithms

    @property
    def score(self) -> float:
        return float(score(torch.tensor(self.errors)))

    def nodes(self) -> list[Place]:
        """Where its values are, row by row."""
        s, t = ([rounded(c + self.half * float(x)) for x in nodes(self.m)] for c in self.centre)
        return [(a, b) for a in s for b in t]

    def random(self, seed: int) -> list[Place]:
        """Random places; the same for the same square and level."""
        text = f"{seed} {self.centre} {self.half} {self.m}"
        places = 2 * torch.rand(RANDOM, 2, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())), dtype=torch.float64) - 1
        return [(rounded(self.centre[0] + self.half * a), rounded(self.centre[1] + self.half * b)) for a, b in places.tolist()]

    def within(self, x: Tensor, axis: int) -> Tensor:
        """Which coordinates along an axis are in it."""
        return (x - self.centre[axis]).abs() <= self.half * (1 + 1e-12)

    def fresh(self, s: Tensor, t: Tensor) -> Tensor:
        """Which places are in it and none of its nodes."""
        rows, columns = (((x[:, None] - (c + self.half * nodes(self.m))).abs() < 1e-12).any(1) for x, c in zip((s, t), self.centre, strict=True))
        return self.within(s, 0) & self.within(t, 1) & ~(rows & columns)


@dataclass
class Sampled:
    """A function on [-1, 1]^2 as squares with their interpolants, for a picture of `resolution` points a side."""

    resolution: int
    tol: float
    seed: int
    seen: dict[Place, float] = field(default_factory=dict)
    squares: list[Square] = field(default_factory=list)

    @property
    def axis(self) -> Tensor:
        """The picture's coordinates (resolution,), the same on both axes."""
        return torch.tensor([rounded(x) for x in torch.linspace(-1, 1, self.resolution, dtype=torch.float64).tolist()], dtype=torch.float64)

    @property
    def errors(self) -> tuple[float, float]:
        """Estimates of the largest errors, as shares of the range of values and of logarithms; nan where nothing is known of a part."""
        worst = [max(0.0 if square.direct else square.errors[kind] for square in self.squares) for kind in (0, 1)]
        return worst[0] if math.isfinite(worst[0]) else math.nan, worst[1] if math.isfinite(worst[1]) else math.nan

    @property
    def converged(self) -> bool:
        """Whether the error asked for is met."""
        return all(square.direct or square.score <= self.tol for square in self.squares)

    def scale(self) -> Scale:
        """Of all values seen."""
        finite = [value for value in self.seen.values() if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
        return Scale(max(high - low, FLAT * abs(high), 1e-300), math.log(high / low) if low > 0 and high > WIDE * low else None)

    def grid(self, value: Callable[[Place], float], *, as_sampled: bool = True) -> Tensor:
        """The picture (resolution, resolution) of `value`, known wherever the function was evaluated; `as_sampled`: on the scale that suits the function."""
        x = self.axis
        z = torch.full((len(x), len(x)), math.nan, dtype=torch.float64)
        index = {float(s): i for i, s in enumerate(x)}
        for s, t in self.seen:  # where nothing else is known, what happens to lie on the picture
            if s in index and t in index:
                z[index[s], index[t]] = value((s, t))
        for square in sorted(self.squares, key=lambda square: square.direct):  # what was evaluated has the last word on a border
            rows, columns = (torch.nonzero(square.within(x, axis))[:, 0] for axis in (0, 1))
            if square.direct:
                part = torch.tensor([value(place) for place in self.points_in(square)], dtype=torch.float64).view(len(rows), len(columns))
            elif square.interpolant is not None:
                values = torch.tensor([value(place) for place in square.nodes()], dtype=torch.float64).view(square.m + 1, -1)
                part = replace(square.interpolant, values=values, of=square.interpolant.of if as_sampled else "values")(x[rows], x[columns])
            else:
                continue
            z[rows[:, None], columns] = part
        return z

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """The function at places (k,) by its polynomials; nan in squares that have none."""
        found = torch.full((len(s),), math.nan, dtype=torch.float64)
        for square in self.squares:
            inside = square.within(s, 0) & square.within(t, 1)
            if square.interpolant is not None and not square.direct and bool(inside.any()):
                found[inside] = square.interpolant.at(s[inside], t[inside])
        return found

    def points_in(self, square: Square) -> list[Place]:
        """The points of the picture that lie in a square."""
        s, t = (self.axis[square.within(self.axis, axis)].tolist() for axis in (0, 1))
        return [(a, b) for a in s for b in t]

    def cost(self, squares: Sequence[Square]) -> int:
        """Evaluations that some squares take, checks among them."""
        places = (place for square in squares for place in (self.points_in(square) if square.direct else square.nodes()))
        return len(self.unseen(places)) + (RANDOM + SUSPECTED) * sum(not square.direct for square in squares)

    def unseen(self, places: Iterable[Place]) -> list[Place]:
        """Those that were not evaluated yet, each once."""
        return [place for place in dict.fromkeys(places) if place not in self.seen]

    def candidates(self, square: Square) -> list[Interpolant]:
        """Polynomials through a square's values, and through their roots and logarithms where they have some; none where a value is not finite."""
        values = torch.tensor([self.seen[place] for place in square.nodes()], dtype=torch.float64).view(square.m + 1, -1)
        if not bool(values.isfinite().all()):
            return []
        low = float(values.min())
        transforms: tuple[Transform, ...] = get_args(Transform) if low > 0 else ("values", "roots") if low == 0 else ("values",)
        return [Interpolant(values, square.centre, square.half, of) for of in transforms]

    def checks(self, square: Square, scale: Scale) -> list[Place]:
        """Where to test a square whose values are known."""
        found = square.random(self.seed)
        x = torch.linspace(-1, 1, 4 * square.m + 1, dtype=torch.float64)[1:-1]
        s, t = (c + square.half * x for c in square.centre)
        for f in self.candidates(square):
            errors = scale.errors(f(s, t), f.coarser(2)(s, t))
            for doubt in errors if f.of == "roots" else [score(errors)]:  # roots, mostly chosen, for values and logarithms apart
                i, j = divmod(int(doubt.argmax()), len(t))
                found.append((rounded(float(s[i])), rounded(float(t[j]))))
        return found

    def assessed(self, square: Square, known: Sequence[Tensor], scale: Scale) -> Square:
        """A square whose points were evaluated, with its interpolant and error; `known`: s, t and value of all places seen."""
        if square.direct:
            return square
        s, t, truth = (column[square.fresh(known[0], known[1])] for column in known)
        candidates = self.candidates(square) if bool(truth.isfinite().all()) else []
        if not candidates:
            return square
        errors = [_estimate(f, scale.worst(f.at(s, t), truth), scale) for f in candidates]
        best = min(range(len(candidates)), key=lambda i: float(score(errors[i])))
        return replace(square, interpolant=candidates[best], errors=(float(errors[best][0]), float(errors[best][1])))


def sample_square(evaluate: Evaluate, *, resolution: int, tol: float, most: int, seed: int, also: Sequence[Place] = ()) -> Sampled:
    """Refine until the error estimated is below `tol` of the range everywhere, or `most` evaluations would be passed.

    All places of a round are asked for at once. The first square is always sampled, at the cost of about 33 evaluations, or as many as the picture has points. `also`: places that
    somebody will look at, such as networks, and that are checks beside the others. What happens between all of these (a narrow well, a lone hole) is not seen.
    """
    sampled = Sampled(resolution, tol, seed)

    def see(places: Iterable[Place]) -> None:
        wanted = sampled.unseen(places)
        sampled.seen.update(zip(wanted, evaluate(wanted), strict=True))

    whole = Square((0.0, 0.0), 1.0)
    step = [replace(whole, direct=True)] if resolution**2 <= sampled.cost([whole]) else [whole]
    see(also)
    while step:
        see(place for square in step for place in (sampled.points_in(square) if square.direct else square.nodes()))
        scale = sampled.scale()
        see([place for square in step if not square.direct for place in sampled.checks(square, scale)])
        scale, known = sampled.scale(), torch.tensor([(*place, value) for place, value in sampled.seen.items()], dtype=torch.float64).unbind(1)
        sampled.squares = [sampled.assessed(square, known, scale) for square in [*sampled.squares, *step]]  # all of them: the range may have grown
        step = _next_step(sampled, scale, most)
    return sampled


def _next_step(sampled: Sampled, scale: Scale, most: int) -> list[Square]:
    """What to sample next in place of the squares that are not good enough, which are taken out; the worst come first where not all can be paid for."""
    step: list[Square] = []
    for square in sorted(sampled.squares, key=lambda square: -square.score):
        if square.direct or square.score <= sampled.tol:
            continue
        finer = _finer(sampled, square, scale)
        if len(sampled.seen) + sampled.cost([*step, *finer]) <= most:
            sampled.squares.remove(square)
            step += finer
    return step


def _finer(sampled: Sampled, square: Square, scale: Scale) -> list[Square]:
    """More points a side where these help, four squares where they do not, the picture's own points where these are the fewest."""
    f = square.interpolant
    if f is not None and square.m < LAST and (square.m == FIRST or _foretold(f, scale) <= sampled.tol):
        finer = [Square(square.centre, square.half, 2 * square.m)]
    else:
        h = square.half / 2
        finer = [Square((square.centre[0] + a * h, square.centre[1] + b * h), h) for a in (-1, 1) for b in (-1, 1)]
        if f is not None:  # a quarter of m / 2 points a side is no finer, and enough where the whole was good
            finer = [quarter if _good_in(quarter, f, scale, sampled.tol) else replace(quarter, m=2 * FIRST) for quarter in finer]
    direct = [Square(square.centre, square.half, direct=True, errors=(0.0, 0.0))]
    return direct if sampled.cost(direct) <= SURE * sampled.cost(finer) else finer


def _estimate(fine: Interpolant, checks: Tensor, scale: Scale) -> Tensor:
    r"""(2,) $2.2 \sqrt{c h}$ (for logarithms $3 \sqrt{c h}$) of the largest error c on fresh points, a few, and the largest h of the grid of half as many intervals on this one's points, which are many.

    Neither alone tells the largest error: c sees too little of the square, h is another grid's (and counts as at least c, and at most 8 c). Over 356 squares of 24 networks the largest error on 51 x 51 points was at most 2.4 times
    their geometric mean (1.2 to 1.5 times in 97 of 100), and up to 12 times c. On 116 planes of 24 other networks the finished estimate held at every point of the picture; `make evidence-5` looks at 40 more.
    """
    found = torch.tensor(SAFETY, dtype=torch.float64) * (checks * torch.minimum(torch.maximum(_missed(fine, 2, scale), checks), BLIND * checks)).sqrt()
    found = found + 8 * EPSILON * float(fine.values.abs().max()) / scale.spread  # of the values themselves
    if scale.logarithmic is not None:
        x = torch.linspace(-1, 1, 4 * len(fine.values) + 1, dtype=torch.float64)
        if float(fine(fine.centre[0] + fine.half * x, fine.centre[1] + fine.half * x).min()) <= 0:
            found[1] = math.inf  # a picture with logarithmic colours would have a hole there
    return found


def _missed(fine: Interpolant, step: int, scale: Scale) -> Tensor:
    """(2,) errors of a coarser grid at the points of this one."""
    return scale.worst(fine.coarser(step)(*_axes(fine)), fine.values)


def _foretold(fine: Interpolant, scale: Scale) -> float:
    """The score of the next finer grid, if errors go on falling at the rate of the grids within this one."""
    half, quarter = (float(score(_missed(fine, step, scale))) for step in (2, 4))
    return half * min(half / quarter, 1.0) ** 2 if math.isfinite(quarter) and quarter > 0 else half


def _good_in(part: Square, fine: Interpolant, scale: Scale, tol: float) -> bool:
    """Whether the grid is foretold to be good enough in a part of its square."""
    s, t = _axes(fine)
    rows, columns = part.within(s, 0), part.within(t, 1)
    half, quarter = (score(scale.errors(fine.coarser(step)(s[rows], t[columns]), fine.values[rows][:, columns])).max() for step in (2, 4))
    return bool(half * (half / quarter).clamp(max=1.0) <= tol)


def _axes(f: Interpolant) -> tuple[Tensor, Tensor]:
    x = nodes(len(f.values) - 1)
    return f.centre[0] + f.half * x, f.centre[1] + f.half * x


def rounded(x: float) -> float:
    """The same number for the same place, on whichever grid it is met."""
    return round(x, 14) + 0.0
