"""Numbers on the page: digits as far as they are known, powers of ten where needed, and no `nan`."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_reader import numbers_in, shows

from tiltmeter.report.numbers import interval_text, lone_text, number, numbers, setting_text, share_of, text_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.2, "4.20"),
        (-0.6543, "−0.654"),
        (0.0, "0"),
        (-0.0, "0"),
        (40.0, "40"),
        (12345.6, "12,346"),
        (134515008.0, "134,515,008"),
        (1e-9, "1.00×10⁻⁹"),
        (-2.345e12, "−2,345,000,000,000"),
        (-2.345e22, "−2.35×10²²"),
        (0.00999999, "0.0100"),
    ],
)
def test_text_of(value, text):
    assert text_of(value) == text


def test_settings_keep_what_was_chosen():
    held = [setting_text(value) for value in (3e-4, 1e-8, 2.5e-5, 0.999, 16, 100000)]
    assert held == ["0.0003", "10⁻⁸", "2.5×10⁻⁵", "0.999", "16", "100,000"]
    assert lone_text(0.001) == "0.001"
    assert lone_text(4.2e-9) == "4.2×10⁻⁹"


@pytest.mark.parametrize(
    ("trio", "text"),
    [
        ((4.2, 4.05, 4.38), "4.20 (4.05 to 4.38)"),
        ((-1.7, -2.1, -1.2), "−1.70 (−2.10 to −1.20)"),
        ((31.0, 25.0, 39.0), "31 (25 to 39)"),
        ((1.3e-9, 1.2e-9, 1.45e-9), "1.30 (1.20 to 1.45) ×10⁻⁹"),
        ((0.0, 0.0, 0.0), "0 (0 to 0)"),
        ((2.0e-9, 0.0, 0.5), "2.0×10⁻⁹ (0 to 0.50)"),
        ((1e-9, 1e-15, 1e-7), "1.00×10⁻⁹ (1.00×10⁻¹⁵ to 1.00×10⁻⁷)"),
        ((0.0, 0.0, 5e-324), "0 (0 to 4.94×10⁻³²⁴)"),
        ((4.2, None, 4.38), "4.2"),
        ((1.5, 1.5, 1.5), "1.5 (1.5 to 1.5)"),
    ],
)
def test_interval_text(trio, text):
    assert interval_text(*trio) == text


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_any_number_reads_back_to_its_digits(value):
    assert shows(text_of(value), value)
    assert math.isclose(numbers_in(setting_text(value))[0][0], value, rel_tol=1e-5, abs_tol=0.0)


@given(*(st.floats(low, 1e9, allow_subnormal=False) for low in (-1e9, 0, 0)))
def test_any_interval_reads_back_in_order(value, below, above):
    text = interval_text(value, value - below, value + above)
    held = [found for found, _ in numbers_in(text)]
    assert len(held) == 3
    assert shows(text, value)
    assert held[1] <= held[0] <= held[2]


def test_what_is_no_number_is_none():
    assert number(True) is None
    assert numbers([1, None, float("nan"), float("inf"), "3"]) == [1.0, None, None, None, None]
    assert numbers("12") == []
    assert share_of([1.0, None, -3.0]) == [0.25, None, 0.75]
    assert share_of([0.0, 0.0]) == [None, None]
