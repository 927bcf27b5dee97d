"""Evidence 2: right where others are silently wrong, and several times faster. Prints every claim with its measured figure and its bar.

Run from the repository root: `make evidence-2` (about 15 minutes on 2 cores, while nothing else runs; `--quick` leaves out the benchmarks).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.workloads import WORKLOADS
from tests import test_engines, test_silent, test_snapshot, test_transformers

from orograph import OutOfBudget, eigenpairs, hessian, spectrum, trace
from orograph.memory import Meter

from .tables import Row, holds, show

PRODUCT = {"mlp": 2.5, "cnn": 2.3, "gpt": 2.3}
SPECTRUM = {"mlp": 0.25, "cnn": 0.5, "gpt": 0.5}


def benchmark_rows() -> list[Row]:
    """Costs beside the peers, from one run of `make bench`, which writes docs/benchmarks.md."""
    from benchmarks import run  # only where the peers are installed

    rows: list[Row] = []
    for name, figures in run.main(list(WORKLOADS)).items():
        product, largest, parts = figures["product"], figures["lambda_max"], figures["spectrum"]
        for label, key, bar in (("graph retained", "Orograph, graphs retained", PRODUCT[name]), ("fresh", "Orograph, fresh", 3.2), ("GGN", "Orograph, GGN", 1.8)):
            rows.append((f"{name}: one further product, {label} (floor 2.0; GGN 4/3)", f"{product[key]:.2f} gradients", f"<= {bar}", product[key] <= bar))
        ratio = largest["Orograph, preflight included"] / largest["curvlinops + ARPACK"]
        power = largest["Orograph, preflight included"] / largest["PyHessian's power iteration, to the same residual"]
        rows.append((f"{name}: lambda_max to 1e-3, preflight included / curvlinops + ARPACK", f"{ratio:.2f}", "<= 0.2", ratio <= 0.2))
        rows.append((f"{name}: lambda_max / power iteration to the same residual", f"{power:.2f}", "< 1", power < 1))
        whole, floor = parts["ours"] / parts["peers"], parts["floor"] / (parts["ours"] / figures["size"]["gradient"])
        rows.append((f"{name}: spectrum / sum of the cheapest right peers (floor: {floor:.2f} of ours)", f"{whole:.2f}", f"<= {SPECTRUM[name]}", whole <= SPECTRUM[name]))
    return rows


def memory_rows() -> list[Row]:
    """Peak bytes of tensors against the budget, for lambda_max, trace and spectrum."""
    rows: list[Row] = []
    for name, make in WORKLOADS.items():
        objective = make().objective()
        jobs: dict[str, Callable[[int | None], object]] = {
            "lambda_max": lambda memory, o=objective: eigenpairs(hessian(o, memory=memory)),  # type: ignore[misc]
            "trace to 10 %": lambda memory, o=objective: trace(hessian(o, memory=memory), rel_error=0.1),  # type: ignore[misc]
            "spectrum, k = 3": lambda memory, o=objective: spectrum(hessian(o, memory=memory), k=3, rel_error=0.2),  # type: ignore[misc]
        }
        for job, run in jobs.items():
            free = _peak(partial(run, None))
            used, within = [], True
            for share in (0.5, 0.1):
                try:
                    peak = _peak(partial(run, int(share * free)))
                    within &= peak <= share * free
                    used.append(f"{peak / (share * free):.0%} of {share:g}")
                except OutOfBudget:
                    used.append(f"refused at {share:g}")
                    within &= share < 0.5 and job.startswith("spectrum")  # its pairs, starts and images need their vectors
            rows.append((f"{name}, {job}: peak of the budget, at half and a tenth of the free peak ({free / 2**20:.0f} MiB)", ", ".join(used), "<= 100 %; finishes", within))
        gradient = _peak(objective.gradient)
        fresh = hessian(objective, engine="fresh", check=False)
        times = _peak(lambda op=fresh, o=objective: op @ o.theta) / gradient  # type: ignore[misc]
        rows.append((f"{name}: a fresh product's peak", f"{times:.1f} gradients", "<= 3", times <= 3))
    return rows


def silent_rows() -> list[Row]:
    """Ordinary models right, functions without a second derivative right by differences, wrong operators caught."""
    right = sum(holds(partial(test_engines.test_ordinary_models_are_right, name, engine)) for name in test_engines.RIGHT for engine in ("retained", "fresh"))
    wrapped = [test_engines.test_compiled_modules_run_eagerly_and_stay_compiled, *(partial(test_engines.test_batchnorm_stand_in_is_the_same_function, mode) for mode in ("eval", "batch"))]
    steps = [
        partial(test_snapshot.test_operator_is_still_the_snapshots_after_the_users_optimiser_has_stepped, model, step, engine)
        for model in test_snapshot.MODELS for step in test_snapshot.STEPS for engine in ("retained", "fresh")
    ]  # fmt: skip
    tied = [partial(test_engines.test_every_engine_gives_the_same_matrix, engine, "tied tokens") for engine in ("retained", "fresh", "difference")]
    custom = [
        partial(test_engines.test_custom_functions_without_a_second_derivative_are_right_by_differences, kind, residual, function)
        for kind in (hessian, test_engines.ggn) for residual in (False, True) for function in (test_engines.Kernel, test_engines.Once)
    ]  # fmt: skip
    custom += [test_engines.test_what_torch_cannot_differentiate_twice_is_right_by_differences, test_engines.test_torchs_own_wrong_weight_norm_is_right_by_differences]
    caught = sum(holds(partial(test_silent.test_preflight_alone_catches_what_is_wrong, name)) for name in test_silent.WRONG)
    total, wrong = 2 * len(test_engines.RIGHT), len(test_silent.WRONG)
    rows: list[Row] = [("attention, norms, RNNs, checkpoints (both kinds), encoder layer: against differences", f"{right} of {total}", "all", right == total)]
    for label, checks in (("compiled modules; BatchNorm in both modes", wrapped), ("operators after plain, foreach and fused optimiser steps", steps), ("tied weights", tied)):
        good = sum(map(holds, checks))
        rows.append((f"  {label}", f"{good} of {len(checks)}", "all", good == len(checks)))
    good = sum(map(holds, custom))
    rows.append(("functions without, or with a wrong, second derivative: right by differences", f"{good} of {len(custom)}", "all", good == len(custom)))
    rows.append(("preflight alone: wrong operators caught, the right one of the same model proven", f"{caught} of {wrong}", "all", caught == wrong))
    return rows


def alarm_rows() -> list[Row]:
    """False alarms on sane models."""
    found = {f"{name}, {dtype}": test_silent.alarms(name, dtype) for name in test_silent.SANE for dtype in (torch.float32, torch.bfloat16)}
    count, runs = sum(map(len, found.values())), 5 * len(found)
    return [(f"false alarms: {len(test_silent.SANE)} sane models x fp32 and bf16 x 5 seeds", f"{count} in {runs}", "none", count == 0)]


def transformer_rows() -> list[Row]:
    """Real transformers in float64."""
    rows: list[Row] = []
    for name in test_transformers.CASES:
        forward, differences = test_transformers.errors(name)
        rows.append((f"{name}: against forward-over-reverse, against differences", f"{forward:.0e}, {differences:.0e}", "< 1e-6, < 1e-4", forward < 1e-6 and differences < 1e-4))
    return rows


def precision_rows() -> list[Row]:
    """Low precision: intervals hold, and digits that are not there are not claimed."""
    cases = [test_silent.low_precision_case(kind, seed) for kind in ("bf16", "autocast") for seed in range(20)]
    inside = sum(case[0] for case in cases)
    honest = all(status == "noise-limited" or residual <= 1e-3 for _, status, residual, _ in cases)
    limited = sum(status == "noise-limited" for _, status, _, _ in cases)
    return [("bf16 weights and autocast: the float64 lambda_max inside the interval", f"{inside} of 40; {limited} noise-limited", ">= 38", inside >= 38 and honest)]


def parts_row() -> list[Row]:
    """What the trace costs: products for 1 %, by method."""
    rows: list[Row] = []
    for name in ("mlp", "cnn"):
        op = hessian(WORKLOADS[name]().objective())
        spent = {method: trace(op, method=method, rel_error=0.01, max_products=1500).products for method in ("auto", "xtrace")}
        rows.append((f"{name}: products for a trace to 1 %, auto against XTrace", f"{spent['auto']} against {spent['xtrace']}", "fewer", spent["auto"] < spent["xtrace"]))
    return rows


def _peak(job: Callable[[], object]) -> int:
    with Meter() as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that differences are used is what may happen
        job()
    found: int = meter.peak
    return found


def main() -> None:
    """Measure every row and print the table."""
    sections: list[Callable[[], list[Row]]] = [silent_rows, alarm_rows, transformer_rows, precision_rows, parts_row, memory_rows]
    if "--quick" not in sys.argv:
        sections.insert(0, benchmark_rows)
    show("Evidence 2: right where others are silently wrong, and several times faster", sections)


if __name__ == "__main__":
    main()
