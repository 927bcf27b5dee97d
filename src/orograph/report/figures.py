"""One draw function for each kind of result; each takes one or many series and returns the figures that show them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from ..results import Curve, Density, Eigenpairs, Estimate, Spectrum
from ..scalars import REACH, format_number
from .theme import (
    PALETTE,
    Drawing,
    Floats,
    Scale,
    Series,
    choose_scale,
    decade_ticks,
    error_bars,
    hover,
    layout,
    named,
    plain,
    translucent,
)

MOST_ENTRIES = 200  # a longer tensor is drawn as its sorted entries


def array(tensor: Tensor | float) -> Floats:
    """A tensor's numbers for drawing."""
    return np.asarray(torch.as_tensor(tensor).detach().cpu().double())


def draw_estimates(series: Sequence[Series]) -> list[Drawing]:
    """A dot with its 95 % interval for each; over the tag's values where three or more records differ in one; tensors by entry."""
    tensors = [s for s in series if isinstance(s.result.value, Tensor)]
    numbers = [s for s in series if s not in tensors]
    drawings = [_estimate_entries(tensors)] if tensors else []
    if len({s.at for s in numbers if s.at is not None}) >= 3:
        drawings.append(_estimates_over_tag([s for s in numbers if s.at is not None]))
    elif numbers:
        drawings.append(_estimates_side_by_side(numbers))
    return drawings


def _ends(estimates: Sequence[Estimate]) -> tuple[Floats, Floats, Floats]:
    values = np.array([e.value for e in estimates], dtype=np.float64)
    lower, upper = (np.array([e.interval()[end] for e in estimates], dtype=np.float64) for end in (0, 1))
    return values, lower, upper


def _estimates_side_by_side(series: Sequence[Series]) -> Drawing:
    values, lower, upper = _ends([s.result for s in series])
    scale = choose_scale(values)
    figure = go.Figure(layout=layout(86 + 30 * len(series), showlegend=False))
    for i, s in enumerate(series):
        cut = slice(i, i + 1)
        figure.add_scatter(
            x=scale.place(values[cut]), y=[plain(s.name, 26)], mode="markers", marker={"size": 11, "color": s.colour}, name=plain(s.name),
            error_x=error_bars(scale, values[cut], lower[cut], upper[cut], s.colour, width=6),
            hovertext=[f"{plain(s.name)}: {format_number(float(values[i]), float(lower[i]), float(upper[i]))}"], hoverinfo="text",
        )
    figure.update_xaxes(**scale.axis(named(series[0].result.label, series[0].result.unit), [*values, *lower, *upper]))
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return Drawing(figure, "Bars: 95 % intervals." if (upper > lower).any() else "", size=86 + 30 * len(series))


def _estimates_over_tag(series: Sequence[Series]) -> Drawing:
    figure = go.Figure(layout=layout(300))
    every, _, _ = _ends([s.result for s in series])
    scale = choose_scale(every)
    for group in dict.fromkeys(s.group for s in series):
        members = sorted((s for s in series if s.group == group), key=lambda s: s.at or 0.0)
        values, lower, upper = _ends([s.result for s in members])
        figure.add_scatter(
            x=[s.at for s in members], y=scale.place(values), mode="lines+markers", name=plain(group), line={"color": members[0].colour},
            error_y=error_bars(scale, values, lower, upper, members[0].colour),
            hovertext=[f"{plain(s.name)}: {format_number(*map(float, ends))}" for s, *ends in zip(members, values, lower, upper, strict=True)],
            hoverinfo="text",
        )
    figure.update_xaxes(title_text=plain(series[0].axis))
    figure.update_yaxes(**scale.axis(named(series[0].result.label, series[0].result.unit), every))
    return Drawing(figure, "Bars: 95 % intervals.", size=300)


def _estimate_entries(series: Sequence[Series]) -> Drawing:
    figure, every = go.Figure(layout=layout(300)), np.concatenate([array(s.result.value).ravel() for s in series])
    scale, sort = choose_scale(every), any(s.result.value.numel() > MOST_ENTRIES for s in series)
    for s in series:
        value, lower, upper = (array(part).ravel() for part in (s.result.value, *s.result.interval()))
        if sort:
            value = np.sort(value)[::-1]
            kept = np.unique(np.linspace(0, len(value) - 1, 1000).astype(int))
            figure.add_scatter(x=kept / len(value), y=scale.place(value[kept]), mode="lines", name=plain(s.name), line={"color": s.colour})
        else:
            bars = error_bars(scale, value, lower, upper, s.colour)
            index = np.arange(len(value))
            figure.add_scatter(x=index, y=scale.place(value), mode="markers", name=plain(s.name), marker={"color": s.colour}, error_y=bars)
    figure.update_xaxes(title_text="share of entries, largest first" if sort else "entry")
    figure.update_yaxes(**scale.axis(named(series[0].result.label or "value", series[0].result.unit), every))
    return Drawing(figure, "" if sort else "Bars: 95 % intervals.", size=300)


def draw_eigenpairs(series: Sequence[Series]) -> list[Drawing]:
    """Eigenvalues in the order in which they were asked for, with their intervals."""
    parts = [(s, s.result, [str(i + 1) for i in range(len(s.result.values))]) for s in series]
    return [_eigenvalues(parts, named(series[0].result.label, series[0].result.unit))]


def _eigenvalues(parts: Sequence[tuple[Series, Eigenpairs, list[str]]], title: str) -> Drawing:
    if len({s.at for s, _, _ in parts if s.at is not None}) >= 3:
        return _eigenvalues_over_tag([part for part in parts if part[0].at is not None], title)
    every = np.concatenate([array(pairs.intervals).ravel() for _, pairs, _ in parts] + [array(pairs.values) for _, pairs, _ in parts])
    scale = choose_scale(np.concatenate([array(pairs.values) for _, pairs, _ in parts]))
    figure, shown = go.Figure(layout=layout()), set[str]()
    for s, pairs, ranks in parts:
        values, residuals, intervals = array(pairs.values), array(pairs.residuals), array(pairs.intervals).reshape(-1, 2)
        texts = [
            f"{plain(s.name)}, rank {rank}: {format_number(float(v), float(low), float(high))}<br>residual {r:.2g}"
            f"{'' if done else ', ' + pairs.status}"
            for rank, v, (low, high), r, done in zip(ranks, values, intervals, residuals, pairs.converged.tolist(), strict=True)
        ]
        symbols = ["circle" if done else "circle-open" for done in pairs.converged.tolist()]
        figure.add_scatter(
            x=ranks, y=scale.place(values), mode="markers", name=plain(s.name), legendgroup=s.name, showlegend=s.name not in shown,
            marker={"color": s.colour, "size": 7, "symbol": symbols, "line": {"width": 2, "color": s.colour}},
            error_y=error_bars(scale, values, intervals[:, 0], intervals[:, 1], s.colour), hovertext=texts, hoverinfo="text",
        )
        shown.add(s.name)
    figure.update_xaxes(title_text="rank", type="category", categoryorder="array", showgrid=False, tickangle=0, nticks=13)
    figure.update_xaxes(categoryarray=list(dict.fromkeys(rank for _, _, ranks in parts for rank in ranks)))
    figure.update_yaxes(**scale.axis(title, every))
    figure.update_layout(showlegend=len(shown) > 1)
    notes = ["Each bar contains an eigenvalue (true residual)."]
    notes += ["Open circles: not converged."] if not all(bool(pairs.converged.all()) for _, pairs, _ in parts) else []
    notes += [f"Vertical {scale.note}."] if scale.note else []
    return Drawing(figure, " ".join(notes), title="Extreme eigenvalues")


def _eigenvalues_over_tag(parts: Sequence[tuple[Series, Eigenpairs, list[str]]], title: str) -> Drawing:
    """A line for each rank, the first five and the last."""
    figure, parts = go.Figure(layout=layout()), sorted(parts, key=lambda part: part[0].at or 0.0)
    ranks = list(dict.fromkeys(rank for _, _, names in parts for rank in names))
    scale = choose_scale(np.concatenate([array(pairs.values) for _, pairs, _ in parts]))
    for rank in ranks if len(ranks) <= 6 else [*ranks[:5], ranks[-1]]:
        for group in dict.fromkeys(s.group for s, _, _ in parts):
            members = [(s.at, pairs, names.index(rank)) for s, pairs, names in parts if s.group == group and rank in names]
            values = np.array([float(pairs.values[i]) for _, pairs, i in members])
            ends = np.array([pairs.intervals[i].tolist() for _, pairs, i in members]).reshape(-1, 2)
            colour = PALETTE[min(ranks.index(rank), len(PALETTE) - 1)]
            figure.add_scatter(
                x=[at for at, _, _ in members], y=scale.place(values), mode="lines+markers", name=plain(f"{group}, rank {rank}"),
                line={"color": colour}, error_y=error_bars(scale, values, ends[:, 0], ends[:, 1], colour), customdata=values,
                hovertemplate=hover(f"{group}, rank {rank}", "%{customdata:.5g}"),
            )
    figure.update_xaxes(title_text=plain(parts[0][0].axis))
    figure.update_yaxes(**scale.axis(title, np.concatenate([array(pairs.values) for _, pairs, _ in parts])))
    return Drawing(figure, "Each bar contains an eigenvalue (true residual).", title="Extreme eigenvalues")


def draw_densities(series: Sequence[Series]) -> list[Drawing]:
    """Smoothed density on a logarithmic axis; verified eigenvalues as spikes as high as their kernel would be."""
    scale = _density_scale([s.result for s in series])
    figure, peaks, floors, every = go.Figure(layout=layout()), [1e-300], [math.inf], []
    for s in series:
        density: Density = s.result
        x = _density_grid(density, scale)
        y = array(replace(density, atoms=density.atoms[:0]).pdf(torch.from_numpy(x)))
        single = 1 / (density.size * density.width * math.sqrt(2 * math.pi))  # height of one eigenvalue under the kernel
        atoms = array(density.atoms)
        figure.add_scatter(
            x=scale.place(x), y=np.where(y > 0, y, np.nan), mode="lines", name=plain(s.name), legendgroup=s.name, customdata=x,
            line={"color": s.colour, "width": 2}, fill="tozeroy" if len(series) <= 2 else None, fillcolor=translucent(s.colour, 0.12),
            hovertemplate=hover(s.name, "eigenvalue %{customdata:.4g}<br>density %{y:.3g}"),
        )
        figure.add_scatter(
            x=scale.place(np.repeat(atoms, 3)), y=np.tile([single / 1e3, single, np.nan], len(atoms)), mode="lines", legendgroup=s.name,
            line={"color": s.colour, "width": 1.5}, showlegend=False, hoverinfo="skip",
        )
        figure.add_scatter(
            x=scale.place(atoms), y=np.full(len(atoms), single), mode="markers", marker={"color": s.colour, "size": 7, "symbol": "diamond"},
            legendgroup=s.name, showlegend=False, customdata=atoms, name=plain(s.name),
            hovertemplate=hover(s.name, "verified eigenvalue %{customdata:.4g}"),
        )
        peaks.append(float(np.nanmax(y, initial=single)))
        floors.append(single)
        every += [x.min(), x.max()]
    figure.update_xaxes(**scale.axis(named(series[0].result.xlabel, series[0].result.unit), every))
    low, high = math.log10(min(floors)) - 1.2, math.log10(max(peaks)) + 0.4
    figure.update_yaxes(type="log", title_text=plain(series[0].result.ylabel), range=[low, high], **decade_ticks(10**low, 10**high))
    figure.update_layout(showlegend=len(series) > 1)
    widths = ", ".join(dict.fromkeys(f"{s.result.width:.2g}" for s in series))
    atoms_note = " Diamonds: eigenvalues verified one by one." if any(len(s.result.atoms) for s in series) else ""
    caption = f"Gaussian kernel of standard deviation {widths}.{atoms_note}" + (f" Horizontal {scale.note}." if scale.note else "")
    return [Drawing(figure, caption, title="Spectral density")]


def _density_scale(densities: Sequence[Density]) -> Scale:
    """Linear, unless the spectrum reaches 20 times beyond nine tenths of its mass."""
    sizes = np.abs(np.concatenate([array(d.nodes).ravel() for d in densities]))
    weights = np.concatenate([array(d.weights).ravel() for d in densities])
    reach = max([*sizes, *(abs(a) for d in densities for a in array(d.atoms))], default=0.0)
    order = np.argsort(sizes)
    total = np.cumsum(weights[order])
    bulk = float(sizes[order][min(np.searchsorted(total, 0.9 * total[-1]), len(total) - 1)]) if len(total) else 0.0
    threshold = max(bulk, min(d.width for d in densities), 1e-300)
    return Scale() if reach <= 20 * threshold else Scale("symlog", 10.0 ** math.floor(math.log10(threshold)))


def _density_grid(density: Density, scale: Scale) -> Floats:
    """Even on the drawn axis, and dense around each node, which a narrow kernel makes a spike."""
    nodes = array(torch.cat([density.nodes.double().flatten(), density.atoms.double()]))
    low, high = nodes.min() - 4 * density.width, nodes.max() + 4 * density.width
    start, stop = scale.place([low, high]).tolist()
    even = np.linspace(start, stop, 600)
    spread = np.sinh(even * math.log(10)) * 2 * scale.threshold if scale.kind == "symlog" else even
    near = (np.unique(array(density.nodes).ravel())[:400, None] + density.width * np.linspace(-4, 4, 9)).ravel()
    return np.unique(np.concatenate([spread, near]))


def draw_spectra(series: Sequence[Series]) -> list[Drawing]:
    """Both ends of each spectrum in one figure, and the densities in another."""
    parts: list[tuple[Series, Eigenpairs, list[str]]] = []
    for s in series:
        spectrum: Spectrum = s.result
        parts.append((s, spectrum.top, [str(i + 1) for i in range(len(spectrum.top.values))]))
    for s in series:
        order = torch.argsort(s.result.bottom.values, descending=True)
        bottom = replace(s.result.bottom, **{f: getattr(s.result.bottom, f)[order] for f in ("values", "residuals", "converged", "intervals")})
        count = len(order)
        parts.append((s, bottom, [f"n−{count - 1 - i}" if i < count - 1 else "n" for i in range(count)]))
    densities = [replace(s, result=s.result.density) for s in series if s.result.density.nodes.numel()]
    return [_eigenvalues(parts, named("eigenvalue", series[0].result.unit)), *(draw_densities(densities) if densities else [])]


def draw_curves(series: Sequence[Series]) -> list[Drawing]:
    """Lines, each with the band of its 95 % intervals."""
    figure, banded = go.Figure(layout=layout()), False
    xs, ys = (np.concatenate([array(getattr(s.result, axis)).ravel() for s in series]) for axis in ("x", "y"))
    x_scale = Scale("log") if (xs > 0).all() and xs.size and xs.max() > 50 * xs.min() else Scale()
    y_scale = choose_scale(ys) if (ys[np.isfinite(ys)] > 0).all() else Scale()
    for s in series:
        curve: Curve = s.result
        x, y = array(curve.x), array(curve.y)
        if curve.error is not None and bool((curve.error > 0).any()):
            banded, reach = True, REACH * array(curve.error)
            for end, fill in ((y - reach, None), (y + reach, "tonexty")):
                figure.add_scatter(
                    x=x, y=end, mode="lines", line={"width": 0}, fill=fill, fillcolor=translucent(s.colour, 0.16), legendgroup=s.name,
                    showlegend=False, hoverinfo="skip",
                )
        figure.add_scatter(
            x=x, y=y, mode="lines+markers" if len(x) <= 40 else "lines", name=plain(s.name), legendgroup=s.name,
            line={"color": s.colour, "dash": s.dash, "width": 2}, marker={"size": 5, "color": s.colour},
            hovertemplate=hover(s.name, "(%{x:.4g}, %{y:.4g})"),
        )
    first: Curve = series[0].result
    figure.update_xaxes(**x_scale.axis(plain(first.xlabel), xs))
    figure.update_yaxes(**y_scale.axis(named(first.ylabel or first.label, first.unit), ys))
    figure.update_layout(showlegend=len(series) > 1)
    return [Drawing(figure, "Bands: 95 % intervals." if banded else "")]
