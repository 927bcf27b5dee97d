"""What a product costs, in gradients of the same model on the same data: medians of alternating runs in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from operator import matmul

import torch
from torch import nn

from orograph import Objective, eigenpairs, ggn, hessian
from orograph.studies.networks import mlp
from orograph.studies.problems import digits

ROUNDS = 15


def networks() -> dict[str, Objective]:
    """A small MLP in ragged batches and a small convolutional network with BatchNorm, on handwritten digits."""
    problem = digits()
    x, y = problem.train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cnn = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    return {
        "digits MLP 64-64-64-10": Objective(mlp(64, 64, 64, 10, seed=0), nn.CrossEntropyLoss(), (x, y), batch_size=350),
        "digits CNN with BatchNorm": Objective(cnn, nn.CrossEntropyLoss(), (x[:500], y[:500]), batch_size=180),
    }


def seconds(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each job, alternating."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(ROUNDS + 2):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; cost in gradients (floor of a further product on a retained graph: 2.0)")
    for name, objective in networks().items():
        fresh, retained, gauss = hessian(objective), hessian(objective, engine="retained"), ggn(objective)
        v = objective.space.sample(0, 0, "normal")
        block = objective.space.samples(0, range(10), "normal")
        jobs: dict[str, Callable[[], object]] = {
            "gradient": objective.gradient,
            "product, fresh": partial(matmul, fresh, v),
            "product, retained": partial(matmul, retained, v),
            "10 products, fresh": partial(matmul, fresh, block),
            "GGN product": partial(matmul, gauss, v),
        }
        cost = seconds(jobs)
        unit = cost["gradient"]
        began = time.perf_counter()
        top = eigenpairs(hessian(objective))
        whole = time.perf_counter() - began
        print(f"\n{name}: {objective.size} parameters, {objective.examples} examples, gradient {1e3 * unit:.2f} ms")
        for job, value in cost.items():
            per = 10 if job.startswith("10") else 1
            print(f"  {job:22} {value / unit / per:6.2f}{' each' if per > 1 else ''}")
        print(f"  lambda_max, preflight included: {whole / unit:.0f} gradients, {top.products} products, relative residual {float(top.residuals[0] / top.values[0]):.1e}")


if __name__ == "__main__":
    main()
