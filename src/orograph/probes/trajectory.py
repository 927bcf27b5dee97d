"""The way of a training through the plane of its principal components."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import AtLeastOne, File, Grid, Positive, Seed
from ..pictures import Examples, draw, mark_rows, own_statistics, sampled_data
from ..planes import principal_plane
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Point, Result, Table
from ..samples import Samples, SurfaceStatistics, chosen_policy
from ..subject import Subject


def _says(results: Results) -> str:
    table, faithful = results["path"], results["faithful"]
    assert isinstance(table, Table) and isinstance(faithful, Table)
    rows = {row["quantity"]: row["value"] for row in faithful.rows}
    doubtful = [row for row in table.rows if row["doubtful"]]
    trust = f"do not trust the picture at {len(doubtful)} of {len(table.rows)} points, where the plane misleads or is not known" if doubtful else "at every point the plane tells the loss about right"
    short = "" if rows["error asked for was reached"] else " Evaluations of the surface ran out before the error asked for was reached: raise max_evaluations and resolution, or ask for less (tol)."
    return f"The plane holds {rows['explained variance']:.0%} of the variance of {len(table.rows)} points: {trust}.{short}"


@probe(says=_says)
def trajectory(
    subject: Subject, *points: Point, resolution: Grid = 51, tol: Positive = 0.01, max_evaluations: AtLeastOne = 3500, statistics: SurfaceStatistics = "auto", examples: Examples = None, seed: Seed = 0, store: File | None = None
) -> dict[str, Result]:
    r"""Networks, such as checkpoints of a training in their order, on the plane of their first two principal components through the last of them, over the loss in that plane.

    Rows $w_k - \bar w$, centred; the plane of their two largest singular vectors, scaled so that all networks lie within 0.8 of the middle.

    Settings: `statistics`: BatchNorm's in the plane, "frozen" at those of the last network, "reestimated" at every point (one more forward pass), or "auto": re-estimated where there are any ·
    `examples`: a random sample of the data, or "enough" for a standard error below `tol` of the range · `resolution`, `tol`, `max_evaluations`, `store` as for a surface.

    Results: `surface` · `path`: for every network its coordinates, its own loss, the loss at its shadow in the plane (both evaluated, none read off the picture), the distance that the plane
    leaves out, and whether it is `doubtful`: a residual of more than a quarter of the picture's half-diagonal, or losses that differ by more than a quarter of the picture's range · `faithful`:
    the variance explained and the picture's error.

    Cost: a surface, and two forward passes for every network.
    """
    if len(points) < 3:
        raise TypeError(f"trajectory takes three networks or more, in the order of the training, got {len(points)}.")
    plane, variances = principal_plane(points)
    statistics = chosen_policy(statistics, subject.objective, len(points))
    objective, spent = sampled_data(subject.objective, plane, examples, span=1.0, tol=tol, seed=seed)
    with progress_bar(subject.progress, "trajectory", unit="point") as report:
        samples = Samples(objective, plane, statistics, Path(store) if store else None, lambda done, expected: report(done, expected, ""), reference=plane.coordinates(points[-1])[:2], evaluations=spent, passes=spent)
        picture = draw(samples, span=1.0, resolution=resolution, tol=tol, most=max_evaluations, seed=seed, networks=points, whole=subject.objective, title="principal components")
        samples.close()
        rows = [{"step": step} | row for step, row in enumerate(mark_rows(picture, points))]
    faithful: list[dict[str, Any]] = [
        {"quantity": "explained variance", "value": sum(variances)}, {"quantity": "first component", "value": variances[0]}, {"quantity": "second component", "value": variances[1]},
        {"quantity": "error of the picture, share of its range", "value": picture.sampled.errors[0]}, {"quantity": "error asked for was reached", "value": picture.sampled.converged},
        {"quantity": "evaluations of the loss", "value": samples.evaluations}, {"quantity": "forward passes of the data for them", "value": samples.passes},
    ]  # fmt: skip
    return {
        "surface": replace(picture.surface, evaluations=samples.evaluations), "path": Table(rows=rows, x="step", y="loss", label=f"the way through the plane{own_statistics(statistics)}"),
        "faithful": Table(rows=faithful, x="quantity", y="value", label="before believing the picture"),
    }  # fmt: skip
