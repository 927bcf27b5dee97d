"""What a quantity can be at all, by its kind: a share is in [0, 1], a norm is not negative. No value or interval leaves it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

SIGNED = "drop from|accuracy drop|increase|coefficient|log|trace|quadratic"  # any sign, whatever else they are called
SHARES = "accuracy|share of|share|negative mass|negative eigenvalues|chance|missed|explained variance"
ROUNDING = 1e-9  # by which a sum may leave its range
NOT_NEGATIVE = (
    "norm|length|distance|sigma at drop|radius|rate|ratio|window|frobenius|barrier|minimax|rank|effective dimension|residual"
)


NAMING = ("quantity", "definition", "measure", "bound")  # columns of a table that say what a value is


def names_of(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    """What a cell of a table is called: by its column, and a `value` by the columns that name it."""
    named = (row.get(key) for key in NAMING) if column == "value" else ()
    return (column, *(text for text in named if isinstance(text, str)))


def range_of(*names: str) -> tuple[float, float]:
    """The range of a quantity by what it is called; the real line where no name tells a kind."""
    text = " ".join(names).lower().replace("_", " ")
    for kinds, ends in ((SIGNED, (-math.inf, math.inf)), (SHARES, (0.0, 1.0)), (NOT_NEGATIVE, (0.0, math.inf))):
        if re.search(rf"(?<![a-z])(?:{kinds})(?![a-z])", text):
            return ends
    return -math.inf, math.inf


def corrected(value: float, names: tuple[str, ...], error: float = 0.0) -> float:
    """`value`, or the end of its range that it has passed by no more than rounding and its own error.

    A value farther outside is no such quantity, whatever its name says, and stays.
    """
    low, high = range_of(*names)
    nearest = min(max(value, low), high)
    allowed = max(ROUNDING, error if math.isfinite(error) else 0.0)
    return nearest if abs(value - nearest) <= allowed else value


def bound(end: float, value: float, names: tuple[str, ...]) -> float:
    """An end of the interval around `value`, within the range of the quantity if the value is."""
    low, high = range_of(*names)
    return min(max(end, low), high) if low <= value <= high and not math.isnan(end) else end
