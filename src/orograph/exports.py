"""Surfaces in the formats of other programs, and those of older ones read."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .arguments import File
from .checks import checked
from .paper import PAPER_FORMATS, View, draw_paper
from .results import Status, Surface, Table

FORMATS = (".npz", ".csv", ".vtk")
Floats = np.ndarray[Any, np.dtype[np.float64]]
ARRAYS = ("x", "y", "z", "error")
MISSING = -1.0  # what the older files hold where a loss was not evaluated


@checked
def save_surface(surface: Surface, path: File, *, marks: Table | None = None, view: View = "contours") -> Path:
    """Write a surface to `path`: .npz (everything), .csv (a line for each point), .vtk (a structured grid whose height is z, for ParaView), or a figure: .png, .svg, .pdf.

    z[i, j] is at (x[i], y[j]) in all of them. What is not finite stays so; in .vtk its height is 0, in a figure it is a hole. A .csv has x, y, z and error, and a .vtk x, y, z and the label:
    names and units of the axes, note, evaluations, status and scale are lost in them, and in a .vtk the error too. `marks`: networks to show in a
    figure, such as record["points"] or record["path"] · `view`: "contours" or "relief". Figures need `orograph[figures]`.
    """
    path = Path(path)
    if marks is not None and not {"s", "t"} <= set(marks.columns):
        raise ValueError(f"save_surface(marks=...) needs a table with columns s and t, such as record['points'], got {', '.join(marks.columns)}.")
    if path.suffix not in FORMATS + PAPER_FORMATS:
        raise ValueError(f"save_surface(path={str(path)!r}) knows {', '.join(FORMATS + PAPER_FORMATS)}. Choose one of these endings.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in PAPER_FORMATS:
        draw_paper(surface, path, marks.rows if marks is not None else [], view)
        return path
    x, y, z = (np.asarray(part.detach().cpu(), dtype=np.float64) for part in (surface.x, surface.y, surface.z))
    error = np.full_like(z, np.nan) if surface.error is None else np.asarray(surface.error.detach().cpu(), dtype=np.float64)
    if path.suffix == ".npz":
        rest = {field.name: np.array(value) for field in fields(Surface) if field.name not in ARRAYS and (value := getattr(surface, field.name)) is not None}
        np.savez_compressed(path, allow_pickle=False, x=x, y=y, z=z, error=error, has_error=np.array(surface.error is not None), **rest)
    elif path.suffix == ".csv":
        rows = np.column_stack([np.repeat(x, len(y)), np.tile(y, len(x)), z.ravel(), error.ravel()])
        np.savetxt(path, rows, delimiter=",", header="x,y,z,error", comments="", fmt="%.17g")
    else:
        path.write_text(_vtk(x, y, z, surface.label))
    return path


def _vtk(x: Floats, y: Floats, z: Floats, label: str) -> str:
    """Legacy VTK: points run along x first."""
    title = " ".join(label.split())[:200] or "surface"
    lines = ["# vtk DataFile Version 3.0", title, "ASCII", "DATASET STRUCTURED_GRID", f"DIMENSIONS {len(x)} {len(y)} 1", f"POINTS {z.size} double"]
    lines += [f"{a:.17g} {b:.17g} {z[i, j] if np.isfinite(z[i, j]) else 0.0:.17g}" for j, b in enumerate(y) for i, a in enumerate(x)]
    lines += [f"POINT_DATA {z.size}", "SCALARS z double 1", "LOOKUP_TABLE default"]
    lines += [f"{z[i, j]:.17g}" for j in range(len(y)) for i in range(len(x))]
    return "\n".join(lines) + "\n"


@checked
def load_surface(path: str | Path, *, quantity: str = "train_loss") -> Surface:
    """Read a surface: an .npz that `save_surface` wrote, or an .h5 of tomgoldstein/loss-landscape (Li et al. 2018, arXiv:1712.09913), which needs `orograph[hdf5]`.

    `quantity`: which of an .h5's data sets, such as "train_loss" or "train_acc". Those files hold (x, y) in an array of that shape, but filled in the order of y, then
    x: a square one is transposed and another one sheared, and both are put right here. Their -1, a point that was not evaluated, becomes a hole, and a surface with holes is "budget-limited". A line
    has the one y = 0. Those files know no label, note or scale; their points are the evaluations.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_surface: there is no file {path}.")
    if path.suffix == ".npz":
        return _stored(path)
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"load_surface(path={str(path)!r}) reads .npz and .h5.")
    try:
        import h5py
    except ImportError as missing:
        raise ImportError(f"{path.suffix} needs h5py: pip install 'orograph[hdf5]'.") from missing
    with h5py.File(path, "r") as file:
        x, values = (_member(file, name, path) for name in ("xcoordinates", quantity))
        y = _member(file, "ycoordinates", path) if "ycoordinates" in file else torch.zeros(1, dtype=torch.float64)
    if values.numel() != len(x) * len(y):
        raise ValueError(f"load_surface: {quantity!r} in {path.name} has {values.numel()} values for {len(x)} x {len(y)} coordinates.")
    z = values.flatten().view(len(y), len(x)).T
    there = z != MISSING
    status: Status = "converged" if bool(there.all()) else "budget-limited"
    return Surface(x=x, y=y, z=torch.where(there, z, math.nan), evaluations=int(there.sum()), label=quantity.replace("_", " "), xlabel="x", ylabel="y", status=status)


def _stored(path: Path) -> Surface:
    """A surface with all its fields; those that an older file lacks have their defaults."""
    with np.load(path, allow_pickle=False) as arrays:
        x, y, z, error = (_member(arrays, name, path) for name in ARRAYS)
        has_error = bool(arrays["has_error"]) if "has_error" in arrays else not bool(error.isnan().all())
        rest = {field.name: arrays[field.name].item() for field in fields(Surface) if field.name not in ARRAYS and field.name in arrays}
    if rest.get("status", "converged") not in get_args(Status):
        raise ValueError(f"load_surface: {path.name} has the status {rest['status']!r}; known are {', '.join(get_args(Status))}. A newer version may have written it: pip install --upgrade orograph.")
    return Surface(x=x, y=y, z=z, error=error if has_error else None, **rest)


def _member(arrays: Any, name: str, path: Path) -> Tensor:
    if name not in arrays:
        raise ValueError(f"load_surface: {path.name} holds no {name!r}, but {', '.join(sorted(arrays))}.")
    return torch.from_numpy(np.array(arrays[name], dtype=np.float64))
