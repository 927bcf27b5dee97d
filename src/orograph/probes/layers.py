"""Curvature, gradient and weights of every layer."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import AtLeastOne, Positive, Seed
from ..curvature import certificate_of_block
from ..layout import Layout
from ..linalg.blocks import BlockSums, block_sums, block_top
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Curve, Estimate, Result, Table
from ..subject import Subject

VANISHING = 1e-2  # ratio of the first to the last layer's gradient that is called vanishing; its inverse, exploding


def _says(results: Results) -> str:
    table, flow = results["layers"], results["gradient_flow"]
    assert isinstance(table, Table) and isinstance(flow, Curve)
    rows = [row for row in table.rows if row["kind"] == "parameter"]
    most = max(rows, key=lambda row: float(row["trace"]))
    total = sum(float(row["trace"]) for row in rows)
    share = f", {most['trace'] / total:.0%} of the trace" if total > 0 else ""
    sharpest = max(rows, key=lambda row: float(row["top_eigenvalue"]))
    return (
        f"Most curvature is in {most['name']}{share}; the sharpest block is {sharpest['name']} with a largest eigenvalue of {sharpest['top_eigenvalue']:.3g}. "
        f"{_flow_sentence(flow)}{_unproven(table)}"
    )


def _unproven(table: Table) -> str:
    """Blocks of which nothing is proven on their own scale."""
    names = [str(row["name"]) for row in table.rows if str(row.get("preflight", "")).startswith("unverified")]
    return f" Not proven against differences on their own scale: {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}." if names else ""


def _flow_sentence(flow: Curve) -> str:
    y = flow.y[flow.y > 0]
    if len(y) < 2:
        return "With fewer than two layers that have a gradient, nothing can be said of its flow."
    ratio = float(y[0] / y[-1])
    kind = "The gradient vanishes towards the input: that" if ratio < VANISHING else "The gradient explodes towards the input: that" if ratio > 1 / VANISHING else "The gradient"
    return f"{kind} of the first layer is {ratio:.2g} times that of the last (root mean square per weight)."


@probe(says=_says)
def layers(
    subject: Subject, *, groups: Mapping[str, str | Sequence[str]] | None = None, num_samples: AtLeastOne = 1, tol: Positive = 0.1, max_products: AtLeastOne = 12, seed: Seed = 0
) -> dict[str, Result]:
    r"""Trace, Frobenius norm and largest eigenvalue of every diagonal block of the Hessian, beside the norms of gradient and weights.

    Blocks are parameters, modules (all parameters below one) and named `groups` (name -> names or globs). `trace_sem` (with its
    degrees of freedom), `frobenius_sem` (rough: from the same samples): standard errors · `top_eigenvalue`: a Rayleigh quotient, never above the true value, with
    `top_residual`, and `top_missed`, the chance that a larger one went unseen · `scale_corrected`:
    $\|w\|^2 \lambda_{max}$, which does not change with the length of a weight that a normalisation makes irrelevant · `coupling`:
    $\|H_{ij}\|_F$ between parameters · `preflight`: what is proven of the block on its own scale · `gradient_flow`: root mean square of the gradient by depth.
    The Hessian's outliers come from `spectrum`; what they leave takes `num_samples` products per parameter (and blocks of one entry none to spare), and a
    largest eigenvalue one to `max_products` per block, until its residual is below `tol` of it and no larger one is likely: one or two where the outliers are clear.
    """
    objective, op = subject.objective, subject.hessian()
    layout, known = objective.layout, subject.low_rank()
    g, theta = subject.gradient().double(), objective.theta.double()
    chosen = _blocks(layout, groups or {})
    words = [certificate_of_block(op, members) for _, _, members in chosen]
    with progress_bar(subject.progress, "layers") as report:
        expected = num_samples * len(layout.names) + len(chosen)
        sums = block_sums(op, known, [layout[name] for name in layout.names], num_samples=num_samples, seed=seed, report=lambda done: report(done, expected, ""))
        rows = []
        for done, ((name, kind, members), certificate) in enumerate(zip(chosen, words, strict=True), start=1):
            where = torch.cat([torch.arange(layout.size)[layout[member]] for member in members]).to(op.device)
            indices = [layout.names.index(member) for member in members]
            unknown = float(sums.left[indices][:, indices].sum().clamp(min=0).sqrt())
            top = block_top(op, known, where, unknown=unknown, tol=tol, max_products=max_products)
            report(num_samples * len(layout.names) + done, expected, name)
            rows.append(_row(name, kind, indices, sums, g[where], theta[where]) | {
                "top_eigenvalue": top.value, "top_residual": top.residual, "top_missed": top.missed, "scale_corrected": float(theta[where] @ theta[where]) * top.value, "preflight": certificate or ""})  # fmt: skip
    weights = [i for i, shape in enumerate(layout.shapes) if len(shape) > 1] or list(range(len(layout.names)))
    flow = torch.tensor([float(g[layout[layout.names[i]]].norm()) / math.sqrt(layout.sizes[i]) for i in weights], dtype=torch.float64)
    label = "gradient by depth: " + ", ".join(layout.names[i] for i in weights) if len(weights) <= 8 else "gradient by depth"
    return {
        "layers": Table(rows=rows, x="name", y="trace", draw="bars", label="trace of the Hessian by layer"),
        "coupling": Table(rows=_coupling(layout, sums), x="block", y="with", draw="heat", label="Frobenius norm of the Hessian's blocks"),
        "gradient_flow": Curve(
            x=torch.arange(1, len(weights) + 1, dtype=torch.float64), y=flow, label=label, xlabel="layer, from the input", ylabel="gradient, rms per weight"
        ),
        "trace": _total(sums),
    }


def _blocks(layout: Layout, groups: Mapping[str, str | Sequence[str]]) -> list[tuple[str, str, list[str]]]:
    """(name, kind, parameters) of every block; a module whose parameters are those of another block is left out."""
    found = [(name, "parameter", [name]) for name in layout.names]
    seen: set[tuple[str, ...]] = {(name,) for name in layout.names}
    prefixes = dict.fromkeys(".".join(name.split(".")[:depth]) for name in layout.names for depth in range(1, name.count(".") + 1))
    for prefix in prefixes:
        members = [name for name in layout.names if name.startswith(f"{prefix}.")]
        if tuple(members) not in seen and len(members) < len(layout.names):
            seen.add(tuple(members))
            found.append((prefix, "module", members))
    for name, patterns in groups.items():
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        members = [own for own in layout.names if any(own == pattern or fnmatch.fnmatchcase(own, pattern) for pattern in wanted)]
        if not members:
            raise ValueError(f"layers(groups={{{name!r}: {patterns!r}}}) matches no parameter. There are: {', '.join(layout.names)}.")
        found.append((name, "group", members))
    return found


def _row(name: str, kind: str, members: list[int], sums: BlockSums, g: Tensor, theta: Tensor) -> dict[str, Any]:
    trace = _sum_of([sums.traces[i] for i in members])
    square = float(sums.squares[members][:, members].sum())
    error = float(sums.squares_sem[members][:, members].sum())  # blocks of one column share their samples
    frobenius = math.sqrt(max(square, 0.0))
    return {
        "name": name, "kind": kind, "size": len(theta), "trace": float(trace.value), "trace_sem": float(trace.sem), "trace_dof": trace.dof, "frobenius": frobenius,
        "frobenius_sem": error / (2 * frobenius) if frobenius > 0 else math.sqrt(error),
        "gradient_norm": float(g.norm()), "weight_norm": float(theta.norm()),
    }  # fmt: skip


def _sum_of(parts: Sequence[Estimate]) -> Estimate:
    """Independent estimates added up."""
    variances = [float(part.sem) ** 2 for part in parts]
    total = sum(variances)
    spent = sum(v**2 / part.dof for v, part in zip(variances, parts, strict=True))
    dof = total**2 / spent if spent > 0 else math.inf
    return Estimate(value=sum(float(part.value) for part in parts), sem=math.sqrt(total), dof=dof)


def _total(sums: BlockSums) -> Estimate:
    total = _sum_of(sums.traces)
    return Estimate(value=total.value, sem=total.sem, dof=total.dof, label="trace, sum over layers")


def _coupling(layout: Layout, sums: BlockSums) -> list[dict[str, Any]]:
    norms = sums.squares.sqrt()
    names = layout.names
    return [{"block": a, "with": b, "value": float(norms[i, j])} for i, a in enumerate(names) for j, b in enumerate(names)]
