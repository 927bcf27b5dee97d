"""Drawing of a Surface: contours, with networks and paths marked on them, and the same in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from ..results import Surface, lowest_shown
from .figures import array
from .theme import GRID, NEUTRAL, Drawing, Floats, Series, layout, named, plain, sentence

OWN_SCALE = 10.0  # ranges that differ by more make one colour scale useless

def draw_surfaces(series: Sequence[Series]) -> list[Drawing]:
    """For each surface its contours and a 3-D view. All share one colour scale, logarithmic where the range is wide, unless one has a range of another order: then each has its own."""
    ranges = [float(np.ptp(finite)) for s in series if (finite := array(s.result.z)[np.isfinite(array(s.result.z))]).size]
    if len(series) > 1 and ranges and max(ranges) > OWN_SCALE * min(ranges):
        return [drawing for s in series for drawing in _drawn([s], several=True)]
    return _drawn(series, several=len(series) > 1)


def _drawn(series: Sequence[Series], *, several: bool) -> list[Drawing]:
    values = torch.cat([s.result.z.detach().cpu().double().flatten() for s in series])
    floor = series[0].result.floor if len(series) == 1 else lowest_shown(values)
    finite = array(values[values.isfinite()])
    height = finite if floor is None else np.log10(np.maximum(finite, floor))
    limits = (float(height.min()), float(height.max())) if height.size else (0.0, 1.0)
    limits = limits if limits[0] < limits[1] else (limits[0] - 0.5, limits[1] + 0.5)
    drawings = []
    for s in series:
        name = f"{plain(s.name)}: " if several else ""
        drawings.append(_contours(s, limits, floor, sentence(f"{name}contours")))
        if min(s.result.z.shape) >= 3:
            drawings.append(_relief(s, limits, floor, sentence(f"{name}relief")))
    return drawings


def _heights(surface: Surface, floor: float | None) -> Floats:
    """(y, x): Plotly's rows run along y. What a logarithmic scale does not reach is drawn like its lowest value; holes stay holes."""
    z = array(surface.z).T
    return z if floor is None else np.log10(np.maximum(np.where(np.isfinite(z), z, np.nan), floor))


def _bar(surface: Surface, limits: tuple[float, float], log: bool) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": named(surface.label, surface.unit), "side": "right", "font": {"size": 13}}, "thickness": 12, "outlinewidth": 0}
    if not log:
        return {**bar, "nticks": 8}
    ticks = [10.0**k * m for k in range(math.floor(limits[0]), math.ceil(limits[1]) + 1) for m in ((1, 2, 5) if limits[1] - limits[0] < 3 else (1,))]
    ticks = [tick for tick in ticks if limits[0] <= math.log10(tick) <= limits[1]]
    return {**bar, "tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}


def _round_step(step: float) -> float:
    decade = 10.0 ** math.floor(math.log10(step))
    return next(decade * m for m in (1, 2, 2.5, 5, 10) if decade * m >= step * 0.999)


def _contours(s: Series, limits: tuple[float, float], floor: float | None, title: str) -> Drawing:
    surface: Surface = s.result
    figure = go.Figure(layout=layout(420))
    step = _round_step(max(limits[1] - limits[0], 1e-12) / 15)
    figure.add_contour(
        x=array(surface.x), y=array(surface.y), z=_heights(surface, floor), zmin=limits[0], zmax=limits[1], colorscale="Viridis",
        contours={"start": math.ceil(limits[0] / step) * step, "end": limits[1], "size": step}, line={"width": 0.6, "color": "rgba(255,255,255,0.55)"},
        colorbar=_bar(surface, limits, floor is not None), customdata=array(surface.z).T, connectgaps=False,
        hovertemplate="(%{x:.3g}, %{y:.3g}): %{customdata:.4g}<extra></extra>",
    )
    points = [row for row in s.marks if all(isinstance(row.get(axis), (int, float)) for axis in ("s", "t"))]
    path = all("step" in row for row in points)
    if points:
        names = [plain(row.get("name", row.get("label", row.get("step", ""))), 24) for row in points]
        shown = [name if not path or i in (0, len(names) - 1) else "" for i, name in enumerate(names)]  # of a way its ends
        hover = [f"{name}: loss {row['loss']:.4g}" if isinstance(row.get("loss"), float) else name for name, row in zip(names, points, strict=True)]
        figure.add_scatter(
            x=[row["s"] for row in points], y=[row["t"] for row in points], mode="lines+markers+text" if path else "markers+text", text=shown,
            textposition=[_side(row["s"], surface) for row in points], textfont={"color": "white", "size": 12, "shadow": "0 0 3px #222"}, showlegend=False, hovertext=hover, hoverinfo="text",
            marker={"size": 8, "color": "white", "line": {"width": 1.5, "color": "#c0267b"}}, line={"color": "#ff5fb0", "width": 2},
        )
    figure.update_xaxes(title_text=plain(surface.xlabel), showgrid=False, zeroline=False)
    figure.update_yaxes(title_text=plain(surface.ylabel), showgrid=False, zeroline=False)
    notes = [f"{surface.evaluations:,} evaluations of the loss." if surface.evaluations else "", _logarithmic(surface, floor), f"{sentence(surface.note)}." if surface.note else ""]
    return Drawing(figure, " ".join(filter(None, notes)), title=title, size=420)


def _logarithmic(surface: Surface, floor: float | None) -> str:
    if floor is None:
        return ""
    low = float(surface.z[surface.z.isfinite()].min()) if bool(surface.z.isfinite().any()) else floor
    return f"Logarithmic colours; values below {floor:.2g} are drawn like it." if low < floor else "Logarithmic colours."


def _side(s: float, surface: Surface) -> str:
    """Where a name goes, so that it stays in the figure."""
    low, high = float(surface.x[0]), float(surface.x[-1])
    share = (s - low) / (high - low) if high > low else 0.5
    return "top left" if share > 0.8 else "top right" if share < 0.2 else "top center"


def _relief(s: Series, limits: tuple[float, float], floor: float | None, title: str) -> Drawing:
    surface: Surface = s.result
    figure = go.Figure(layout=layout(420))
    figure.add_surface(
        x=array(surface.x), y=array(surface.y), z=_heights(surface, floor), cmin=limits[0], cmax=limits[1], colorscale="Viridis", showscale=False,
        customdata=array(surface.z).T, hovertemplate="(%{x:.3g}, %{y:.3g}): %{customdata:.4g}<extra></extra>",
        lighting={"ambient": 0.7, "diffuse": 0.6, "specular": 0.1},
    )
    axis: dict[str, Any] = {"color": NEUTRAL, "gridcolor": GRID, "showbackground": False, "zerolinecolor": GRID, "nticks": 5}
    bar = _bar(surface, limits, floor is not None)
    vertical: dict[str, Any] = {**axis, "title": {"text": bar["title"]["text"]}, **{key: bar[key] for key in ("tickvals", "ticktext") if key in bar}}
    figure.update_layout(
        scene={
            "xaxis": {**axis, "title": {"text": plain(surface.xlabel)}}, "yaxis": {**axis, "title": {"text": plain(surface.ylabel)}},
            "zaxis": vertical, "aspectratio": {"x": 1, "y": 1, "z": 0.7}, "camera": {"eye": {"x": 1.3, "y": -1.4, "z": 0.85}, "center": {"x": 0, "y": 0, "z": -0.22}},
        },
        dragmode="turntable",
    )
    return Drawing(figure, "Drag to turn.", title=title, size=420)
