"""Sharpness by every definition in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..arguments import AtLeastOne, AtLeastTwo, NotNegative, Positive, Seed
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Result, Table
from ..sharpness_zoo import DEFINITIONS, Constants
from ..subject import Subject

PUBLISHED = Constants()


def _says(results: Results) -> str:
    table = results["sharpness"]
    assert isinstance(table, Table)
    rows = {row["definition"]: row for row in table.rows}
    worst = rows.get("worst case, L2 ball")
    if worst is None:
        return f"Sharpness by {len(rows)} definitions; the first, {table.rows[0]['definition']}, is {table.rows[0]['value']:.3g}."
    return f"A step of length {worst['radius']:g} can raise the loss by at least {worst['found']:.3g}; the quadratic model has {worst['quadratic']:.3g}."


@probe(says=_says)
def sharpness(
    subject: Subject,
    *,
    definitions: str | Sequence[str] | None = None,
    radius: Positive = PUBLISHED.radius,
    adaptive_radius: Positive = PUBLISHED.adaptive_radius,
    adaptive_offset: NotNegative = PUBLISHED.adaptive_offset,
    micro_batch: AtLeastOne = PUBLISHED.micro_batch,
    most_batches: AtLeastOne = PUBLISHED.most_batches,
    gradients: AtLeastOne = PUBLISHED.gradients,
    linf_radius: Positive = PUBLISHED.linf_radius,
    sigma: Positive = PUBLISHED.sigma,
    adaptive_sigma: Positive = PUBLISHED.adaptive_sigma,
    pairs: AtLeastTwo = PUBLISHED.pairs,
    epsilons: Sequence[Positive] = PUBLISHED.epsilons,
    dimension: AtLeastOne = PUBLISHED.dimension,
    iterations: AtLeastOne = PUBLISHED.iterations,
    normalize_logits: bool = PUBLISHED.normalize_logits,
    steps: AtLeastOne = PUBLISHED.steps,
    seed: Seed = PUBLISHED.seed,
) -> dict[str, Result]:
    r"""Sharpness by every definition in use, each with its published constants; `definitions` chooses families.

    "curvature": lambda_max, trace · "sam": one step of length `radius`, whole and within micro-batches of `micro_batch` (at most `most_batches`) ·
    "worst": projected ascent in the same ball, beside the trust-region value of the quadratic model · "adaptive": ASAM (`adaptive_radius`, T = |w| +
    `adaptive_offset`), and ascent in $\{\|d / |w|\|_p \le \rho\}$ for p = 2, infinity (`linf_radius`), with or without `normalize_logits` · "average": mean increase under
    N(0, `sigma`^2) and N(0, `adaptive_sigma`^2 w^2) from antithetic `pairs` · "keskar": boxes `epsilons`, L-BFGS-B of `iterations`, whole space and `dimension`
    random directions · "flatness": relative flatness · "fisher": Fisher-Rao norm and information-geometric sharpness in `steps` Lanczos steps.
    docs/invariances.md says which definition is invariant to what. What ascent found is a true lower bound (`kind`); `quadratic` is a reference, no bound on the loss. Ascent costs up to `gradients` gradients from each start;
    products, beside the shared spectrum and the gradient's Krylov space: 1 for "flatness", 1 + `steps` Gauss-Newton products for "fisher".
    """
    given = locals()
    wanted = list(DEFINITIONS) if definitions is None else [definitions] if isinstance(definitions, str) else list(definitions)
    strangers = [name for name in wanted if name not in DEFINITIONS]
    if strangers or not wanted:
        raise ValueError(f"sharpness(definitions={definitions!r}): choose from {', '.join(DEFINITIONS)}.")
    constants = Constants(**{f.name: given[f.name] for f in fields(Constants)} | {"epsilons": tuple(epsilons)})
    rows: list[dict[str, Any]] = []
    with progress_bar(subject.progress, "sharpness", unit="definition") as report:
        for done, name in enumerate(wanted, start=1):
            rows += DEFINITIONS[name](subject, constants)
            report(done, len(wanted), name)
    return {"sharpness": Table(rows=rows, x="definition", y="value", label="sharpness by definition")}
