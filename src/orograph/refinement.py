"""Which points of a picture to evaluate: more a side where these help, smaller squares where they do not, all of them where that is as cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .chebyshev import Interpolant
from .grids import FIRST, Place, Sampled, Scale, Square, score

SAFETY, COARSE = 2.2, 3.3  # see `_estimate`; of the coarsest grids
BLIND = 8.0  # a coarser grid counts as at most so much worse than the checks
SURE = 2  # points of the picture that are evaluated rather than one more node, which only may help
EPSILON = torch.finfo(torch.float64).eps
Evaluate = Callable[[Sequence[Place]], Sequence[float]]


def sample_square(evaluate: Evaluate, *, resolution: int, tol: float, most: int, seed: int, also: Sequence[Place] = (), price: Callable[[int], int] = int) -> Sampled:
    """Refine until the error estimated is below `tol` of the range everywhere, or `most` evaluations would be passed, which never happens.

    All places of a round are asked for at once. `also`: places that somebody will look at, such as networks, and that are checks beside the others. All other places are points of the
    picture. What happens between all of these (a narrow well, a lone hole) is not seen. `price`: evaluations that some new places take.
    """
    sampled = Sampled(resolution, tol, seed, most, price)

    def see(places: Iterable[Place]) -> None:
        wanted = sampled.unseen(places)
        sampled.left -= price(len(wanted))
        sampled.seen.update(zip(wanted, evaluate(wanted), strict=True))

    see(also)
    step = _first_step(sampled)
    while step:
        see(place for square in step for place in sampled.places(square))
        scale = sampled.scale()
        see([place for square in step if not square.direct for place in sampled.checks(square, scale)])
        scale, known = sampled.scale(), _known(sampled)
        sampled.squares = [_assessed(sampled, square, known, scale) for square in [*sampled.squares, *step]]  # all of them: the range may have grown
        step = _next_step(sampled, scale)
    _spend_the_rest(sampled, see)
    return sampled


def _first_step(sampled: Sampled) -> list[Square]:
    """The whole picture, as it can be afforded; nothing where not even nine points of it can."""
    last = sampled.resolution - 1
    whole = Square((0, last, 0, last))
    direct = replace(whole, direct=True, errors=(0.0, 0.0))
    if whole.most < FIRST or sampled.cost([direct]) <= sampled.cost([whole]):
        choice = [direct]
    else:
        choice = [whole, replace(whole, m=FIRST // 2)]
    affordable = [square for square in choice if sampled.affords([square])]
    if not affordable:
        sampled.squares = [replace(whole, m=0)]
    return affordable[:1]


def _known(sampled: Sampled) -> Sequence[Tensor]:
    """s, t and value of all places seen."""
    return torch.tensor([(*place, value) for place, value in sampled.seen.items()], dtype=torch.float64).unbind(1)


def _assessed(sampled: Sampled, square: Square, known: Sequence[Tensor], scale: Scale) -> Square:
    """A square whose points were evaluated, with its interpolant and error."""
    if square.direct:
        return square
    s, t, truth = (column[_fresh(sampled, square, known)] for column in known)
    candidates = sampled.candidates(square) if len(truth) and bool(truth.isfinite().all()) else []
    if not candidates:
        return square
    errors = [_estimate(f, scale.worst(f.at(s, t), truth), scale) for f in candidates]
    best = min(range(len(candidates)), key=lambda i: float(score(errors[i])))
    return replace(square, interpolant=candidates[best], errors=(float(errors[best][0]), float(errors[best][1])))


def _fresh(sampled: Sampled, square: Square, known: Sequence[Tensor]) -> Tensor:
    """Which places are in a square and none of its nodes."""
    inside, node = torch.ones(len(known[0]), dtype=torch.bool), torch.ones(len(known[0]), dtype=torch.bool)
    for x, used in zip(known, square.sampled(), strict=False):
        own = sampled.axis[used]
        inside &= (x >= own[0] - 1e-12) & (x <= own[-1] + 1e-12)
        node &= ((x[:, None] - own).abs() < 1e-12).any(1)
    return inside & ~node


def _next_step(sampled: Sampled, scale: Scale) -> list[Square]:
    """What to sample next in place of the squares that are not good enough, which are taken out; the worst come first where not all can be paid for."""
    step: list[Square] = []
    for square in sorted(sampled.squares, key=lambda square: -square.score):
        if square.direct or square.score <= sampled.tol:
            continue
        finer = _finer(sampled, square, scale)
        if sampled.affords([*step, *finer]):
            sampled.squares.remove(square)
            step += finer
    return step


def _finer(sampled: Sampled, square: Square, scale: Scale) -> list[Square]:
    """More points a side where these help, four squares where they do not, the picture's own points where these are the fewest."""
    f = square.interpolant
    direct = [replace(square, direct=True, interpolant=None, errors=(0.0, 0.0))]
    if f is not None and square.m < square.most and (square.m <= FIRST or _foretold(f, scale) <= sampled.tol):
        finer = [Square(square.sides, 2 * square.m)]
    else:
        finer = square.quarters()
        if any(quarter.most < FIRST for quarter in finer):
            return direct
        if f is not None:  # a quarter of m / 2 points a side is no finer, and enough where the whole was good
            finer = [quarter if quarter.most <= FIRST or _good_in(sampled, quarter, f, scale) else replace(quarter, m=2 * FIRST) for quarter in finer]
    return direct if sampled.cost(direct) <= SURE * sampled.cost(finer) else finer


def _spend_the_rest(sampled: Sampled, see: Callable[[Iterable[Place]], None]) -> None:
    """Where nearly all points of a square can be paid for, they are evaluated, and those left out are told from their neighbours."""
    for square in sorted(sampled.squares, key=lambda square: -square.score):
        if square.direct or square.score <= sampled.tol:
            continue
        missing = sampled.unseen(sampled.points_in(square))
        left = next((n for n in range(min(len(missing), sampled.left), 0, -1) if sampled.price(n) <= sampled.left), 0)
        if not left or (2 * left < len(missing) and square.m):
            continue
        see(_spread_out(sampled, square, missing)[:left])
        thin = replace(square, direct=True, interpolant=None)
        sampled.squares[sampled.squares.index(square)] = replace(thin, errors=sampled.thin_errors(thin, sampled.scale()))


def _spread_out(sampled: Sampled, square: Square, missing: Sequence[Place]) -> list[Place]:
    """Those first that are worst told from their neighbours: on the square's border, then every second one; the rest from the middle on last."""
    rows, columns = replace(square, direct=True).sampled()
    index = {place: (i, j) for place, (i, j) in zip(sampled.points_in(square), ((i, j) for i in rows for j in columns), strict=True)}
    a, b, c, d = square.sides

    def last(place: Place) -> tuple[bool, int]:
        i, j = index[place]
        depth = min(i - a, b - i, j - c, d - j)
        return (i + j) % 2 == 1 and depth > 0, depth

    return sorted(missing, key=last)


def _estimate(fine: Interpolant, checks: Tensor, scale: Scale) -> Tensor:
    r"""(2,) $2.2 \sqrt{c h}$ (for 5 x 5 points, where h is told by 3 x 3, $3.3 \sqrt{c h}$) of the largest error c on fresh points, a few, and the largest h of the grid of half as many intervals on this one's points, which are many.

    Neither alone tells the largest error: c sees too little of the square, h is another grid's (and counts as at least c, and at most 8 c). One of the checks lies where the loss is lowest, and logarithms are told worst. On 96 planes
    of six networks, random, along eigenvectors of four lengths, along the gradient and through three points, the finished estimate of values and logarithms held at every point of the picture; the evidence looks at others.
    """
    found = (SAFETY if len(fine.s) > FIRST + 1 else COARSE) * (checks * torch.minimum(torch.maximum(_missed(fine, 2, scale), checks), BLIND * checks)).sqrt()
    found = found + 8 * EPSILON * float(fine.values.abs().max()) / scale.spread  # of the values themselves
    if scale.logarithmic is not None and not scale.floor:
        s, t = (torch.linspace(float(x[0]), float(x[-1]), 4 * len(x) + 1, dtype=torch.float64) for x in (fine.s, fine.t))
        if float(fine(s, t).min()) <= 0:
            found[1] = math.inf  # a picture with logarithmic colours would have a hole there
    return found


def _missed(fine: Interpolant, step: int, scale: Scale) -> Tensor:
    """(2,) errors of a coarser grid at the points of this one."""
    return scale.worst(fine.coarser(step)(fine.s, fine.t), fine.values)


def _foretold(fine: Interpolant, scale: Scale) -> float:
    """The score of the next finer grid, if errors go on falling at the rate of the grids within this one."""
    half, quarter = (float(score(_missed(fine, step, scale))) for step in (2, 4))
    return half * min(half / quarter, 1.0) ** 2 if math.isfinite(quarter) and quarter > 0 else half


def _good_in(sampled: Sampled, part: Square, fine: Interpolant, scale: Scale) -> bool:
    """Whether the grid is foretold to be good enough in a part of its square."""
    rows, columns = ((x >= sampled.axis[low] - 1e-12) & (x <= sampled.axis[high] + 1e-12) for x, low, high in ((fine.s, *part.sides[:2]), (fine.t, *part.sides[2:])))
    half, quarter = (score(scale.errors(fine.coarser(step)(fine.s[rows], fine.t[columns]), fine.values[rows][:, columns])).max() for step in (2, 4))
    return bool(half * (half / quarter).clamp(max=1.0) <= sampled.tol)
