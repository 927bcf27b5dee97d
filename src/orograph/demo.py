"""The demo: the same small network trained with small and with large batches to the same loss, measured and compared."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .arguments import Folder, Seed
from .checks import checked
from .objective import Objective
from .progress import Progress
from .records import Record, RecordKeeper, Records
from .registry import measure, measure_all
from .report import write_report
from .results import Spectrum
from .studies.networks import mlp
from .studies.problems import digits
from .studies.training import train_to_loss

WIDTHS = (64, 32, 10)
RUNS = {"small batch": 16, "large batch": 400}
LEARNING_RATE = 0.2
TARGET = 0.05
EXAMPLES = 597  # held out
PROBES = ["gradient", "spectrum", "layers", "sharpness", "noise", "stability"]
SETTINGS: dict[str, dict[str, Any]] = {
    "spectrum": {"rel_error": 0.02}, "sharpness": {"definitions": ["curvature", "sam", "worst", "flatness", "fisher"]}, "stability": {"learning_rate": LEARNING_RATE},
}  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind."""

    records: Records
    table: list[tuple[str, str, str, str]]  # quantity, small batch, large batch, what it means
    report: Path
    seconds: float


@checked
def run_demo(folder: Folder, *, seed: Seed = 0, progress: Progress = None) -> Demo:
    """Train twice, measure both networks and the line between them, write records and report into `folder`."""
    folder, began = Path(folder), time.perf_counter()
    problem = digits()
    start = mlp(*WIDTHS, seed=seed)
    networks: dict[str, nn.Sequential] = {}
    for name, batch_size in RUNS.items():
        network = copy.deepcopy(start)
        result = train_to_loss(
            network, problem.train, batch_size=batch_size, learning_rate=LEARNING_RATE, target=TARGET, seed=seed, progress=progress, title=f"training, {name}"
        )
        if not result.reached:
            raise RuntimeError(f"the demo's training with the {name} stopped at loss {result.loss:.3g}, above {TARGET}.")
        networks[name] = network
    objective = Objective(networks["small batch"], nn.CrossEntropyLoss(), problem.train)
    held_out = objective.on(problem.held_out)
    records: list[Record] = []
    keeper = RecordKeeper(folder / "records")
    for name, network in networks.items():
        here = objective.at(objective.point(network, label=name))
        records += measure_all(here, PROBES, tags={"batch size": RUNS[name]}, held_out=held_out.at(network), progress=progress, settings=SETTINGS)
        keeper.save(records[-len(PROBES) :])
    ends = [objective.point(network, label=name) for name, network in networks.items()]
    records.append(measure(objective, "barrier", *ends, held_out=held_out, progress=progress))
    accuracies = {name: held_out.at(network).metrics()["accuracy"] for name, network in networks.items()}
    keeper.save(records[-1:])
    kept = Records(records)
    page = write_report(kept, folder / "report.html")
    if keeper.lost:
        raise OSError(keeper.lost)
    return Demo(kept, _table(kept, accuracies), page, time.perf_counter() - began)


def _table(records: Records, held_out: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """Every quantity for both networks, with a sentence on what it says."""
    of = {(record.probe, record.label): record for record in records}
    names = list(RUNS)
    gradients: list[Any] = [of["gradient", name] for name in names]
    spectra: list[Any] = [of["spectrum", name]["spectrum"] for name in names]
    others: list[list[Any]] = [[of[probe, name] for name in names] for probe in ("layers", "sharpness", "noise", "stability")]
    layers_of, sharp, noisy, stable = others
    layers = [max(g["layers"].rows, key=lambda r: r["norm"]) for g in gradients]
    flatter = names[0] if spectra[0].top.values[0] < spectra[1].top.values[0] else names[1]
    better = max(held_out, key=lambda name: held_out[name])
    scatter = 2 * (2 * 0.02 * 0.98 / EXAMPLES) ** 0.5  # of a difference of two shares near 2 %, two standard errors
    agree = "the flatter network also generalises better here" if better == flatter else "the flatter network does not generalise better here"
    if abs(held_out[names[0]] - held_out[names[1]]) < scatter:
        agree = f"the difference is less than {EXAMPLES} digits can tell"
    barrier: Any = next(record for record in records if record.probe == "barrier")
    return [
        _row("training loss", [f"{g['loss'].value:.4f}" for g in gradients], "the same by construction: both stopped there"),
        _row("training accuracy", [f"{g['accuracy'].value:.1%}" for g in gradients], "share of training digits read rightly"),
        _row("held-out accuracy", [f"{held_out[name]:.1%}" for name in names], f"share of unseen digits read rightly; {agree}"),
        _row("gradient norm", [f"{g['norm'].value:.4f}" for g in gradients], "how steep the loss is here; zero at a minimum"),
        _row("steepest layer", [f"{r['name']} ({r['norm']:.3f})" for r in layers], "where most of the gradient is"),
        _row("lambda_max", [_pair(s, "top", 0) for s in spectra], "curvature along the sharpest direction"),
        _row("2 / lambda_max", [f"{2 / float(s.top.values[0]):.3f}" for s in spectra], f"largest stable learning rate of plain gradient descent; training used {LEARNING_RATE}"),
        _row("lambda_1 ... lambda_10", [f"{float(s.top.values[0]):.3g} ... {float(s.top.values[-1]):.3g}" for s in spectra], "the sharp directions: for 10 classes, about 10 stand out"),
        _row("lambda_min", [_pair(s, "bottom", 0) for s in spectra], "negative: a direction in which the loss still curves down"),
        _row("trace", [_interval(s) for s in spectra], "noise of size sigma on every weight raises the loss by sigma^2/2 times this"),
        _row("negative eigenvalues", [f"{float(s.negative_mass.value):.1%}" for s in spectra], "share of directions that curve down by more than the density resolves"),
        _row("most curved layer", [_most_curved(r) for r in layers_of], "where most of the trace is"),
        _row("worst case, radius 0.05", [_worst(r) for r in sharp], "rise of the loss that ascent found in the ball, and the quadratic model's value"),
        _row("sigma for -10 % accuracy", [f"{float(r['sigma_at_drop'].value):.3f}" for r in noisy], "noise on every weight that costs a tenth of the accuracy: the valley's width"),
        _row("critical learning rate", [f"{float(r['critical_rate'].value):.3f}" for r in stable], "from which a step along the gradient raises the loss, by forward passes alone"),
        _row("products spent", [f"{sum(r.products for r in records if r.label == name)}" for name in names], "Hessian-vector products of all probes; each costs about 2 gradients"),
        _row("status", [of["spectrum", name].status for name in names], "whether every number reached the asked precision"),
        ("barrier between them", _barrier(barrier), "", "loss on the straight line above the chord between its ends"),
    ]


def _pair(s: Spectrum, end: str, index: int) -> str:
    pairs = s.top if end == "top" else s.bottom
    return f"{float(pairs.values[index]):.4f} ± {float(pairs.intervals[index, 1] - pairs.values[index]):.0e}"


def _interval(s: Spectrum) -> str:
    low, high = s.trace.interval()
    return f"{float(s.trace.value):.1f} [{float(low):.1f}, {float(high):.1f}]"


def _most_curved(record: Any) -> str:
    rows = [row for row in record["layers"].rows if row["kind"] == "parameter"]
    most = max(rows, key=lambda row: row["trace"])
    return f"{most['name']} ({most['trace'] / sum(row['trace'] for row in rows):.0%})"


def _worst(record: Any) -> str:
    row = next(row for row in record["sharpness"].rows if row["definition"] == "worst case, L2 ball")
    return f"{row['found']:.4f} / {row['quadratic']:.4f}"


def _barrier(record: Any) -> str:
    row = next(r for r in record["barriers"].rows if r["definition"] == "over the chord" and r["metric"] == "loss" and r["split"] == "train")
    return f"{row['value']:.3f} at t = {row['t']:.2f}"


def _row(quantity: str, cells: list[str], meaning: str) -> tuple[str, str, str, str]:
    small, large = cells
    return quantity, small, large, meaning
