"""How near a learning rate is to the edge of stability, from curvature and from forward passes alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import Positive, Seed
from ..edge_verdicts import WITHHELD, Ratio, optimizer_ratios, other_loss
from ..optimizers import edge, preconditioner
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Estimate, Result, Table
from ..subject import Subject
from ..variants import in_double

MOST_DOUBLINGS = 40
HALVINGS = 7  # of the bracket, which then is under 1 % wide
AGREE = 0.1  # relative difference below which two critical rates are said to agree
LARGEST_STABLE = "largest stable learning rate"
ALONG, FORWARD = "2 / curvature along the update", "critical rate, forwards only"


def _says(results: Results) -> str:
    rates, edges = results["rates"], results.get("edge")
    assert isinstance(rates, Table)
    values = {row["measure"]: float(row["value"]) for row in rates.rows}
    by_forward, largest = values.get(FORWARD, math.nan), values[LARGEST_STABLE]
    first = (
        f"One step along the update raises the loss from a learning rate of {by_forward:.3g} on"
        if math.isfinite(by_forward)
        else "No learning rate tried along the update raised the loss"
    )
    bound = (
        f"is stable up to a learning rate of {largest:.3g}"
        if math.isfinite(largest)
        else "has no positive curvature, so no learning rate is too large there"
    )
    return f"{first}; {rates.rows[0]['method']} along the sharpest direction {bound}.{_verdict_sentence(edges) if isinstance(edges, Table) else ''}"


def _verdict_sentence(edges: Table) -> str:
    """What the rows of `edge` say of the learning rate given."""
    whole, rest = edges.rows[0], edges.rows[-1]
    ratio = f"{float(rest['ratio']):.2g} times the largest stable one"
    if rest["verdict"] == WITHHELD:
        without = "" if rest is whole else f" {rest['parameters']}"
        return (
            f" No verdict on the learning rate given, which is {ratio}{without}: {rest['reason']}."
        )
    if rest is whole:
        return f" The learning rate given is {ratio}: {rest['verdict']}."
    return f" No verdict on all parameters together: {whole['reason']}. {str(rest['parameters']).capitalize()} the learning rate given is {ratio}: {rest['verdict']}."


@probe(says=_says)
def stability(
    subject: Subject, *, learning_rate: Positive | None = None, optimizer: Optimizer | None = None, seed: Seed = 0
) -> dict[str, Result]:
    r"""Critical learning rates at a point, by three measures, and how near a given one is to the edge.

    `edge`, `edge_ratio`: the learning rate over the largest stable one, $\eta \lambda_{max} / 2$ for a `learning_rate` of plain gradient descent; for an
    `optimizer` with its momentum, decay and preconditioner P, all of its learning rates raised together (see `edge` of the package). Above 1, full-batch
    training is locally unstable. The verdict is withheld where P says nothing: within its first ten steps, and for parameters whose second moment is
    round-off although the loss is curved along them (`edge` then names them, and `edge_ratio` leaves them out); and for BatchNorm with running statistics,
    which is another loss than that of training. `directional`: curvature along the update, $D^\top H D / D^\top P D$ with
    $D = P^{-1} g$ (P = I without an optimizer) · `critical_rate`: the smallest learning rate of one step along D, without momentum, that raises the loss, by doubling and bisection
    with forward passes alone (Kalra et al. 2026, arXiv:2601.16979), in float64 where rounding of the loss would decide · `rates`: all of them; on a quadratic loss the last two agree.
    Costs about 15 forward passes, and no product beside the shared ones (with an optimizer about 25 for the preconditioned Hessian and one along D, twice where a verdict is withheld).
    Full batch: mini-batch noise makes training unstable below the edge.
    """
    if learning_rate is not None and optimizer is not None:
        raise ValueError(
            "stability(learning_rate=, optimizer=): give one of them; an optimizer brings its own learning rate."
        )
    P = None if optimizer is None else preconditioner(optimizer, subject.objective)
    results: dict[str, Result] = {}
    if optimizer is None:
        top = subject.spectrum().top
        rate, method = learning_rate or 1.0, "gradient descent"
        sharpest, above = rate * float(top.values[0]) / 2, rate * float(top.intervals[0, 1]) / 2
        ratios = [
            Ratio(sharpest, above - sharpest, doubt=other_loss(subject) if learning_rate else "")
        ]
    else:
        rate, method = edge(optimizer).rate, type(optimizer).__name__
        ratios = optimizer_ratios(subject, optimizer, seed)
    if learning_rate is None and optimizer is None:
        subject.missing["edge_ratio"] = "neither learning_rate= nor optimizer= was given"
    else:
        rows = [one.row(rate) for one in ratios]
        subject.missing |= {
            f"verdict on {row['parameters']}": row["reason"]
            for row in rows
            if row["verdict"] == WITHHELD
        }
        label = f"learning rate / {LARGEST_STABLE}"
        results["edge"] = Table(rows=rows, x="parameters", y="ratio", label=label)
        results["edge_ratio"] = Estimate(
            value=rows[-1]["ratio"],
            sem=ratios[-1].error,
            least=0.0,
            label=f"{label}, {ratios[-1].parameters}",
        )
    return results | _rates(subject, P, ratios[-1], rate, method)


def _rates(
    subject: Subject, P: Tensor | None, ratio: Ratio, rate: float, method: str
) -> dict[str, Result]:
    """Curvature along the update, the critical rate along it, and the table of all rates."""
    value, error = (
        (rate / ratio.value, rate * ratio.error / ratio.value**2)
        if ratio.value > 0
        else (math.inf, math.nan)
    )
    rows: list[dict[str, Any]] = [
        {
            "measure": LARGEST_STABLE,
            "method": method,
            "value": value,
            "error": error,
            "agrees": None,
        }
    ]
    results: dict[str, Result] = {}
    g = subject.gradient()
    if not bool(g.any()):
        subject.missing |= dict.fromkeys(
            ("critical_rate", "directional"), "the gradient is exactly zero, so there is no update"
        )
    else:
        step = g if P is None else g / P.to(g)
        results["directional"] = along = _directional(subject, step, P)
        results["critical_rate"] = critical = _critical_rate(subject, step, float(along.value))
        bent, found = float(along.value), float(critical.value)
        rows.append(
            {
                "measure": ALONG,
                "value": 2 / bent if bent > 0 else math.inf,
                "error": 2 * float(along.sem) / bent**2 if bent else math.nan,
            }
        )
        rows.append(
            {"measure": FORWARD, "value": found, "error": float(critical.sem), "agrees": None}
        )
        for row in rows[1:]:
            row["method"] = "one step without momentum"
        rows[1]["agrees"] = (
            math.isfinite(rows[1]["value"])
            and math.isfinite(found)
            and abs(rows[1]["value"] - found) <= AGREE * abs(found)
        )
    results["rates"] = Table(rows=rows, x="measure", y="value", label="critical learning rates")
    return results


def _directional(subject: Subject, step: Tensor, P: Tensor | None) -> Estimate:
    """D'HD / D'PD."""
    op, label = subject.hessian(), "curvature along the update"
    krylov = subject.gradient_krylov()
    if P is None and krylov is not None:
        return Estimate(value=float(krylov.T[0, 0]), sem=op.noise * krylov.scale, label=label)
    image = op @ step.to(op.dtype)
    length = float(op.space.inner(step, step * (1.0 if P is None else P.to(step))))
    return Estimate(value=float(op.space.inner(step, image)) / length, sem=op.noise * float(op.space.norm(image)) * float(op.space.norm(step)) / length, products=1, label=label)


def _critical_rate(subject: Subject, step: Tensor, curvature: float) -> Estimate:
    """The smallest rate along -step at which the loss is above where it started; inf if none of those tried is."""
    objective, label = subject.objective, "critical learning rate along the update"
    drop = float(subject.gradient().double() @ step.double()) / (2 * abs(curvature)) if curvature else math.inf  # at the minimum along the update
    if drop < 1e4 * torch.finfo(objective.dtype).eps * abs(objective.value()):  # rounding of the loss would decide
        objective = in_double(objective)
        step = step.double()
    theta, base = objective.theta, objective.value()
    start = 2 / curvature if curvature > 0 else float(theta.norm()) / max(float(step.norm()), 1e-300)
    with progress_bar(subject.progress, "critical rate", unit="forward") as report:
        tried = 0

        def rises(rate: float) -> bool:
            nonlocal tried
            tried += 1
            report(tried, max(tried, 2 + HALVINGS), f"rate {rate:.3g}")
            loss = objective.at(theta - rate * step).value() if math.isfinite(rate * float(step.abs().max())) else math.inf
            return not loss <= base  # a loss of NaN has risen

        low = start / 4
        for _ in range(MOST_DOUBLINGS):
            if not rises(low):
                break
            low /= 2
        else:
            return Estimate(value=0.0, sem=low, label=f"{label} (none lowers the loss)", status="noise-limited")
        high = 2 * low
        for _ in range(MOST_DOUBLINGS):
            if rises(high):
                break
            low, high = high, 2 * high
        else:
            return Estimate(value=math.inf, sem=math.nan, label=f"{label} (none tried raises the loss)", status="budget-limited")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if rises(middle) else (middle, high)
    return Estimate(value=(low + high) / 2, sem=(high - low) / 2, label=label)
