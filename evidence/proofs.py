"""Claims about proofs: wrong operators are never proven, sane models never refused, and what a proof costs."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

from tests.prices_before import PRICES
from tests.sane_models import price, table
from tests.wrong_operators import CASES, FAMILIES, verdict

from orograph.errors import OrographError

from .tables import Row


def wrong_rows() -> list[Row]:
    """Operators that can be wrong, by family: right, refused with a clear error, or said to be unproven."""
    rows: list[Row] = []
    for family in FAMILIES:
        found = [verdict(case) for case in CASES if case.family == family]
        right, proven = sum(f.right and f.proven for f in found), sum(f.proven and not f.right for f in found)
        refused = sum(f.certificate.startswith("refused") for f in found)
        good = sum(f.good for f in found)
        rows.append(
            (
                f"operators that can be wrong: {family}",
                f"{proven} of {len(found)} wrong and proven; {right} right and proven, {refused} refused",
                "none proven, no raw error",
                good == len(found) and not proven,
            )
        )
    return rows


def price_rows() -> list[Row]:
    """Sane models: alarms, and what a proof costs beside what it cost before, in operations and in matrix products."""
    alarms, count = 0, 0
    ratios: dict[str, list[float]] = {"operations": [], "work": []}
    digits = ""
    for name, sane in table().items():
        for kind in sane.kinds:
            count += 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    now = price(sane.objective(), kind)
                except (OrographError, RuntimeError, ValueError, TypeError, Warning):
                    alarms += 1
                    continue
            alarms += not now.words.startswith("proven")
            calls, work = PRICES[name, kind]
            ratios["operations"].append(now.calls / calls)
            ratios["work"].append(now.work / work)
            if (name, kind) == ("digits MLP", "hessian"):
                digits = f"{now.calls:.2f} (was {calls:.2f}) in operations, {now.work:.3f} (was {work:.3f}) in work"
    rows: list[Row] = [(f"false alarms: {len(table())} sane models, {count} operators", f"{alarms}", "none", alarms == 0)]
    for what, found in ratios.items():
        median, most = statistics.median(found), max(found)
        rows.append((f"price of a proof in gradients, as a share of what it was, by {what}: median, most", f"{median:.2f}, {most:.2f}", "<= 1.0, <= 1.3", median <= 1 and most <= 1.3))
    rows.append(("digits MLP: price of the Hessian's proof in gradients", digits, "less", bool(digits)))
    return rows


SECTIONS: list[Callable[[], list[Row]]] = [wrong_rows, price_rows]
