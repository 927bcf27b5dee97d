"""No proof refuses what is right, warns of it, or calls it unverified; and none costs much more than before it proved as much."""

import pytest

from .families import rotating
from .prices_before import PRICES
from .sane_models import price, table

SANE = table()
CASES = [(name, kind) for name, sane in SANE.items() for kind in sane.kinds]


@pytest.mark.parametrize(("name", "kind"), rotating(CASES, 12))
def test_sane_models_are_proven_at_no_more_than_their_price(name, kind):
    found = price(SANE[name].objective(), kind)
    calls, work = PRICES[name, kind]
    assert found.words.startswith("proven")
    assert found.calls <= 1.3 * calls and found.work <= 1.3 * work
