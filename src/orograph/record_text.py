"""The text that `print(record)` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import Curve, Result, Table
from .scalars import cell_text, format_number, scalars

MOST_LINES = 20  # of one result when printed


def record_text(record: Any) -> str:
    """The text that `print(record)` shows; `record` is a `Record`, which stands above this file."""
    title = f"{record.probe} of {record.label}" if record.label else record.probe
    lines = [f"{title}  ({record.status})"]
    lines += [f"  {record.says}"] if record.says else []
    for name, result in record.results.items():
        lines += ["", *_result_lines(name, result)]
    lines += [f"  {name} is missing: {why}" for name, why in record.missing.items()]
    reused = f" and {record.reused:,} reused" if record.reused else ""
    lines += ["", f"  {record.products:,} products{reused}, {record.seconds:.3g} s"]
    return "\n".join(lines)


def _result_lines(name: str, result: Result) -> list[str]:
    unit = f" ({result.unit})" if result.unit else ""
    if isinstance(result, Curve) and len(result.x):
        return [f"  {name}{unit}: {_curve_text(result)}"]
    if isinstance(result, Table):
        columns = [c for c in result.columns if not _in_a_bracket(c, result.columns)]
        header, body = columns, [[cell_text(row, column) for column in columns] for row in result.rows]
    else:
        numbers = scalars(result)
        header = []
        body = [[number.quantity, format_number(number.value, number.lower, number.upper), _unlike(number.status)] for number in numbers]
    if len(body) == 1 and not header:
        return ["  " + "  ".join([name, *body[0][1:]]).rstrip() + unit]
    hidden = [f"    ... {len(body) - MOST_LINES} more"] if len(body) > MOST_LINES else []
    shown = ([header] if header else []) + body[:MOST_LINES]
    return [f"  {name}{unit}", *(f"    {line}" for line in _aligned(shown)), *hidden]


def _curve_text(curve: Curve) -> str:
    """A curve in one line: its ends, its extremes, and over how many points."""
    x, y = curve.x.tolist(), curve.y.tolist()
    low, high = min(range(len(y)), key=y.__getitem__), max(range(len(y)), key=y.__getitem__)
    axis = (curve.xlabel or "x").split(":")[0].split(",")[0]
    return f"{y[0]:.4g} at {axis} = {x[0]:.3g}, {y[-1]:.4g} at {x[-1]:.3g}; least {y[low]:.4g} at {x[low]:.3g}, most {y[high]:.4g} at {x[high]:.3g} ({len(y)} points)"


def _in_a_bracket(column: str, columns: Sequence[str]) -> bool:
    """Whether a column is an error that the bracket behind a value shows already."""
    return (column in ("error", "lower", "upper") and "value" in columns) or (column.endswith("_sem") and column.removesuffix("_sem") in columns)


def _unlike(status: str | None) -> str:
    return "" if status in (None, "converged") else f"({status})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
