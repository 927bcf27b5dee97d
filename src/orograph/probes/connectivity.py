"""Are two networks connected: straight, up to the order of their units, up to running statistics, or along a curve?"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from ..alignment import Alignment, align
from ..arguments import AtLeastOne, Grid, Positive, Seed, Whole
from ..axis_rules import INHERENT
from ..curves import fit_path
from ..errors import OrographError
from ..objective import Objective
from ..paths import Line, Path
from ..profiles import Profile, Statistics, end_labels, ends_table, remarks, trace_path
from ..progress import progress_bar
from ..registry import Results, probe
from ..renormalise import Repair
from ..results import Curve, Point, Result, Table
from ..subject import Subject
from ..symmetries import IN_PART

STRAIGHT, WEIGHTS, ACTIVATIONS, RENORMALISED, CURVED = "straight line", "aligned by weights", "aligned by activations", "aligned and renormalised", "curve with one bend"


def _says(results: Results) -> str:
    table = results["stages"]
    assert isinstance(table, Table)
    rows = {row["stage"]: row for row in table.rows}
    straight = rows[STRAIGHT]["barrier"]
    lines = [row for name, row in rows.items() if name not in (STRAIGHT, CURVED)]
    best = min(lines, key=lambda row: row["barrier"], default=rows[STRAIGHT])
    curve = f", a curve with one bend one of {rows[CURVED]['barrier']:.3g}" if CURVED in rows else ""
    advice = (
        "Averaging them as they are is safe" if straight <= 0.1 * max(rows[STRAIGHT]["larger_end"], 1e-12)
        else f"Do not average them as they are; {best['stage']}, their midpoint has a loss of {best['midpoint']:.3g}, against {rows[STRAIGHT]['larger_end']:.3g} at the worse end"
    )  # fmt: skip
    said = f"The straight line has a barrier of {straight:.3g}, {best['stage']} one of {best['barrier']:.3g}{curve}. {advice}."
    policies = {row["stage"]: row["statistics"] for row in (rows[STRAIGHT], best, *rows.values()) if row["stage"] in (STRAIGHT, best["stage"], CURVED)}
    known = {name: policy for name, policy in policies.items() if policy != "as they are"}
    return said + _says_units(results) + remarks(results["ends"], "; ".join(f"{name}, {policy}" for name, policy in known.items()) or "as they are")


def _says_units(results: Results) -> str:
    """One sentence on what was not permuted, if anything was not."""
    table = results.get("units")
    if not isinstance(table, Table):
        return ""
    kept = [row for row in table.rows if not row["permuted"]]
    if len(kept) == len(table.rows):
        return f" Nothing could be permuted, so the networks are compared as their units are numbered: {kept[0]['reason']}."
    if kept:
        return f" {len(kept)} of {len(table.rows)} kinds of units stay in place, such as {kept[0]['units']}: {kept[0]['reason']}."
    return ""


@dataclass(frozen=True)
class Stage:
    """One way from a to b, as it is measured."""

    name: str
    path: Path
    statistics: Statistics
    seconds: float
    gradients: float


@probe(says=_says)
def connectivity(
    subject: Subject, a: Point, b: Point, *, resolution: Grid = 11, curve_epochs: Whole = 100, curve_learning_rate: Positive = 0.2, batch_size: AtLeastOne = 64, seed: Seed = 0
) -> dict[str, Result]:
    r"""Barriers between two networks: on the straight line, with b's units in a's order, repaired, and on a trained curve.

    `stages`: for each the barrier of the loss over the chord between its ends (refined, with its 95 % interval over examples), that of the error, the loss at the
    midpoint, the arc length, seconds, and forwards and gradients of the whole data set. What cannot be aligned says so in `missing`. `units`: the kinds of
    units, whether they were permuted and, if they stay in place, why. `merged`: the midpoint of the best line, repaired, as a Point that
    `objective.state_dict` turns into a checkpoint. `curve_epochs` of 0: no curve.
    """
    objective = subject.objective
    results: dict[str, Result] = {}
    rows: list[dict[str, Any]] = []
    best: tuple[float, Path] | None = None
    with progress_bar(subject.progress, "connectivity", unit="point") as report:
        stages, units = _stages(subject, a, b, curve_epochs, curve_learning_rate, batch_size, seed)
        for stage in stages:
            began = time.perf_counter()
            profile = trace_path(objective, stage.path, statistics=stage.statistics, resolution=resolution, report=report)
            row = _row(stage, profile, stage.seconds + time.perf_counter() - began)
            rows.append(row)
            if stage.name == STRAIGHT:
                results["ends"] = ends_table({a.label or "a": (profile, 0.0), b.label or "b": (profile, 1.0)})
            t, losses = profile.curve("loss")
            results[stage.name.replace(" ", "_")] = Curve(x=t, y=losses, label=f"loss: {stage.name}", xlabel=end_labels(a, b), ylabel="loss")
            if isinstance(stage.path, Line) and (best is None or row["barrier"] < best[0]):
                best = row["barrier"], stage.path
    assert best is not None  # the straight line is always there
    merged = replace(_merged(objective, best[1]), label=f"{a.label} and {b.label} merged")
    results["stages"] = Table(rows=rows, x="stage", y="barrier", draw="bars", label="barriers between the two networks")
    if units:
        results["units"] = Table(rows=units, x="units", y="permuted", label="units of the aligned network")
    results["merged"] = merged
    return results | _merged_row(objective, subject.held_out, merged)


def _stages(
    subject: Subject, a: Point, b: Point, epochs: int, rate: float, batch_size: int, seed: int
) -> tuple[list[Stage], list[dict[str, Any]]]:
    """All ways from a to b, and rows on the units that were permuted or not."""
    objective = subject.objective
    units: list[dict[str, Any]] = []
    found = [Stage(STRAIGHT, Line(a, b), "interpolated", 0.0, 0.0)]
    lines: list[Path] = [found[0].path]
    for name, method in ((WEIGHTS, "weights"), (ACTIVATIONS, "activations")):
        began = time.perf_counter()
        try:
            aligned = align(objective, a, b, method=method, seed=seed)  # type: ignore[arg-type]
        except (OrographError, TypeError) as error:
            subject.missing[name] = str(error)
            continue
        units = _unit_rows(aligned)
        if not aligned.permutations:
            subject.missing[name] = f"nothing could be permuted: {units[0]['reason']}"
            continue
        lines.append(Line(a, aligned.point))
        found.append(Stage(name, lines[-1], "interpolated", time.perf_counter() - began, 0.0))
    began = time.perf_counter()
    middles = [objective.at(_merged(objective, line)).value() for line in lines]
    found.append(Stage(RENORMALISED, lines[middles.index(min(middles))], "repaired", time.perf_counter() - began, 0.0))
    if epochs:
        began = time.perf_counter()
        curve = fit_path(objective, a, b, epochs=epochs, learning_rate=rate, batch_size=batch_size, seed=seed, progress=subject.progress)
        found.append(Stage(CURVED, curve, "reestimated", time.perf_counter() - began, float(epochs)))
    return found, units


def _unit_rows(aligned: Alignment) -> list[dict[str, Any]]:
    """One row for each kind of unit, permuted or in place; axes that no network can permute are left out."""
    rows: list[dict[str, Any]] = [
        {"units": name, "size": len(order), "permuted": True, "reason": ""} for name, order in aligned.permutations.items()
    ]
    for name, reason in aligned.left.items():
        if not set(reason.removeprefix(IN_PART).split("; ")) <= INHERENT:
            rows.append({"units": name, "permuted": False, "reason": reason})
    nothing = "the network has no units between its inputs and its outputs"
    return rows or [{"units": "none", "permuted": False, "reason": nothing}]


def _merged(objective: Objective, line: Path) -> Point:
    """The midpoint with its statistics repaired."""
    first, middle, last = line.points[0], line(0.5), line.points[-1]
    assert isinstance(first, Point) and isinstance(middle, Point) and isinstance(last, Point)
    return Repair(objective, first, last).at(middle, 0.5)


def _row(stage: Stage, profile: Profile, seconds: float) -> dict[str, Any]:
    profile.add(0.5)
    chord = profile.barriers("loss", "train")[0]
    _, losses = profile.curve("loss")
    _, errors = profile.curve("error")
    known = not bool(errors.isnan().any())
    return {
        "stage": stage.name, "barrier": chord["value"], "barrier_sem": chord["sem"], "lower": chord["lower"], "upper": chord["upper"], "t": chord["t"],
        "error_barrier": profile.barriers("error", "train")[0]["value"] if known else float("nan"), "midpoint": profile.sums[0.5]["loss"], "maximum": float(losses.max()),
        "larger_end": float(max(losses[0], losses[-1])), "length": stage.path.length(), "statistics": profile.policy, "seconds": seconds, "forwards": profile.forwards, "gradients": stage.gradients,
    }  # fmt: skip


def _merged_row(objective: Objective, held_out: Objective | None, merged: Point) -> dict[str, Result]:
    rows = [{"data": split, **data.at(merged).metrics()} for split, data in (("train", objective), ("held out", held_out)) if data is not None]
    return {"merged_metrics": Table(rows=rows, x="data", y="loss", label="the merged network")}
