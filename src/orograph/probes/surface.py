"""The loss over a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..arguments import AtLeastOne, File, Grid, Positive, Seed
from ..curvature import hessian
from ..objective import Objective
from ..pictures import (
    Examples,
    Picture,
    basin_rows,
    draw,
    mark_rows,
    over_directions,
    own_statistics,
    quadratic_model,
    sampled_data,
)
from ..planes import LENGTH_EVALUATIONS, Normalisation, Plane, curvature_length, plane_through, random_direction
from ..progress import Report, progress_bar
from ..registry import Results, probe
from ..results import Point, Result, Surface, Table, unequal_losses
from ..samples import Samples, SurfaceStatistics, chosen_policy
from ..subject import Subject

Axes = Literal["random", "eigenvectors", "gradient"]
RADIUS = "length of (s, t) at which the quadratic model fails"
RISE = "rise of the quadratic model over the top eigenvector's axis"
MINIMA = "significant minima inside the picture"
AXES = {"eigenvectors": "the Hessian's top two eigenvectors", "gradient": "the gradient and the Hessian's top eigenvector"}


def _says(results: Results) -> str:
    s, table, points, basins = results["surface"], results["faithful"], results["points"], results["basins"]
    assert isinstance(s, Surface) and isinstance(table, Table) and isinstance(points, Table) and isinstance(basins, Table)
    rows = {row["quantity"]: row["value"] for row in table.rows}
    finite = s.z[s.z.isfinite()]
    if not len(finite):
        return "No point of this plane that was evaluated has a finite loss."
    radius = rows.get(RADIUS, math.nan)
    model = f" The quadratic model is off by a tenth of the range from (s, t) of length {radius:.2g} on." if math.isfinite(radius) else ""
    lowest = finite.min()
    near = float(((s.x[:, None] ** 2 + s.y[None] ** 2).sqrt())[(s.z - lowest).abs() <= 0.02 * (finite.max() - lowest)].max())
    if near < 0.2 * float(s.x[-1]):
        model += f" The basin is small in it: span={2.5 * max(near, float(s.x[1] - s.x[0])):.1g} shows it."
    if rows[MINIMA] > 1:
        told = len(basins.rows)
        model += f" It has {rows[MINIMA]} minima that are deeper than all doubt{f', of which the table has {told}' if told < rows[MINIMA] else ''}."
    error, left = rows["error of the picture, share of its range"], rows["points of the picture left out"]
    own = f"; {error:.1%} of that range is the picture's own error" if math.isfinite(error) else ""
    left_out = f" {left:,} of its {s.z.numel():,} points are left out." if left else ""
    short = "" if rows["error asked for was reached"] else " Evaluations ran out before the error asked for was reached: raise max_evaluations and resolution, or ask for less (tol)."
    doubtful = [str(row["name"]) for row in points.rows if row["doubtful"]]
    doubt = f" Do not trust it at {', '.join(doubtful)}, whose own loss is another one or which lies outside." if doubtful else ""
    if len(points.rows) > 1:
        losses = {str(row["name"]): float(row["loss"]) for row in points.rows}
        doubt = f"{doubt} {unequal_losses(losses)}".rstrip()
    return f"Over this plane the loss goes from {rows['lowest sample']:.3g} to {rows['highest sample']:.3g}, drawn from {rows['samples that it is drawn from']:,} samples{own}.{left_out}{short}{doubt}{model}"


@probe(says=_says)
def surface(
    subject: Subject, *points: Point, plane: Plane | None = None, axes: Axes = "random", normalisation: Normalisation = "filter", span: Positive = 1.0, resolution: Grid = 51, tol: Positive = 0.01,
    max_evaluations: AtLeastOne = 3500, statistics: SurfaceStatistics = "auto", examples: Examples = None, seed: Seed = 0, seeds: AtLeastOne = 1, store: File | None = None,
) -> dict[str, Result]:  # fmt: skip
    r"""The loss over a plane: $L(\theta + s u + t v)$ for (s, t) in [-`span`, `span`]^2, around the own point, through three networks, or in a `plane` given.

    The directions u, v have the length of the weights, so that s and t are relative distances (axes say how long they are). `axes`: "random", normalised per "filter" (Li et al. 2018,
    arXiv:1712.09913), per "layer" or as a "whole" · "eigenvectors": the top two of the Hessian · "gradient": it and the top eigenvector. Both of these axes are so long that the quadratic model
    rises along the top eigenvector by what has been learnt, $\ell = \sqrt{2 \Delta / \lambda_1}$, $\Delta = \max(|L|, |L_0 - L|)$ with $L_0$ the loss of all weights zero (about log C for C classes), and
    no longer than the weights. A unit vector would lead as far as the network's scale has it, beyond the basin, where a loss has kinks and a picture costs several times as much.

    Samples are points of the picture near to Chebyshev points. They are refined, and the plane is cut where the loss is not smooth, until the error estimated on points never used is below `tol`
    of the range: at worst when every point of the picture is evaluated. What is not finite stays a hole; what happens between all samples, such as a narrow well, is not seen.

    Settings: `statistics`: BatchNorm's "frozen" at those of the plane's origin, "reestimated" at every point (one more forward pass), or "auto": re-estimated through three networks, each of
    which has its own · `examples`: a random sample of the data, or "enough" for a standard error below `tol` of the range · `seed`, `seeds`: the first seed of random axes, and how many planes ·
    `store`: a file of samples, from which a killed job goes on and a finer one begins · `max_evaluations`: of the loss, for each plane; the points of the picture, `resolution` squared, are a limit too. Where a limit binds, the status is "budget-limited" and the error stated is that of what was not evaluated.

    Results: `surface` · `first_axis`, `second_axis`: the loss along the axes · `quadratic`: the model from two products · `basins`: minima and the passes out of them; `significant`: against the errors of
    data and picture and the gaps between its points, and not on its border · `points`: for each network where it lies, its own loss and that of its shadow in the plane, how far it is from the plane, and whether the plane misleads there · `faithful`:
    what to know before believing the picture · with several seeds `directions` (mean and standard error over all axes), `spread` (standard deviation between planes) and `seeds` (the picture itself is the first one's; `seed` chooses).

    Cost: about 100 evaluations for a smooth network, 300 for ReLU with BatchNorm, and never more than the picture has points. Everything counts as one: points, networks and their shadows, the
    reference of errors, minima, stored samples that are checked, the choice of axes' length and of the data (in passes of the picture's own data). An evaluation is one forward pass of the
    data, two with statistics re-estimated; `faithful` has both numbers. Products with the Hessian are counted apart, by the record. Only where the networks given would take two thirds of all
    evaluations, on a picture of some 3 x 3 points, they come on top.
    """
    _check(points, plane, axes, normalisation, seeds)
    statistics = chosen_policy(statistics, subject.objective, len(points))
    planes, marks, rise = _planes(subject, points, plane, axes, normalisation, range(seed, seed + int(seeds)))
    _check_axes(planes, normalisation)
    objective, spent = sampled_data(subject.objective, planes[0], examples, span=span, tol=tol, seed=seed)
    spent += LENGTH_EVALUATIONS if rise is not None else 0
    pictures: list[Picture] = []
    with progress_bar(subject.progress, "surface", unit="point") as report:
        for chosen in planes:
            before = sum(picture.surface.evaluations for picture in pictures)
            tell, reference = partial(_tell, report, before, len(planes) - len(pictures) - 1), (0.0, 0.0) if plane is not None else chosen.coordinates(marks[0])[:2]
            samples = Samples(objective, chosen, statistics, Path(store) if store else None, tell, reference=reference, evaluations=0 if pictures else spent, passes=0 if pictures else spent)
            title = "the plane given" if plane is not None else "through three networks" if points else f"random axes, {normalisation}-normalised, seed {seed + len(pictures)}" if rise is None else f"{AXES[axes]}, axes of a rise of {rise:.2g}"
            pictures.append(draw(samples, span=span, resolution=resolution, tol=tol, most=max_evaluations, seed=seed, networks=marks, whole=subject.objective, title=title))
            samples.close()
    picture, chosen = pictures[0], planes[0]
    results: dict[str, Result] = {"surface": picture.surface, "first_axis": picture.slices[0], "second_axis": picture.slices[1]}
    models, curvature = _models(subject, objective, planes, pictures, own=not points and plane is None and statistics == "frozen", seed=seed)
    results |= models
    results["points"] = Table(rows=mark_rows(picture, marks), x="s", y="t", label=f"networks in the plane{own_statistics(statistics)}")
    basins = basin_rows(picture)
    significant = sum(minimum.significant for minimum in picture.minima)
    left_out = significant - sum(bool(row["significant"]) for row in basins)
    cut = f", the {len(basins)} deepest of {significant} that are significant" if left_out else ""
    results["basins"] = Table(rows=basins, x="s", y="depth", label=f"minima in the plane{cut}")
    rows = _facts(subject, picture, chosen, basins, "the origin" if plane is not None else marks[0].label)
    rows += [{"quantity": RISE, "value": rise}] if rise is not None else []
    results["surface"] = replace(picture.surface, evaluations=picture.samples.evaluations)
    rows.append({"quantity": MINIMA, "value": significant})
    results["faithful"] = Table(rows=rows + curvature, x="quantity", y="value", label="before believing the picture")
    return results


def _facts(subject: Subject, picture: Picture, chosen: Plane, basins: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """What to know before believing a picture."""
    seen = [loss for loss in (*picture.sampled.seen.values(), *(row["loss"] for row in basins)) if math.isfinite(loss)]
    rows: list[dict[str, Any]] = [
        {"quantity": "error of the picture, share of its range", "value": picture.sampled.errors[0]},
        *([{"quantity": "error of its logarithms, share of their range", "value": picture.sampled.errors[1]}] if picture.sampled.scale().logarithmic is not None else []),
        {"quantity": "samples that it is drawn from", "value": len(picture.sampled.seen)}, {"quantity": "lowest sample", "value": min(seen, default=math.nan)},
        {"quantity": "highest sample", "value": max(seen, default=math.nan)}, {"quantity": "error asked for was reached", "value": picture.sampled.converged}, {"quantity": "points of the picture left out", "value": picture.sampled.unknown},
        {"quantity": "cosine between the axes", "value": chosen.cosine}, {"quantity": "share of the first axis in biases and norms", "value": _flat_share(subject, chosen)},
    ]  # fmt: skip
    lengths = [float(x.double().norm()) for x in (chosen.origin.theta if isinstance(chosen.origin, Point) else chosen.origin, chosen.u, chosen.v)]
    rows += [{"quantity": name, "value": length} for name, length in zip(("norm of the weights, |w|", "length of the first axis", "length of the second axis"), lengths, strict=True)]
    if picture.surface.error is not None:
        rows += [
            {"quantity": f"largest standard error of the data, of differences to {reference}", "value": float(picture.surface.error.nan_to_num(nan=0.0, posinf=math.inf).max())},
            {"quantity": f"standard error of the data, of the loss at {reference}", "value": picture.samples.level_error()},
        ]
    return [*rows, {"quantity": "evaluations of the loss", "value": picture.samples.evaluations}, {"quantity": "forward passes of the data for them", "value": picture.samples.passes}]


def _tell(report: Report, before: int, to_come: int, done: int, expected: int) -> None:
    """Progress over all planes: those to come will take about as many evaluations as this one."""
    report(before + done, before + expected * (1 + to_come), "")


def _models(subject: Subject, objective: Objective, planes: Sequence[Plane], pictures: Sequence[Picture], *, own: bool, seed: int) -> tuple[dict[str, Result], list[dict[str, Any]]]:
    """What the Hessian says of planes around the own point, and what several seeds say together; and of the first plane what to know."""
    results: dict[str, Result] = {}
    facts: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    op = None
    if own:
        op = subject.hessian() if objective is subject.objective else hessian(objective)
    else:
        subject.missing["quadratic"] = "it is the Hessian's at the own point, with running statistics as they are"
    before = op.products if op is not None else 0
    for k, (plane, picture) in enumerate(zip(planes, pictures, strict=True)):
        finite = picture.surface.z[picture.surface.z.isfinite()]
        row: dict[str, Any] = {"seed": seed + k, "lowest": float(finite.min()), "highest": float(finite.max())} if len(finite) else {"seed": seed + k}
        if op is not None:
            model, radius, (first, second) = quadratic_model(op, objective.at(plane.origin), plane, picture.surface)
            row |= {"radius": radius, "first_curvature": first, "second_curvature": second}
            results.setdefault("quadratic", model)
        rows.append(row)
    if op is not None:
        subject.shared.elsewhere += op.products - before if objective is not subject.objective else 0
        names = {"radius": RADIUS, "first_curvature": "curvature along the first axis, per squared distance", "second_curvature": "curvature along the second axis, per squared distance"}
        facts = [{"quantity": name, "value": rows[0][key]} for key, name in names.items()]
    if len(planes) > 1:
        results["directions"], results["spread"] = over_directions(pictures)
        results["seeds"] = Table(rows=rows, x="seed", y="highest", label="planes of several seeds")
    return results, facts


def _planes(subject: Subject, points: tuple[Point, ...], plane: Any, axes: Axes, normalisation: Normalisation, seeds: Sequence[int]) -> tuple[list[Plane], list[Point], float | None]:
    """The planes, the networks to be marked in them, and by how much the quadratic model rises over axes that are as long as curvature says."""
    objective = subject.objective
    own = objective.point()
    if plane is not None:
        return [Plane(objective.point(plane.origin), plane.u.to(own.theta), plane.v.to(own.theta))], [own], None
    if points:
        return [plane_through(points)], list(points), None
    if axes == "random":
        return [Plane(own, random_direction(objective, seed, normalisation), random_direction(objective, seed + 1_000_003, normalisation)) for seed in seeds], [own], None
    if objective.size < 2:
        raise ValueError(f"surface(axes={axes!r}) needs two directions, and there is one parameter. Use a barrier, or random axes.")
    g = subject.gradient() if axes == "gradient" else own.theta
    if axes == "gradient" and not bool(g.any()):
        raise ValueError('surface(axes="gradient"): the gradient is exactly zero here and is no direction. Use axes="eigenvectors".')
    top = subject.spectrum().top
    assert top.vectors is not None  # they go only when a record is stored
    length = curvature_length(objective, float(top.values[0]))
    rise = length**2 * float(top.values[0]) / 2
    first, second = length * top.vectors[:, 0].to(own.theta), length * top.vectors[:, 1].to(own.theta)
    if axes == "eigenvectors":
        return [Plane(own, first, second)], [own], rise
    return [Plane(own, (length * g / g.norm()).to(own.theta), first)], [own], rise


def _check_axes(planes: Sequence[Plane], normalisation: Normalisation) -> None:
    """ValueError for axes that lead nowhere."""
    if all(bool(axis.isfinite().all()) and bool(axis.any()) for plane in planes for axis in (plane.u, plane.v)):
        return
    why = "are all zero where they would be scaled to"
    if normalisation == "filter":
        why += " (filters; biases and other parameters of one axis are not moved)"
    raise ValueError(f"surface: an axis of the plane is zero or not finite. For random axes, the weights {why}: choose another normalisation, or give a plane.")


def _flat_share(subject: Subject, plane: Plane) -> float:
    """How much of the first direction's squared length is in parameters of one axis."""
    layout = subject.objective.layout
    parts = layout.split(plane.u)
    total = float(plane.u.double().norm()) ** 2
    return sum(float(part.double().norm()) ** 2 for part in parts if part.ndim < 2) / total if total else 0.0


def _check(points: tuple[Point, ...], plane: Plane | None, axes: Axes, normalisation: Normalisation, seeds: int) -> None:
    if len(points) not in (0, 3):
        raise TypeError(f"surface takes no network (a plane around the own point) or three, got {len(points)}.")
    if points and plane is not None:
        raise ValueError("surface: give three networks or plane=, not both.")
    if (points or plane is not None) and (axes, normalisation) != ("random", "filter"):
        raise ValueError(f"surface: the plane is given, so axes={axes!r} and normalisation={normalisation!r} choose nothing. Leave them out.")
    if seeds > 1 and (points or plane is not None or axes != "random"):
        raise ValueError(f"surface(seeds={seeds}) draws random axes anew, and these are given. Use seeds=1, or axes=\"random\".")
