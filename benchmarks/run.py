"""Orograph beside its peers on three workloads in one run: products, seconds, gradients, true residuals, errors, memory.

Run from the repository root: `make bench` (about 15 minutes on 2 cores; nothing else should run). Writes docs/benchmarks.md.
"""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from orograph import LinearOperator, Objective, eigenpairs, ggn, hessian, spectrum, trace
from orograph.memory import Meter

from .peers import PyHessianAlgorithm, arpack, curvlinops_operator, curvlinops_xtrace, eigenthings_lanczos, eigenthings_operator
from .workloads import WORKLOADS, Workload

ROUNDS = 3
PAGE = Path("docs/benchmarks.md")
CHUNK = 7  # columns at a time for curvlinops, which is faster on convolutions than all at once, and fits on the GPT
Row = list[str]


@dataclass
class Bench:
    """One workload with what its numbers are compared against."""

    workload: Workload
    objective: Objective
    exact: LinearOperator  # in float64
    reference: float  # lambda_max to 1e-8
    gradient: float  # seconds, the unit

    @classmethod
    def of(cls, workload: Workload) -> Bench:
        """Reference value in float64, and the unit: a gradient as Orograph computes it, which is within noise of a plain loop."""
        objective = workload.objective()
        exact = hessian(workload.objective(torch.float64), check=False)
        return cls(workload, objective, exact, float(eigenpairs(exact, tol=1e-8).values[0]), medians({"gradient": objective.gradient}, 15)["gradient"])

    def residual(self, value: float, vector: Tensor) -> float:
        """True relative residual, in float64, against the right operator."""
        v = vector.reshape(-1).double()
        v = v / v.norm()
        return float((self.exact @ v - value * v).norm()) / abs(value)


def medians(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, alternating, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if round_:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(job: Callable[[], Any]) -> int:
    """Bytes of tensors at the worst."""
    job()
    with Meter() as meter:
        job()
    found: int = meter.peak
    return found


def products_table(bench: Bench) -> tuple[list[Row], dict[str, float]]:
    """What one product costs, and its memory beside the gradient's."""
    objective, workload = bench.objective, bench.workload
    v = objective.space.sample(0, 0, "normal")
    block = objective.space.samples(0, range(10), "normal")
    fresh, kept, gauss = hessian(objective, engine="fresh", check=False), hessian(objective, engine="retained", check=False), ggn(objective, check=False)
    peers = curvlinops_operator(workload), eigenthings_operator(workload), PyHessianAlgorithm(workload)
    jobs: dict[str, Callable[[], Any]] = {
        "gradient": objective.gradient,
        "Orograph, graphs retained": lambda: kept @ v,
        "Orograph, fresh": lambda: fresh @ v,
        "Orograph, fresh, one of 10 columns": lambda: fresh @ block,
        "Orograph, GGN": lambda: gauss @ v,
        "curvlinops": lambda: peers[0] @ v,
        "hessian-eigenthings (another operator)": lambda: peers[1].matvec(v),
        "PyHessian's algorithm": lambda: peers[2].product(v),
    }
    seconds = medians(jobs, 9)
    cost = {name: value / seconds["gradient"] / (10 if "10 columns" in name else 1) for name, value in seconds.items()}
    memory = {name: peak(job) for name, job in jobs.items() if "10 columns" not in name}
    retained = peak(lambda: hessian(objective, engine="retained", check=False) @ v)
    memory["Orograph, graphs retained"] = retained
    rows = [[name, f"{cost[name]:.2f}", f"{memory[name] / 2**20:.1f} MiB ({memory[name] / memory['gradient']:.1f} x)" if name in memory else ""] for name in jobs]
    return rows, cost


def lambda_max_table(bench: Bench) -> tuple[list[Row], dict[str, float]]:
    """The largest eigenvalue to a true relative residual of 1e-3, everything included that has to be built for it."""
    found: dict[str, tuple[float, Tensor, int]] = {}
    workload = bench.workload

    def orograph() -> None:
        pairs = eigenpairs(hessian(bench.objective), tol=1e-3)
        assert pairs.vectors is not None
        found["Orograph, preflight included"] = float(pairs.values[0]), pairs.vectors[:, 0], pairs.products

    def curvlinops() -> None:
        values, vectors, products = arpack(curvlinops_operator(workload), 1, 1e-3)
        found["curvlinops + ARPACK"] = float(values[0]), vectors[:, 0], products

    def pyhessian(stop: Any, name: str) -> Callable[[], None]:
        def job() -> None:
            found[name] = PyHessianAlgorithm(workload).power_iteration(stop=stop)

        return job

    def eigenthings() -> None:
        values, vectors, products = eigenthings_lanczos(eigenthings_operator(workload), 1, 20)
        found["hessian-eigenthings, 20 steps (another operator)"] = float(values[0]), vectors[:, 0], products

    jobs = {
        "Orograph, preflight included": orograph,
        "curvlinops + ARPACK": curvlinops,
        "PyHessian's power iteration, its own stop": pyhessian("its own", "PyHessian's power iteration, its own stop"),
        "PyHessian's power iteration, to the same residual": pyhessian("residual", "PyHessian's power iteration, to the same residual"),
        "hessian-eigenthings, 20 steps (another operator)": eigenthings,
    }
    seconds = medians(jobs, ROUNDS)
    rows = []
    for name in jobs:
        value, vector, products = found[name]
        error = abs(value - bench.reference) / bench.reference
        rows.append([name, str(products), f"{seconds[name]:.3g}", f"{seconds[name] / bench.gradient:.0f}", f"{bench.residual(value, vector):.1e}", f"{error:.1e}"])
    return rows, seconds


def spectrum_table(bench: Bench, cost: dict[str, float]) -> tuple[list[Row], dict[str, float]]:
    """Top 10, trace to 1 % and density: Orograph's one pass, and the sum of what the cheapest right peer takes for each."""
    objective, workload, unit = bench.objective, bench.workload, bench.gradient
    began = time.perf_counter()
    op = hessian(objective)
    whole = spectrum(op, k=10, rel_error=0.01)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    alone = trace(hessian(objective), rel_error=0.01)
    trace_seconds = time.perf_counter() - began
    ten = medians({"ten": lambda: arpack(curvlinops_operator(workload), 10, 1e-3)}, 1)["ten"]
    sketch = trace(op, method="xtrace", rel_error=0.01, max_products=500)  # the same algorithm, which here says when it is there
    peer = PyHessianAlgorithm(workload)
    product = medians({"product": lambda: peer.product(objective.theta)}, 5)["product"]
    products, note = density_at_equal_error(bench, op, peer)
    density = products * product
    right = workload.name != "byte GPT"  # curvlinops' product is wrong through LayerNorm
    if right:
        columns = medians({"columns": lambda: curvlinops_xtrace(curvlinops_operator(workload), 28, chunk=CHUNK)}, 2)["columns"]
        sketching = columns * sketch.products / 28
    else:
        sketching = product * sketch.products
    total = ten + sketching + density
    floor = whole.products * cost["Orograph, graphs retained"]
    low, high = whole.trace.interval()
    rows = [
        ["Orograph, spectrum(k=10, rel_error=0.01)", str(whole.products), f"{ours:.3g}", f"{ours / unit:.0f}", f"trace {float(whole.trace.value):.5g}, 95 %: {float(low):.5g} to {float(high):.5g}"],
        ["  its floor: products x cost of a product", "", "", f"{floor:.0f}", ""],
        ["Orograph, trace(rel_error=0.01) alone", str(alone.products), f"{trace_seconds:.3g}", f"{trace_seconds / unit:.0f}", f"{float(alone.value):.5g} ± {1.96 * float(alone.sem):.2g}"],
        ["peers: top 10, curvlinops + ARPACK", "", f"{ten:.3g}", f"{ten / unit:.0f}", "" if right else "its operator is 2e-3 off: LayerNorm"],
        [
            f"peers: trace by XTrace at {'curvlinops' if right else 'PyHessian'}'s price of a product", str(sketch.products), f"{sketching:.3g}", f"{sketching / unit:.0f}",
            f"{float(sketch.value):.5g} ± {1.96 * float(sketch.sem):.2g}; products until Orograph's XTrace has its 1 %{', or 500' if sketch.status != 'converged' else ''}; {28 if right else 5} of them timed",
        ],
        ["peers: density, PyHessian's", str(products), f"{density:.3g}", f"{density / unit:.0f}", note],
        ["peers: sum", "", f"{total:.3g}", f"{total / unit:.0f}", f"Orograph takes {ours / total:.2f} of it"],
    ]  # fmt: skip
    return rows, {"ours": ours, "peers": total, "floor": floor}


def density_at_equal_error(bench: Bench, op: LinearOperator, peer: PyHessianAlgorithm) -> tuple[int, str]:
    """Products of the cheapest PyHessian density that is as near to the true one as Orograph's, where the dense matrix can tell."""
    if op.size > 10_000:
        return 30, "one run of 30 steps, whatever its error"
    truth = torch.linalg.eigvalsh(op.dense()).numpy()

    def distance(nodes: Tensor, weights: Tensor) -> float:
        return float(wasserstein_distance(nodes.numpy(), truth, weights.numpy()))

    def orograph(seed: int) -> float:
        d = spectrum(op, k=10, rel_error=0.01, seed=seed).density
        return distance(torch.cat([d.nodes.flatten(), d.atoms]), torch.cat([d.weights.flatten() / len(d.weights), torch.full((len(d.atoms),), 1 / d.size, dtype=torch.float64)]))

    def pyhessian(runs: int, steps: int, seed: int) -> float:
        rules = peer.density(runs, steps, seed)
        return distance(torch.cat([nodes for nodes, _ in rules]), torch.cat([weights / runs for _, weights in rules]))

    ours = statistics.mean(orograph(seed) for seed in range(3))
    for runs, steps in ((1, 30), (1, 60), (2, 30), (2, 60), (4, 60), (8, 60)):
        theirs = statistics.mean(pyhessian(runs, steps, seed) for seed in range(3))
        if theirs <= 1.05 * ours:
            break
    return runs * steps, f"{runs} runs of {steps} steps: mean Wasserstein distance to the dense spectrum {theirs:.2g}, Orograph's {ours:.2g}"


def table(head: Row, rows: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


def main(names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print and write the page; the figures by workload."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Times are medians of alternating runs in one process, in seconds and in gradients of the same model on the same",
        "data (the unit); a true residual is computed in float64 against the right operator. Memory counts the tensors made by one product, graphs included.",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}. The last batch of every workload is shorter than the others.",
    ]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        bench = Bench.of(WORKLOADS[name]())
        size, examples = bench.objective.size, bench.objective.examples
        lines += ["", f"## {bench.workload.name}: {size:,} parameters, {examples} examples, a gradient takes {1e3 * bench.gradient:.3g} ms", ""]
        rows, cost = products_table(bench)
        lines += [*table(["one product", "gradients", "memory (of the gradient's)"], rows), ""]
        rows, largest = lambda_max_table(bench)
        head = ["lambda_max to a residual of 1e-3", "products", "seconds", "gradients", "true residual", "error of the value"]
        lines += [*table(head, rows), ""]
        rows, parts = spectrum_table(bench, cost)
        lines += table(["top 10, trace to 1 %, density", "products", "seconds", "gradients", ""], rows)
        figures[name] = {"product": cost, "lambda_max": largest, "spectrum": parts, "size": {"n": float(size), "gradient": bench.gradient, "nan": math.nan}}
        print("\n".join(lines), flush=True)
        lines_done, lines = lines, []
        PAGE.write_text((PAGE.read_text() if name != names[0] else "") + "\n".join(lines_done) + "\n")
    return figures


if __name__ == "__main__":
    main(sys.argv[1:] or list(WORKLOADS))
