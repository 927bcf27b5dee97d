"""One right and cheap call of every public callable, from which wrong ones are made by changing one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import orograph as og
from orograph.curvature import hessian
from orograph.registry import find_probe

from .networks import small_mlp

Good = tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]  # function, arguments by name, further positional ones
F64 = {"dtype": torch.float64}
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), **F64)
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
CHEAP = {  # settings that make a probe cheap, so that a wrong value that is accepted shows soon
    "barrier": {"resolution": 3, "refine": False}, "basins": {"resolution": 3}, "connectivity": {"resolution": 3, "curve_epochs": 1}, "noise": {"sigmas": [0.01], "pairs": 2},
    "pac_bayes": {"draws": 2, "sigmas": [0.1]}, "sharpness": {"definitions": ["sam"]}, "spectrum": {"k": 1, "rel_error": 1.0}, "surface": {"resolution": 3, "tol": 0.5},
    "trajectory": {"resolution": 3, "tol": 0.5}, "layers": {"max_products": 1}, "conditioning": {"steps": 2},
}  # fmt: skip


def a_probe(subject: og.Subject) -> dict[str, og.Result]:
    """The gradient's norm, as a probe of the user's own."""
    return {"norm": og.Estimate(value=float(subject.gradient().norm()))}


def objective_of(model: nn.Module | None = None) -> og.Objective:
    return og.Objective(model or small_mlp(), nn.CrossEntropyLoss(), (X, Y))


def good_calls(folder: Path) -> dict[str, Good]:
    """Every public callable by name."""
    (folder / "a_file").write_text("x")
    model, other = small_mlp(), small_mlp(seed=1)
    objective = objective_of(model)
    a, b = objective.point(), objective.point(other)
    op = og.LinearOperator.from_dense(torch.diag(torch.arange(1.0, 52.0, **F64)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return (
        {name: (getattr(og, name), {}, ()) for name in ("list_probes",)}
        | _objectives(model, objective, folder)
        | _operators(objective, op, sgd)
        | _between(objective, a, b)
        | _results(a)
        | _measurements(objective, a, b, folder)
    )


def _objectives(model: nn.Module, objective: og.Objective, folder: Path) -> dict[str, Good]:
    loss = nn.CrossEntropyLoss()
    o: dict[str, Good] = {
        "Objective": (og.Objective, {"model": model, "criterion": loss, "data": (X, Y)}, ()),
        "Objective.from_batch_loss": (og.Objective.from_batch_loss, {"model": model, "batch_loss": lambda m, batch: (loss(m(batch[0]), batch[1]) * len(batch[1]), len(batch[1])), "data": [(X, Y)]}, ()),
        "Objective.at": (objective.at, {"source": objective.theta}, ()),
        "Objective.like": (objective.like, {"snapshot": objective.snapshot, "terms": objective.terms()}, ()),
        "Objective.network": (objective.network, {"source": objective.theta}, ()),
        "Objective.on": (objective.on, {"data": (X[:9], Y[:9])}, ()),
        "Objective.picked": (objective.picked, {"rows": torch.arange(5)}, ()),
        "Objective.point": (objective.point, {"source": objective.theta}, ()),
        "Objective.sample": (objective.sample, {"n": 5, "seed": 0}, ()),
        "Objective.split": (objective.split, {"parts": 2, "seed": 0}, ()),
        "Objective.state_dict": (objective.state_dict, {"point": objective.theta}, ()),
    }
    plain = ("applied", "fingerprints", "gradient", "metrics", "now", "per_example", "terms", "value", "value_and_gradient")
    return o | {f"Objective.{name}": (getattr(objective, name), {}, ()) for name in plain}


def _operators(objective: og.Objective, op: og.LinearOperator, sgd: torch.optim.Optimizer) -> dict[str, Good]:
    v = torch.ones(op.size, **F64)
    return {
        "LinearOperator": (_used, {"matmat": lambda V: 2 * V, "size": 5}, ()),
        "LinearOperator.__matmul__": (op.__matmul__, {"V": v}, ()),
        "LinearOperator.apart": (op.apart, {"vectors": lambda part: v[:, None], "take": lambda image: None}, ()),
        "LinearOperator.dense": (op.dense, {}, ()),
        "LinearOperator.from_dense": (og.LinearOperator.from_dense, {"A": torch.eye(3)}, ()),
        "LinearOperator.prove": (op.prove, {}, ()),
        "hessian": (og.hessian, {"objective": objective}, ()),
        "ggn": (og.ggn, {"objective": objective}, ()),
        "fisher": (og.fisher, {"objective": objective}, ()),
        "preconditioned": (og.preconditioned, {"op": op, "scale": v}, ()),
        "block": (og.block, {"op": op, "objective": objective, "names": "0.*"}, ()),
        "eigenpairs": (og.eigenpairs, {"op": op}, ()),
        "trace": (og.trace, {"op": op, "max_products": 20}, ()),
        "diagonal": (og.diagonal, {"op": op, "num_samples": 3}, ()),
        "spectral_density": (og.spectral_density, {"op": op, "num_samples": 1, "steps": 3}, ()),
        "spectrum": (og.spectrum, {"op": op, "k": 2, "rel_error": 1.0}, ()),
        "data_error": (og.data_error, {"objective": objective, "statistic": lambda o: o.value(), "parts": 3}, ()),
        "edge": (og.edge, {"optimizer": sgd}, ()),
        "preconditioner": (og.preconditioner, {"optimizer": sgd, "objective": objective}, ()),
        "Edge": (og.Edge, {"threshold": 20.0, "rate": 0.1, "formula": "2 / lr"}, ()),
    }


def _used(matmat: Any, size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", space: Any = None, **settings: Any) -> og.Eigenpairs:
    """A plain operator as it is met: made, then used."""
    return og.eigenpairs(og.LinearOperator(matmat, size, dtype, device, space, **settings))


_used.__signature__ = inspect.signature(og.LinearOperator)
_used.__module__ = og.LinearOperator.__module__  # where its annotations are resolved


def _between(objective: og.Objective, a: og.Point, b: og.Point) -> dict[str, Good]:
    paths = {"Line": og.Line(a, b), "Bezier": og.Bezier([a, b]), "PolyChain": og.PolyChain([a, b])}
    found: dict[str, Good] = {"Line": (og.Line, {"a": a, "b": b}, ()), "Bezier": (og.Bezier, {"points": [a, b]}, ()), "PolyChain": (og.PolyChain, {"points": [a, b]}, ())}
    for name, path in paths.items():
        found |= {f"{name}.weights": (path.weights, {"t": 0.5}, ()), f"{name}.__call__": (path.__call__, {"t": 0.5}, ()), f"{name}.length": (path.length, {}, ())}
    u, v = objective.space.sample(0, 0, "normal"), objective.space.sample(0, 1, "normal")
    plane = og.Plane(a, u, v)
    return found | {
        "Plane": (og.Plane, {"origin": a, "u": u, "v": v}, ()),
        "Plane.__call__": (plane.__call__, {"s": 0.5, "t": 0.5}, ()),
        "Plane.coordinates": (plane.coordinates, {"place": b}, ()),
        "fit_path": (og.fit_path, {"objective": objective, "a": a, "b": b, "epochs": 1}, ()),
        "elastic_band": (og.elastic_band, {"objective": objective, "a": a, "b": b, "cycles": [(1, 0.1)]}, ()),
        "align": (og.align, {"objective": objective, "a": a, "b": b}, ()),
        "Alignment": (og.Alignment, {"point": a, "permutations": {"x": torch.arange(3)}, "verified": True, "similarity": (0.5, 0.6), "method": "weights", "left": {}}, ()),
        "connect": (og.connect, {"objective": objective, "a": a, "b": b, "curve_epochs": 1, "resolution": 3}, ()),
    }


def _results(a: og.Point) -> dict[str, Good]:
    two = torch.ones(2, **F64)
    pairs = {"values": two, "vectors": None, "residuals": two, "converged": two > 0, "intervals": torch.ones(2, 2, **F64), "missed": 0.0, "products": 2, "status": "converged"}
    density = {"nodes": torch.ones(1, 2, **F64), "weights": torch.ones(1, 2, **F64) / 2, "atoms": torch.ones(0, **F64), "size": 5, "width": 0.1}
    d, e, p = og.Density(**density), og.Estimate(value=1.0), og.Eigenpairs(**pairs)
    spectrum = {"top": p, "bottom": p, "trace": e, "density": d, "negative_mass": e, "condition": {"largest / smallest": 2.0}, "products": 3, "status": "converged"}
    return {
        "Estimate": (og.Estimate, {"value": 1.0}, ()),
        "Estimate.interval": (e.interval, {}, ()),
        "Eigenpairs": (og.Eigenpairs, pairs, ()),
        "Density": (og.Density, density, ()),
        "Density.pdf": (d.pdf, {"x": two}, ()),
        "Density.cdf": (d.cdf, {"x": two}, ()),
        "Density.mass": (d.mass, {"low": 0.0, "high": 2.0}, ()),
        "Spectrum": (og.Spectrum, spectrum, ()),
        "Spectrum.effective_dimension": (og.Spectrum(**spectrum).effective_dimension, {"z": 0.1}, ()),
        "Curve": (og.Curve, {"x": two, "y": two}, ()),
        "Surface": (og.Surface, {"x": two, "y": two, "z": torch.ones(2, 2, **F64)}, ()),
        "Table": (og.Table, {"rows": [{"x": 1}]}, ()),
        "Point": (og.Point, {"theta": a.theta}, ()),
    }


def _measurements(objective: og.Objective, a: og.Point, b: og.Point, folder: Path) -> dict[str, Good]:
    record = og.measure(objective, "gradient")
    records, subject = og.Records([record]), og.Subject(objective)
    og.save_records(records, folder / "records")
    surface = og.Surface(x=torch.arange(2.0), y=torch.arange(2.0), z=torch.ones(2, 2))
    og.save_surface(surface, folder / "s.npz")
    networks = {"barrier": (a, b), "basins": (a, b), "connectivity": (a, b), "trajectory": (a, b, objective.point(small_mlp(seed=2)))}
    probes: dict[str, Good] = {f"measure {name}": (og.measure, CHEAP.get(name, {}), (objective, name, *networks.get(name, ()))) for name in og.list_probes() if find_probe(name).function.__module__.startswith("orograph.")}
    return probes | {
        "measure": (og.measure, {"objective": objective, "name": "gradient"}, ()),
        "measure_all": (og.measure_all, {"objective": objective, "names": ["gradient"]}, ()),
        "probe": (og.probe, {"function": a_probe}, ()),
        "Record": (og.Record, {"probe": "gradient", "results": {"norm": og.Estimate(value=1.0)}}, ()),
        "Record.__getitem__": (record.__getitem__, {"name": next(iter(record.results))}, ()),
        "Records": (og.Records, {"items": [record]}, ()),
        "Records.__getitem__": (records.__getitem__, {"index": 0}, ()),
        "Records.to_frame": (records.to_frame, {}, ()),
        "Subject": (og.Subject, {"objective": objective}, ()),
        "Subject.once": (subject.once, {"name": "x", "find": lambda: 3}, ()),
        "Subject.operator": (subject.operator, {"name": "hessian", "make": hessian}, ()),
        "Subject.spectrum": (subject.spectrum, {}, ()),
        "Subject.gradient_krylov": (subject.gradient_krylov, {"steps": 2}, ()),
        **{f"Subject.{name}": (getattr(subject, name), {}, ()) for name in ("hessian", "ggn", "gradient", "low_rank")},
        "save_records": (og.save_records, {"records": record, "folder": folder / "new"}, ()),
        "load_records": (og.load_records, {"folder": folder / "records"}, ()),
        "save_surface": (og.save_surface, {"surface": surface, "path": folder / "t.npz"}, ()),
        "load_surface": (og.load_surface, {"path": folder / "s.npz"}, ()),
        "write_report": (og.write_report, {"records_or_folder": folder / "records", "path": folder / "r.html"}, ()),
    }
