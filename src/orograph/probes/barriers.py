"""The loss along the straight line between two networks."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..arguments import Grid
from ..curvature import hessian
from ..paths import Line
from ..profiles import Statistics, end_labels, ends_table, remarks, trace_path
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Curve, Estimate, Point, Result, Table
from ..subject import Subject


def _says(results: Results) -> str:
    table = results["barriers"]
    assert isinstance(table, Table)
    row = next(row for row in table.rows if row["definition"] == "over the chord" and row["metric"] == "loss")
    if results["length"].value == 0:  # type: ignore[union-attr]
        return "The two networks have the same weights, so there is nothing between them."
    if row["value"] <= 1e-3 * max(abs(float(results["path"].y[0])), 1e-12):  # type: ignore[union-attr]
        first = "The straight line between the two networks has no barrier: the loss stays below the chord between its ends."
    else:
        first = f"The straight line between the two networks has a loss barrier of {row['value']:.3g} over the chord between its ends, at t = {row['t']:.2f}: they are not connected by it."
    return first + remarks(results["ends"], row["statistics"])


@probe(says=_says)
def barrier(subject: Subject, a: Point, b: Point, *, resolution: Grid = 25, statistics: Statistics = "interpolated", refine: bool = True, derivatives: bool = False) -> dict[str, Result]:
    r"""Loss and error along $(1-t)\,a + t\,b$ at `resolution` equidistant t, and the barrier by each definition in use.

    Each maximum of the loss is refined in its bracket (Brent's method); it stays a lower bound on the barrier, since a narrower peak may lie between. `lower`,
    `upper`: 95 % interval over examples at that t, from paired differences to the ends · `statistics`: BatchNorm's running statistics "interpolated"
    like the weights, or "reestimated" on the data at every t, the ends too (of the first data set, for `held_out` too); "repaired": means and scales of all units' activations
    between those of the ends (REPAIR), which for a network with running statistics is the same · `derivatives`: the gradient's norm and the curvature
    $d^\top H d$ along the unit direction d of the line at every t of the grid too, for a gradient and a product each. Costs `resolution` forward passes and up to 36 for the
    refinement, twice with `held_out` data, and as many again where statistics are re-estimated.
    """
    results: dict[str, Result] = {}
    rows: list[dict[str, Any]] = []
    for split, objective in (("train", subject.objective), ("held out", subject.held_out)):
        if objective is None:
            continue
        with progress_bar(subject.progress, f"line, {split}", unit="point") as report:
            profile = trace_path(objective, Line(a, b), statistics=statistics, resolution=resolution, report=report, refine=refine, fitted_on=subject.objective)
        rows += profile.barriers("loss", split)
        if split == "train":
            results["ends"] = ends_table({a.label or "a": (profile, 0.0), b.label or "b": (profile, 1.0)})
        suffix = "" if split == "train" else "_held_out"
        t, losses = profile.curve("loss")
        results[f"path{suffix}"] = Curve(x=t, y=losses, label=f"loss along the line, {split}", xlabel=end_labels(a, b), ylabel="loss")
        t, errors = profile.curve("error")
        if not bool(errors.isnan().any()):
            rows += profile.barriers("error", split)
            results[f"error_path{suffix}"] = Curve(x=t, y=errors, label=f"error along the line, {split}", xlabel=end_labels(a, b), ylabel="share of wrong predictions")
    results["length"] = Estimate(value=Line(a, b).length(), label="distance between the two networks")
    if derivatives:
        results |= _derivatives(subject, a, b, resolution)
    if "error_path" not in results:
        subject.missing["error_path"] = "the loss is no classification that Orograph knows"
    if any(math.isnan(row["lower"]) for row in rows):
        subject.missing["lower, upper"] = "the loss of single examples is known for torch's own losses only"
    results["barriers"] = Table(rows=rows, x="definition", y="value", label="barriers")
    return results


def _derivatives(subject: Subject, a: Point, b: Point, resolution: int) -> dict[str, Result]:
    """Gradient norm and curvature along the line, at running statistics as interpolated."""
    line, t = Line(a, b), torch.linspace(0, 1, resolution, dtype=torch.float64)
    length, slopes, bends = line.length(), [], []
    if length == 0:
        subject.missing["curvature"] = "the two networks have the same weights, so there is no direction"
        return {}
    for s in t.tolist():
        here = subject.objective.at(line(s))
        op = hessian(here, engine="fresh", check=False)
        direction = ((b.theta - a.theta) / length).to(op.dtype)
        slopes.append(float(here.space.norm(here.gradient())))
        bends.append(float(op.space.inner(direction, op @ direction)))
        subject.shared.elsewhere += op.products
    shared = {"x": t, "xlabel": end_labels(a, b)}
    return {
        "gradient_norm": Curve(y=torch.tensor(slopes, dtype=torch.float64), label="gradient norm along the line", ylabel="gradient norm", **shared),  # type: ignore[arg-type]
        "curvature": Curve(y=torch.tensor(bends, dtype=torch.float64), label="curvature along the line", ylabel="d'Hd", **shared),  # type: ignore[arg-type]
    }
