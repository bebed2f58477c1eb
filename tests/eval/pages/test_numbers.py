"""Intervals are shown with digits that tell their ends apart."""

import pytest

from sparsary.eval.pages.numbers import show_interval


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.99938, 0.99951, "0.9994\u20130.9995"),
        (0.742, 0.834, "0.742\u20130.834"),
        (0.98, 1.06, "0.98\u20131.06"),
        (12.3456, 12.3461, "12.3456\u201312.3461"),
        (0.8, 0.8, "0.8\u20130.8"),
        (0, 0.03, "0\u20130.03"),
        (-0.0174, 0.0769, "\u22120.0174 to 0.0769"),
        (0.01088, 0.01304, "0.0109\u20130.0130"),
        (0.000774, 0.092531, "0.0008\u20130.0925"),
        (0.09968, 0.13079, "0.0997\u20130.1308"),
        (1234.5, 1234.9, "1,234.5\u20131,234.9"),
    ],
)
def test_ends_of_an_interval_differ_as_they_do(low, high, text):
    assert show_interval(low, high) == text


def test_an_interval_s_width_is_kept():
    for width in (1e-2, 3e-4, 7e-6):
        low, high = (float(end) for end in show_interval(0.5, 0.5 + width).split("\u2013"))
        assert high - low == pytest.approx(width, rel=0.25)
