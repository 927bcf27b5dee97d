"""Families of cases: `make evidence-6` runs them whole, `make test` runs a sample that changes every day.

`OROGRAPH_FAMILIES=all` runs every case, `OROGRAPH_FAMILIES=739000` repeats the sample of that day.
"""

import datetime
import os
import random
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")
CHOICE = os.environ.get("OROGRAPH_FAMILIES", str(datetime.date.today().toordinal()))


def rotating(cases: Sequence[Case], count: int) -> list[Case]:
    """Today's `count` cases of a family: a window that moves through all of them in a fixed random order."""
    if CHOICE == "all" or count >= len(cases):
        return list(cases)
    order = random.Random(0).sample(range(len(cases)), len(cases))
    start = int(CHOICE) * count
    return [cases[order[(start + i) % len(order)]] for i in range(count)]
