"""Loss and accuracy under Gaussian noise on the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import AtLeastTwo, Positive, Seed, Share
from ..curvature import preconditioned
from ..linalg.traces import trace
from ..perturbations import BatchNormPolicy, Draws, Noise
from ..progress import Report, progress_bar
from ..registry import Results, probe
from ..results import Curve, Estimate, Result, Table
from ..subject import Subject

Kind = Literal["isotropic", "magnitude", "layerwise"]
STEP = math.sqrt(2.0)  # between one sigma and the next
MOST_UP, MOST_DOWN = 18, 10  # steps of the ladder from its start
HALVINGS = 8  # of the bracket in which accuracy falls
XLABELS = {"isotropic": "sigma, standard deviation of the noise", "magnitude": "sigma, relative to every weight", "layerwise": "sigma, relative to the rms weight of each layer"}


def _says(results: Results) -> str:
    window, loss = results["window"], results["loss"]
    assert isinstance(window, Estimate) and isinstance(loss, Curve)
    start = f"The mean loss under weight noise follows L + sigma^2/2 tr H to a tenth of the increase up to sigma = {float(window.value):.2g}."
    if float(window.value) == 0:
        quadratic = results["quadratic"]
        assert isinstance(quadratic, Curve)
        base = (quadratic.y[0] * loss.x[1] ** 2 - quadratic.y[1] * loss.x[0] ** 2) / (loss.x[1] ** 2 - loss.x[0] ** 2) if len(loss.x) > 1 else quadratic.y[0]
        ratio = float((loss.y[0] - base) / (quadratic.y[0] - base)) if len(loss.x) > 1 else math.nan
        start = f"The loss rises {ratio:.2f} times as much as sigma^2/2 tr H says, down to the smallest sigma tried ({float(loss.x[0]):.2g}): kinks (ReLU, max-pooling) bend the loss where the Hessian does not see it."
    drop = results.get("sigma_at_drop")
    falls = f" The accuracy has fallen by {drop.label.split()[-1]} at sigma = {float(drop.value):.2g}." if isinstance(drop, Estimate) and math.isfinite(float(drop.value)) else ""
    return f"{start}{falls}"


@probe(says=_says)
def noise(
    subject: Subject, *, sigmas: Sequence[Positive] | None = None, pairs: AtLeastTwo = 10, kind: Kind = "isotropic", drop: Share = 0.1, deviation: Positive = 0.1,
    batchnorm: BatchNormPolicy = "frozen", seed: Seed = 0,
) -> dict[str, Result]:  # fmt: skip
    r"""Loss and accuracy against the size of Gaussian weight noise, beside what the trace predicts.

    $\mathbb{E} L(\theta + d) = L + \tfrac{\sigma^2}{2} \operatorname{tr} S H S + \tfrac{\sigma^4}{8} \sum_{ij} \partial_{iijj} L + \dots$, d = $\sigma S u$, u normal. `kind`: S = 1, |w| (magnitude-aware), or
    every layer's rms weight · `sigmas`: default a ladder around the place where the prediction fails and accuracy falls by `drop` ·
    `pairs`: antithetic pairs, the same directions at every sigma · `deviation`: of the increase, at which the prediction counts as failed (`window`) ·
    `sigma_at_drop`: bisection along the same directions, which make the mean accuracy one function of sigma; its error is that over directions ·
    `batchnorm`: running statistics "frozen" as they are, or "reestimated" for every draw · `layers`: noise in one parameter at a time, at half of
    `sigma_at_drop` (or the window). Costs 2 `pairs` forward passes per sigma and per two parameters, and no product beside the spectrum's (a trace of its own where S is not 1).
    """
    objective = subject.objective
    scale = _scale(subject, kind)
    work = Noise(objective, pairs, seed, scale, subject.low_rank(), batchnorm)
    base, predicted = work.base(), _trace(subject, scale, seed)
    results: dict[str, Result] = {}
    with progress_bar(subject.progress, "weight noise", unit="forward") as report:
        found = _ladder(work, base, predicted, sigmas, drop if base["error"] + drop < 1 else None, deviation, report)  # an accuracy that is not there cannot fall
        x = torch.tensor([draws.sigma for draws in found], dtype=torch.float64)
        results |= _curves(x, found, base, predicted, XLABELS[kind])
        results["window"] = window = _window(found, predicted, deviation)
        if (fourth := _fourth_order(found, float(window.value))) is not None:
            results["fourth_order"] = fourth
        else:
            subject.missing["fourth_order"] = "fewer than four sigmas lie within the window of the quadratic term"
        if math.isnan(base["error"]):
            subject.missing |= dict.fromkeys(("accuracy", "sigma_at_drop"), "the loss is no classification that Orograph knows")
            reference = float(window.value) or float(x[0])
        else:
            results["sigma_at_drop"] = at_drop = _sigma_at_drop(work, base, found, drop, report)
            reference = float(at_drop.value) / 2 if math.isfinite(float(at_drop.value)) else float(window.value) or float(x[0])
        results["layers"] = _layers(subject, work, base, reference, report)
    return results


def _scale(subject: Subject, kind: Kind) -> Tensor | None:
    """S as a vector (n,); None for ones. A weight of zero gets a millionth of the largest, since the operator divides by it."""
    theta, layout = subject.objective.theta, subject.objective.layout
    if kind == "isotropic":
        return None
    if kind == "magnitude":
        scale = theta.abs()
    else:
        scale = torch.cat([part.square().mean().sqrt().expand(part.numel()) for part in layout.split(theta)])
    if not bool(scale.any()):
        raise ValueError(f"noise(kind={kind!r}) scales noise by the weights, and all of them are zero here. Use kind='isotropic'.")
    return scale.clamp(min=1e-6 * float(scale.max()))


def _trace(subject: Subject, scale: Tensor | None, seed: int) -> Estimate:
    """Tr S H S."""
    return subject.spectrum().trace if scale is None else trace(preconditioned(subject.hessian(), scale**-2), seed=seed, progress=subject.progress)


def _ladder(
    work: Noise, base: dict[str, float], predicted: Estimate, sigmas: Sequence[float] | None, drop: float | None, deviation: float, report: Report
) -> list[Draws]:
    """Draws at the given sigmas, or up and down from a small one until both failures are in between."""

    def at(sigma: float) -> Draws:
        return work.at(sigma, base["loss"], lambda forwards: report(forwards, forwards, f"sigma {sigma:.2g}"))

    if sigmas is not None:
        return [at(float(sigma)) for sigma in sorted(sigmas)]
    curvature = abs(float(predicted.value))
    start = math.sqrt(0.1 * max(abs(base["loss"]), 1e-2) / curvature) if curvature > 0 else 1e-3
    found = [at(start)]
    for step in range(1, MOST_UP + 1):
        fell = drop is None or float(found[-1].mean_error().value) - base["error"] >= drop
        off, error = _deviation(found[-1], predicted)
        if not math.isfinite(off) or (fell and abs(off) - 2 * error > deviation):
            break
        found.append(at(start * STEP**step))
    for step in range(1, MOST_DOWN + 1):
        off, _ = _deviation(found[0], predicted)
        unresolved = abs(float(found[0].mean_increase().value)) < 1e-5 * abs(base["loss"])
        settled = step > 4 and abs(off) > 0.8 * abs(_deviation(found[3], predicted)[0])  # kinks: it does not fall with sigma
        if abs(off) < deviation / 4 or unresolved or settled:
            break
        found.insert(0, at(start * STEP**-step))
    return found


def _deviation(draws: Draws, predicted: Estimate) -> tuple[float, float]:
    """(increase / predicted increase - 1, its standard error)."""
    increase, model = draws.mean_increase(), 0.5 * draws.sigma**2 * float(predicted.value)
    if model == 0:
        return math.inf, math.inf
    ratio = float(increase.value) / model
    return ratio - 1, math.hypot(float(increase.sem) / model, ratio * float(predicted.sem) / float(predicted.value))


def _curves(x: Tensor, found: list[Draws], base: dict[str, float], predicted: Estimate, xlabel: str) -> dict[str, Result]:
    increases, errors = [draws.mean_increase() for draws in found], [draws.mean_error() for draws in found]

    def column(values: Sequence[Any]) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    curves: dict[str, Result] = {
        "loss": Curve(x=x, y=base["loss"] + column([e.value for e in increases]), error=column([e.sem for e in increases]), label="mean loss under noise", xlabel=xlabel, ylabel="loss"),
        "quadratic": Curve(
            x=x, y=base["loss"] + 0.5 * x**2 * float(predicted.value), error=0.5 * x**2 * float(predicted.sem), label="L + sigma^2/2 trace", xlabel=xlabel, ylabel="loss"
        ),
    }
    if not math.isnan(base["error"]):
        y, error = 1 - column([e.value for e in errors]), column([e.sem for e in errors])
        curves["accuracy"] = Curve(x=x, y=y, error=error, label="mean accuracy under noise", xlabel=xlabel, ylabel="accuracy")
    return curves


def _window(found: list[Draws], predicted: Estimate, deviation: float) -> Estimate:
    """The first sigma at which the deviation passes its limit, between two rungs linear in sigma^2, as the fourth order has it."""
    label = f"largest sigma at which the increase is within {deviation:.0%} of sigma^2/2 trace"
    offs = [_deviation(draws, predicted) for draws in found]
    beyond = next((i for i, (off, error) in enumerate(offs) if not abs(off) - 2 * error <= deviation), None)  # resolved, or not finite
    if beyond is None:
        return Estimate(value=found[-1].sigma, label=f"{label} (at least: no failure was resolved up to there)", status="budget-limited")
    inside = next((i for i in range(beyond - 1, -1, -1) if abs(offs[i][0]) <= deviation), None)
    if inside is None:
        return Estimate(value=0.0, label=f"{label} (not even at the smallest tried, {found[0].sigma:.2g})")
    (below, _), (above, error), low, high = offs[inside], offs[inside + 1], found[inside].sigma, found[inside + 1].sigma
    if not math.isfinite(above):
        return Estimate(value=low, sem=high - low, label=f"{label} (the loss is not finite at {high:.2g})", status="budget-limited")
    slope = (abs(above) - abs(below)) / (high**2 - low**2)
    square = low**2 + (deviation - abs(below)) / slope
    sem = error / (2 * math.sqrt(square) * slope)
    return Estimate(value=math.sqrt(square), sem=sem, dof=len(found[0].increase) - 1, label=label, status="noise-limited" if error > deviation / 2 else "converged")


def _fourth_order(found: list[Draws], window: float) -> Estimate | None:
    r"""The coefficient of $\sigma^4$: every direction's even part is fitted by $a \sigma^2 + c \sigma^4 + e \sigma^6$, and c averaged."""
    used = [draws for draws in found if draws.sigma <= 1.1 * window and bool(torch.isfinite(draws.increase).all())]
    if len(used) < 4:
        return None
    x = torch.tensor([draws.sigma for draws in used], dtype=torch.float64) / window
    y = torch.stack([draws.increase / draws.sigma**2 for draws in used])  # (sigmas, pairs)
    powers = torch.stack([x ** (2 * order) for order in range(3)], dim=1)
    c, shorter = (torch.linalg.lstsq(powers[:count], y[:count]).solution[1] / window**2 for count in (len(used), len(used) - 1))
    truncation = abs(float(c.mean() - shorter.mean()))  # what orders beyond the sixth leave in it
    return Estimate(value=float(c.mean()), sem=math.hypot(float(c.std()) / math.sqrt(len(c)), truncation), dof=len(c) - 1, label="coefficient of sigma^4 in the mean increase")


def _sigma_at_drop(work: Noise, base: dict[str, float], found: list[Draws], drop: float, report: Report) -> Estimate:
    """Where the mean error along the same directions has risen by `drop`, by bisection between two rungs of the ladder."""
    label, target = f"sigma at which accuracy has fallen by {drop:g}", base["error"] + drop
    rises = [float(draws.mean_error().value) for draws in found]
    above = next((i for i, error in enumerate(rises) if error >= target), None)
    if above is None:
        return Estimate(value=math.inf, sem=math.nan, label=f"{label} (not within the sigmas tried)", status="budget-limited")
    low, high = (found[above - 1].sigma if above else 0.0), found[above].sigma
    errors = (rises[above - 1] if above else base["error"]), rises[above]
    slope = (errors[1] - errors[0]) / (high - low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        draws = work.at(middle, base["loss"], lambda forwards: report(forwards, forwards, "bisection"))
        low, high = (low, middle) if float(draws.mean_error().value) >= target else (middle, high)
    sem = float(draws.mean_error().sem) / slope if slope > 0 else math.inf
    return Estimate(value=(low + high) / 2, sem=math.hypot(sem, high - low), dof=work.pairs - 1, label=label)


def _layers(subject: Subject, work: Noise, base: dict[str, float], sigma: float, report: Report) -> Table:
    """Noise in one parameter at a time."""
    layout, rows = subject.objective.layout, []
    pairs = max(2, work.pairs // 4)
    for done, name in enumerate(layout.names):
        scale = torch.zeros_like(subject.objective.theta)
        scale[layout[name]] = 1.0 if work.scale is None else work.scale[layout[name]]
        alone = Noise(work.objective, pairs, work.seed, scale, batchnorm=work.batchnorm)  # too few draws for a control
        draws = alone.at(sigma, base["loss"])
        increase, error = draws.mean_increase(), draws.mean_error()
        report(work.forwards + 2 * pairs * (done + 1), work.forwards + 2 * pairs * len(layout.names), name)
        rows.append({"name": name, "sigma": sigma, "value": float(increase.value), "error": float(increase.sem), "accuracy_drop": float(error.value) - base["error"]})
    return Table(rows=rows, x="name", y="value", draw="bars", label="mean increase of the loss by noise in one layer alone")
