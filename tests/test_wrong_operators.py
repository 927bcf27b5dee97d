"""What is wrong is never certified: right, refused with a clear error, or said to be unproven."""

import pytest

from .families import rotating
from .oracles import relative
from .wrong_operators import CASES, plain_products, verdict


@pytest.mark.parametrize("case", rotating(CASES, 8), ids=str)
def test_a_wrong_operator_is_never_proven(case):
    found = verdict(case)
    assert found.good, (
        f"relative error {found.error:.2g}, certificate {found.certificate!r}, engine {found.how}, said {found.said}"
    )


@pytest.mark.parametrize("case", rotating(CASES, 6), ids=str)
def test_the_truth_is_what_autograd_says_of_the_plain_network(case):
    assert relative(*plain_products(case)) < 1e-8
