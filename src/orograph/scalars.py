"""Every result read as plain numbers with their intervals, and numbers written with the digits that their interval supports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .ranges import bound, names_of
from .results import Curve, Density, Eigenpairs, Estimate, Point, Result, Spectrum, Status, Surface, Table

MOST_ENTRIES = 100  # a longer tensor is read as its norm, smallest and largest entry
REACH = 1.959963984540054  # half-width of the 95 % interval in standard errors


@dataclass(frozen=True)
class Scalar:
    """One number: `quantity` names it, `lower` and `upper` end its 95 % interval (nan: no interval is known)."""

    quantity: str
    value: float
    lower: float = math.nan
    upper: float = math.nan
    status: Status | None = None  # None: as its record
    unit: str = ""


def scalars(result: Result) -> list[Scalar]:
    """The numbers of one result, in the order in which a reader wants them."""
    return list(_READERS[type(result)](result))


def _of_estimate(estimate: Estimate, quantity: str = "value") -> Iterator[Scalar]:
    value, (lower, upper) = estimate.value, estimate.interval()
    if not isinstance(value, Tensor):
        yield Scalar(quantity, value, float(lower), float(upper), estimate.status, estimate.unit)
    elif value.numel() > MOST_ENTRIES:
        yield from _extent(value, quantity, estimate.unit)
    else:
        ends = [end.flatten().tolist() for end in (value, value.new_zeros(value.shape) + lower, value.new_zeros(value.shape) + upper)]
        for i, (middle, low, high) in enumerate(zip(*ends, strict=True)):
            yield Scalar(f"{quantity}[{i}]", middle, low, high, estimate.status, estimate.unit)


def _extent(values: Tensor, quantity: str, unit: str) -> Iterator[Scalar]:
    yield Scalar(f"{quantity}.norm", float(values.double().norm()), unit=unit)
    yield Scalar(f"{quantity}.min", float(values.min()), unit=unit)
    yield Scalar(f"{quantity}.max", float(values.max()), unit=unit)


def _of_eigenpairs(pairs: Eigenpairs, quantity: str = "eigenvalue") -> Iterator[Scalar]:
    for i, (value, (lower, upper), converged) in enumerate(
        zip(pairs.values.tolist(), pairs.intervals.tolist(), pairs.converged.tolist(), strict=True)
    ):
        yield Scalar(f"{quantity}[{i}]", value, lower, upper, "converged" if converged else pairs.status, pairs.unit)


def _of_density(density: Density) -> Iterator[Scalar]:
    if density.nodes.numel() or density.atoms.numel():
        yield from _of_estimate(density.mass(-math.inf, 0.0), "negative_mass")


def _of_spectrum(spectrum: Spectrum) -> Iterator[Scalar]:
    yield from _of_eigenpairs(spectrum.top, "top.eigenvalue")
    yield from _of_eigenpairs(spectrum.bottom, "bottom.eigenvalue")
    yield from _of_estimate(spectrum.trace, "trace")
    yield from _of_estimate(spectrum.negative_mass, "negative_mass")
    for name, value in spectrum.condition.items():
        yield Scalar(f"condition.{name}", value)


def _of_curve(curve: Curve) -> Iterator[Scalar]:
    errors = [math.nan] * len(curve.y) if curve.error is None else curve.error.tolist()
    for x, y, error in zip(curve.x.tolist(), curve.y.tolist(), errors, strict=True):
        lower, upper = (bound(y + side * REACH * error, y, (curve.ylabel,)) for side in (-1, 1))
        yield Scalar(f"y[x={x:.6g}]", y, lower, upper, unit=curve.unit)


def _of_surface(surface: Surface) -> Iterator[Scalar]:
    if surface.z.numel():
        yield Scalar("min", float(surface.z.min()), unit=surface.unit)
        yield Scalar("max", float(surface.z.max()), unit=surface.unit)


def _of_table(table: Table) -> Iterator[Scalar]:
    for i, row in enumerate(table.rows):
        texts = [value for value in row.values() if isinstance(value, str)]
        name = row.get(table.x) if table.x in row else (texts[0] if texts else i)
        for column, value in row.items():
            if is_number(value) and column not in ("lower", "upper", "error") and not column.endswith("_sem"):
                lower, upper = cell_interval(row, column)
                yield Scalar(f"{name}.{column}", float(value), lower, upper, unit=table.unit)


def _of_point(point: Point) -> Iterator[Scalar]:
    yield Scalar("size", point.theta.numel())
    yield Scalar("norm", float(point.theta.double().norm()))


_READERS: dict[type, Any] = {
    Estimate: _of_estimate, Eigenpairs: _of_eigenpairs, Density: _of_density, Spectrum: _of_spectrum,
    Curve: _of_curve, Surface: _of_surface, Table: _of_table, Point: _of_point,
}


def is_number(value: object) -> bool:
    """Whether a table's cell is a number: a truth value is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell_interval(row: dict[str, Any], column: str) -> tuple[float, float]:
    """95 % interval of a table's cell: from `lower` and `upper`, or the standard errors `error` (of `value`) and `<column>_sem`."""
    if column == "value" and is_number(row.get("lower")) and is_number(row.get("upper")):
        return float(row["lower"]), float(row["upper"])
    error = row.get("error") if column == "value" else row.get(f"{column}_sem")
    if not is_number(error) or error is None:
        return math.nan, math.nan
    names = names_of(row, column)
    value = float(row[column])
    return bound(value - REACH * error, value, names), bound(value + REACH * error, value, names)


def format_number(value: float, lower: float = math.nan, upper: float = math.nan) -> str:
    """`value` with its interval, to two digits of the interval's half-width and six in all: "12.34 [12.11, 12.57]"."""
    half = (upper - lower) / 2
    if not (math.isfinite(value) and math.isfinite(half) and half > 0):
        unbounded = math.isfinite(value) and (math.isinf(lower) or math.isinf(upper))
        return f"{_plain(value)} [{_plain(lower)}, {_plain(upper)}]" if unbounded else _plain(value)
    scale = max(abs(value), abs(lower), abs(upper))
    magnitude = math.floor(math.log10(scale))
    if half < 1e-5 * scale:
        return f"{_plain(value, 6)} ± {half:.1g}"
    decimals = min(1 - math.floor(math.log10(half)), 5 - magnitude)
    if 1e-3 <= scale < 1e6:
        middle, low, high = (f"{number:.{max(decimals, 0)}f}" for number in (value, lower, upper))
    else:
        middle, low, high = (f"{number:.{max(decimals + magnitude, 1)}e}" for number in (value, lower, upper))
    return f"{middle} [{low}, {high}]"


def _plain(value: float, digits: int = 4) -> str:
    if isinstance(value, int) and abs(value) < 10**9:
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if math.isnan(value):
        return "undefined"
    return f"{value:.{digits}g}"


def cell_text(row: dict[str, Any], column: str) -> str:
    """A table's cell as text: numbers with the digits that their interval supports, nothing for what the row lacks."""
    value = row.get(column)
    if value is None or (column != "value" and value != value):  # NaN: a column that this row has no number for
        return ""
    if is_number(value):
        return format_number(value, *cell_interval(row, column))
    return str(value)
