"""What a quantity can be at all, by its kind: a share is in [0, 1], a norm is not negative. No value or interval leaves it."""

from __future__ import annotations

import math
import re

SIGNED = "drop from|accuracy drop|increase|coefficient|log|trace|quadratic"  # any sign, whatever else they are called
SHARES = "accuracy|share of|share|negative mass|negative eigenvalues|chance|missed|explained variance"
NOT_NEGATIVE = (
    "norm|length|distance|sigma at drop|radius|rate|ratio|window|frobenius|barrier|minimax|rank|effective dimension|residual"
)


def range_of(*names: str) -> tuple[float, float]:
    """The range of a quantity by what it is called; the real line where no name tells a kind."""
    text = " ".join(names).lower().replace("_", " ")
    for kinds, ends in ((SIGNED, (-math.inf, math.inf)), (SHARES, (0.0, 1.0)), (NOT_NEGATIVE, (0.0, math.inf))):
        if re.search(rf"(?<![a-z])(?:{kinds})(?![a-z])", text):
            return ends
    return -math.inf, math.inf


def within(value: float, names: tuple[str, ...]) -> float:
    """`value`, or the end of its range that it has passed; nan stays."""
    low, high = range_of(*names)
    return value if math.isnan(value) else min(max(value, low), high)
