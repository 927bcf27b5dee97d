"""Evidence 1: from a network to certified curvature. Prints every claim with its measured figure, its bar, pass or fail.

Run from the repository root: `make evidence-1` (about 8 minutes on 2 cores; `--quick` leaves out the fresh clone).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests import test_curvature, test_errors, test_objective, test_snapshot
from tests.networks import N, loss_cases
from tests.oracles import dense_hessian, expected_pairs, planted, planted_spectra, relative
from tests.test_density import SPECTRA, wasserstein
from torch import nn
from torch.nn import functional as F

from evidence.intervals import trace_coverage
from evidence.tables import Row, holds, show
from orograph import Objective, eigenpairs, ggn, hessian, spectral_density
from orograph.linalg.lanczos import Krylov
from orograph.studies.networks import mlp
from orograph.studies.problems import digits
from orograph.studies.training import train_to_loss


def trained_digits(dtype: torch.dtype) -> tuple[Objective, nn.Sequential]:
    """A digits MLP of 1,210 parameters, trained, in the given precision."""
    problem = digits()
    model = mlp(64, 16, 10, seed=0)
    train_to_loss(model, problem.train, batch_size=32, learning_rate=0.2, target=0.1)
    return Objective(model, nn.CrossEntropyLoss(), problem.train, dtype=dtype), model


def digits_against_dense() -> list[Row]:
    """Extreme eigenpairs of a trained network against its dense Hessian."""
    objective, _ = trained_digits(torch.float64)
    op = hessian(objective)
    values = torch.linalg.eigvalsh(op.dense()).flip(0)
    top, bottom = eigenpairs(op, 10, tol=1e-6), eigenpairs(op, 1, which="smallest", tol=1e-6)
    found, exact = torch.cat([top.values, bottom.values]), torch.cat([values[:10], values[-1:]])
    worst = float(((found - exact) / exact).abs().max())
    gap, inside = 0.0, True
    for pairs, truth in ((top, values[:10]), (bottom, values[-1:])):
        assert pairs.vectors is not None
        residuals = op.space.norm(op @ pairs.vectors - pairs.vectors * pairs.values)
        gap = max(gap, float((residuals - pairs.residuals).abs().max() / values[0]))
        inside &= bool(((pairs.intervals[:, 0] <= truth) & (truth <= pairs.intervals[:, 1])).all())
    name = f"digits MLP, {objective.size} parameters: lambda_max, top 10, lambda_min against the dense Hessian"
    return [
        (name, f"relative error {worst:.1e}", "< 1e-8", worst < 1e-8),
        ("  reported residual against the true one", f"differs by {gap:.0e} lambda_max", "< 1e-12", gap < 1e-12),
        ("  intervals contain the value", f"{'all' if inside else 'not all'} 11", "all", inside),
    ]


def closed_forms() -> list[Row]:
    """Linear, logistic and softmax regression: the tests hold each to 1e-12."""
    checks = [test_curvature.test_linear_regression_is_2_xx_over_n, test_curvature.test_logistic_regression_is_x_p_1_minus_p_x_over_n, test_curvature.test_softmax_regression_is_the_kronecker_sum]
    held = sum(holds(partial(check, kind)) for check in checks for kind in (hessian, ggn))
    return [("Hessian and GGN of linear, logistic, softmax regression against closed forms", f"{held} of 6 within 1e-12", "< 1e-10", held == 6)]


def batchings() -> list[Row]:
    """The dense Hessian of the whole set from every batching, for every kind of loss and data."""
    worst, cells = 0.0, 0
    for case in loss_cases().values():
        expected = dense_hessian(case.objective(N), case.model, case.whole)
        for size in (1, 7, 300, N):
            worst, cells = max(worst, relative(hessian(case.objective(size), check=False).dense(), expected)), cells + 1
    pinn = sum(holds(partial(test_objective.test_pinn_hessian_is_that_of_all_collocation_points, size)) for size in (1, 7, 300, N))
    name = f"batches of 1, 7, 300, all x {len(loss_cases())} losses and data (ignored tokens, dicts, tied, unused, weights ...)"
    return [
        (name, f"{cells} cells, worst {worst:.1e}", "< 1e-10", worst < 1e-10),
        ("  a PINN through from_batch_loss, same batchings", f"{pinn} of 4 within 1e-10", "4 of 4", pinn == 4),
    ]


def criteria() -> list[Row]:
    """The same criterion in every form: the same operator, or an error that asks for count."""
    case = loss_cases()["class weights"]
    weight, expected = case.criterion.weight, None
    forms: dict[str, Any] = {
        "module": nn.CrossEntropyLoss(weight=weight), "partial": partial(F.cross_entropy, weight=weight),
        "lambda": lambda o, t: F.cross_entropy(o, t, weight=weight), "function": F.cross_entropy, "plain lambda": lambda o, t: F.cross_entropy(o, t),
        "sum in a lambda": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    }  # fmt: skip
    outcomes = {}
    weighted = dense_hessian(case.objective(N), case.model, case.whole)
    plain = dense_hessian(case.objective(N), case.model, lambda call: F.cross_entropy(call(case.data[0]), case.data[1]))
    for name, form in forms.items():
        expected = plain if name in ("function", "plain lambda") else weighted
        try:
            outcomes[name] = "same" if relative(hessian(Objective(case.model, form, case.batches(47))).dense(), expected) < 1e-12 else "DIFFERENT"
        except ValueError as error:
            outcomes[name] = "asks for count" if "count=" in str(error) else "unclear error"
    good = all(value in ("same", "asks for count") for value in outcomes.values())
    return [("criterion as module, function, partial, lambda", "; ".join(f"{k}: {v}" for k, v in outcomes.items()), "same, or asks for count", good)]


def planted_rows() -> list[Row]:
    """Eigenpairs of planted spectra at every end and scale, and no ghosts in single precision."""
    good, cells, worst = 0, 0, 0.0
    for name, values in planted_spectra().items():
        for scale in (1.0, 1e-6, 1e6):
            for which in ("largest", "smallest", "magnitude", "both"):
                hidden = name == "geometric" and which in ("smallest", "both")  # below round-off: nothing can be resolved there
                pairs = eigenpairs(planted(values * scale), 5, which=which, tol=1e-6, max_products=400 if hidden else None)
                expected = expected_pairs(values * scale, 5, which)
                error = float((pairs.values.abs() - expected.abs()).abs().max() / (values.abs().max() * scale))
                worst = max(worst, error)
                round_off = hidden or (name == "rank-deficient" and which in ("smallest", "both"))
                good += error < 1e-9 and (pairs.status != "converged" if round_off else pairs.status == "converged")
                cells += 1
    outliers = SPECTRA["outliers over an indefinite bulk"]
    krylov = Krylov(planted(outliers, torch.float32), 300, torch.zeros(0, len(outliers)))
    krylov.begin(torch.randn(len(outliers), generator=torch.Generator().manual_seed(1)))
    for _ in range(300):
        krylov.step()
    copies = int((krylov.ritz()[0] > 1).sum())
    return [
        ("planted spectra (6 x 3 scales x 4 ends): values and status", f"{good} of {cells} right, worst error {worst:.0e} of the norm", "all", good == cells),
        ("  Ritz values above the bulk after 300 steps in fp32, 7 planted", f"{copies}", "7", copies == 7),
    ]


def interval_rows(seeds: int) -> list[Row]:
    """Coverage and width of the trace's intervals."""
    cells = trace_coverage(seeds)
    least, mean = min(c["coverage"] for c in cells), sum(c["coverage"] for c in cells) / len(cells)
    widest = max(c["ratio"] for c in cells)
    return [
        (f"95 % intervals of trace, {seeds} seeds x {len(cells)} cells: least coverage", f"{least:.1%}", ">= 91.5 %", least >= 0.915),
        ("  coverage over all", f"{mean:.1%}", ">= 94 %", mean >= 0.94),
        ("  largest median half-width / 95 % quantile of the true error", f"{widest:.2f}", "<= 1.7", widest <= 1.7),
    ]


def density_rows() -> list[Row]:
    """Wasserstein-1 distance of the density at the defaults."""
    worst, where = max((wasserstein(spectral_density(planted(values), seed=seed), values), name) for name, values in SPECTRA.items() for seed in range(5))
    objective, _ = trained_digits(torch.float32)
    op = hessian(objective)
    exact = torch.linalg.eigvalsh(op.dense().double())
    network = max(wasserstein(spectral_density(op, seed=seed), exact) for seed in range(5))
    return [
        (f"density at the defaults, {len(SPECTRA)} spectra x 5 seeds: worst W1 / range", f"{worst:.2%} ({where})", "< 1 %", worst < 0.01),
        ("  digits MLP, 5 seeds", f"{network:.2%}", "< 1 %", network < 0.01),
    ]


def snapshot_rows() -> list[Row]:
    """Operators after the user's optimiser has stepped, after .at(), with checkpointing, RNNs and BatchNorm in both modes."""
    cells = [(m, s, e) for m in test_snapshot.MODELS for s in test_snapshot.STEPS for e in ("fresh", "retained")]
    held = sum(holds(partial(test_snapshot.test_operator_is_still_the_snapshots_after_the_users_optimiser_has_stepped, *cell)) for cell in cells)
    modes = sum(holds(partial(test_snapshot.test_batchnorm_in_both_modes_is_its_own_fixed_function, mode)) for mode in ("eval", "batch"))
    own = holds(test_snapshot.test_users_own_pending_backward_still_works) + holds(test_snapshot.test_pending_backward_through_checkpointing_still_works)
    return [
        ("operator after optimiser steps (plain, foreach, fused) and .at(): bit for bit the snapshot's", f"{held} of {len(cells)}", "all", held == len(cells)),
        ("  BatchNorm in both modes; a pending backward of the user's", f"{modes + own} of 4", "all", modes + own == 4),
    ]


def bad_input_rows() -> list[Row]:
    """Every bad input gets its one clear error and leaves the state alone."""
    with tempfile.TemporaryDirectory() as folder:
        held = sum(holds(partial(test_errors.test_bad_input_is_one_clear_error, name, Path(folder))) for name in test_errors.BAD)
    total = len(test_errors.BAD)
    return [("bad input: one clear error that says what to do, state untouched", f"{held} of {total} cases", ">= 30, all", held == total >= 30)]


def fresh_clone_rows() -> list[Row]:
    """`make demo` and `make test` on a fresh clone, in a fresh virtual environment."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(clone)], check=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "PYTHONPATH", "MAKE"))}
        for target, limit in (("demo", 600), ("test", 1500)):
            began = time.perf_counter()
            done = subprocess.run(["make", target], cwd=clone, env=environment, capture_output=True, text=True, timeout=limit, check=False)
            last = (done.stdout.strip().splitlines() or [""])[-1][:60]
            rows.append((f"fresh clone: make {target}", f"exit {done.returncode}, {time.perf_counter() - began:.0f} s: {last}", "exit 0", done.returncode == 0))
        shutil.rmtree(clone, ignore_errors=True)
    return rows


def main() -> None:
    """Measure every row and print the table."""
    quick = "--quick" in sys.argv
    sections: list[Callable[[], list[Row]]] = [
        digits_against_dense, closed_forms, batchings, criteria, planted_rows, density_rows, snapshot_rows, bad_input_rows, partial(interval_rows, 100 if quick else 1000),
    ]  # fmt: skip
    if not quick:
        sections.append(fresh_clone_rows)
    show("Evidence 1: from a network to certified curvature", sections)


if __name__ == "__main__":
    main()
