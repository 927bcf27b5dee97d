"""PAC-Bayes certificates of the network with Gaussian noise on its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import AtLeastOne, Positive, Seed, Share, Whole
from ..bounds import binomial_upper, catoni_over_grid, chernoff_upper, gaussian_kl, mcallester, monte_carlo_upper, seeger
from ..objective import Objective
from ..progress import Report, progress_bar
from ..registry import Results, probe
from ..renormalise import running_norms
from ..results import Estimate, Point, Result, Table
from ..subject import Subject

Posterior = Literal["both", "isotropic", "layerwise"]
SIGMAS = tuple(10 ** (power / 8) for power in range(-24, 3))  # 1e-3 to 1.8, fixed before any data
SEARCH = 3  # draws per sigma when one is looked for
LEAST = 8  # examples, for Maurer's 2 sqrt n
FEW = 20  # draws where no number of them could make the certificate useful
OWN_TEST = "test set, the network as it is"
BOUNDS = {"kl-inverse": seeger, "McAllester": mcallester, "Catoni": catoni_over_grid}


def _says(results: Results) -> str:
    table = results.get("certificates")
    if not isinstance(table, Table):
        return "No certificate: the record says what stands in the way."
    best = min((row for row in table.rows if row["bound"] == "kl-inverse"), key=lambda row: float(row["value"]))  # they hold together
    test = [row for row in table.rows if row["bound"] == OWN_TEST]
    beside = " It says nothing of the network without noise."
    if test and test[0]["vacuous"]:
        beside = f" Held-out data give no bound for the network without noise: {test[0]['n']} examples allow for guessing."
    elif test:
        beside = f" For the network without noise, held-out data give {float(test[0]['value']):.3g} at the same confidence."
    noise = f"sigma = {best['sigma']:.3g}" + (" times the rms of each layer of the prior" if best["posterior"] == "layerwise" else "")
    verdict = f"vacuous (guessing errs on {table.rows[-1]['value']:.3g})" if best["vacuous"] else "not vacuous"
    return (
        f"{_condition(best)}with probability {1 - best['delta']:.3g} over the data the stochastic network with noise of {noise} on its weights errs on at most {best['value']:.3g} of new examples "
        f"(n = {best['n']}): the certificate is {verdict}.{beside}"
    )


def _condition(row: dict[str, Any]) -> str:
    return "With a prior of zeros, " if row["prior"] == "zero" else f"If the prior ({row['prior']}) has seen none of the {row['n']} examples that certify, "


@dataclass(frozen=True)
class Setting:
    """One family of posteriors N(w, s^2 diag r^2) with priors N(w0, s^2 diag r^2), s on the grid."""

    name: str
    spread: Tensor  # r (n,)
    distance: float  # sum (w - w0)^2 / r^2

    def kl(self, sigma: float) -> float:
        return gaussian_kl([self.distance], [1], [sigma], [sigma])


@probe(says=_says)
def pac_bayes(
    subject: Subject, *, prior: Any = None, prior_samples: Whole = 0, posterior: Posterior = "both", delta: Share = 0.025, delta_draws: Share = 0.01,
    draws: AtLeastOne = 300, sigmas: Sequence[Positive] = SIGMAS, seed: Seed = 0,
) -> dict[str, Result]:  # fmt: skip
    r"""Upper bounds on the error of the stochastic network N(w, s^2) on new examples, valid with probability 1 - delta - delta_draws.

    Posterior N(w, s^2 R), prior N(w0, s^2 R), $KL = \sum_i (w_i - w_{0,i})^2 / 2 s^2 r_i^2$; R = I ("isotropic"), or r the rms of each layer of the *prior*
    ("layerwise"). `prior`: the network that w0 is taken from, such as the initialisation, or one trained on the first `prior_samples` examples, which
    are then left out of n and of the empirical error; without one, w0 = 0 · `sigmas`: grid of s, to be fixed before seeing data: a union bound
    takes delta / len(grid) for each, so that s may be chosen by the data (it is, by a few draws) · `draws`: fresh weights at the s chosen, whose mean error
    enters through its own bound at `delta_draws` · `seed` of all draws. Both posteriors share delta and delta_draws, so that the better one may be
    named; the three bounds hold each on its own: the one to quote is "kl-inverse", chosen beforehand.
    n counts examples, never tokens; an example's error is that of its positions on average. Running statistics of BatchNorm are fitted to the data and no
    part of the posterior: every draw has those of the prior (without one, 0 and 1). The bound says nothing of the network without noise.
    Beside it: bounds from `held_out` data, and the trivial one, 1 - 1/classes; `vacuous` is what is not below it. Forward passes only.
    McAllester 1999; Seeger 2002, Maurer 2004, arXiv:cs/0411099; Catoni 2007, arXiv:0712.0248; Dziugaite and Roy 2017, arXiv:1703.11008; Perez-Ortiz et al. 2021, arXiv:2007.12911.
    """
    _check(subject, prior, prior_samples, delta, delta_draws)
    whole, start = subject.objective, _prior(subject.objective, prior)
    reason = _not_example_by_example(whole)
    if prior is not None and not prior_samples and torch.equal(start.theta, whole.theta):
        raise ValueError("the prior is this network itself, which has seen the data that are to certify it. Pass its initialisation, or a network trained on the first prior_samples= examples.")
    if reason is None and prior_samples and not whole.divisible:
        reason = "the first examples cannot be left out, since batches are part of this loss"
    objective = whole.picked(torch.arange(prior_samples, whole.examples)) if prior_samples and reason is None else whole
    n = len(_errors(objective, objective.point())) if reason is None else 0
    if reason is not None or n < LEAST:
        reason = reason or f"{n} examples are left to certify with, and the bound holds from {LEAST} on"
        subject.missing |= dict.fromkeys(("certificates", "test_bound"), reason)
        distance = float((whole.theta.double() - start.theta.double()).norm())
        return {"distance": Estimate(value=distance, label="distance of the weights from the prior")}
    trivial, settings, held_out = _trivial(objective), _settings(whole, start, posterior), _held_out(subject)
    _note_conditions(subject, prior, start, n)
    rows: list[dict[str, Any]] = []
    with progress_bar(subject.progress, "PAC-Bayes", unit="forward") as report:
        for setting in settings:
            shares = delta / len(settings), delta_draws / len(settings)
            found = _certify(objective, held_out, start, setting, n, trivial, *shares, draws, [float(s) for s in sigmas], seed, report)
            rows += [row | {"delta": delta + delta_draws} for row in found]  # together
    results: dict[str, Result] = {}
    if held_out is not None:
        errors = _errors(held_out, whole.point())
        bound = _test_bound(errors, delta + delta_draws)
        rows.append(_row(OWN_TEST, "none", bound, float(errors.mean()), 0.0, 0.0, len(errors), delta + delta_draws, trivial))
        if rows[-1]["vacuous"]:
            subject.missing["test_bound"] = f"{len(errors)} held-out examples allow for an error of {bound:.3g}, and guessing errs on {trivial:.3g}"
        else:
            results["test_bound"] = Estimate(value=bound, least=0.0, most=1.0, label=f"bound on the error from {len(errors)} held-out examples, delta = {delta + delta_draws:g}")
    rows.append(_row("trivial", "none", trivial, math.nan, 0.0, math.nan, n, 0.0, trivial))
    return {"certificates": Table(rows=rows, x="bound", y="value", label="bounds on the error")} | results


def _held_out(subject: Subject) -> Objective | None:
    """The held-out data, where they bound an error: there are some, their errors are known, and training has seen none of them."""
    held_out = subject.held_out
    reason = "no held_out= data were given" if held_out is None else _not_example_by_example(held_out)
    if held_out is not None and reason is None:
        if shared := _overlap(subject.objective, held_out):
            reason = f"{shared} of {held_out.examples} held-out examples are among those of training, so they are not independent of the network"
        elif not len(_errors(held_out, subject.objective.point())):
            reason = "no held-out example has a target that counts"
    if reason is not None:
        subject.missing["test_bound"] = reason
        return None
    return held_out


def _overlap(objective: Objective, held_out: Objective) -> int:
    """How many held-out examples are among those of the objective."""
    mine, theirs = (data.terms().batches.reading.hashes for data in (objective, held_out))
    return int(np.isin(theirs, mine).sum())


def _note_conditions(subject: Subject, prior: Any, start: Point, n: int) -> None:
    """What the certificate takes on trust, and what of the network it leaves out."""
    fitted = _running(subject.objective)
    if prior is not None:
        subject.missing["proof that the prior is independent"] = f"none of the {n} examples that certify may have had a part in it, which its weights cannot tell; prior_samples= leaves out the first that had"
    if start.frozen:
        subject.missing["noise on the parameters outside the study"] = "they are fixed, and the certificate holds only if they do not depend on these data"
    if fitted:
        subject.missing["the network's own running statistics"] = f"they are fitted to the data and no part of the posterior: every draw has those of the prior ({start.label})"
    if not bool(start.theta.any()):
        subject.missing["layerwise"] = "a prior of zeros gives the layers no scale, so that this would be the isotropic certificate"
    kept = [name for name, tensor in start.buffers.items() if tensor.is_floating_point() and name not in fitted]
    if kept and prior is None:
        subject.missing["buffers of the prior"] = f"{', '.join(kept)} are the network's own, and the certificate holds only if they do not depend on these data"


def _not_example_by_example(objective: Objective) -> str | None:
    """Why single examples have no error of their own, if they have none."""
    norms = [module for module in objective.snapshot.model.modules() if isinstance(module, _BatchNorm)]
    if any(objective.mode == "batch" or norm.running_mean is None for norm in norms):
        return 'BatchNorm with the statistics of the batch makes the prediction of each example depend on the others; use mode="eval" and running statistics'
    if objective.recipe.indivisible:
        return f"the examples cannot be taken one by one: {objective.recipe.indivisible}"
    found = objective.per_example().get("error")
    if found is None:
        return "the loss is no classification whose errors are known example by example"
    with objective.applied():
        examples = sum(term.examples for term in objective.terms())
    if len(found.total) != examples:
        return f"the output has {len(found.total)} rows for {examples} examples, and only examples are independent; let forward= return one row per example"
    return None


def _prior(objective: Objective, prior: Any) -> Point:
    """w0 with the running statistics that every draw gets."""
    if prior is not None:
        return objective.network(prior)
    own = objective.point()
    fresh = {name: torch.full_like(own.buffers[name], value) for name, value in _running(objective).items()}
    return replace(own, theta=torch.zeros_like(own.theta), buffers=dict(own.buffers) | fresh, label="zero")


def _running(objective: Objective) -> dict[str, float]:
    """Running statistics of BatchNorm: name of the buffer -> what it is before any data."""
    places = {(id(module), attribute): name for name, slots in objective.snapshot.slots.buffers.items() for module, attribute in slots}
    norms = running_norms(objective.snapshot.model)
    return {places[id(norm), attribute]: value for norm in norms for attribute, value in (("running_mean", 0.0), ("running_var", 1.0))}


def _settings(objective: Objective, start: Point, posterior: Posterior) -> list[Setting]:
    """The families asked for; r comes from the prior alone."""
    step = objective.theta.double() - start.theta.double()
    sizes = [float(part.double().square().mean().sqrt()) for part in objective.layout.split(start.theta)]
    fallback = float(start.theta.double().square().mean().sqrt()) or 1.0
    layerwise = torch.cat([torch.full((count,), rms or fallback, dtype=torch.float64) for rms, count in zip(sizes, objective.layout.sizes, strict=True)]).to(step.device)
    families = {"isotropic": torch.ones_like(step), "layerwise": layerwise}
    wanted = ["isotropic", "layerwise"] if posterior == "both" else [posterior]
    if not bool(start.theta.any()):
        wanted = ["isotropic"]  # without a scale in the prior the two are one
    return [Setting(name, families[name], float((step / families[name]).square().sum())) for name in wanted]


def _certify(
    objective: Objective, held_out: Objective | None, start: Point, setting: Setting, n: int, trivial: float, delta: float, delta_draws: float, draws: int,
    sigmas: list[float], seed: int, report: Report,
) -> list[dict[str, Any]]:  # fmt: skip
    """Choose s with few draws, then bound with fresh ones."""
    share, done = delta / len(sigmas), 0

    def mean_errors(data: Objective, sigma: float, indices: range) -> list[float]:
        nonlocal done
        found = []
        for index in indices:
            found.append(float(_errors(data, _draw(objective, start, setting, sigma, seed, index)).mean()))
            done += 1
            report(done, done + max(draws - index, 0), f"{setting.name}, sigma {sigma:.2g}")
        return found

    best, chosen = math.inf, max(sigmas)
    for sigma in sorted(sigmas):
        if seeger(0.0, setting.kl(sigma), n, share) >= best or (seeger(0.0, setting.kl(sigma), n, share) >= trivial and sigma < max(sigmas)):
            continue  # not even without an error
        risk = sum(mean_errors(objective, sigma, range(-SEARCH, 0))) / SEARCH
        bound = seeger(monte_carlo_upper(risk, draws, delta_draws), setting.kl(sigma), n, share)
        best, chosen = (bound, sigma) if bound < best else (best, chosen)
        if risk >= best:
            break  # more noise only errs more
    count = draws if best < trivial else min(draws, FEW)
    kl = setting.kl(chosen)
    seen = sum(mean_errors(objective, chosen, range(count))) / count
    upper = monte_carlo_upper(seen, count, delta_draws)
    rows = [
        _row(name, setting.name, bound(upper, kl, n, share), seen, kl, chosen, n, delta + delta_draws, trivial) | {"draws": count, "seed": seed, "prior": start.label}
        for name, bound in BOUNDS.items()
    ]
    if held_out is not None:
        test = mean_errors(held_out, chosen, range(count))
        size = len(_errors(held_out, _draw(objective, start, setting, chosen, seed, 0)))
        upper = monte_carlo_upper(sum(test) / count, count, delta_draws)
        rows.append(_row("test set, the same noise", setting.name, chernoff_upper(upper, size, delta), sum(test) / count, 0.0, chosen, size, delta + delta_draws, trivial) | {"draws": count, "seed": seed})
    return rows


def _draw(objective: Objective, start: Point, setting: Setting, sigma: float, seed: int, index: int) -> Point:
    """Weights number `index` of the posterior, with the prior's running statistics."""
    own = objective.point()
    noise = objective.space.sample(seed, index, "normal")
    return replace(own, theta=own.theta + sigma * setting.spread.to(noise) * noise, buffers=start.buffers)


def _errors(objective: Objective, point: Point) -> Tensor:
    """Share of wrong positions in every example that has one to count (n,)."""
    found = objective.at(point).per_example()["error"]
    kept = found.count > 0
    return found.total[kept] / found.count[kept]


def _test_bound(errors: Tensor, delta: float) -> float:
    whole = bool((errors == errors.round()).all())
    return binomial_upper(int(errors.sum()), len(errors), delta) if whole else chernoff_upper(float(errors.mean()), len(errors), delta)


def _trivial(objective: Objective) -> float:
    """1 - 1/C: the error of guessing."""
    with objective.applied(), torch.no_grad():
        output = next(iter(objective.terms())).output()
    criterion = objective.recipe.criterion
    assert criterion is not None  # there is an error per example
    return 1 - 1 / output.shape[1 if output.ndim > 1 else 0] if criterion.family in ("cross_entropy", "nll") else 0.5


def _row(bound: str, posterior: str, value: float, empirical: float, kl: float, sigma: float, n: int, delta: float, trivial: float) -> dict[str, Any]:
    vacuous = bound == "trivial" or not value < trivial
    return {"bound": bound, "posterior": posterior, "value": value, "empirical": empirical, "kl": kl, "sigma": sigma, "n": n, "delta": delta, "vacuous": vacuous}


def _check(subject: Subject, prior: Any, prior_samples: int, delta: float, delta_draws: float) -> None:
    examples = subject.objective.examples
    if prior_samples >= examples:
        raise ValueError(f"pac_bayes(prior_samples={prior_samples!r}) needs a number from 0 to {examples - 1}: of {examples} examples, the first ones that made the prior.")
    if prior_samples and prior is None:
        raise ValueError(f"pac_bayes(prior_samples={prior_samples}) says which examples made the prior, and no prior= was given. Pass the network trained on them.")
    if not delta + delta_draws < 1:
        raise ValueError(f"pac_bayes(delta={delta}, delta_draws={delta_draws}) needs two probabilities that add up to less than 1.")
