"""The way of a training through the plane of its principal components."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..pictures import Examples, check_examples, draw, sampled_data
from ..planes import principal_plane
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Point, Result, Table
from ..samples import Samples, SurfaceStatistics, check_policy
from ..subject import Subject

DOUBTFUL = 0.25  # of the picture's size outside the plane, or of its range between true and in-plane loss


def _says(results: Results) -> str:
    table, faithful = results["path"], results["faithful"]
    assert isinstance(table, Table) and isinstance(faithful, Table)
    rows = {row["quantity"]: row["value"] for row in faithful.rows}
    doubtful = [row for row in table.rows if row["doubtful"]]
    trust = f"do not trust the picture at {len(doubtful)} of {len(table.rows)} points, where the plane misleads" if doubtful else "at every point the plane tells the loss about right"
    short = "" if rows["error asked for was reached"] else " Evaluations of the surface ran out before the error asked for was reached: raise max_evaluations, or ask for less (tol)."
    return f"The plane holds {rows['explained variance']:.0%} of the variance of {len(table.rows)} points: {trust}.{short}"


@probe(says=_says)
def trajectory(
    subject: Subject, *points: Point, resolution: int = 51, tol: float = 0.01, max_evaluations: int = 3500, statistics: SurfaceStatistics = "frozen", examples: Examples = None, seed: int = 0, store: str | None = None
) -> dict[str, Result]:
    r"""Networks, such as checkpoints of a training in their order, on the plane of their first two principal components through the last of them, over the loss in that plane.

    `path`: for every network its coordinates, its own loss, the loss at its shadow in the plane (both evaluated, none read off the picture), the distance that the plane
    leaves out, and whether it is `doubtful`: the residual is more than a quarter of the picture's half-diagonal, or the two losses differ by more than a quarter of the picture's range.
    Running statistics of the plane are those of the last network, or re-estimated. `examples`: a random sample of the data, or "enough" for a standard error below `tol` of the range.
    """
    if len(points) < 3:
        raise TypeError(f"trajectory takes three networks or more, in the order of the training, got {len(points)}.")
    check_policy("trajectory", statistics)
    check_examples("trajectory", examples)
    plane, variances = principal_plane(points)
    objective = sampled_data(subject.objective, plane, examples, span=1.0, tol=tol, seed=seed)
    with progress_bar(subject.progress, "trajectory", unit="point") as report:
        samples = Samples(objective, plane, statistics, Path(store) if store else None, lambda count: report(count, max(count, 100), ""))
        picture = draw(samples, span=1.0, resolution=resolution, tol=tol, most=max_evaluations, seed=seed, whole=subject.objective)
    z = picture.surface.z[picture.surface.z.isfinite()]
    spread = float(z.max() - z.min()) if len(z) else 0.0
    size = math.hypot(float(plane.u.double().norm()), float(plane.v.double().norm()))  # a middle of the picture is near nothing, and no reason for doubt
    rows: list[dict[str, Any]] = []
    for step, point in enumerate(points):
        s, t, off = plane.coordinates(point)
        loss, shadow = objective.at(point).value(), samples.losses([(s, t)])[0]
        doubtful = off > DOUBTFUL * size or abs(loss - shadow) > DOUBTFUL * spread
        rows.append({"step": step, "name": point.label, "s": s, "t": t, "loss": loss, "in_plane_loss": shadow, "residual": off, "doubtful": bool(doubtful)})
    faithful: list[dict[str, Any]] = [
        {"quantity": "explained variance", "value": sum(variances)}, {"quantity": "first component", "value": variances[0]}, {"quantity": "second component", "value": variances[1]},
        {"quantity": "error of the picture, share of its range", "value": picture.sampled.errors[0]}, {"quantity": "error asked for was reached", "value": picture.sampled.converged},
    ]  # fmt: skip
    return {
        "surface": picture.surface, "path": Table(rows=rows, x="step", y="loss", label="the way through the plane"),
        "faithful": Table(rows=faithful, x="quantity", y="value", label="before believing the picture"),
    }  # fmt: skip
