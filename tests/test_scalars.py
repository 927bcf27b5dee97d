"""Results read as plain numbers, and numbers written with the digits that their interval supports."""

import math

import pytest
import torch

from orograph.results import Curve, Estimate, Table
from orograph.scalars import format_number, scalars


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((12.3456, 12.1, 12.6), "12.35 [12.10, 12.60]"), ((0.0123, 0.0113, 0.0133), "0.0123 [0.0113, 0.0133]"),
        ((12345.0, 11845.0, 12845.0), "12345 [11845, 12845]"), ((2.5e7, 2.4e7, 2.6e7), "2.50e+07 [2.40e+07, 2.60e+07]"),
        ((-3e-6, -5e-6, -1e-6), "-3.0e-06 [-5.0e-06, -1.0e-06]"), ((1.0, 1.0 - 1e-9, 1.0 + 1e-9), "1 ± 1e-09"),
        ((3.14159,), "3.142"), ((2.0, 2.0, 2.0), "2"), ((math.nan,), "undefined"), ((math.inf,), "inf"), ((0.0,), "0"), ((123456,), "123,456"),
        ((1.0, -math.inf, math.inf), "1 [-inf, inf]"), ((math.inf, math.inf, math.inf), "inf"), ((0.0, -1.0, 1.0), "0.0 [-1.0, 1.0]"),
    ],
)
def test_numbers_show_the_digits_that_their_interval_supports(numbers, text):
    assert format_number(*numbers) == text


def test_interval_of_a_cell_comes_from_its_row():
    rows = [{"name": "a", "value": 2.0, "lower": 1.0, "upper": 4.0}, {"name": "b", "value": 2.0, "error": 1.0, "found": True}, {"size": 3}]
    found = [(n.quantity, n.value, n.lower, n.upper) for n in scalars(Table(rows=rows))]
    assert found[0] == ("a.value", 2.0, 1.0, 4.0) and found[1][2:] == pytest.approx((0.04, 3.96), abs=1e-3)
    assert found[2][:2] == ("2.size", 3.0) and math.isnan(found[2][2]) and len(found) == 3


def test_long_tensors_are_read_as_their_extent():
    long = scalars(Estimate(value=torch.arange(200.0), sem=torch.ones(200)))
    assert [(n.quantity, n.value) for n in long[1:]] == [("value.min", 0.0), ("value.max", 199.0)] and long[0].quantity == "value.norm"
    short = scalars(Estimate(value=torch.arange(3.0), sem=0.5))
    assert [n.quantity for n in short] == ["value[0]", "value[1]", "value[2]"] and short[1].upper == pytest.approx(1.98, abs=1e-3)


def test_curve_without_errors_has_no_intervals():
    (number,) = scalars(Curve(x=torch.tensor([0.5]), y=torch.tensor([2.0])))
    assert number.quantity == "y[x=0.5]" and math.isnan(number.lower)
