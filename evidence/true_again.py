"""Claims about safety, proofs, verdicts, stored work and errors: `make evidence-6`.

Each part walks a whole family of cases. `python -m evidence.true_again jobs bad_calls` runs these
parts alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from . import (
    bad_calls,
    equal_eigenvalues,
    indivisible,
    jobs,
    planted_permutations,
    proofs,
    surface_costs,
    unharmed,
    verdicts,
)
from .tables import Row, show

PARTS: dict[str, list[Callable[[], list[Row]]]] = {
    "unharmed": unharmed.SECTIONS,
    "proofs": proofs.SECTIONS,
    "indivisible": indivisible.SECTIONS,
    "planted_permutations": planted_permutations.SECTIONS,
    "verdicts": verdicts.SECTIONS,
    "jobs": jobs.SECTIONS,
    "bad_calls": bad_calls.SECTIONS,
    "surface_costs": surface_costs.SECTIONS,
    "equal_eigenvalues": equal_eigenvalues.SECTIONS,
}


def main() -> None:
    """Measure every row of the parts asked for (default: all) and print the table."""
    asked = sys.argv[1:] or list(PARTS)
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        sys.exit(f"unknown part {', '.join(unknown)}. Choose from {', '.join(PARTS)}.")
    show("Evidence 6: true again", [section for name in asked for section in PARTS[name]])


if __name__ == "__main__":
    main()
