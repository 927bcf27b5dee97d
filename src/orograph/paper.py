"""Surfaces as figures for papers, with matplotlib: filled contours or a relief, with networks and paths marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import numpy as np

from .results import Surface

PAPER_FORMATS = (".png", ".svg", ".pdf")
View = Literal["contours", "relief"]
SIZE, DOTS = (4.6, 3.9), 200  # inches: a column's width; dots per inch of a PNG
GROUND = {"facecolor": "0.15", "alpha": 0.5, "edgecolor": "none", "pad": 0.8}  # under white letters, which can then be read on yellow
MAGENTA, NAMED = "#c0267b", 12  # more marks than this go without names


def draw_paper(surface: Surface, path: Path, marks: Sequence[dict[str, Any]], view: View) -> None:
    """One figure; `marks`: rows with s and t, and name or step. The same surface gives the same bytes."""
    if min(surface.z.shape) < 2:
        raise ValueError(f"{path.suffix} shows a surface, and this one has {surface.z.shape[0]} x {surface.z.shape[1]} points: a line. Save it as .csv.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{path.suffix} needs matplotlib: pip install 'orograph[figures]'. Or choose .npz, .csv or .vtk.") from error

    with rc_context({"svg.hashsalt": "orograph", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.linewidth": 0.6}):  # no pyplot: the user's figures and backend stay as they are
        figure = Figure(figsize=SIZE, layout="constrained")
        (_contours if view == "contours" else _relief)(figure, surface, marks)
        low = float(surface.z[surface.z.isfinite()].min()) if surface.floor is not None else 0.0
        drawn = f"values below {surface.floor:.2g} drawn like it" if surface.floor is not None and low < surface.floor else ""
        notes = [f"{surface.evaluations:,} evaluations" if surface.evaluations else "", surface.note, drawn]
        figure.supxlabel(fill(", ".join(filter(None, notes)), 88), fontsize=6.5, color="0.35")
        when = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        figure.savefig(path, dpi=DOTS, metadata={**when, "Title": surface.label or "surface"})


def _heights(surface: Surface) -> tuple[Any, Any, Any]:
    """x, y, and z as matplotlib has it: rows along y, holes masked."""
    x, y, z = (np.asarray(part.detach().cpu(), dtype=np.float64) for part in (surface.x, surface.y, surface.z))
    heights = np.ma.masked_invalid(z.T)
    return x, y, heights if surface.floor is None else np.ma.maximum(heights, surface.floor)


def _colours(surface: Surface, z: Any) -> tuple[Any, Any]:
    """The levels of the contours and the scale of their colours."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    low, high = (float(z.min()), float(z.max())) if z.count() else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    if surface.floor is not None:
        return np.geomspace(surface.floor, high, 19), LogNorm(surface.floor, high)
    return MaxNLocator(18).tick_values(low, high), Normalize(low, high)


def _contours(figure: Any, surface: Surface, marks: Sequence[dict[str, Any]]) -> None:
    axes = figure.add_subplot()
    x, y, z = _heights(surface)
    levels, norm = _colours(surface, z)
    filled = axes.contourf(x, y, z, levels=levels, norm=norm, cmap="viridis")
    axes.contour(x, y, z, levels=levels, colors="white", linewidths=0.3, alpha=0.6)
    axes.set_facecolor("0.85")  # holes
    _bar(figure, filled, axes, surface)
    places = _places(marks)
    if places:
        s, t = [row["s"] for row in places], [row["t"] for row in places]
        way = all("step" in row for row in places)
        axes.plot(s, t, color=MAGENTA, linestyle="-" if way else "", linewidth=1, marker="o", markersize=3 if way else 4.5, markeredgecolor="white", markeredgewidth=0.6, clip_on=False)
        named = (places[0], places[-1]) if way else places if len(places) <= NAMED else ()  # of a way its ends
        for row in named:
            axes.annotate(str(row.get("name", row.get("step", ""))), (row["s"], row["t"]), xytext=(0, 5), textcoords="offset points", ha=_side(float(row["s"]), x), fontsize=7, color="white", bbox=GROUND)
    axes.locator_params(nbins=5)
    axes.set_xlabel(surface.xlabel)
    axes.set_ylabel(surface.ylabel)


def _relief(figure: Any, surface: Surface, marks: Sequence[dict[str, Any]]) -> None:
    axes = figure.add_subplot(projection="3d")
    x, y, z = _heights(surface)
    heights = np.ma.log10(z) if surface.wide else z
    drawn = axes.plot_surface(*np.meshgrid(x, y), heights.filled(np.nan), cmap="viridis", rcount=len(y), ccount=len(x), linewidth=0, antialiased=True)
    drawn.set_edgecolor("face")  # or fine white lines show between the patches of an SVG
    axes.set_box_aspect(None, zoom=0.86)  # or the labels leave the figure
    axes.locator_params(nbins=5)
    axes.set_xlabel(surface.xlabel, fontsize=7)
    axes.set_ylabel(surface.ylabel, fontsize=7)
    axes.set_zlabel(f"log10 {surface.label}" if surface.wide else surface.label, fontsize=7)
    axes.tick_params(labelsize=6, pad=0)
    axes.view_init(elev=32, azim=-55)
    inside = [row for row in _places(marks) if x[0] <= row["s"] <= x[-1] and y[0] <= row["t"] <= y[-1]]
    if inside:
        columns, rows = (np.abs(grid[None] - np.array([[row[key]] for row in inside])).argmin(1) for grid, key in ((x, "s"), (y, "t")))
        top = float(heights.max()) + 0.12 * float(heights.max() - heights.min())
        for row, i, j in zip(inside, columns, rows, strict=True):  # pins: a dot alone would seem to lie on whatever hides it
            axes.plot([x[i], x[i]], [y[j], y[j]], [heights.filled(np.nan)[j, i], top], color=MAGENTA, linewidth=0.8, zorder=10)
            axes.plot([x[i]], [y[j]], [top], color=MAGENTA, marker="o", markersize=3.5, zorder=11)
            if len(inside) <= NAMED:
                axes.text(x[i], y[j], top + 0.03 * (top - float(heights.min())), str(row.get("name", row.get("step", ""))), fontsize=6.5, ha="center", zorder=12)


def _places(marks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have a place."""
    return [row for row in marks if all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in ("s", "t"))]


def _side(s: float, x: Any) -> str:
    """Where a name goes, so that it stays in the figure."""
    share = (s - float(x[0])) / float(x[-1] - x[0])
    return "right" if share > 0.85 else "left" if share < 0.15 else "center"


def _bar(figure: Any, filled: Any, axes: Any, surface: Surface) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    bar = figure.colorbar(filled, ax=axes, label=f"{surface.label} ({surface.unit})" if surface.unit else surface.label, pad=0.02)
    bar.outline.set_visible(False)
    if surface.wide:
        bar.locator, bar.formatter = LogLocator(subs=(1.0, 2.0, 5.0)), FuncFormatter(lambda value, _: f"{value:g}")
        bar.update_ticks()
