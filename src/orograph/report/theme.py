"""What all figures share: series, colours that read on light and dark ground, layout, and axes for wide ranges."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Middle luminance: contrast of at least 3 with both the light and the dark card.
PALETTE = ("#3b82f6", "#e8762c", "#1f9d6b", "#a463e0", "#e04f74", "#1597a8", "#b08913", "#7b8794")
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")
NEUTRAL = "#7b8794"  # axes of 3-D scenes, where the page's style sheet cannot reach
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
GRID = "rgba(123,135,148,0.22)"


@dataclass(frozen=True, eq=False)
class Series:
    """One result to draw. `at`: value of the numeric tag `axis` that varies between records of the same `group`, or None."""

    name: str
    result: Any
    colour: str = PALETTE[0]
    dash: str = "solid"
    at: float | None = None
    axis: str = ""
    group: str = ""
    marks: Sequence[Mapping[str, Any]] = ()  # rows with columns s and t, shown on a Surface


@dataclass(frozen=True)
class Drawing:
    """One figure with the words beneath it."""

    figure: go.Figure
    caption: str = ""
    title: str = ""
    wide: bool = False
    size: int = field(default=340)  # height in pixels


@dataclass(frozen=True)
class Scale:
    """How an axis spreads its values: "symlog" is linear within `threshold` of zero and logarithmic beyond, on both sides."""

    kind: Literal["linear", "log", "symlog"] = "linear"
    threshold: float = 1.0

    def place(self, values: ArrayLike) -> Floats:
        """Coordinates on the drawn axis."""
        values = np.asarray(values, dtype=np.float64)
        return np.arcsinh(values / self.threshold / 2) / math.log(10) if self.kind == "symlog" else values

    def axis(self, title: str, values: ArrayLike) -> dict[str, Any]:
        """Plotly's settings of an axis that shows `values`."""
        finite = _finite(values)
        if self.kind == "linear":
            return {"title": {"text": title}, "type": "linear"}
        if self.kind == "log":
            return {"title": {"text": title}, "type": "log", **decade_ticks(float(finite.min()), float(finite.max()))}
        ticks = _symlog_ticks(self.threshold, float(finite.min()), float(finite.max()))
        return {"title": {"text": title}, "tickvals": self.place(ticks), "ticktext": [f"{tick:g}".replace("-", "−") for tick in ticks], "tickangle": 0}

    @property
    def note(self) -> str:
        """What the caption should say about the axis."""
        return f"axis linear within ±{self.threshold:g}, logarithmic beyond" if self.kind == "symlog" else ""


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    finite: Floats = array[np.isfinite(array)]
    return finite if finite.size else np.zeros(1)


def decade_ticks(low: float, high: float) -> dict[str, Any]:
    """Powers of ten for a logarithmic axis over more than a decade and a half; Plotly sets its own too large."""
    if not 0 < low < high or math.log10(high / low) < 1.5:
        return {}
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, 1 + int(math.log10(high / low) // 6))
    return {"tickvals": [10.0**k for k in powers], "ticktext": ["10" + str(k).translate(RAISED) for k in powers]}


def _symlog_ticks(threshold: float, low: float, high: float) -> list[float]:
    """Zero and powers of ten; the threshold itself would crowd zero."""
    count = max(1, math.floor(math.log10(max(abs(low), abs(high), threshold) * 1.05 / threshold)))
    decades = [threshold * 10.0**k for k in range(1, count + 1)][:: 1 + count // 5]
    reach_low, reach_high = max(-low, 0.0) * 1.05, max(high, 0.0) * 1.05
    return [-d for d in reversed(decades) if d <= reach_low] + [0.0] + [d for d in decades if d <= reach_high]


def choose_scale(values: ArrayLike, *, signed: bool = True) -> Scale:
    """Linear, unless a few values are so large that the others could not be told apart."""
    finite = _finite(values)
    sizes = np.abs(finite[finite != 0])
    if sizes.size < 2 or sizes.max() < 30 * np.median(sizes):
        return Scale()
    if (finite > 0).all() or not signed:
        return Scale("log")
    return Scale("symlog", 10.0 ** math.floor(math.log10(np.median(sizes))))


def plain(text: object, longest: int = 200) -> str:
    """User's text for a figure: Plotly reads tags, entities and templates, so they are escaped; the middle of a long text is left out."""
    words = str(text)
    if len(words) > longest:
        words = words[: longest // 2] + "…" + words[-(longest // 2) + 1 :]
    return html.escape(words, quote=False).replace("{", "&#123;")


def hover(name: str, template: str) -> str:
    """Plotly's template of the words beside the pointer; `name` is only text, whatever it holds."""
    return f"{plain(name)}<br>{template}<extra></extra>"


def sentence(text: str) -> str:
    """`text` with a capital at its start; a Greek letter stays the symbol that it is."""
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def named(title: str, unit: str) -> str:
    """An axis title with its unit, broken into lines that fit a narrow screen."""
    return "<br>".join(plain(line) for line in textwrap.wrap(f"{title} [{unit}]" if unit and title else title or unit, 28))


def layout(height: int = 340, **settings: Any) -> go.Layout:
    """Transparent ground, quiet grid, legend above; the page's style sheet colours the text."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "ticks": "", "automargin": True, "exponentformat": "e", "title": {"standoff": 10, "font": {"size": 13}}, "ticklabelstandoff": 4}
    base: dict[str, Any] = {
        "template": go.layout.Template(layout={"xaxis": axis, "yaxis": axis, "colorway": PALETTE}),
        "height": height, "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13}, "hoverlabel": {"font": {"size": 13}, "namelength": -1},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"}, "dragmode": False,
        "autosize": True,
    }
    return go.Layout({**base, **settings})


def translucent(colour: str, alpha: float) -> str:
    """A hex colour with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def error_bars(scale: Scale, values: ArrayLike, lower: ArrayLike, upper: ArrayLike, colour: str, width: float = 4) -> dict[str, Any]:
    """Interval bars in the coordinates of `scale`; where an end is unknown there is no bar."""
    middle = scale.place(values)
    with np.errstate(invalid="ignore"):  # an infinite value has no bar
        above, below = scale.place(upper) - middle, middle - scale.place(lower)
    return {
        "type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour, "thickness": 1.6, "width": width,
    }


def spread(count: int) -> list[str]:
    """Colours of an ordered many, from the palette's blue to its orange."""
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTE[:2]]
    shares = [k / max(count - 1, 1) for k in range(count)]
    return ["#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True)) for share in shares]
