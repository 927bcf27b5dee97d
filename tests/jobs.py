"""Long jobs on one small network: how each is run, how it is interrupted, what leaves its result alone and what changes it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orograph as og
from orograph.linalg.operator import LinearOperator

Change = dict[str, Any]  # settings of `network`, of `objective`, of the operator and of the job that differ from the usual
GOOD = torch.Generator().manual_seed(0)
INPUTS = torch.randn(30, 5, generator=GOOD)
LABELS = torch.randint(0, 3, (30,), generator=GOOD)


class Scaled(nn.Module):
    """A network with BatchNorm and a number that no state dict holds."""

    def __init__(self, scale: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), activation(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def network(*, seed: int = 0, scale: float = 1.0, activation: type[nn.Module] = nn.Tanh, weight: float = 1.0, statistics: float = 1.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    net = Scaled(scale, activation)
    net.body[1].running_mean.copy_(torch.linspace(0.1, 0.2, 6))
    with torch.no_grad():
        net.body[0].weight[0, 0] *= weight
        net.body[1].running_mean[0] *= statistics
    return net.to(dtype).eval()


def with_decay(decay: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's own loss, with a number in its closure."""
    return lambda output, target: F.cross_entropy(output, target) + decay * output.square().mean()


LOSSES: dict[str, Any] = {
    "plain": nn.CrossEntropyLoss(), "smoothed": nn.CrossEntropyLoss(label_smoothing=1e-3), "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.001])),
    "sum": nn.CrossEntropyLoss(reduction="sum"), "own": with_decay(1e-3), "own, another number": with_decay(1.001e-3),
}  # fmt: skip


def data(*, entry: float = 1.0, label: int = 0, rows: int = 30, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = INPUTS.to(dtype).clone(), LABELS.clone()
    x[7, 2] *= entry
    y[7] = (y[7] + label) % 3
    return x[:rows], y[:rows]


def objective(*, loss: str = "plain", net: Change | None = None, examples: Change | None = None, dtype: torch.dtype = torch.float64, label: str | None = None, **settings: Any) -> og.Objective:
    criterion = LOSSES[loss]
    criterion = criterion.to(dtype) if isinstance(criterion, nn.Module) else criterion
    found = og.Objective(network(dtype=dtype, **(net or {})), criterion, data(dtype=dtype, **(examples or {})), **settings)
    return found if label is None else found.at(found.point(label=label))


def operator(change: Change) -> LinearOperator:
    kind, make = change.get("kind", "hessian"), change.get("operator", {})
    return getattr(og, kind)(objective(**change.get("objective", {})), **make)


Progress = Callable[[int, int, str], None] | None


def _on_operator(function: Callable[..., Any], numbers: Callable[[Any], list[float]], **usual: Any) -> Callable[[Change, Path | None, Progress], tuple[list[float], float]]:
    """A job on the Hessian: (its numbers, products that this call has spent)."""

    def run(change: Change, path: Path | None, progress: Progress) -> tuple[list[float], float]:
        op = operator(change)
        spent = [0]

        def counting(V: Tensor, inner: Any = op.matmat) -> Tensor:
            spent[0] += V.shape[1]
            return inner(V)

        op.matmat = counting
        before = 2 if path is not None else 0  # products by which the matrix is known
        found = function(op, checkpoint=path, progress=progress, **{**usual, **change.get("job", {})})
        return numbers(found), spent[0] - before

    return run


def _curve(function: Callable[..., Any], **usual: Any) -> Callable[[Change, Path | None, Progress], tuple[list[float], float]]:
    def run(change: Change, path: Path | None, progress: Progress) -> tuple[list[float], float]:
        here, steps = objective(**change.get("objective", {})), [0]

        def counting(done: int, total: int, note: str) -> None:
            steps[0] += 1
            if progress is not None:
                progress(done, total, note)

        net = change.get("objective", {}).get("net") or {}
        dtype = change.get("objective", {}).get("dtype", torch.float64)
        ends = [network(**{**net, "seed": seed, "dtype": dtype}) for seed in (change.get("first", 0), change.get("last", 1))]
        found = function(here, *ends, checkpoint=path, progress=counting, **{**usual, **change.get("job", {})})
        return [float(x) for point in found.points for x in point.theta[:5]], float(steps[0])

    return run


def _surface(change: Change, path: Path | None, progress: Progress) -> tuple[list[float], float]:
    here = objective(**change.get("objective", {}))
    settings = {"tol": 1e-12, "resolution": 9, "span": 1.0, "max_evaluations": 81, "normalisation": "layer", "statistics": "frozen", **change.get("job", {})}
    record = og.measure(here, "surface", store=None if path is None else str(path), progress=progress, **settings)
    return record["surface"].z.flatten().tolist(), float(record["surface"].evaluations)


def _values(found: Any) -> list[float]:
    return found.values.tolist()


JOBS: dict[str, Callable[[Change, Path | None, Progress], tuple[list[float], float]]] = {
    "eigenpairs by Lanczos": _on_operator(og.eigenpairs, _values, k=2, tol=1e-6),
    "eigenpairs by power iteration": _on_operator(og.eigenpairs, _values, k=2, method="power", tol=1e-3),
    "eigenpairs by LOBPCG": _on_operator(og.eigenpairs, _values, k=2, method="lobpcg", tol=1e-4),
    **{f"trace by {method}": _on_operator(og.trace, lambda found: [float(found.value)], method=method, rel_error=1e-9, max_products=60) for method in ("auto", "hutchinson", "hutch++", "xtrace")},
    "spectral density": _on_operator(og.spectral_density, lambda found: found.nodes.flatten().tolist(), num_samples=3, steps=10),
    "spectrum": _on_operator(og.spectrum, lambda found: [*found.top.values.tolist(), float(found.trace.value)], k=3),
    "fit_path": _curve(og.fit_path, epochs=6, batch_size=10),
    "elastic_band": _curve(og.elastic_band, cycles=[(3, 0.1), (3, 0.05)], batch_size=10),
    "surface": _surface,
}
ON_OPERATORS = [name for name in JOBS if name not in ("fit_path", "elastic_band", "surface")]

# What leaves the result of a job as it is. `memory` of operators is set by hand below: free memory changes by itself.
SAME_JOB: dict[str, Change] = {
    "less memory": {"operator": {"memory": "4MiB"}},
    "hardly any memory": {"operator": {"memory": 150_000}},
    "more memory": {"operator": {"memory": "8GiB"}},
    "graphs built anew": {"operator": {"engine": "fresh"}},
    "graphs kept": {"operator": {"engine": "retained"}},
    "two threads": {"threads": 2},
    "another label": {"objective": {"label": "renamed"}},
    "unproven products": {"operator": {"check": False}},
}
# What changes it, on every job.
OTHER_JOB: dict[str, Change] = {
    "one weight, by 1e-3": {"objective": {"net": {"weight": 1.001}}},
    "one running mean, by 1e-3": {"objective": {"net": {"statistics": 1.001}}},
    "one entry of one example, by 1e-3": {"objective": {"examples": {"entry": 1.001}}},
    "one label": {"objective": {"examples": {"label": 1}}},
    "one example less": {"objective": {"examples": {"rows": 29}}},
    "a class weight, by 1e-3": {"objective": {"loss": "weighted"}},
    "label smoothing of 1e-3": {"objective": {"loss": "smoothed"}},
    "a sum for a mean": {"objective": {"loss": "sum"}},
    "a user's own loss": {"objective": {"loss": "own"}},
    "a number of the model that is no weight": {"objective": {"net": {"scale": 1.001}}},
    "another activation": {"objective": {"net": {"activation": nn.Softsign}}},
    "BatchNorm by batches": {"objective": {"mode": "batch"}},
    "single precision": {"objective": {"dtype": torch.float32}},
    "fewer parameters": {"objective": {"params": "body.3.*"}},
    "the seed": {"job": {"seed": 1}},
}
OTHER_OPERATOR: dict[str, Change] = {"Gauss-Newton": {"kind": "ggn"}, "Fisher": {"kind": "fisher"}}
OTHER_SETTINGS: dict[str, dict[str, Change]] = {
    "eigenpairs by Lanczos": {"k": {"job": {"k": 3}}, "which": {"job": {"which": "smallest"}}, "tol": {"job": {"tol": 1e-5}}, "start": {"job": {"start": torch.ones(69, dtype=torch.float64)}}},
    "eigenpairs by power iteration": {"method": {"job": {"method": "lobpcg"}}, "k": {"job": {"k": 1}}},
    "eigenpairs by LOBPCG": {"method": {"job": {"method": "lanczos"}}, "which": {"job": {"which": "both"}}},
    "trace by auto": {"method": {"job": {"method": "xtrace"}}},
    "trace by hutch++": {"method": {"job": {"method": "hutchinson"}}},
    "spectral density": {"samples": {"job": {"num_samples": 4}}, "steps": {"job": {"steps": 11}}},
    "spectrum": {"k": {"job": {"k": 2}}},
    "fit_path": {name: {"job": {name: value}} for name, value in {"kind": "polychain", "bends": 2, "epochs": 7, "batch_size": 15, "learning_rate": 0.21, "momentum": 0.8, "weight_decay": 6e-4}.items()}
    | {"first end": {"first": 2}, "last end": {"last": 2}},
    "elastic_band": {name: {"job": {name: value}} for name, value in {"cycles": [(3, 0.1), (3, 0.06)], "batch_size": 15, "momentum": 0.8, "weight_decay": 2e-4}.items()} | {"last end": {"last": 2}},
    "surface": {"normalisation": {"job": {"normalisation": "filter"}}},
}  # fmt: skip


def right_jobs() -> list[tuple[str, str]]:
    """(job, what changes without changing its result)."""
    return [(job, same) for job in JOBS for same in SAME_JOB if job in ON_OPERATORS or "operator" not in SAME_JOB[same]]


def wrong_jobs() -> list[tuple[str, str, Change]]:
    """(job, what changes, how): jobs of another result."""
    common = [(job, what, change) for job in JOBS for what, change in OTHER_JOB.items() if what != "fewer parameters" or job not in ("fit_path", "elastic_band")]  # whose ends differ in the others
    operators = [(job, what, change) for job in ON_OPERATORS for what, change in OTHER_OPERATOR.items()]
    return common + operators + [(job, what, change) for job, changes in OTHER_SETTINGS.items() for what, change in changes.items()]


def run(job: str, change: Change, path: Path | None, *, reports: int | None = None) -> tuple[list[float], float]:
    """Run a job; after so many `reports` of its progress it is interrupted as by Ctrl-C."""
    seen = [0]

    def interrupting(done: int, total: int, note: str) -> None:
        seen[0] += 1
        if reports is not None and seen[0] > reports:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(change.get("threads", before))
    try:
        return JOBS[job](change, path, interrupting)
    finally:
        torch.set_num_threads(before)


@functools.cache
def undisturbed(job: str) -> tuple[list[float], float]:
    return run(job, {}, None)
