"""Loss and error along a path, and how high they rise above its ends: the barrier by every definition in use, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor

from .evaluation import PerExample
from .objective import Objective
from .paths import Path
from .progress import Report
from .renormalise import Repair, renormalised, running_norms
from .results import Point, Table, unequal_losses

Statistics = Literal["interpolated", "reestimated", "repaired"]
Reference = Callable[[Tensor, Tensor], Tensor]
DEFINITIONS: dict[str, Reference] = {  # name -> what the curve is measured against, at every t
    "over the chord": lambda y, t: (1 - t) * y[0] + t * y[-1],  # Entezari et al. 2022, arXiv:2110.06296
    "over the mean of the ends": lambda y, t: torch.full_like(t, float(y[0] + y[-1]) / 2),  # Frankle et al. 2020, arXiv:1912.05671
    "over the larger end": lambda y, t: torch.full_like(t, float(max(y[0], y[-1]))),
}
ROUND_OFF = 8.0  # units of the dtype by which a loss may be off: no barrier
REFINEMENTS = 12  # evaluations for a maximum in its bracket


@dataclass
class Profile:
    """A path as one data set sees it; points are added as they are asked for."""

    objective: Objective
    path: Path
    statistics: Statistics
    report: Report
    fitted_on: Objective  # whose batches re-estimate running statistics
    found: dict[float, dict[str, PerExample]] = field(default_factory=dict)
    sums: dict[float, dict[str, float]] = field(default_factory=dict)
    forwards: int = 0  # passes over the data, those for statistics among them
    _repair: Repair | None = None

    def add(self, t: float) -> None:
        """Evaluate at t, unless it has been."""
        if t in self.sums:
            return
        there = self.objective.at(self._place(t))
        examples = there.per_example()
        self.forwards += 1 if "loss" in examples else 2
        metrics = {} if "loss" in examples else there.metrics()
        loss = examples["loss"].mean if "loss" in examples else metrics["loss"]
        error = examples["error"].mean if "error" in examples else 1 - metrics["accuracy"] if "accuracy" in metrics else math.nan
        self.found[t], self.sums[t] = examples, {"loss": loss, "error": error}
        self.report(len(self.sums), len(self.sums), f"t = {t:.2f}, loss {loss:.4g}")

    def _place(self, t: float) -> Point | Tensor:
        """The network at t, under the policy for statistics."""
        place = self.path(t)
        if self.statistics == "interpolated":
            return place
        if running_norms(self.fitted_on.snapshot.model):  # the ends too: one policy for the whole path
            self.forwards += 1
            return renormalised(self.fitted_on, place)
        if self.statistics == "reestimated" or not 0 < t < 1:  # at the ends REPAIR changes nothing
            return place
        first, last = self.path.points[0], self.path.points[-1]
        assert isinstance(place, Point) and isinstance(first, Point) and isinstance(last, Point)
        self._repair = self._repair or Repair(self.fitted_on, first, last)
        before = self._repair.passes
        there = self._repair.at(place, t)
        self.forwards += self._repair.passes - before
        return there

    @property
    def policy(self) -> str:
        """What was done to the networks of the path before their loss was taken."""
        return policy_words(self.statistics, self.objective)

    def curve(self, metric: str) -> tuple[Tensor, Tensor]:
        """(t, value) of all points, in order."""
        t = sorted(self.sums)
        return torch.tensor(t, dtype=torch.float64), torch.tensor([self.sums[s][metric] for s in t], dtype=torch.float64)

    def refine(self, definition: str) -> None:
        """Brent's method in the bracket of the largest excess of the loss: exact after a few steps where it is a parabola."""
        reference = DEFINITIONS[definition]
        t, y = self.curve("loss")
        if not bool(torch.isfinite(y).all()):
            return
        peak = int((y - reference(y, t)).argmax())
        low, high = float(t[max(peak - 1, 0)]), float(t[min(peak + 1, len(t) - 1)])
        first, last = y[0], y[-1]

        def excess(s: float) -> float:
            self.add(s)
            ends = torch.stack([first, last])
            place = torch.tensor([0.0, s, 1.0], dtype=torch.float64)
            return self.sums[s]["loss"] - float(reference(torch.stack([ends[0], ends[0], ends[1]]), place)[1])

        minimize_scalar(lambda s: -excess(float(s)), bounds=(low, high), method="bounded", options={"maxiter": REFINEMENTS, "xatol": 1e-7})

    def barriers(self, metric: str, split: str) -> list[dict[str, Any]]:
        """One row per definition: the largest excess, where it is, and its interval over the examples."""
        t, y = self.curve(metric)
        examples = [self.found[float(s)].get(metric) for s in t]
        rows = []
        for definition, reference in DEFINITIONS.items():
            excess = y - reference(y, t)
            peak = int(excess.argmax())
            share = {"over the chord": float(t[peak]), "over the mean of the ends": 0.5, "over the larger end": float(y[-1] > y[0])}[definition]
            half = half_width(examples[0], examples[-1], examples[peak], share)
            round_off = ROUND_OFF * torch.finfo(self.objective.dtype).eps * float(y.abs().max())
            value = float(excess[peak]) if not float(excess[peak]) <= round_off else 0.0  # the ends belong to the path
            upper = min(value + half, 1.0) if metric == "error" else value + half
            lower = math.nan if math.isnan(half) else max(value - half, 0.0)
            rows.append({"definition": definition, "metric": metric, "split": split, "value": value, "lower": lower, "upper": upper, "sem": half / 1.96, "t": float(t[peak]), "statistics": self.policy})
        return rows


def trace_path(objective: Objective, path: Path, *, statistics: Statistics, resolution: int, report: Report, refine: bool = True, fitted_on: Objective | None = None) -> Profile:
    """The profile at equidistant t, refined around the maximum of every definition."""
    profile = Profile(objective, path, statistics, report, fitted_on or objective)
    for t in torch.linspace(0, 1, resolution, dtype=torch.float64).tolist():
        profile.add(t)
    if refine:
        for definition in DEFINITIONS:
            profile.refine(definition)
    return profile


def policy_words(statistics: Statistics, objective: Objective) -> str:
    """The policy for statistics in words; "as they are" where a network has none to choose for."""
    if running_norms(objective.snapshot.model):
        if statistics == "interpolated":
            return "running statistics interpolated like the weights"
        return "running statistics re-estimated at every point, the ends too"
    return "activations repaired between the ends" if statistics == "repaired" else "as they are"


def ends_table(profiles: Mapping[str, tuple[Profile, float]]) -> Table:
    """Losses of the networks that are compared, by name: where each one is on a profile."""
    rows = [{"name": name, "loss": profile.sums[t]["loss"]} for name, (profile, t) in profiles.items()]
    return Table(rows=rows, x="name", y="loss", label="losses of the networks")


def remarks(ends: Any, policy: str) -> str:
    """What has to be said beside barriers: unequal losses of the networks, and the policy for statistics."""
    assert isinstance(ends, Table)
    unequal = unequal_losses({row["name"]: float(row["loss"]) for row in ends.rows})
    said = "" if policy == "as they are" else f"Along the path: {policy}."
    return "".join(f" {text}" for text in (unequal, said) if text)


def half_width(first: PerExample | None, last: PerExample | None, peak: PerExample | None, share: float) -> float:
    r"""Half-width of the 95 % interval of $L(t) - (1-s) L(0) - s L(1)$ over examples."""
    if first is None or last is None or peak is None or len(peak.total) < 2:
        return math.nan
    return difference_sem(first, last, peak, share) * float(stats.t.ppf(0.975, len(peak.total) - 1))


def difference_sem(first: PerExample, last: PerExample, peak: PerExample, share: float) -> float:
    """Standard error of that difference as a ratio of sums over examples (delta method)."""
    difference = peak.total - (1 - share) * first.total - share * last.total
    mean = difference.sum() / peak.count.sum()
    return float((difference - mean * peak.count).std()) * math.sqrt(len(difference)) / float(peak.count.sum()) if len(difference) > 1 else math.nan


def end_labels(a: Point, b: Point) -> str:
    """What the axis of t says."""
    return f"t: 0 is {a.label}, 1 is {b.label}"
