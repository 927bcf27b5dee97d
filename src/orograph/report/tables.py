"""Drawing of a Table: bars over a column of names, or a map over two columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..scalars import cell_interval, format_number, is_number
from .theme import NEUTRAL, Drawing, Scale, Series, choose_scale, error_bars, layout, named, plain


def draw_bars(series: Sequence[Series]) -> list[Drawing]:
    """A table's column `y` as bars over its column `x`, with intervals where the rows have errors."""
    table, first = series[0].result, series[0].result
    rows = max(len(s.result.rows) for s in series)
    height = 90 + max(26, 10 + 15 * len(series)) * rows
    figure, every = go.Figure(layout=layout(height, barmode="group", bargap=0.25)), list[float]()
    for s in series:
        shown = [row for row in s.result.rows if is_number(row.get(table.y))]
        values = np.array([row[table.y] for row in shown], dtype=np.float64)
        ends = np.array([cell_interval(row, table.y) for row in shown], dtype=np.float64).reshape(-1, 2)
        every += values.tolist()
        names = [plain(row.get(table.x, i), 30) for i, row in enumerate(shown)]
        texts = [f"{plain(s.name)}, {name}: {format_number(float(v), *map(float, end))}" for name, v, end in zip(names, values, ends, strict=True)]
        figure.add_bar(
            y=names, x=values, orientation="h", name=plain(s.name), marker={"color": s.colour, "line": {"width": 0}}, hovertext=texts,
            hoverinfo="text", error_x=error_bars(Scale(), values, ends[:, 0], ends[:, 1], NEUTRAL, width=3), textposition="none",
        )
    scale = choose_scale(every)
    scale = scale if scale.kind == "log" else Scale()  # a bar has to start somewhere, so only positive values may be spread
    figure.update_xaxes(**scale.axis(named(table.y.replace("_", " "), first.unit), every))
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_layout(showlegend=len(series) > 1)
    return [Drawing(figure, size=height)]


def draw_heat(series: Sequence[Series]) -> list[Drawing]:
    """A table as a map: columns `x` and `y` are its axes, and the first other number is the colour."""
    drawings = []
    for s in series:
        table = s.result
        others = [c for c in table.columns if c not in (table.x, table.y) and any(is_number(row.get(c)) for row in table.rows)]
        value = "value" if "value" in others else others[0]
        xs, ys = (list(dict.fromkeys(row.get(axis) for row in table.rows)) for axis in (table.x, table.y))
        z: Any = np.full((len(ys), len(xs)), np.nan)
        for row in table.rows:
            z[ys.index(row.get(table.y)), xs.index(row.get(table.x))] = row[value] if is_number(row.get(value)) else np.nan
        figure = go.Figure(layout=layout(120 + 30 * len(ys)))
        bar = {"title": {"text": plain(value.replace("_", " "))}, "thickness": 12, "outlinewidth": 0}
        figure.add_heatmap(x=[plain(x, 20) for x in xs], y=[plain(y, 26) for y in ys], z=z, colorscale="Viridis", colorbar=bar, xgap=1, ygap=1)
        figure.update_xaxes(title_text=plain(table.x.replace("_", " ")), showgrid=False)
        figure.update_yaxes(title_text=plain(table.y.replace("_", " ")), autorange="reversed", showgrid=False)
        drawings.append(Drawing(figure, title=plain(s.name) if len(series) > 1 else "", size=120 + 30 * len(ys)))
    return drawings
